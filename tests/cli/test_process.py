"""The command as a process: clean standard output, one line for an error."""

import json
import sys
from typing import Any

import pytest

import libortho
from commands import QUICK, call, process
from libortho import cli

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


def test_an_error_is_one_line_and_exit_code_2(cache):
    done = process(cache, "inspect", f"AGE-SECRET-KEY-1{'Q' * 58}")  # refused before torch is imported
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: argument 2 holds a secret key (not shown)")


def test_other_errors_and_a_failing_disk_are_one_line_too(planted_directory, forget, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "report.json")

    monkeypatch.setattr(libortho.AuditReport, "to_json", fail)
    for arguments, complaint in (
        (["inspect", tmp_path / "no [such] directory"], "no [such] directory"),
        (["split", tmp_path / "empty", "--out", tmp_path / "out"], "cannot load the model"),
        (
            ["audit", planted_directory, "--forget", forget, "--set", "samples=2", "--out", tmp_path / "a"],
            "No space left",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["libortho", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert complaint in line


def test_an_unknown_option_is_exit_code_2():
    result = call("split", "--nonsense")
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_standard_output_of_a_real_process_is_json(cache, planted_directory, forget, tmp_path):
    """With everything that transformers and the progress bars say on standard error, and default retain text."""
    arguments = ["--forget", forget, "--out", tmp_path / "out", *QUICK, "--json"]
    done = process(cache, "isolate", planted_directory, *arguments)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    assert "Traceback" not in done.stderr
    assert len(list((cache / "samples").iterdir())) == 1
