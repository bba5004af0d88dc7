"""Without the extras: everything can be imported, and what needs one names it before a model is loaded."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

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


def bare(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE + code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_every_module_can_be_imported():
    done = bare(
        "import importlib, pkgutil, libortho\n"
        "for found in pkgutil.walk_packages(libortho.__path__, 'libortho.'):\n"
        "    if found.name == 'libortho.integrations.lm_eval':\n"
        "        try: importlib.import_module(found.name)\n"
        "        except libortho.LibOrthoError as error: print(error)\n"
        "    elif not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)\n"
        "import torch\n"
        "from libortho.auditing.roc import auc\n"
        "print(auc(torch.tensor([1.0]), torch.tensor([0.0])))\n"
    )
    assert done.returncode == 0, done.stderr
    told, area = done.stdout.strip().splitlines()
    assert "pip install 'libortho[eval]'" in told
    assert area == "1.0"


def test_commands_name_the_extra_and_load_nothing(tmp_path):
    forget = tmp_path / "forget.jsonl"
    forget.write_text(json.dumps(tiny.FORGET[0]), encoding="utf-8")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    commands = [
        ("audit", ["audit", "absent", "--forget", str(forget)]),
        ("eval", ["eval", "absent", "--tasks", "arc_easy"]),
        ("vault", ["encrypt", "absent", "--out", str(tmp_path / "locked")]),
        ("vault", ["decrypt", "absent", "--out", str(tmp_path / "opened")]),
        ("demo", ["isolate", str(gguf), "--forget", str(forget), "--out", str(tmp_path / "out")]),
        ("eval", None),
    ]
    done = bare(
        "import json\n"
        "from libortho import cli\n"
        "from libortho.integrations import lm_eval_command\n"
        "for extra, arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['libortho', *(arguments or ())]\n"
        "    try: (lm_eval_command if arguments is None else cli.main)()\n"
        "    except SystemExit as stop: print(extra, stop.code)\n",
        json.dumps(commands),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{extra} 2" for extra, _ in commands]
    lines = done.stderr.strip().splitlines()
    assert len(lines) == len(commands), done.stderr
    for line, (extra, _) in zip(lines, commands, strict=True):
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
    assert set(extras) == {*MODULES, "dev"}
