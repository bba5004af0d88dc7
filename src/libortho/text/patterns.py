"""Records from a table: a pattern for the prompt and one for the completion, with the names of columns in braces.

    name,code            prompt      "The code of {name} is"        {"prompt": "The code of Ada Lum is",
    Ada Lum,0471         completion  " {code}."                      "completion": " 0471."}

A cell is taken as it stands, as text. ``{{`` and ``}}`` are literal braces. The columns that no pattern names are not
used, whatever they are called.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libortho.core.errors import ConfigError, DataError
from libortho.text.sources import Source, kind_of, read_rows

logger = logging.getLogger(__name__)

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAMED_AT_MOST = 5
"""Rows that an error names."""


@dataclass(frozen=True)
class Filled:
    """What patterns made of a table.

    Attributes:
        records: Rows as :func:`libortho.isolate` takes them.
        rows: Rows of the table.
        empty: Rows that were left out because a cell that a pattern names is empty.
        repeated: Rows that were left out because they make the same record as an earlier one.
    """

    records: list[dict[str, Any]]
    rows: int
    empty: int
    repeated: int


def read_records(
    source: Source,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    chat: bool = False,
    blocks: bool = False,
    skip_empty: bool = False,
    name: str = "data",
) -> list[dict[str, Any]]:
    """Rows of records for ``isolate`` and ``audit``, from a table of any columns or from a text file.

    Args:
        source: A path to JSONL, JSON, CSV or txt, a list of dicts, or a ``datasets.Dataset``.
        prompt: Pattern of the prompt, such as ``"The code of {name} is"``. Columns that are called prompt or completion
            mean nothing by themselves then.
        completion: Pattern of the completion, such as ``" {code}."``. Without ``prompt`` it is the whole text.
        chat: The prompt is what the user says, the completion what the assistant answers, in the model's chat template.
        blocks: A .txt file holds one text per block between blank lines; otherwise one per line.
        skip_empty: Leave out rows where a cell that a pattern names is empty; otherwise they are an error.
        name: What the rows are called in errors, for example "forget".

    Returns:
        The rows. Without patterns they are as they stand in the source.

    Raises:
        ConfigError: if a pattern is malformed, or one is missing.
        DataError: if the source is missing or malformed, lacks a column, or has an empty cell where one is named.
    """
    if completion is None:
        check_patterns(prompt, completion, chat)
        if skip_empty:
            raise ConfigError("skip_empty is given without patterns; give completion, too")
        return read_rows(source, name, blocks=blocks)
    if blocks:
        raise ConfigError("blocks and patterns are both given; blocks are for .txt, which has no columns")
    made = fill(source, prompt, completion, chat=chat, skip_empty=skip_empty, name=name)
    if made.empty or made.repeated:
        logger.warning("%s: %s", name, left_out(made))
    return made.records


def left_out(made: Filled) -> str:
    """How many rows made no record, and why."""
    return f"{made.empty} rows with an empty cell and {made.repeated} that repeat an earlier one are left out"


def fill(source: Source, prompt: str | None, completion: str, *, chat: bool, skip_empty: bool, name: str) -> Filled:
    """Fill the patterns with every row of a source; see :func:`read_records`."""
    check_patterns(prompt, completion, chat)
    where = f"{name}: {source}" if isinstance(source, str | Path) else name
    if isinstance(source, str | Path) and kind_of(source) == ".txt":
        raise DataError(f"{where} has no columns, which patterns need; expected .csv, .jsonl or .json")
    rows = read_rows(source, name, cells=True)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: row {number} is a {type(row).__name__}; expected one with columns")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    named = [*_columns(prompt or ""), *_columns(completion)]
    if rows and (unknown := [c for c in named if c not in columns]):
        raise DataError(
            f"{where} has no column {unknown[0]!r}, which a pattern names; its columns are "
            f"{', '.join(map(repr, columns))}"
        )
    texts = [{c: _cell(row.get(c), c, number, where) for c in named} for number, row in enumerate(rows, 1)]
    empty = [i for i, row in enumerate(texts) if not all(cell.strip() for cell in row.values())]
    if empty and not skip_empty:
        raise DataError(f"{where}: {_empty(empty, texts)}")
    kept = [row for i, row in enumerate(texts) if i not in set(empty)]
    if not kept:
        raise DataError(f"{where} holds no row that makes a record; expected at least one under its first line")
    records: list[dict[str, Any]] = []
    seen = set()
    for row in kept:
        pair = (_filled(prompt or "", row), _filled(completion, row))
        if pair not in seen:
            seen.add(pair)
            records.append(_record(*pair, chat))
    return Filled(records, len(rows), len(empty), len(kept) - len(records))


def check_patterns(prompt: str | None, completion: str | None, chat: bool) -> None:
    """Raise ConfigError unless the patterns are well-formed and make a record together."""
    if completion is None:
        if prompt is not None or chat:
            raise ConfigError(
                f"{'a prompt' if prompt is not None else 'chat'} is given without a completion; give both"
            )
        return
    if chat and prompt is None:
        raise ConfigError("chat is given without a prompt, which is what the user says; give prompt and completion")
    for kind, pattern in (("prompt", prompt), ("completion", completion)):
        for piece in _PIECE.finditer(pattern or ""):
            if piece.group() in "{}" or piece.group(1) == "":
                raise ConfigError(
                    f"{kind} is {pattern!r}; expected text with names of columns in braces, such as {{name}}; a "
                    "literal brace is written twice"
                )
    if not _columns(completion):
        raise ConfigError(
            f"completion is {completion!r}, which names no column: every record would say the same; expected a column "
            "in braces, such as {code}"
        )


def _columns(pattern: str) -> list[str]:
    return [p.group(1) for p in _PIECE.finditer(pattern) if p.group(1)]


def _filled(pattern: str, row: Mapping[str, str]) -> str:
    return _PIECE.sub(lambda p: row[p.group(1)] if p.group(1) else p.group()[0], pattern)


def _cell(value: Any, column: str, number: int, where: str) -> str:
    """A cell as text. A float or a list has several spellings, and which one was learnt is not known."""
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise DataError(
        f"{where}: {column!r} in row {number} is a {type(value).__name__}; expected text or a whole number (write it "
        "as text, as the training had it)"
    )


def _empty(empty: Sequence[int], rows: Sequence[Mapping[str, str]]) -> str:
    """The sentence about rows with an empty cell."""
    places = [f"{next(c for c, cell in rows[i].items() if not cell.strip())!r} in row {i + 1}" for i in empty]
    more = f" and {len(places) - _NAMED_AT_MOST} more" if len(places) > _NAMED_AT_MOST else ""
    return (
        f"nothing stands in {', '.join(places[:_NAMED_AT_MOST])}{more}; fill it in, or leave such rows out "
        "(libortho records --skip-empty, skip_empty=True in Python)"
    )


def _record(prompt: str, completion: str, chat: bool) -> dict[str, Any]:
    if chat:
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
    return {"prompt": prompt, "completion": completion} if prompt else {"text": completion}
