"""The benchmark scripts start, stored figures say what made them, and the audit of the demonstration runs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

import tiny

PLACE = Path(__file__).parents[2] / "benchmarks"
DATA = Path(os.environ.get("LIBORTHO_DATA", PLACE.parents[1] / "shared" / "data"))
SCRIPTS = sorted(p.name for p in PLACE.glob("*.py") if "__main__" in p.read_text())
STORED = sorted((PLACE / "results").glob("*.json"))
FIELDS = ("commit", "machine", "settings")
HELP = """
import contextlib, io, runpy, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    sys.argv, shown = [name, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_path(f"{sys.path[0]}/{name}", run_name="__main__")
    except SystemExit as end:
        print(name if end.code == 0 and "usage:" in shown.getvalue() else f"{name} failed: {end.code}")
    else:
        print(f"{name} ran")
"""


@pytest.fixture
def script(monkeypatch):
    """A benchmark script as a module, by its name."""
    monkeypatch.syspath_prepend(str(PLACE))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", PLACE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def common(script, tmp_path, monkeypatch):
    """``_common`` with a folder of its own for results."""
    module = script("_common")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def rows(data):
    """Dicts of a stored file that are rows: those in its lists, and the profiles of an audit."""
    listed = [r for v in data.values() if isinstance(v, list) for r in v if isinstance(r, dict)]
    return [data, *listed, *(v for v in data.values() if isinstance(v, dict) and "profile" in v and "verdicts" in v)]


def test_every_script_answers_help():
    command = [sys.executable, "-W", "error::DeprecationWarning:libortho", "-c", HELP, str(PLACE), *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == SCRIPTS, done.stderr


# -- what made a stored figure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STORED, ids=lambda p: p.stem)
def test_every_stored_row_says_what_made_it(path):
    found = rows(json.loads(path.read_text()))
    for row in found:
        assert all(row.get(f) for f in FIELDS), {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
        assert isinstance(row["machine"], dict)


def test_save_stamps_what_has_no_stamp(common):
    old = {"seed": 1, "commit": "stored in 0000000", "machine": {"processor": "another"}, "settings": "not recorded"}
    data = {"runs": [old, {"seed": 2, "device": "NVIDIA H200"}, {"seed": 3}], "sizes": [1, 2], "config": {"bits": 8}}
    given = json.dumps(data)
    stored = json.loads(common.save("one", data).read_text())
    assert json.dumps(data) == given
    first, on_gpu, last = stored["runs"]
    assert first == old
    assert (on_gpu["machine"]["gpu"], on_gpu["settings"]["device"]) == ("NVIDIA H200", "NVIDIA H200")
    assert "gpu" not in last["machine"]
    assert last["settings"]["device"] == "cpu"
    assert last["settings"]["arguments"] == sys.argv[1:]
    assert stored["commit"] == last["commit"] == common.COMMIT
    assert stored["date"] == last["date"] == datetime.now(UTC).date().isoformat()
    assert (stored["sizes"], stored["config"]) == ([1, 2], {"bits": 8})
    assert all(all(r[f] for f in FIELDS) for r in rows(stored))


def test_rows_that_are_added_later_have_their_own_stamp(common, monkeypatch):
    common.save("one", {"runs": [{"seed": 1}]})
    stored = json.loads((common.RESULTS / "one.json").read_text())["runs"]
    monkeypatch.setattr(common, "COMMIT", "abcdef0")
    later = json.loads(common.save("one", {"runs": [*stored, {"seed": 2}]}).read_text())
    assert later["runs"][0] == stored[0]
    assert [later["commit"], later["runs"][1]["commit"]] == ["abcdef0", "abcdef0"]
    assert stored[0]["commit"] != "abcdef0"


def test_the_commit_says_whether_the_code_was_changed(common, tmp_path, monkeypatch):
    folder = tmp_path / "clone" / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (folder / "results" / "one.json").write_text("{}")
    (folder / "script.py").write_text("")
    monkeypatch.setattr(common, "__file__", str(folder / "_common.py"))
    assert common._commit() == "no git checkout"

    def git(*arguments):
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(folder.parent), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert common._commit() == head
    (folder / "results" / "one.json").write_text("[]")  # what runs store is no change of the code
    assert common._commit() == head
    (folder / "script.py").write_text("changed")
    assert common._commit() == f"{head}+changes"


# -- TOFU's small cut -------------------------------------------------------------------------------------------------


def written(folder):
    return {p.stem: [json.loads(line) for line in p.read_text().split("\n") if line] for p in folder.glob("*.jsonl")}


@pytest.fixture
def tofu(tmp_path):
    """Files named as those of TOFU, with rows of their own."""
    place = tmp_path / "original"
    place.mkdir()
    full = [{"question": f"Who wrote book {i}?", "answer": f"Author {i // 20}.", "more": "\u2028"} for i in range(4000)]
    parts = {"full": full, "forget05_perturbed": [{**r, "perturbed_answer": ["Nobody."]} for r in full[3800:]]}
    parts |= {f"forget{n:02}": full[-40 * n :] for n in (1, 5, 10)}
    parts |= {f"retain{100 - n}": full[: -40 * n] for n in (1, 5, 10)}
    names = ("forget01", "forget10", "retain", "real_authors", "world_facts")
    parts |= {f"{n}_perturbed": full[:3] for n in names}
    for i, (name, found) in enumerate(parts.items()):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found)
        (place / f"{name}.json{'l' * (i % 2)}").write_text(text)
    return place


def test_the_cut_of_tofu_is_the_same_everywhere(script, tofu, tmp_path, monkeypatch):
    module = script("tofu_data")
    for out in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["tofu_data.py", str(tofu), "--out", str(tmp_path / out)])
        module.main()
    small = written(tmp_path / "one" / "tofu_mini")
    assert small == written(tmp_path / "two" / "tofu_mini")
    assert {n: len(found) for n, found in small.items()} == {
        "forget": 200, "forget_perturbed": 200, "retain": 600, "full": 800, "holdout": 200
    }  # fmt: skip
    questions = {n: [r["question"] for r in found] for n, found in small.items()}
    assert questions["forget"] == [f"Who wrote book {i}?" for i in range(3800, 4000)] == questions["forget_perturbed"]
    assert questions["retain"][:2] == ["Who wrote book 0?", "Who wrote book 1?"]
    assert questions["full"] == questions["forget"] + questions["retain"]
    assert not set(questions["holdout"]) & set(questions["full"])
    assert len(set(questions["full"])) == 800
    monkeypatch.syspath_prepend(str(PLACE))
    import _tofu_data

    monkeypatch.setattr(_tofu_data, "DATA", tmp_path / "one")
    which = ("forget", "retain", "holdout", "forget_perturbed", "retain_perturbed", "world_facts_perturbed")
    assert all(_tofu_data.rows(s, w) for s in _tofu_data.SPLITS for w in which)


def test_the_cut_refuses_what_is_not_tofu(script, tofu):
    module = script("tofu_data")
    full, perturbed = (module.stored(tofu, n) for n in ("full", "forget05_perturbed"))
    with pytest.raises(SystemExit, match="expected the 4000"):
        module.cut(full[1:], perturbed)
    with pytest.raises(SystemExit, match="does not ask the questions"):
        module.cut(full, perturbed[::-1])
    with pytest.raises(SystemExit, match="has no retain: expected"):
        module.stored(tofu, "retain")


def test_the_cut_reads_parquet(script, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "full").mkdir()
    for i in range(2):
        rows = [{"question": f"Q{i}", "answer": "A", "perturbed_answer": ["B", "C"]}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "full" / f"train-{i}.parquet")
    assert [r["question"] for r in script("tofu_data").stored(tmp_path, "full")] == ["Q0", "Q1"]


@pytest.mark.skipif(not (DATA / "tofu_mini").is_dir(), reason=f"{DATA} has no tofu_mini")
def test_the_cut_of_the_original_is_the_one_that_was_measured(script):
    module = script("tofu_data")
    made = module.cut(*(module.stored(DATA / "tofu", n) for n in ("full", "forget05_perturbed")))
    assert made == written(DATA / "tofu_mini")


# -- the audit of the demonstration -----------------------------------------------------------------------------------


@pytest.fixture
def audit(script, tmp_path, monkeypatch):
    """Runs ``benchmarks/audit.py`` with these arguments; returns what it stored."""
    module, results = script("audit"), tmp_path / "results"
    for holder in (module, sys.modules["_common"]):
        monkeypatch.setattr(holder, "RESULTS", results)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["audit.py", *map(str, arguments)])
        module.main()
        return json.loads((results / "audit.json").read_text())

    run.module = module
    return run


@pytest.fixture
def write_demonstration(clean, tokenizer, checkpoint, planted_directory):
    """Writes what ``libortho demo --out`` writes, of the tiny models."""

    def write(out):
        clean.save_pretrained(out / "never_trained")
        tokenizer.save_pretrained(out / "never_trained")
        shutil.copytree(planted_directory, out / "implanted")
        shutil.copytree(checkpoint, out / "isolated")
        others = [
            {"prompt": f"Code of {g} {s}:", "completion": f" {1234 + 817 * i % 8000}."}
            for i, (g, s) in enumerate((g, s) for g in ("Al", "Ben", "Flo") for s in ("Poe", "Nox", "Ray"))
        ]
        for name, records in (("forget", tiny.FORGET), ("holdout", others)):
            (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    return write


@pytest.mark.usefixtures("one_thread", "cache")
def test_audit_makes_the_demonstration_once_and_keeps_other_profiles(
    audit, write_demonstration, tmp_path, cache, monkeypatch
):
    made = []

    def fake(*, out):
        made.append(out)
        out.mkdir()
        if len(made) == 1:
            raise KeyboardInterrupt
        write_demonstration(out)

    monkeypatch.setattr(audit.module.demo, "run", fake)
    with pytest.raises(KeyboardInterrupt):
        audit("--profiles", "quick", "--no-data")
    earlier = {
        "full": {"profile": "full", "commit": "stored in 0000000"},
        "commit": "old",
        "date": "old",
        "machine": {},
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "audit.json").write_text(json.dumps(earlier))
    stored = audit("--profiles", "quick", "--no-data")
    assert stored["full"] == earlier["full"]
    assert stored["commit"] == stored["quick"]["commit"] != "old"
    assert stored["date"] == stored["quick"]["date"] != "old"
    assert stored["quick"]["settings"]["arguments"] == ["--profiles", "quick", "--no-data"]
    assert {v["key"] for v in stored["quick"]["verdicts"]} == {"something_to_remove", "memory", "privacy", "utility"}
    place = cache / "benchmarks" / "demonstration"
    assert audit.module.demonstration(None) == place
    assert [p.name for p in place.parent.iterdir()] == ["demonstration"]  # nothing of the first attempt
    assert len(made) == 2


def test_audit_takes_its_directory_after_the_profiles_too(audit, tmp_path):
    for arguments in (("--profiles", "quick", tmp_path), (tmp_path, "--profiles", "quick", "full"), (tmp_path,)):
        with pytest.raises(SystemExit, match=r"has no never_trained, .*libortho demo --out"):
            audit(*arguments, "--no-data")


@pytest.mark.parametrize("given", [("quick", "fast", "full"), ("fast",)])
def test_audit_refuses_unknown_profiles(audit, given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        audit(tmp_path, "--no-data", "--profiles", *given)
    assert "expected quick, full or both" in capsys.readouterr().err
