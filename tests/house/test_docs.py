"""What the pages show can be done, and what they link to is there."""

import json
import re
from pathlib import Path

import pytest

from libortho.text.records import load_records

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = re.findall(r"```jsonl\n(.*?)```", (ROOT / "docs" / "records.md").read_text(), re.DOTALL)


def anchors(page):
    """Headings as the links of a web page name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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
