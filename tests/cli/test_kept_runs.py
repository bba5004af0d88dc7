"""Finished parts of isolate and audit are kept until the command ends."""

import pytest
import typer

from commands import QUICK, call
from libortho.cli.kept_runs import kept_run
from libortho.core.errors import DataError
from libortho.core.files import write_atomically

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


def stopped_run(error, *inputs, part="part.safetensors"):
    with kept_run("isolate", None, True, 0, *inputs) as folder:
        assert folder is not None
        write_atomically(folder / part, "")
        raise error


def test_an_interrupt_leaves_the_parts_and_says_where(cache, tmp_path, capsys):
    records = tmp_path / "forget.jsonl"
    records.write_text("a")
    with pytest.raises(typer.Exit) as stopped:
        stopped_run(KeyboardInterrupt(), str(records), 8)
    assert stopped.value.exit_code == 130
    [folder] = (cache / "runs").iterdir()
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "1 finished parts lie in" in said
    assert folder.is_relative_to(cache)
    assert folder.parent.stat().st_mode & 0o077 == 0
    with kept_run("isolate", None, True, 0, str(records), 8) as again:
        assert again == folder
    assert "going on from" in capsys.readouterr().err
    assert not folder.exists()  # what is finished is not kept
    records.write_text("b")
    with kept_run("isolate", None, True, 0, str(records), 8) as other, kept_run("audit", None, True, 0, 8) as third:
        assert len({folder, other, third}) == 3


def test_an_error_leaves_them_too_and_a_named_folder_always_stays(cache, tmp_path, capsys):
    with pytest.raises(DataError):
        stopped_run(DataError("no"), 1)
    assert [p.name for p in (cache / "runs").glob("*/*")] == ["part.safetensors"]
    with kept_run("isolate", tmp_path / "mine", True, 0, 1) as named:
        assert named is not None
        write_atomically(named / "part.safetensors", "")
    assert named == tmp_path / "mine"
    assert named.exists()
    capsys.readouterr()
    with kept_run("isolate", None, False, 0, 1) as none:
        assert none is None
    assert capsys.readouterr().err == ""


def test_a_refusal_before_any_part_says_nothing_and_leaves_nothing(cache, capsys):
    with pytest.raises(DataError):
        stopped_run(DataError("no"), 1, part="run.json")
    assert not any((cache / "runs").iterdir())
    assert "part" not in capsys.readouterr().err.partition("none is kept)")[2]


def test_a_place_without_room_or_of_others_keeps_nothing_and_says_so(cache, monkeypatch, capsys):
    with kept_run("audit", None, True, 10**18) as none:
        assert none is None
    assert "--resume DIR" in capsys.readouterr().err
    cache.mkdir(exist_ok=True)
    (cache / "runs").chmod(0o777)
    with kept_run("audit", None, True, 0) as none:
        assert none is None
    assert "nothing is kept in case of an interruption" in capsys.readouterr().err


def test_commands_keep_parts_while_they_run_and_none_when_they_are_done(planted_directory, forget, cache, tmp_path):
    result = call("isolate", planted_directory, "--forget", forget, "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 3, result.output
    assert f"finished parts are kept in {cache}" in result.stderr.replace("\n", "")
    assert not any((cache / "runs").iterdir())
    result = call("audit", tmp_path / "out", "--forget", forget, "--set", "samples=2", "--no-keep")
    assert "kept in" not in result.stderr
    assert "memory: fail" in result.stderr
    assert result.stderr.index("memory: ") < result.stderr.rindex("audit ")  # verdicts come before the end
