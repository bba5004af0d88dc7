"""Without the extras: everything can be imported, and what needs one names it before a model is loaded."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import libortho
import tiny
from libortho.core.errors import CheckpointError, LibOrthoError
from libortho.core.extras import MODULES, module, require

# In a process of its own, as nothing that was imported before may help.
BARE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(m for names in MODULES.values() for m in names)!r}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(f) for f in sys.meta_path]
"""


COMMANDS = """
import json
from libortho import cli
from libortho.integrations import lm_eval_command
for extra, arguments in json.loads(sys.argv[1]):
    sys.argv = ["libortho", *(arguments or ())]
    try:
        (lm_eval_command if arguments is None else cli.main)()
    except SystemExit as stop:
        print(extra, stop.code)
for stream in (sys.stdout, sys.stderr):
    print("then", file=stream, flush=True)
"""
IMPORTS = """
SERVER = {"fastapi", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client", "starlette"}
import importlib, pkgutil, libortho
for found in pkgutil.walk_packages(libortho.__path__, "libortho."):
    if found.name == "libortho.integrations.lm_eval":
        try:
            importlib.import_module(found.name)
        except libortho.LibOrthoError as error:
            print(error)
    elif found.name.startswith("libortho.serving."):  # the command asks for the extra before it imports these
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] not in SERVER:
                raise
    elif not found.name.endswith("__main__"):
        importlib.import_module(found.name)
import torch
from libortho.auditing.roc import auc
print(auc(torch.tensor([1.0]), torch.tensor([0.0])))
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[str] | None]]:
    """What is called, and the extra that it needs."""
    place = tmp_path_factory.mktemp("inputs")
    forget, gguf = place / "forget.jsonl", place / "model.gguf"
    forget.write_text(json.dumps(tiny.FORGET[0]), encoding="utf-8")
    gguf.write_bytes(b"GGUF")
    return [
        ("audit", ["audit", "absent", "--forget", str(forget)]),
        ("eval", ["eval", "absent", "--tasks", "arc_easy"]),
        ("vault", ["encrypt", "absent", "--out", str(place / "locked")]),
        ("vault", ["decrypt", "absent", "--out", str(place / "opened")]),
        ("demo", ["isolate", str(gguf), "--forget", str(forget), "--out", str(place / "out")]),
        ("serve", ["serve", "absent"]),
        ("eval", None),
    ]


@pytest.fixture(scope="module")
def bare(commands: list[tuple[str, list[str] | None]]) -> tuple[list[list[str]], list[list[str]]]:
    """What commands, and then an import of every module, write on standard output and on standard error."""
    command = [sys.executable, "-c", BARE + COMMANDS + IMPORTS, json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    output, errors = ([part.splitlines() for part in text.split("then\n")] for text in (done.stdout, done.stderr))
    return output, errors


def test_every_module_can_be_imported(bare):
    told, area = bare[0][1]
    assert "pip install 'libortho[eval]'" in told
    assert area == "1.0"


def test_commands_name_the_extra_and_load_nothing(bare, commands):
    said, told = bare[0][0], bare[1][0]
    assert said == [f"{extra} 2" for extra, _ in commands]
    assert len(told) == len(commands), told
    for line, (extra, _) in zip(told, commands, strict=True):
        assert line.startswith("error: ")
        assert f"pip install 'libortho[{extra}]'" in line


def test_calls_name_the_extra(planted, tokenizer, monkeypatch, tmp_path):
    extra = {name for names in MODULES.values() for name in names}
    for name in [*extra, *(m for m in sys.modules if m.partition(".")[0] in extra)]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LibOrthoError, match=r"audit needs rapidfuzz, rouge_score, scipy; .*libortho\[audit\]"):
        libortho.audit(planted, tokenizer, tiny.FORGET)
    with pytest.raises(CheckpointError, match=r"libortho\[vault\]"):
        libortho.encrypt(tmp_path, tmp_path / "locked", passphrase="phrase")
    with pytest.raises(LibOrthoError, match=r"scipy\.stats cannot be imported .*libortho\[audit\]"):
        module("audit", "scipy.stats")


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    for name, modules in MODULES.items():
        brought = " ".join(extras[name]).replace("-", "_")
        assert all(m in brought for m in modules)
        require(name, "this test")
    assert set(extras) == {*MODULES, "dev", "docs"}
