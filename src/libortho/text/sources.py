"""Rows of records as they stand in a list, a ``datasets.Dataset``, or a JSONL, JSON, CSV or text file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from libortho.core.errors import DataError

Source = str | Path | Iterable[Any]
"""Rows: a list of dicts, a ``datasets.Dataset``, or a path to JSONL, JSON, CSV or txt."""
_LISTS = ("alternates", "neighbours", "messages", "tools", "chat_template_kwargs", "perturbed_answer")
"""What a CSV cell holds as JSON; alternates and neighbours may also be texts with ``|`` between them."""


def read_rows(source: Source, name: str = "data") -> list[Any]:
    """The rows of a source as they stand there, unchecked.

    Raises:
        DataError: if the source is missing or malformed.
    """
    return _read(Path(source), name) if isinstance(source, str | Path) else _iterate(source, name)


def _read(path: Path, name: str) -> list[Any]:
    if not path.is_file():
        raise DataError(f"{name}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {path} is not UTF-8 text ({error})") from error
    except OSError as error:
        raise DataError(f"{name}: {path} cannot be read ({error.strerror})") from error
    lines = text.split("\n")  # splitlines would also cut at U+2028 and others, which JSON strings may hold
    if path.suffix == ".csv":
        return _csv(text, path, name)
    if path.suffix == ".txt":
        return [{"text": line} for line in lines if line.strip()]
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: {path} is not JSON ({error})") from error
        if not isinstance(rows, list):
            raise DataError(f"{name}: {path} holds a {type(rows).__name__}; expected a list of records")
        return rows
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{name}: line {number} of {path} is not JSON ({error})") from error
        return rows
    raise DataError(f"{name}: {path} ends in {path.suffix!r}; expected .jsonl, .json, .csv or .txt")


def _csv(text: str, path: Path, name: str) -> list[dict[str, Any]]:
    """Rows by the names in the first line; empty cells are left out, and cells that hold lists are read as such."""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows: list[dict[Any, Any]] = [{k: v for k, v in row.items() if v not in (None, "", [])} for row in reader]
    except csv.Error as error:
        raise DataError(f"{name}: {path} is not CSV ({error})") from error
    for number, row in enumerate(rows, 1):
        if None in row:
            raise DataError(f"{name}: row {number} of {path} has more cells than the first line has names")
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
    return rows


def _iterate(source: Any, name: str) -> list[Any]:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"{name} is a {type(source).__name__}; expected a list of dicts, a Dataset or a path")
    return list(source)
