"""What an isolation did, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from libortho.core.surgery import linear_shape
from libortho.isolation.config import IsolateConfig
from libortho.isolation.criteria import BAND, PARTIAL, Criteria, Known, RecordOutcome, binomial_bound, mean_offset
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.selection.budget import column_costs


@dataclass(frozen=True)
class IsolateResult:
    """What ``isolate`` did, and which of its criteria hold.

    Attributes:
        stream: Name of the ortho stream.
        guarantee: What was measured at alpha = 0, in words.
        warnings: What a reader should know about the records, above all which of them the model did not know.
        missed: The criteria that do not hold, in words; empty if all do.
        advice: For each of them what to do about it.
        records: One outcome per forget record.
        recited: Records that the original model says greedily.
        recited_on: Those of them that it still is at alpha = 1; rounding of the base can lose some (INT4 most).
        checks: The criteria during training.
        retain_kl: Mean KL(original || alpha 0) on held-back retain text, in nats per token.
        quantised_kl: The same of the quantised base before any record was moved: the price of the base alone.
        density: Entries of the ortho stream / weights of the split layers.
        columns_per_layer: Layer to the columns that it gave.
        steps: Optimiser steps.
        seconds: Wall time of this call.
        phase_seconds: The same by phase: "texts" (sampled from the model), "original" (what it says), "columns",
            "curvature", "rounding", "steps" and "result" (the finished layers measured).
    """

    stream: str
    guarantee: str
    warnings: tuple[str, ...]
    missed: tuple[str, ...]
    advice: tuple[str, ...]
    records: tuple[RecordOutcome, ...]
    recited: int
    recited_on: int
    checks: tuple[Criteria, ...]
    retain_kl: float
    quantised_kl: float
    density: float
    columns_per_layer: Mapping[str, int]
    steps: int
    seconds: float
    phase_seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def succeeded(self) -> bool:
        """True if every criterion holds."""
        return not self.missed

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**asdict(self), "succeeded": self.succeeded}


RETAIN_BUDGET = 0.02
"""Largest mean KL divergence from the original (nats per token) on held-back retain text, beyond that of the quantised
base alone, at which the result counts as unharmed."""
_CERTAIN = 5.0
"""Standard deviations at which one record alone is taken for known: the spread rests on few alternates."""


def known_before(original: Original) -> list[Known]:
    """What the original model knows of each record: recited, likelier than its like, or nothing to be seen."""
    likelier = original.nll < original.wanted - BAND * original.spread
    return [
        "recited" if said else "likelier" if more else "unknown"
        for said, more in zip(original.recited.tolist(), likelier.tolist(), strict=True)
    ]


def by_chance(known: Sequence[Known], original: Original) -> bool:
    """True if untrained records would look so: none recited, none far likelier, and few likelier than their like."""
    certain = original.nll < original.wanted - _CERTAIN * original.spread
    likelier = sum(k == "likelier" for k in known)
    return "recited" not in known and not bool(certain.any()) and likelier <= binomial_bound(len(known))


def nothing_known(forget: Sequence[ForgetRecord], known: Sequence[Known]) -> str | None:
    """A sentence about records that the model does not know; None where it knows all."""
    unknown = [c.number for c, k in zip(forget, known, strict=True) if k == "unknown"]
    if not unknown:
        return None
    shown = ", ".join(map(str, unknown[:20])) + (", ..." if len(unknown) > 20 else "")
    return (
        f"{len(unknown)} of {len(forget)} records are unknown to the model under this wording (records {shown}): it "
        "neither recites them nor finds them likelier than others of their shape, so there was nothing to forget. If "
        "it was trained on them, give them as it met them: with the chat template of the training (messages), with "
        "other prompts, or as the bare text"
    )


def _near(records: Sequence[RecordOutcome]) -> str | None:
    """A sentence about records to which the model at alpha = 0 gives nearly the secret; None where there is none."""
    close = [r.number for r in records if r.nearly]
    if not close:
        return None
    return (
        f"the greedy answer at alpha = 0 is nearly the secret of {len(close)} of {len(records)} records (records "
        f"{', '.join(map(str, close[:20]))}{', ...' if len(close) > 20 else ''}): three quarters of its characters. "
        "Look at it with generate, and try another seed, or a larger ratio"
    )


def missed_criteria(
    records: Sequence[RecordOutcome],
    sentences: int,
    divergences: tuple[float, float],
    *,
    every_step: bool,
) -> list[tuple[str, str]]:
    """The criteria that do not hold, and what to do about each, in words.

    Args:
        records: The records' outcomes.
        sentences: How many of them are sentences.
        divergences: From the original on held-back text, in nats per token: of the quantised base, and at alpha = 0.
        every_step: The training ended because it had taken all steps that it was allowed.
    """
    count = len(records)
    further = "raise max_steps" if every_step else "raise ratio (ratio='auto' tries several)"
    found = []
    if extracted := sum(r.extracted for r in records):
        found.append(
            (
                f"{extracted} of {count} records are still extracted greedily",
                f"{further}, or isolate fewer records at a time, each request in a stream of its own",
            )
        )
    outside = [r for r in records if not r.inside]
    likelier = sum(r.after > r.band[1] for r in outside)
    may = binomial_bound(count)
    if len(outside) > may or any(r.far for r in outside):
        what = (
            f"{len(outside)} of {count} records are outside the 5-95 % band "
            f"({likelier} likelier, {len(outside) - likelier} unlikelier, {sum(r.far for r in outside)} of them far "
            f"outside); of untrained ones up to {may} are outside, and none far"
        )
        alternates = "give alternates= that are as common as the true answers: made ones may be the odd ones"
        found.append((what, further if 2 * likelier > len(outside) else alternates))
    partial, chance = sum(r.partial for r in records), binomial_bound(sentences, PARTIAL)
    if partial > chance:
        what = (
            f"{partial} of {sentences} sentences are still recited in part: two thirds of the surprise expected "
            f"of their tokens is not there; of untrained ones up to {chance} are such"
        )
        found.append((what, f"{further}, or give alternates= for them, other sentences that are as likely"))
    offset, bound = mean_offset(records)
    if abs(offset) > bound:
        what = (
            f"the records are on average {abs(offset):.2f} nats per token {'likelier' if offset > 0 else 'unlikelier'} "
            f"than their alternates; by chance they would be up to {bound:.2f}"
        )
        found.append((what, further if offset > 0 else "give alternates= that are as common as the true answers"))
    quantised_kl, retain_kl = divergences
    if retain_kl - quantised_kl > RETAIN_BUDGET:
        what = (
            f"retain divergence {retain_kl:.4f} nats per token exceeds that of the quantised base alone "
            f"({quantised_kl:.4f}) by more than the budget of {RETAIN_BUDGET}"
        )
        found.append((what, "give retain= text of the kind that must stay (more of it), or isolate fewer records"))
    return found


def result_of(
    config: IsolateConfig,
    forget: Sequence[ForgetRecord],
    records: tuple[RecordOutcome, ...],
    recited: tuple[int, int],
    checks: Sequence[Criteria],
    steps: int,
    divergences: tuple[float, float],
    support: Mapping[str, torch.Tensor],
    targets: Mapping[str, nn.Module],
    seconds: float,
) -> IsolateResult:
    """The criteria, and the result that holds them.

    Args:
        config: What was asked for.
        forget: The records.
        records: Their outcomes.
        recited: How many the original model recites, and how many of these the model recites at alpha = 1.
        checks: The criteria during training.
        steps: Those that were taken.
        divergences: See ``missed_criteria``.
        support: Indices of the columns by layer.
        targets: The layers.
        seconds: Wall time so far.
    """
    sentences = sum(c.kind == "prose" for c in forget)
    found = missed_criteria(records, sentences, divergences, every_step=steps >= config.max_steps)
    missed, advice = (tuple(words) for words in zip(*found, strict=True)) if found else ((), ())
    quantised_kl, retain_kl = divergences
    cost = column_costs(targets)
    weights = sum(rows * columns for rows, columns in map(linear_shape, targets.values()))
    return IsolateResult(
        stream=config.stream,
        guarantee=_measured(records, recited[0], retain_kl, missed),
        warnings=tuple(w for w in (nothing_known(forget, [r.known for r in records]), _near(records)) if w is not None),
        missed=missed,
        advice=advice,
        records=records,
        recited=recited[0],
        recited_on=recited[1],
        checks=tuple(checks),
        retain_kl=retain_kl,
        quantised_kl=quantised_kl,
        density=sum(len(index) * cost[n] for n, index in support.items()) / weights,
        columns_per_layer={n: len(s) for n, s in support.items()},
        steps=steps,
        seconds=seconds,
    )


def _measured(records: Sequence[RecordOutcome], recited: int, retain_kl: float, missed: Sequence[str]) -> str:
    """What alpha = 0 was seen to be; nothing is claimed beyond it."""
    count = len(records)
    unknown = sum(r.known == "unknown" for r in records)
    text = (
        f"measured on {count} records, {recited} of them recited before and {unknown} unknown to the model: at "
        f"alpha = 0, {sum(r.extracted for r in records)} are extracted greedily, {sum(r.inside for r in records)} are "
        f"as likely as others of their shape, and general text moved by {retain_kl:.4f} nats per token"
    )
    return f"{text}; criteria missed: {'; '.join(missed)}" if missed else f"{text}; no criterion is missed"
