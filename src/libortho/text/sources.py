"""Rows of records as they stand in a list, a ``datasets.Dataset``, or a JSONL, JSON, CSV or text file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from libortho.core.errors import DataError

Source = str | Path | Iterable[Any]
"""Rows: a list of dicts, a ``datasets.Dataset``, or a path to JSONL, JSON, CSV or txt."""
_LISTS = ("alternates", "neighbours", "messages", "tools", "chat_template_kwargs", "perturbed_answer")
"""What a CSV cell holds as JSON; alternates and neighbours may also be texts with ``|`` between them."""


def read_rows(source: Source, name: str = "data", *, blocks: bool = False, cells: bool = False) -> list[Any]:
    """The rows of a source as they stand there, unchecked.

    Args:
        source: See above.
        name: What the rows are called in errors.
        blocks: A .txt file holds one text per block between blank lines; otherwise one per line.
        cells: Every cell of a CSV file is text, the empty ones too; otherwise those are left out, and lists are read.

    Raises:
        DataError: if the source is missing or malformed.
    """
    if isinstance(source, str | Path):
        return _read(Path(source), name, blocks, cells)
    return _iterate(source, name)


def kind_of(path: str | Path) -> str:
    """The ending of a file's name, which says what is in it."""
    return Path(path).suffix.lower()


def _read(path: Path, name: str, blocks: bool, cells: bool) -> list[Any]:
    kind = kind_of(path)
    if blocks and kind != ".txt":
        raise DataError(f"{name}: {path} ends in {path.suffix!r}; blocks of lines are for .txt")
    if not path.is_file():
        raise DataError(f"{name}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{name}: {path} cannot be read ({error.strerror})") from error
    lines = text.split("\n")  # splitlines would also cut at U+2028 and others, which JSON strings may hold
    if kind == ".csv":
        rows = _table(text, path, name)
        return rows if cells else [_without_empty(row, number, path, name) for number, row in enumerate(rows, 1)]
    if kind == ".txt":
        texts = [block.strip("\n") for block in re.split(r"\n(?:[^\S\n]*\n)+", text)] if blocks else lines
        return [{"text": t} for t in texts if t.strip()]
    if kind == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: {path} is not JSON ({error})") from error
        if not isinstance(rows, list):
            raise DataError(f"{name}: {path} holds a {type(rows).__name__}; expected a list of records")
        return rows
    if kind == ".jsonl":
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{name}: line {number} of {path} is not JSON ({error})") from error
        return rows
    raise DataError(f"{name}: {path} ends in {path.suffix!r}; expected .jsonl, .json, .csv or .txt")


def _table(text: str, path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a CSV file by the names in its first line, every cell as text."""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text), restval="", strict=True)
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise DataError(f"{name}: {path} is not CSV ({error})") from error
    if twice := sorted({c for c in columns if c and columns.count(c) > 1}):
        raise DataError(f"{name}: the first line of {path} names the column {twice[0]!r} twice; rename one")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise DataError(f"{name}: row {number} of {path} has more cells than the first line has names")
    return rows


def _delimiter(text: str) -> str:
    """A comma, unless the first line has none and has semicolons (as Excel writes in many countries) or tabs."""
    head = re.sub(r'"[^"]*"', "", text.lstrip("\n").partition("\n")[0])
    return next((mark for mark in ",;\t" if mark in head), ",")


def _without_empty(cells: Mapping[str, str], number: int, path: Path, name: str) -> dict[str, Any]:
    """A row without its empty cells; cells that hold lists are read as such."""
    row: dict[str, Any] = {k: v for k, v in cells.items() if v}
    for key in _LISTS:
        cell = row.get(key)
        if cell is None:
            continue
        texts = key in ("alternates", "neighbours")
        if cell.strip().lower() in ("null", "nan", "none") and texts:
            del row[key]
        elif cell.lstrip()[:1] in ("[", "{", '"'):
            try:
                found = json.loads(cell)
                row[key] = [found] if texts and isinstance(found, str) else found
            except json.JSONDecodeError as error:
                if not texts or "|" not in cell:
                    raise DataError(f"{name}: {key!r} in row {number} of {path} is not JSON ({error})") from error
                row[key] = cell.split("|")
        elif texts:
            row[key] = cell.split("|")
    return row


def _iterate(source: Any, name: str) -> list[Any]:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"{name} is a {type(source).__name__}; expected a list of dicts, a Dataset or a path")
    return list(source)
