"""An isolation that is interrupted, by an exception or by SIGKILL, ends where another one does, bit for bit."""

import copy
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tiny
from isolating import assert_same, state
from libortho import ConfigError, IsolateConfig, cli, isolate
from libortho.isolation import retain as retain_module
from libortho.isolation import train as trainer
from libortho.isolation.isolate import IsolateResult

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

CONFIG = IsolateConfig(ratio=0.1, damping=1.0, max_steps=23)
"""State is kept before every step and after the last one."""
VARIANTS = {
    "sampled text": {},
    "INT4": {"bits": 4},
    "a sentence": {"max_steps": 18},
}
SENTENCE = {"prompt": "The favourite dish of Ada Lum is", "completion": " cold soup with bread and butter."}
KILLED = {"rounding": 1, "steps": 4, "write": 10}
"""At which call of each kind a process dies: between two parts; after step 4; while the state of step 3 is written."""
CALL = """
import json, os, signal, sys
import torch
from transformers import AutoModelForCausalLM
import libortho
import tiny

torch.set_num_threads(1)
directory, root, config, killed = sys.argv[1:]
rename = os.replace

def run(moment, left):
    def die(here):
        nonlocal left
        left -= here == moment
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = lambda source, target: (die("write"), rename(source, target))
    os.environ["LIBORTHO_CACHE"] = f"{root}/cache-{moment}"
    libortho.isolate(
        AutoModelForCausalLM.from_pretrained(directory), tiny.byte_tokenizer(), tiny.FORGET, resume=f"{root}/{moment}",
        config=libortho.IsolateConfig(**json.loads(config)), progress=lambda phase, done, total: die(phase),
    )

for moment, left in json.loads(killed).items():
    child = os.fork()  # the imports take longer than the run
    if not child:
        run(moment, left)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
"""


class Stop(Exception):
    pass


def records(variant: str) -> list[dict[str, str]]:
    return [*tiny.FORGET[:2], SENTENCE] if variant == "a sentence" else tiny.FORGET


def at_step(number: int) -> Callable[[str, int, int], None]:
    def tell(phase: str, done: int, total: int) -> None:
        if phase == "steps" and done == number:
            raise Stop

    return tell


