"""Places that cannot be written and models that cannot be saved are refused before the work."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commands import refused
from libortho.demo import demo

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Nothing is loaded."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(demo, "load_model", never)  # bound when the module is imported, not when it is called
    for name in ("libortho.checkpoint.dense.load_model", "libortho.checkpoint.load"):
        monkeypatch.setattr(name, never)


def places(folder: Path) -> dict[str, str]:
    """Where no checkpoint can be written, and what is said of it."""
    (folder / "busy").mkdir()
    (folder / "busy/notes.txt").write_text("x")
    (folder / "file").write_text("x")
    return {
        "busy": "is not empty and no checkpoint", "file": "is a file", "file/out": "takes no new entry",
        "file/deep/out": "takes no new entry", "n" * 300: "takes no new entry",
    }  # fmt: skip


@pytest.mark.usefixtures("no_work")
def test_places_for_checkpoints_are_refused_first(planted_directory, checkpoint, forget, tmp_path):
    for place, complaint in places(tmp_path).items():
        out = ["--out", tmp_path / place]
        assert complaint in refused("split", planted_directory, *out)
        assert complaint in refused("isolate", planted_directory, "--forget", forget, *out, "--resume", tmp_path / "r")
        if "/" in place:
            assert "takes no new entry" in refused("demo", "--model", planted_directory, *out)
            assert "takes no new entry" in refused("detach", checkpoint, *out)
            assert "takes no new entry" in refused("encrypt", checkpoint / "ortho/hr", *out)
            assert "takes no new entry" in refused("decrypt", tmp_path / "file", *out)
    assert "holds the streams ['hr']" in refused("split", planted_directory, "--out", checkpoint)
    lost = refused("isolate", planted_directory, "--forget", forget, "--out", checkpoint, "--stream", "legal")
    assert "holds the streams ['hr']" in lost
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("no_work")
def test_places_for_reports_and_finished_parts_are_refused_first(planted_directory, checkpoint, forget, tmp_path):
    places(tmp_path)
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"context": "a", "continuation": "b"}), encoding="utf-8")
    audit = ["audit", planted_directory, "--forget", forget]
    for option in ("--out", "--html"):
        assert f"{option} is {tmp_path}/busy, which is a directory" in refused(*audit, option, tmp_path / "busy")
        assert f"{option} is /dev/null, which is no ordinary file" in refused(*audit, option, "/dev/null")
        assert "takes no new entry" in refused(*audit, option, tmp_path / "file/a")
    assert "expected two files" in refused(*audit, "--out", tmp_path / "a", "--html", tmp_path / "a")
    assert "which is a directory" in refused("eval", checkpoint, "--task-file", task, "--out", tmp_path / "busy")
    isolate = ["isolate", planted_directory, "--forget", forget, "--out", tmp_path / "out"]
    for command in (audit, isolate):
        assert "--resume is" in refused(*command, "--resume", tmp_path / "file")
        assert "takes no new entry" in refused(*command, "--resume", tmp_path / "file/kept")
    for inside in ("out", "out/kept"):
        assert "which lies in --out" in refused(*isolate, "--resume", tmp_path / inside)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_split(monkeypatch) -> None:
    """A model may be loaded, but nothing is done with it."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the work began")

    for place in ("libortho.splitting.split.split", "libortho.isolation.isolate.isolate"):
        monkeypatch.setattr(place, never)


@pytest.mark.usefixtures("no_split")
def test_models_that_cannot_be_saved_are_refused_first(tiny_gpt2, tiny_llama, tokenizer, forget, tmp_path, monkeypatch):
    in_two_dtypes = tiny_llama
    in_two_dtypes.model.norm.bfloat16()
    for model, complaint in ((tiny_gpt2, "is a Conv1D"), (in_two_dtypes, r"norm.weight is kept in torch.bfloat16")):
        monkeypatch.setattr("libortho.checkpoint.dense.load_model", lambda *a, m=model: (m, tokenizer))
        assert complaint in refused("split", "any", "--out", tmp_path / "out")
        message = refused(
            "isolate", "any", "--forget", forget, "--out", tmp_path / "out", "--resume", tmp_path / "kept"
        )
        assert complaint in message
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_split")
def test_a_full_disk_is_told_first(planted_directory, forget, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    for command in (["split", planted_directory], ["isolate", planted_directory, "--forget", forget]):
        assert "the disk has 0.00 GB left" in refused(*command, "--out", tmp_path / "out")
