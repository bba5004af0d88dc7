"""audit --streams: the matrix of several owners."""

import copy
import json

import pytest

from commands import call, refused
from libortho import TuneConfig, load, save, tune
from libortho.auditing.interference import interference
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owners")
    for name, rows in (("hr", HR), ("legal", LEGAL), ("empty", [])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def two(_planted, tokenizer, tmp_path_factory):
    """A checkpoint with a stream of each of two owners."""
    model = copy.deepcopy(_planted)
    for name, rows in (("hr", HR), ("legal", LEGAL)):
        tune(model, tokenizer, rows, name, TuneConfig(ratio=0.25, epochs=60))
    out = tmp_path_factory.mktemp("two") / "out"
    save(model, tokenizer, out)
    return out


def test_the_matrix_is_shown_and_written(two, files, holdout, tmp_path):
    options = ["--streams", f"hr={files / 'hr.jsonl'}", "--streams", f"legal={files / 'legal.jsonl'}"]
    result = call(
        "audit", two, *options, "--holdout-streams", f"hr={holdout}", "--out", tmp_path / "a.json", "--html",
        tmp_path / "a.html",
    )  # fmt: skip
    report = json.loads((tmp_path / "a.json").read_text())
    assert result.exit_code == (3 if report["missed"] else 0), result.output
    assert "without hr: dropping hr takes hr's facts (0 of 2 left)" in " ".join(result.stdout.split())
    assert [r["label"] for r in report["rows"]] == ["none", "hr alone", "legal alone", "all"]
    for word in ("hr alone", "legal alone", "0/2", "2/2"):
        assert word in result.stdout
    assert "<svg" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.json").stat().st_mode & 0o077 == 0


def test_wrong_owners_are_refused_before_the_model_is_loaded(two, checkpoint, files, planted_directory, monkeypatch):
    monkeypatch.setattr("libortho.cli.owners.open_model", None)
    hr, legal = (["--streams", f"{n}={files / f'{n}.jsonl'}"] for n in ("hr", "legal"))
    assert "--forget" in refused("audit", two, *hr, *legal, "--forget", files / "hr.jsonl")
    assert "nothing to audit" in refused("audit", two)
    assert "without --streams" in refused(
        "audit", two, "--forget", files / "hr.jsonl", "--holdout-streams", f"hr={files / 'legal.jsonl'}"
    )
    assert "'tax'; the model has hr, legal" in refused("audit", two, *hr, "--streams", f"tax={files / 'legal.jsonl'}")
    assert "hr alone" in refused("audit", two, *hr)
    assert "twice" in refused("audit", two, *hr, *hr)
    assert "NAME=FILE" in refused("audit", two, "--streams", "hr.jsonl")
    assert "holds no record" in refused("audit", two, *hr, "--streams", f"legal={files / 'empty.jsonl'}")
    assert "no file" in refused("audit", two, *hr, "--streams", f"legal={files / 'none.jsonl'}")
    assert "the one stream hr" in refused("audit", checkpoint, *hr, *legal)
    assert "not a checkpoint" in refused("audit", planted_directory, *hr, *legal)


def test_patterns_and_json_serve_every_owner(two, files, tmp_path):
    tables = []
    for name, rows in (("hr", HR), ("legal", LEGAL)):
        table = tmp_path / f"{name}.csv"
        table.write_text("who,code\n" + "\n".join(f"{r['prompt'][8:-1]},'{r['completion'][1:-1]}" for r in rows))
        tables += ["--streams", f"{name}={table}"]
    result = call("audit", two, *tables, "--prompt", "Code of {who}:", "--completion", " {code}.", "--json")
    assert json.loads(result.stdout)["owners"] == ["hr", "legal"]


def test_a_saved_matrix_is_of_the_loaded_model(two, tokenizer):
    model, _ = load(two)
    assert interference(model, tokenizer, {"hr": HR, "legal": LEGAL}).row("hr").owners["hr"].recited == (1, 2)