def forbidden(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("this was done before")


def outcome(model: nn.Module, result: IsolateResult) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Everything that a run gave, wall time aside."""
    return {**result.to_dict(), "seconds": None, "phase_seconds": None}, dict(model.state_dict())


def assert_equal(
    one: tuple[dict[str, Any], dict[str, torch.Tensor]], other: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][n], t) for n, t in other[1].items())


@pytest.fixture(scope="module")
def whole(_planted: nn.Module, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a run without interruption gives, each variant made once."""
    made: dict[str, Any] = {}

    def get(variant: str = "sampled text") -> Any:
        if variant not in made:
            model = copy.deepcopy(_planted)
            result = isolate(model, tokenizer, records(variant), config=replace(CONFIG, **VARIANTS[variant]))
            made[variant] = outcome(model, result)
        return made[variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_exceptions_at_many_steps_change_nothing(planted, tokenizer, whole, tmp_path, variant):
    expected, forget = whole(variant), records(variant)
    config = replace(CONFIG, **VARIANTS[variant])
    before = state(planted)
    last = expected[0]["steps"]
    # after a look, after steps beside the records, in the middle, after the last one
    for step in sorted({1, 2, 5, min(8, last), last}):
        with pytest.raises(Stop):
            isolate(planted, tokenizer, forget, config=config, resume=tmp_path / "run", progress=at_step(step))
        assert_same(planted, before)
    result = isolate(planted, tokenizer, forget, config=config, resume=str(tmp_path / "run"))
    assert_equal(outcome(planted, result), expected)


@pytest.fixture(scope="module")
def killed(planted_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of processes that died at the moments that they are named after."""
    root = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    given = (str(planted_directory), str(root), json.dumps(CONFIG.to_dict()), json.dumps(KILLED))
    command = [sys.executable, "-c", CALL, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_process_goes_on(planted, tokenizer, whole, killed, monkeypatch, moment):
    expected = whole()
    kept = {p.name for p in (killed / moment).iterdir()}
    assert kept >= {"run.json", "retain.safetensors", "original.safetensors"}
    assert ("training.safetensors" in kept) == (moment != "rounding")
    assert any(n.startswith("tmp") for n in kept) == (moment == "write")  # the file that was being written
    monkeypatch.setattr(retain_module, "cached_samples", forbidden)
    seen: list[int] = []
    result = isolate(
        planted, tokenizer, tiny.FORGET, config=CONFIG, resume=killed / moment,
        progress=lambda phase, done, total: seen.append(done) if phase == "steps" else None,
    )  # fmt: skip
    assert seen[0] == {"rounding": 1, "steps": 4, "write": 3}[moment]
    assert_equal(outcome(planted, result), expected)


def test_a_finished_run_is_read_back(planted, tokenizer, whole, tmp_path, monkeypatch):
    first = copy.deepcopy(planted)
    result = isolate(first, tokenizer, tiny.FORGET, config=CONFIG, resume=tmp_path)
    assert_equal(outcome(first, result), whole())
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for place, name in ((trainer, "Equations"), (trainer, "record_targets"), (retain_module, "cached_samples"),
                        (sys.modules["libortho.isolation.attempt"], "preconditioners"),
                        (sys.modules["libortho.isolation.bases"], "gptq_bases"),
                        (sys.modules["libortho.isolation.original"], "read_original"),
                        (sys.modules["libortho.isolation.support"], "read_layers")):  # fmt: skip
        monkeypatch.setattr(place, name, forbidden)
    again = isolate(planted, tokenizer, tiny.FORGET, config=CONFIG, resume=tmp_path)
    assert_equal(outcome(planted, again), whole())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == files


def test_folder_and_files_are_for_their_owner_alone(planted, tokenizer, tmp_path):
    config = replace(CONFIG, max_steps=1)
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config, resume=tmp_path / "run")
    files = list((tmp_path / "run").iterdir())
    parts = ("in_form", "original", "support", "bases", "training")
    assert {f.name for f in files} == {"run.json"} | {f"{n}.safetensors" for n in parts}
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}


OTHERS: dict[str, dict[str, Any]] = {
    "records": {"forget": tiny.FORGET[:3]},
    "retain": {"retain": tiny.RETAIN[:9]},
    "sampled retain": {"retain": None},
    "alternates": {"alternates": [[" 1111.", " 2222."]] * 4},
    "neighbours": {"neighbours": [["Code of Al Poe:"]] * 4},
    "seed": {"config": replace(CONFIG, max_steps=1, seed=1)},
}


@pytest.fixture(scope="module")
def finished(_planted: nn.Module, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = replace(CONFIG, max_steps=1)
    isolate(copy.deepcopy(_planted), tokenizer, tiny.FORGET, tiny.RETAIN, config=config, resume=folder)
    return folder


@pytest.mark.parametrize("case", [*OTHERS, "model", "dtype"])
def test_a_folder_of_another_run_is_refused(planted, clean, tokenizer, finished, case):
    model = {"model": clean, "dtype": copy.deepcopy(planted).double()}.get(case, planted)  # the dtype: same values
    before, files = state(model), {p: p.read_bytes() for p in finished.iterdir()}
    given = {
        "forget": tiny.FORGET, "retain": tiny.RETAIN, "config": replace(CONFIG, max_steps=1), **OTHERS.get(case, {}),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"belongs to another run .* give another folder, or delete it"):
        isolate(model, tokenizer, **given, resume=finished)
    assert_same(model, before)
    assert {p: p.read_bytes() for p in finished.iterdir()} == files


def test_the_command_line(planted_directory, tmp_path):
    (tmp_path / "forget.json").write_text(json.dumps(tiny.FORGET), encoding="utf-8")
    arguments = ["isolate", planted_directory, "--forget", tmp_path / "forget.json", "--ratio", "0.1",
                 "--set", "max_steps=1", "--resume", tmp_path / "run"]  # fmt: skip
    results = [CliRunner().invoke(cli.app, [*map(str, arguments), "--out", str(tmp_path / n)]) for n in "ab"]
    for result in results:
        assert result.exit_code == 3, result.output
        assert "run still holds" in " ".join(result.stdout.split())
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
    refused = CliRunner().invoke(cli.app, [*map(str, arguments), "--out", str(tmp_path / "c"), "--seed", "1"])
    assert isinstance(refused.exception, ConfigError)
    assert not (tmp_path / "c").exists()
