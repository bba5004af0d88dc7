"""audit: exit codes, reports, controls."""

import json

import pytest

from commands import call, refused

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


def test_audit_of_a_model_that_knows_exits_with_3_and_writes_its_reports(planted_directory, forget, holdout, tmp_path):
    result = call("audit", planted_directory, "--forget", forget, "--holdout", holdout, "--set", "samples=2",
                  "--out", tmp_path / "a.json", "--html", tmp_path / "a.html",
                  "--resume", tmp_path / "kept")  # fmt: skip
    assert result.exit_code == 3, result.output
    assert any((tmp_path / "kept").iterdir())
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    assert result.stdout.startswith("FAIL")
    assert "membership AUC" in result.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["subjects"][0]["memory"]["greedy_extraction"]["value"] == 1
    assert "<html" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.json").stat().st_mode & 0o077 == 0


def test_audit_of_a_checkpoint_compares_the_switch_with_its_controls(checkpoint, forget, planted_directory):
    result = call(
        "audit", checkpoint, "--forget", forget, "--set", "samples=2", "--original", planted_directory, "--json"
    )
    report = json.loads(result.stdout)
    by_key = {s["key"]: s["memory"]["greedy_extraction"]["value"] for s in report["subjects"]}
    assert by_key["off"] == 0
    assert by_key["on"] == by_key["original"] == by_key["quantised"] == 1
    assert set(by_key) == {"off", "on", "original", "quantised"}
    assert [p["alpha"] for p in report["curve"]] == [0, 0.5, 1]
    status = {v["key"]: v["status"] for v in report["verdicts"]}
    assert status["privacy"] == "withheld"
    assert result.exit_code == (3 if "fail" in status.values() else 0)


def test_audit_refuses_overlapping_records(planted_directory, forget):
    assert "forget 1 = holdout 1" in refused("audit", planted_directory, "--forget", forget, "--holdout", forget)
    assert "profile" in refused("audit", planted_directory, "--forget", forget, "--profile", "slow")
