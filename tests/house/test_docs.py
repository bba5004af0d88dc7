"""What the pages show can be done, and what they link to is there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import libortho
import notebook
import tiny
from libortho.cli.commands import app
from libortho.core import errors
from libortho.isolation.criteria import RecordOutcome
from libortho.isolation.result import missed_criteria
from libortho.text.records import load_records
from templates import TEMPLATES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FRONT = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "benchmarks/README")]
PAGES = [*FRONT, *sorted(DOCS.rglob("*.md"))]
BLOCKS = re.findall(r"```jsonl\n(.*?)```", (DOCS / "how-to" / "records.md").read_text(), re.DOTALL)
SHORT = [ROOT / "README.md", DOCS / "index.md", *sorted((DOCS / "tutorials").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page):
    """Headings as the links of a web page name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        assert DOCS not in page.parents or DOCS in found.resolve().parents, f"{target} is outside the site"
        assert not anchor or anchor in anchors(found), target


def sentences(text):
    """Those of paragraphs and lists: without code, tables, quotes, blocks of the report, and where links lead."""
    text = re.sub(r"^ *```.*?^ *```$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- report:.*?<!-- /report -->", "\n", text, flags=re.DOTALL)
    lines = ["" if re.match(r"\||#|<|>| {4}\S", line) else line for line in text.split("\n")]
    text = re.sub(r"^ *(?:[-*]|\d+\.) ", "\n", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return [s for p in re.split(r"\n\s*\n", text) for s in re.split(r"(?<=[.!?])[*_)\"']*\s+", p) if s.split()]


def test_sentences_are_found_in_paragraphs_and_lists():
    page = (
        "# Not this\n\nOne [two](far/away.md). **Three.** Four\nfive:\n\n    no code\n\n- six\n- seven\n\n| no | no |\n"
    )
    assert [" ".join(s.split()) for s in sentences(page)] == ["One two.", "**Three.", "Four five:", "six", "seven"]


@pytest.mark.parametrize("page", SHORT, ids=[p.name for p in SHORT])
def test_sentences_are_short(page):
    long = [s for s in sentences(page.read_text()) if len(s.split()) > 30]
    assert long == []


def test_a_code_is_a_secret_and_no_integer():
    """ "Code" alone is a secret (or that of a program, or of an exit); what a base holds are integers."""
    for page in PAGES:
        if page.name != "research-log.md":
            wrong = r"(integer|nearest|INT[48]|quantised|packed) codes?\b|\bcodes? and scales"
            assert not re.search(wrong, page.read_text()), page


PARAMETERS = (134_515_008, 1_235_814_400, 8_030_261_248)
"""Of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B."""


def test_the_sizes_of_large_models_are_those_of_the_formulas():
    page = (DOCS / "how-to" / "large-models.md").read_text()
    cells = {r[0]: r[1:] for r in (re.split(r" *\| *", x)[1:-1] for x in page.splitlines() if x.startswith("| "))}

    tokens = int(re.search(r"readings, `t` = ([\d,]+)", page)[1].replace(",", ""))
    for i, (parameters, shape) in enumerate(zip(PARAMETERS, cells["shape: `L`, `h`, `m`"], strict=True)):
        layers, hidden, width = map(int, shape.split(", "))
        weights = layers * hidden * width
        beside = [2 * tokens * layers * (hidden + width), 4 * layers * hidden**2, 8 * width**2]
        expected = {
            "parameters `P`": parameters,
            "split weights `T`": weights,
            "dense model, bf16": 2 * parameters,
            "base, INT8": 2 * (parameters - weights) + weights,
            "base, INT4": 2 * (parameters - weights) + 0.5625 * weights,
            "stream values at 0.5 %": 0.01 * weights,
            f"readings, `t` = {tokens:,}": beside[0],
            "curvature": beside[1],
            "rounding, one layer": beside[2],
            "`isolate` beyond the dense model, without activations": sum(beside) + weights,
        }
        for name, value in expected.items():
            number, unit = cells[name][i].replace(",", "").split()
            last = {"M": 1e6, "MB": 1e6, "GB": 1e9}[unit] / 10 ** len(number.partition(".")[2])
            assert float(number) * {"M": 1e6, "MB": 1e6, "GB": 1e9}[unit] == pytest.approx(value, abs=0.51 * last), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_of_the_repository_exist(page):
    for name in re.findall(r"`((?:benchmarks|scripts|examples|tests|src)/[\w./-]+\.\w+)", page.read_text()):
        assert (ROOT / name).exists(), name


def test_the_examples_of_records_are_records(tokenizer):
    lines = [line for block in BLOCKS for line in block.splitlines()]
    assert len(lines) >= 10
    found = [load_records([json.loads(line)], tokenizer)[0] for line in lines]
    secrets = [r.completion.strip() for r in found]
    assert secrets[:4] == ["A4-52107."] + ["A4-52107"] * 3
    assert found[4].prompt == ""
    assert secrets[5:8] == ["A4-52107", "631108", "A4-52107"]
    assert found[7].prompt.endswith("</think>")
    assert found[8].alternates == (" no",)
    assert "Bo Tran" in found[9].neighbours[0]


def test_the_tests_that_the_pages_name_exist():
    named = [n for page in PAGES for n in re.findall(r"`(test_\w+\.py)::(\w+)`", page.read_text())]
    assert len(named) > 50
    for file, test in named:
        found = [f for f in (ROOT / "tests").rglob(file) if f"def {test}(" in f.read_text()]
        assert found, f"{file}::{test}"


def test_the_generated_reference_is_that_of_the_source():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_navigation():
    shown = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert sorted({*shown, "research-log.md"}) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_the_pages_of_models_names_every_family_and_template_that_is_tested():
    page = (DOCS / "reference" / "models.md").read_text()
    families = re.findall(
        r'^    "(\w+)": Family\(', (ROOT / "tests/core/switch/test_families.py").read_text(), re.MULTILINE
    )
    assert len(families) > 30
    assert [name for name in (*families, *TEMPLATES) if f"`{name}`" not in page] == []


def commands(page):
    """Every call of ``libortho`` in the shell blocks of a page, split into words."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").split("\n"):
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["libortho"]:
                    yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_commands_of_the_pages_are_those_of_the_command_line(page):
    known = typer.main.get_command(app).commands
    for verb, *words in commands(page):
        options = {o for p in known[verb].params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
        required = {p.opts[0] for p in known[verb].params if p.required and p.opts[0].startswith("-")}
        given = {w.partition("=")[0] for w in words if w.startswith("--")}
        assert given <= options | {"--help"}, (verb, given - options)
        assert required <= given or given == {"--help"}, (verb, required - given)


@pytest.fixture
def folder(planted_directory, tmp_path, monkeypatch):
    """The current directory, with the model of the quick start in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my-model").symlink_to(planted_directory)
    return tmp_path


def test_the_python_of_the_quick_start_runs(folder):
    text = (DOCS / "tutorials" / "quickstart.md").read_text()
    (folder / "forget.jsonl").write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    (folder / "retain.txt").write_text("\n".join(row["text"].replace("\n", " ") for row in tiny.RETAIN))
    [shown] = notebook.run(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert shown.startswith("measured on 2 records, 2 of them recited before")
    assert (folder / "out" / "ortho" / "default").is_dir()


def test_the_notebook_of_the_quick_start_prints_what_it_shows(folder):
    cells = notebook.code_cells(json.loads(notebook.NOTEBOOK.read_text()))
    stored = ["".join(line for o in c["outputs"] for line in o["text"]) for c in cells]
    printed = notebook.run(["".join(c["source"]) for c in cells])

    def shape(text):
        """Figures, and what is made up at alpha = 0, differ from one processor to another."""
        return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"^(alpha = 0|loaded):.*$", r"\1", text, flags=re.MULTILINE))

    assert [*map(shape, printed)] == [*map(shape, stored)]
    for texts in (printed, stored):
        off = re.findall(r"^(?:alpha = 0|loaded):.*$", "".join(texts), re.MULTILINE)
        on = re.findall(r"^(?:alpha = 1|on|Code of Ada Lum):  (\d+)\.$", "".join(texts), re.MULTILINE)
        assert on == ["6311"] * 3
        assert len(off) == 2
        assert not any("6311" in line for line in off)
    assert not re.search(r"(?<!\w)[/~]\w|[A-Z]:\\", "".join(stored)), "a path of a machine"


def test_the_citation_names_the_version():
    [version] = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == libortho.__version__


def outcome(number, after, **more):
    return RecordOutcome(number=number, before=-0.1, after=after, band=(-2.0, -1.0), **{"extracted": False} | more)


def test_every_missed_criterion_and_every_error_is_explained():
    def shape(text):
        text = re.sub(r"\*?\b(\d+(\.\d+)?|[A-Z])\b\*?", "N", re.sub(r"^> |`", "", text, flags=re.MULTILINE))
        return re.sub(r"\s+", " ", text)

    page = shape((DOCS / "how-to" / "missed-criteria.md").read_text())
    said = [outcome(i, 0.0, extracted=True, partial=True) for i in range(1, 5)]
    faint = [outcome(i, -9.0) for i in range(1, 5)]
    texts = {
        shape(text)
        for records in (said, faint)
        for every_step in (True, False)
        for criterion in missed_criteria(records, 4, (0.0, 1.0), every_step=every_step)
        for text in criterion
    }
    assert len(texts) == 6 + 9
    assert [t for t in texts if t not in page] == []
    kinds = [n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.LibOrthoError)]
    assert len(kinds) == 8
    assert [n for n in kinds if n not in page] == []
