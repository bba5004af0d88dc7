"""Runs the code cells of the quick start's notebook.

``python tests/notebook.py`` stores what they print on the model of the tests.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import tiny

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "quickstart.ipynb"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def run(sources: Sequence[str]) -> list[str]:
    """What each piece of code prints; all run in order, in one namespace and in the current directory."""
    namespace: dict[str, Any] = {}
    printed = []
    for i, source in enumerate(sources, 1):
        with redirect_stdout(StringIO()) as out:
            exec(compile(source, f"<cell {i}>", "exec"), namespace)
        printed.append(out.getvalue())
    return printed


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    cells = code_cells(notebook)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ["LIBORTHO_CACHE"] = folder
        tiny.save_planted(Path("my-model"))
        printed = run(["".join(c["source"]) for c in cells])
    for count, (cell, text) in enumerate(zip(cells, printed, strict=True), 1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell.update(execution_count=count, outputs=[stream] if text else [])
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
