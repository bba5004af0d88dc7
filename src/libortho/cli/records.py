"""The command that makes records of a table: records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from libortho.cli import tables
from libortho.cli.models import next_commands
from libortho.cli.options import Json
from libortho.cli.sources import AsChat, Blocks, Completion, Prompt, kind_of_texts
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, note
from libortho.core.errors import ConfigError
from libortho.core.files import check_report, write_atomically

_SHOWN = 3
"""Records that ``records`` shows."""


def records(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, JSONL or JSON with any columns, or txt.")],
    prompt: Prompt = None,
    completion: Completion = None,
    chat: AsChat = False,
    blocks: Blocks = False,
    skip_empty: Annotated[
        bool, typer.Option("--skip-empty", help="Leave out rows where a cell that a pattern names is empty.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSONL to write; without it samples are shown only.")] = None,
    as_json: Json = False,
) -> None:
    """Make records of a table or a text file, and show samples."""
    from libortho.text.patterns import Filled, check_patterns, fill
    from libortho.text.sources import kind_of, read_rows

    check_report(out, "--out")
    if out is not None and out.resolve() == source.resolve():
        raise ConfigError(f"--out is {out}, the file that is read; expected another")
    text = kind_of(source) == ".txt"
    if completion is None and not text:
        check_patterns(prompt, completion, chat)
        raise ConfigError(f"{source} is a table, and no pattern is given; give --prompt and --completion")
    if completion is not None:
        if blocks:
            raise ConfigError("--blocks is given with patterns; blocks are for .txt, which has no columns")
        made = fill(source, prompt, completion, chat=chat, skip_empty=skip_empty, name="records")
    else:
        check_patterns(prompt, completion, chat)
        if skip_empty:
            raise ConfigError("--skip-empty is given without patterns; a .txt has no empty rows, leave it out")
        rows = read_rows(source, "records", blocks=blocks)
        made = Filled(rows, len(rows), 0, 0)
    if out is not None:
        write_atomically(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made.records))
    if as_json:
        counts = {"rows": made.rows, "empty": made.empty, "repeated": made.repeated}
        emit({"out": None if out is None else str(out), "records": len(made.records), **counts})
        return
    kind = f"of {made.rows} rows; {made.empty} left out as empty, {made.repeated} as repeated"
    kind = kind_of_texts(blocks) if text else kind
    note(f"{len(made.records)} records from {source}, {kind}. Samples:")
    last = len(made.records) - 1
    for number in sorted({round(i * last / (_SHOWN - 1)) for i in range(_SHOWN)} if made.records else ()):
        tables.note(Terminal(soft_wrap=True), f"{number + 1}: {_sample(made.records[number])}")
    if completion is not None and prompt and not chat and _glued(made.records):
        note("There is no blank between prompt and completion. Most texts have one: begin the completion with it.")
    if out is not None:
        note(f"Written to {out}. It holds the secrets in plain text.")
        next_commands(["isolate", "MODEL", "--forget", out, "--out", "out"])


def _sample(record: Mapping[str, Any]) -> str:
    """A record on one line, with its blanks and line breaks visible."""
    parts = [m["content"] for m in record.get("messages", ())] or [record[k] for k in record]
    return " -> ".join(json.dumps(p, ensure_ascii=False) for p in parts)


def _glued(made: Sequence[Mapping[str, Any]]) -> bool:
    return any(r["prompt"][-1:].strip() and r["completion"][:1].strip() for r in made if r.get("prompt"))
