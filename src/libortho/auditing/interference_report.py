"""What several owners' streams do to each other: figures for each subset that is on, and verdicts that follow by rule.

    facts of X          records of X that are said with X alone on or with all on, and not with all off
    left                records of X that are said with all on but X, and not with all off
    kept                facts of the others that are said with all on but X
    together            facts of each that are said with all on

Dropping X is clean where nothing is left and all is kept: what FlexOlmo (arXiv 2507.07024) asks of experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from libortho.auditing.report import Check, Verdict, at_least, at_most, json_ready
from libortho.auditing.thresholds import AUC, KL, OTHERS_KEPT, PERPLEXITY, POINT
from libortho.core.files import write_atomically
from libortho.core.version import __version__
from libortho.evaluation.intervals import Estimate

SCHEMA = "libortho-interference/1"


@dataclass(frozen=True)
class OwnerFigures:
    """What a model says of one owner's records.

    Attributes:
        records: How many there are.
        recited: Numbers of those that it says greedily, from 1.
        loss: Mean over the records of the loss of a token of the completion, in nats.
        auc: How well the loss tells the records from holdout records: 0.5 is not at all. None without a holdout.
        auc_moved: The same minus that of all streams off, paired by record.
    """

    records: int
    recited: tuple[int, ...]
    loss: float
    auc: Estimate | None = None
    auc_moved: Estimate | None = None


@dataclass(frozen=True)
class SubsetFigures:
    """A model with some of its streams on.

    Attributes:
        on: The streams that are on, in the order of the model.
        label: The same in words.
        owners: Figures by owner.
        perplexity: Of general text.
        perplexity_ratio: The same over that of all streams off.
        kl: Mean KL(all off || subset) on general text, in nats per token.
    """

    on: tuple[str, ...]
    label: str
    owners: Mapping[str, OwnerFigures]
    perplexity: float
    perplexity_ratio: float
    kl: float


@dataclass(frozen=True)
class InterferenceReport:
    """The matrix: subsets of streams, and what is recited under each.

    Attributes:
        streams: The model's streams.
        owners: Those of them that records were given for.
        measured: Which subsets were measured, in words.
        rows: Figures of each subset, all streams off first.
        general_tokens: Judged tokens of general text.
        warnings: What a reader should know about the data.
        name: What the model is called.
        seconds: Wall time; not part of the JSON.
    """

    streams: tuple[str, ...]
    owners: tuple[str, ...]
    measured: str
    rows: tuple[SubsetFigures, ...]
    general_tokens: int
    warnings: tuple[str, ...] = ()
    name: str | None = None
    seconds: float = field(default=0.0, compare=False)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """For each owner whether dropping it takes its facts and leaves the others'; then all together, and ability."""
        return (*(_without(self, o) for o in self.owners), _together(self), _ability(self))

    @property
    def missed(self) -> tuple[str, ...]:
        """What failed, in words; empty if nothing did."""
        return tuple(v.text for v in self.verdicts if v.status == "fail")

    def row(self, *on: str) -> SubsetFigures | None:
        """The figures with exactly these streams on; None if they were not measured."""
        return next((r for r in self.rows if set(r.on) == set(on)), None)

    def to_dict(self) -> dict[str, Any]:
        """The figures and verdicts as JSON-ready values."""
        data = {
            "schema": SCHEMA, "libortho": __version__, **asdict(self),
            "verdicts": [v.to_dict() for v in self.verdicts], "missed": self.missed,
        }  # fmt: skip
        del data["seconds"]
        ready: dict[str, Any] = json_ready(data)
        return ready

    def to_json(self, path: str | Path | None = None) -> str:
        """The figures as JSON text; written to ``path`` as well if one is given."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        if path is not None:
            write_atomically(Path(path), text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The figures as one self-contained HTML page; written to ``path`` as well if one is given."""
        from libortho.auditing.page.matrix import render_matrix

        text = render_matrix(self.to_dict())
        if path is not None:
            write_atomically(Path(path), text)
        return text


def label_of(on: Sequence[str], streams: Sequence[str]) -> str:
    """A subset in words: "none", "hr alone", "hr + legal", "all but hr", "all"."""
    off = [s for s in streams if s not in on]
    if not on:
        return "none"
    if not off:
        return "all"
    if len(on) == 1:
        return f"{on[0]} alone"
    return f"all but {off[0]}" if len(off) == 1 else " + ".join(on)


