"""The plan of the code: names that are public, files of one subject. The layers are a contract of import-linter."""

import ast
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import libortho

ROOT = Path(__file__).parents[2]
MOST_LINES = 400
OUTSIDE = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
INSIDE = sorted((ROOT / "src").rglob("*.py"))


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def private(file: Path) -> Iterator[str]:
    """Private names of the package that a file imports, or reads off a module of the package."""
    tree = ast.parse(file.read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "libortho":
            modules |= {a.asname or a.name for a in node.names if a.name.islower()}
            yield from (f"from {node.module} import {a.name}" for a in node.names if a.name.startswith("_"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            hidden = node.attr.startswith("_") and not node.attr.startswith("__")
            yield from [f"{node.value.id}.{node.attr}"] if hidden else []
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            given = node.args[0]
            if isinstance(given, ast.Constant) and str(given.value).startswith("libortho"):
                yield f"import_module({given.value!r})"


@pytest.mark.parametrize("file", OUTSIDE, ids=name)
def test_tests_and_benchmarks_use_public_names(file):
    assert list(private(file)) == []


@pytest.mark.parametrize("file", INSIDE, ids=name)
def test_no_module_imports_a_private_name_of_another(file):
    tree = ast.parse(file.read_text())
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("libortho")]
    assert [a.name for n in froms for a in n.names if a.name.startswith("_") and not a.name.startswith("__")] == []


@pytest.mark.parametrize("file", [*INSIDE, *OUTSIDE], ids=name)
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES


def test_no_verb_hides_a_module():
    assert not {m.name for m in pkgutil.iter_modules(libortho.__path__)} & set(libortho.__all__)
