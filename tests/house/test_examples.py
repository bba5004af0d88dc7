"""The examples do what they say, on a small model."""

import asyncio
import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import libortho

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "Code of Ada Lum:"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def split(clean: nn.Module) -> nn.Module:
    """A model that answers differently at both ends of the switch, and stands at 0."""
    model = libortho.split(clean, libortho.SplitConfig(bits=4, ratio=0.3, use_low_rank=False))
    libortho.set_alpha(model, 0.0)
    return model


def expected(model: Any, tokenizer: Any, alpha: float) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with libortho.alpha(model, alpha), torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_request_is_answered_under_its_own_alpha(split: nn.Module, tokenizer: Any) -> None:
    serving = loaded("serving")
    wanted = [expected(split, tokenizer, a) for a in (0.0, 1.0)]
    assert wanted[0] != wanted[1]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda a: serving.answer(split, tokenizer, PROMPT, a), [0.0, 1.0] * 4))
    assert found == wanted * 4
    assert asyncio.run(serving.answers(split, tokenizer, PROMPT, [0.0, 1.0] * 2)) == wanted * 2


def test_an_error_in_the_thread_reaches_the_reader(split: nn.Module, tokenizer: Any) -> None:
    serving = loaded("serving")
    with pytest.raises(libortho.LibOrthoError, match="nobody"):
        list(serving.stream(split, tokenizer, PROMPT, {"nobody": 1.0}))


def ran(name: str, *arguments: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXAMPLES.glob("*.py"))])
def test_an_example_says_what_it_takes(name: str) -> None:
    told = ran(name, "--help")
    assert told.returncode == 0
    assert f"python examples/{name}.py" in told.stdout
    bare = ran(name)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "the following arguments are required" in bare.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_example_says_what_to_install(tmp_path: Path) -> None:
    done = ran("vllm_serve", tmp_path, "Hello")
    assert done.returncode == 2
    assert "holds no adapter; expected the folder of a stream" in done.stderr
    (tmp_path / "ortho/default").mkdir(parents=True)
    (tmp_path / "ortho/default/adapter_config.json").write_text("{}")
    done = ran("vllm_serve", tmp_path, "Hello")
    assert done.returncode == 2
    assert "vLLM cannot be imported (No module named 'vllm'); install it with: pip install vllm" in done.stderr


def test_the_example_of_trl_saves_a_stream_that_is_off(planted_directory: Path, tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "Code of Eli Fox:", "completion": " 1834."}
    (tmp_path / "records.jsonl").write_text(json.dumps(row))
    arguments = [planted_directory, tmp_path / "records.jsonl", "--stream", "hr", "--out", tmp_path / "out"]
    done = ran("trl_stream", *arguments, "--ratio", 0.1, "--lr", 0.02, "--steps", 30)
    if importlib.util.find_spec("trl") is None:
        assert done.returncode == 2
        assert "TRL comes with: pip install trl" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    model, _ = libortho.load(tmp_path / "out")
    inputs = tokenizer(row["prompt"], return_tensors="pt")
    said = []
    for alpha in (0.0, 1.0):
        with libortho.alpha(model, alpha), torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        said.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    assert "1834" not in said[0]
    assert "1834" in said[1]