def _said(report: InterferenceReport, owner: str, on: Sequence[str]) -> set[int] | None:
    """Records of an owner that are said with these streams on and not with all off; None if that was not measured."""
    row, off = report.row(*on), report.row()
    if row is None or off is None:
        return None
    return set(row.owners[owner].recited) - set(off.owners[owner].recited)


def _facts(report: InterferenceReport, owner: str) -> set[int]:
    """What the owner's stream brings."""
    return (_said(report, owner, [owner]) or set()) | (_said(report, owner, report.streams) or set())


def _without(report: InterferenceReport, owner: str) -> Verdict:
    """Does dropping an owner take its facts, and leave those of the others?"""
    key, rest = f"without {owner}", [s for s in report.streams if s != owner]
    row, left = report.row(*rest), _said(report, owner, rest)
    if row is None or left is None or (report.row(owner) is None and report.row(*report.streams) is None):
        return Verdict(
            key, "withheld", f"Withheld: all streams but {owner}, and {owner} alone or all streams, were not measured."
        )
    facts = _facts(report, owner) | left
    others = {o: (own, own & (_said(report, o, rest) or set()))
              for o in report.owners if o != owner and (own := _facts(report, o))}  # fmt: skip
    if not facts:
        return Verdict(
            key, "withheld", f"Withheld: {owner}'s stream says none of its records; there is nothing to take."
        )
    if not others:
        return Verdict(key, "withheld", "Withheld: the others' streams say none of their records; none can be kept.")
    takes = at_most(f"share of {owner}'s facts left", len(left) / len(facts), POINT)
    keeps = [at_least(f"share of {o}'s facts kept", len(kept) / len(own), OTHERS_KEPT)
             for o, (own, kept) in others.items()]  # fmt: skip
    every, stay = (sum(map(len, sets)) for sets in zip(*others.values(), strict=True))
    text = (
        f"dropping {owner} {'takes' if takes.ok else 'does not take'} {owner}'s facts "
        f"({len(left)} of {len(facts)} left) and {'leaves' if all(c.ok for c in keeps) else 'does not leave'} "
        f"the others' ({stay} of {every} kept)"
    )
    checks: list[Check] = [takes, *keeps]
    moved = row.owners[owner].auc_moved
    if moved is not None:
        near = moved.low is None or moved.high is None or (moved.low <= AUC and moved.high >= -AUC)
        trace = at_most(f"membership AUC of {owner}, away from all off", abs(moved.value), AUC, possibly=near)
        checks.append(trace)
        if trace.ok is False:
            text += f"; its loss still tells its records apart (AUC {moved.value:+.2f} against all off)"
    return Verdict(key, _status(checks), f"{text}.", tuple(checks))


def _together(report: InterferenceReport) -> Verdict:
    """Do all streams together say what each brings?"""
    pairs = {o: (own, own & said) for o in report.owners
             if (own := _facts(report, o)) and (said := _said(report, o, report.streams)) is not None}  # fmt: skip
    if not pairs:
        return Verdict(
            "together", "withheld", "Withheld: all streams on were not measured, or say none of the records."
        )
    checks = [at_least(f"share of {o}'s facts said with all on", len(said) / len(own), OTHERS_KEPT)
              for o, (own, said) in pairs.items()]  # fmt: skip
    every, whole = (sum(map(len, sets)) for sets in zip(*pairs.values(), strict=True))
    spoilt = "" if all(c.ok for c in checks) else ": the streams disturb each other"
    text = f"with all streams on, {whole} of their {every} facts are said{spoilt}."
    return Verdict("together", _status(checks), text, tuple(checks))


def _ability(report: InterferenceReport) -> Verdict:
    """Is general ability what it is with all streams off, whichever are on?"""
    most, moved = max(report.rows, key=lambda r: r.perplexity_ratio), max(report.rows, key=lambda r: r.kl)
    checks = (
        at_most(f"perplexity over that of all off ({most.label})", most.perplexity_ratio, PERPLEXITY),
        at_most(f"KL from all off, nats per token ({moved.label})", moved.kl, KL),
    )
    text = (
        f"perplexity of general text is at most {most.perplexity_ratio:.4f} times that of all off ({most.label}), and "
        f"such text moves by at most {moved.kl:.4f} nats per token ({moved.label})."
    )
    return Verdict("ability", _status(checks), text, checks)


def _status(checks: Sequence[Check]) -> str:
    return "fail" if any(c.ok is False for c in checks) else "pass"
