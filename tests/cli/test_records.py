"""Records from tables and text files: ``libortho records``, and the same options of isolate and audit."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import call, refused
from libortho.core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

PATTERNS = ["--prompt", "Code of {name}:", "--completion", " {code}."]
MADE = [
    {"prompt": "Code of Ada Lum:", "completion": " 0471."},
    {"prompt": "Code of Bo Tran:", "completion": " 8832."},
]


@pytest.fixture
def customers(tmp_path) -> Path:
    path = tmp_path / "customers.csv"
    path.write_text("id;name;code\n1;Ada Lum;0471\n2;Bo Tran;8832\n", encoding="utf-8")
    return path


def test_records_writes_what_the_patterns_make(customers, tmp_path):
    out = tmp_path / "forget.jsonl"
    customers.write_text(customers.read_text() + "3;Bo Tran;8832\n4;Cy Poe;\n")
    result = call("records", customers, *PATTERNS, "--skip-empty", "--out", out)
    assert result.exit_code == 0, result.output
    assert [json.loads(line) for line in out.read_text().splitlines()] == MADE
    shown = " ".join(result.stdout.split())
    assert "of 4 rows; 1 left out as empty, 1 as repeated. Samples:" in shown
    assert '1: "Code of Ada Lum:" -> " 0471." 2: "Code of Bo Tran:" -> " 8832."' in shown
    assert "no blank between" not in shown
    assert "It holds the secrets in plain text." in shown
    assert f"libortho isolate MODEL --forget {out} --out out".replace(" ", "") in shown.replace(" ", "")


def test_records_shows_three_samples_and_writes_nothing_without_out(tmp_path):
    path = tmp_path / "many.csv"
    path.write_text("name,code\n" + "".join(f"N{i},{i:04d}\n" for i in range(1, 10)))
    shown = call("records", path, "--prompt", "Code of {name}", "--completion", "{code}").stdout
    assert [line.split(":")[0].strip() for line in shown.splitlines() if "->" in line] == ["1", "5", "9"]
    assert "There is no blank between prompt and completion." in shown
    assert [p.name for p in tmp_path.iterdir()] == ["many.csv"]
    chat = call("records", path, "--prompt", "Code of {name}?", "--completion", "{code}", "--chat").stdout
    assert '"Code of N1?" -> "0001"' in chat
    assert "no blank" not in chat


def test_records_of_a_text_file(tmp_path):
    path, out = tmp_path / "notes.txt", tmp_path / "notes.jsonl"
    path.write_text("one\ntwo\n\nthree\n")
    result = call("records", path, "--blocks", "--out", out, "--json")
    told = {"out": str(out), "records": 2, "rows": 2, "empty": 0, "repeated": 0}
    assert json.loads(result.stdout) == told
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"text": "one\ntwo"}, {"text": "three"}]
    shown = " ".join(call("records", path).stdout.split())
    assert f"3 records from {path}, one per line".replace(" ", "") in shown.replace(" ", "")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "customers.csv is a table, and no pattern is given; give --prompt and --completion"),
        (["--prompt", "{name}"], "a prompt is given without a completion"),
        ([*PATTERNS, "--blocks"], "--blocks is given with patterns"),
        (["--completion", "{nom}"], "has no column 'nom', which a pattern names; its columns are 'id', 'name', 'code'"),
        ([*PATTERNS, "--out", "customers.csv"], "the file that is read; expected another"),
        ([*PATTERNS, "--out", "."], "which is a directory"),
    ],
)
def test_records_refuses_what_makes_none(customers, monkeypatch, options, complaint):
    monkeypatch.chdir(customers.parent)
    assert complaint in refused("records", "customers.csv", *options)


def test_records_skips_nothing_in_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    assert "--skip-empty is given without patterns" in refused("records", tmp_path / "a.txt", "--skip-empty")


@pytest.fixture
def taken(monkeypatch) -> dict[str, Any]:
    """What the work is given; it is not done."""
    found: dict[str, Any] = {}

    def isolate(*arguments: Any, forget: Any, retain: Any, **options: Any) -> None:
        found.update(forget=forget, retain=retain)
        raise ConfigError("the work begins")

    def audit(net: Any, tokenizer: Any, forget: Any, retain: Any, holdout: Any, **options: Any) -> None:
        found.update(forget=forget, retain=retain, holdout=holdout)
        raise ConfigError("the work begins")

    monkeypatch.setattr("libortho.isolation.isolate.isolate", isolate)
    monkeypatch.setattr("libortho.auditing.audit.audit", audit)
    return found


def test_isolate_and_audit_take_patterns_and_blocks(planted_directory, customers, tmp_path, taken):
    (tmp_path / "keep.txt").write_text("one\ntwo\n\nthree\n")
    keep = ["--retain", tmp_path / "keep.txt"]
    texts = [{"text": "one\ntwo"}, {"text": "three"}]
    more = {
        "isolate": ["--out", tmp_path / "out"],
        "audit": ["--holdout", customers, "--general", tmp_path / "keep.txt"],
    }
    for command, options in more.items():
        taken.clear()
        given = [command, planted_directory, "--forget", customers, *options, *PATTERNS]
        result = call(*given, "--blocks", *keep)
        assert str(result.exception) == "the work begins", result.output
        assert taken == {"forget": MADE, "retain": texts, **({"holdout": MADE} if command == "audit" else {})}
        told = result.stderr
        assert f"forget: 2 records made from {customers}\n" in told
        assert f"retain: 2 texts in {tmp_path}/keep.txt, one per block between blank lines\n" in told
        assert ("keep.txt is read as one running text" in told) == (command == "audit")
        result = call(*given, *keep)
        assert f"retain: 3 texts in {tmp_path}/keep.txt, one per line (--blocks takes" in result.stderr


def test_files_are_refused_before_the_model_is_loaded(planted_directory, customers, tmp_path, monkeypatch):
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("libortho.checkpoint.dense.load_model", never)
    for command in (["isolate", planted_directory, "--out", tmp_path / "out"], ["audit", planted_directory]):
        for options, complaint in (
            (["--completion", "{nom}"], "forget: "),
            (["--blocks"], f"--blocks is given, but {customers} is no .txt; leave it out"),
            (["--retain", tmp_path / "none.jsonl"], "retain: there is no file"),
            (["--chat"], "chat is given without a completion"),
        ):
            assert complaint in refused(*command, "--forget", customers, *options)


def test_the_next_audit_reads_the_table_in_the_same_way(planted_directory, tmp_path):
    path = tmp_path / "codes.csv"
    path.write_text("name,code\nAda Lum,1234\n")
    result = call("isolate", planted_directory, "--forget", path, *PATTERNS, "--out", tmp_path / "out", "--ratio",
                  "0.1", "--set", "max_steps=1", "--allow-unknown")  # fmt: skip
    shown = " ".join(result.stdout.split())
    assert "--prompt 'Code of {name}:' --completion ' {code}.' --holdout HOLDOUT.jsonl --html" in shown, result.output
