"""``audit --streams``: what several owners' streams do to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from libortho.cli import tables
from libortho.cli.options import check_reports, device_of, dtype_of, open_model
from libortho.cli.sources import Reading, read_sources, say_running_text
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, progress_bars
from libortho.core.errors import ConfigError, DataError
from libortho.core.escapes import one_line

if TYPE_CHECKING:
    from libortho.auditing.interference_report import InterferenceReport, OwnerFigures

Streams = Annotated[
    list[str] | None,
    typer.Option(
        "--streams", metavar="NAME=FILE",
        help="In place of --forget: the records that a stream holds. Repeat it for each owner; measures every subset.",
    ),
]  # fmt: skip
HoldoutStreams = Annotated[
    list[str] | None,
    typer.Option(
        "--holdout-streams", metavar="NAME=FILE",
        help="With --streams: records of the same kind as that stream's, never trained on. Repeatable.",
    ),
]  # fmt: skip


def audit_streams(
    model: str,
    streams: Sequence[str],
    holdout: Sequence[str] | None,
    reading: Reading,
    *,
    general: Path | None,
    out: Path | None,
    html: Path | None,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    others: Mapping[str, Any],
) -> None:
    """Measure the matrix, write and show it.

    Args:
        model: A checkpoint.
        streams: Texts ``NAME=FILE``.
        holdout: The same of records never trained on.
        reading: How files are read.
        general: Text for perplexity.
        out: Where JSON goes.
        html: Where the page goes.
        seed: Of the intervals.
        device: Name of the device.
        dtype: Name of the dtype.
        as_json: Print JSON alone.
        others: Options of the audit of one forget set, by name; none may be given.

    Raises:
        ConfigError: if an option is wrong, or names a stream that is not there.
        DataError: if a file is missing, malformed or empty.
        Exit: with code 3 if a verdict is "fail".
    """
    from libortho.auditing.interference import check_owners, interference
    from libortho.checkpoint import is_checkpoint, stream_names

    if wrong := [name for name, value in others.items() if value]:
        raise ConfigError(
            f"--streams is given with {', '.join(wrong)}, which belong{'s' * (len(wrong) == 1)} to the audit of one "
            "forget set; leave out one or the other"
        )
    data, unseen = _files("--streams", streams), _files("--holdout-streams", holdout or ())
    check_reports(out, html)
    kind, where = dtype_of(dtype), device_of(device)
    if not is_checkpoint(model):
        raise ConfigError(f"--streams is given, but {model} is not a checkpoint of libortho; make one with tune")
    check_owners(stream_names(Path(model)), data, unseen)
    named = {f"data of {n}": p for n, p in data.items()} | {f"holdout of {n}": p for n, p in unseen.items()}
    rows = read_sources(reading, **named)
    for name, found in rows.items():
        if not found:
            raise DataError(f"{name}: {named[name]} holds no record; expected at least one")
    say_running_text("general", general)
    net, tokenizer = open_model(model, kind, where)
    with progress_bars() as progress:
        report = interference(
            net, tokenizer, {n: rows[f"data of {n}"] for n in data},
            holdout={n: rows[f"holdout of {n}"] for n in unseen}, text=general,
            name=Path(model).name, seed=seed, progress=progress,
        )  # fmt: skip
    if out is not None:
        report.to_json(out)
    if html is not None:
        report.to_html(html)
    if as_json:
        emit(report.to_dict())
    else:
        show_interference(report, Terminal())
    if report.missed:
        raise typer.Exit(3)


def show_interference(report: InterferenceReport, console: Terminal) -> None:
    """Verdicts first, then a row for each subset of streams that is on, and a column for each owner."""
    for verdict in report.verdicts:
        tables.note(console, f"{verdict.status.upper():9}{verdict.key}: {verdict.text}")
    for warning in report.warnings:
        tables.note(console, f"warning: {warning}")
    console.print()
    table = Table(title="records said, nats per token")
    for name in ("streams on", *report.owners, "perplexity", "KL"):
        table.add_column(Text(one_line(name)))
    for row in report.rows:
        cells = [row.label, *(_cell(row.owners[o]) for o in report.owners)]
        cells += [f"x {row.perplexity_ratio:.3f}", f"{row.kl:.4f}"]
        table.add_row(*(Text(one_line(c)) for c in cells))
    tables.show_table(table, console)
    tables.note(console, f"{report.measured}; {report.seconds:.0f} s")


def _cell(found: OwnerFigures) -> str:
    auc = "" if found.auc is None else f", AUC {found.auc.value:.2f}"
    return f"{len(found.recited)}/{found.records}, {found.loss:.2f}{auc}"


def _files(option: str, texts: Sequence[str]) -> dict[str, Path]:
    """Path by stream name.

    Raises:
        ConfigError: if a text is no ``NAME=FILE``, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise ConfigError(f"{option} is {text!r}; expected NAME=FILE, such as hr=hr.jsonl")
        if name in found:
            raise ConfigError(f"{option} names {name!r} twice; put all records of a stream into one file")
        found[name] = Path(path)
    return found
