"""What all pages share: stored files, Markdown tables, limits, and what made a row."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .._method import METHOD

Row = dict[str, Any]
UNRECORDED, UNMEASURED, MISSED = "not recorded", "not measured yet", "**not reached**"
TOLD = {"model", "case", "seed", "records", "objective", "gradient_weight", "ratio", "setting", "base"}
"""Settings that headings and tables say."""
MACHINE = ("gpu", "processor", "threads", "cpu_capability", "python", "torch", "transformers")


def read(results: Path, name: str) -> Row:
    """A stored file, or an empty dict if there is none."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def is_earlier(row: Row) -> bool:
    """Whether an earlier method made the row.

    Rows that name no objective are judged by their commit: "stored in X" was written before the present method.
    """
    if objective := row.get("objective"):
        return bool(objective != METHOD["objective"])
    return str(row.get("commit", "")).startswith("stored in")


def newest(rows: Sequence[Row], script: str) -> tuple[list[Row], str]:
    """Rows of the present method, or all if there are none; and what is said about the earlier ones of ``script``."""
    present = [r for r in rows if not is_earlier(r)]
    older = len(rows) - len(present)
    if not older:
        return list(rows), ""
    if present:
        return present, f"Left out: {older} older {'row' if older == 1 else 'rows'} of an earlier method."
    return list(rows), earlier(rows, script)


def earlier(rows: Sequence[Row], script: str) -> str:
    """The warning above figures of an earlier method, and the commands that would replace them."""
    commits = ", ".join(dict.fromkeys(str(r.get("commit", UNRECORDED)) for r in rows))
    again = " and ".join(dict.fromkeys(called(script, arguments(r.get("settings")) or ()) for r in rows))
    left = f"The present method has not been measured here yet. To replace the figures, run {again}."
    return f"**Of an earlier method (commit {commits}).** {left}"


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def share(value: float | None) -> str:
    """A share in percent, without needless digits."""
    return "-" if value is None else f"{round(100 * value, 1):g} %"


def interval(found: Row | None, form: str = ".3f") -> str:
    """A value with its interval, as audits store it."""
    if found is None:
        return "-"
    value, low, high = (number(found[k], form) for k in ("value", "low", "high"))
    return value if "-" in (low, high) else f"{value} [{low}, {high}]"


def judged(text: str, holds: bool | None) -> str:
    """A figure beside its limit, marked if the limit is missed or if the figure cannot tell."""
    return text if holds else f"{text} {MISSED}" if holds is False else f"{text} (undecided)"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in cells)


def arguments(settings: Any) -> list[str] | None:
    """Those of the command line as they are stored, or None; paths of the machine that it ran on are left out."""
    given = settings.get("arguments") if isinstance(settings, dict) else None
    return None if given is None else ["PATH" if "/" in a else a for a in given]


def called(script: str, given: Sequence[str]) -> str:
    return f"`{shlex.join(['python', f'benchmarks/{script}.py', *given])}`"


def command(script: str, settings: Any) -> str:
    """The command line of a row."""
    given = arguments(settings)
    return called(script, given or ()) + (f", arguments {UNRECORDED}" if given is None else "")


def machine(found: Any) -> str:
    if not isinstance(found, dict):
        return UNRECORDED
    names = {"threads": "threads", "python": "Python", "torch": "torch", "transformers": "transformers"}
    known = [f"{names.get(k, '')} {found[k]}".strip() for k in MACHINE if k in found]
    missing = [k for k in MACHINE[1:] if k not in found]
    return ", ".join(known) + (f"; {UNRECORDED}: {', '.join(missing)}" if missing else "")


def settings(row: Row) -> str:
    """What else decides the figures, without what headings and tables say."""
    found = row.get("settings")
    if not isinstance(found, dict):
        return UNRECORDED
    kept = {**found, **row.get("config", {})}
    left_out = {"arguments", *TOLD}
    shown = [f"{k} {v}" for k, v in kept.items() if k not in left_out and v is not None]
    return ", ".join(shown) or "as the table says"


def made_by(script: str, rows: Sequence[Row], label: Callable[[Row], str]) -> str:
    """Command, commit, date, machine and settings; once for all rows that share them."""
    groups: dict[str, list[str]] = {}
    for r in rows:
        lines = {
            "command": command(script, r.get("settings")),
            "commit": str(r.get("commit", UNRECORDED)),
            "date": str(r.get("date", UNRECORDED)),
            "machine": machine(r.get("machine")),
            "settings": settings(r),
        }
        groups.setdefault("\n".join(f"- {k}: {v}" for k, v in lines.items()), []).append(label(r))
    if len(groups) == 1:
        return next(iter(groups))
    return "\n\n".join(f"{', '.join(dict.fromkeys(labels))}:\n\n{lines}" for lines, labels in groups.items())


def page(title: str, about: str, *parts: str) -> str:
    head = "<!-- Written by `python -m benchmarks.report`; do not edit. -->"
    return "\n\n".join(p for p in (f"# {title}", head, about, *parts) if p) + "\n"
