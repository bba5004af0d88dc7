"""When a record is gone: figures of each record, and the criteria on all of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

import torch
from torch import Tensor

from libortho.isolation.equations import Seen
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import all_first, grouped_scores, judged, log_probability
from libortho.text.encoding import Encoded

logger = logging.getLogger(__name__)

CLOSE = 0.05
"""Offset of the mean surprise, in nats per token, that needs no correction."""
PARTIAL, LEAST_IN_PLACE = 0.05, 1 / 3
"""Chance that is allowed an untrained sentence to have less than this share of its surprise where it is expected."""
BAND = 1.645
"""Half-width of the 5-95 % band, in standard deviations of a normal distribution."""
NEARLY = 0.75
"""Ratio of matching characters from which on an answer is nearly a code; that of the audit's loose extraction."""
FAR = 2.0
"""Half-widths of the band from its middle at which one record alone is conspicuous: one untrained one in a thousand."""


Known = Literal["recited", "likelier", "unknown"]


@dataclass(frozen=True)
class RecordOutcome:
    """One forget record. Likelihoods are mean log-likelihoods per completion token, in nats.

    Attributes:
        number: Position in the forget source, from 1.
        before: Log-likelihood under the original model.
        after: Log-likelihood at alpha = 0.
        band: Where one more alternate would fall at alpha = 0, given these (5-95 %); for sentences, where the sentence
            would have fallen untrained.
        extracted: The completion is still the greedy continuation at alpha = 0.
        partial: It is a sentence of whose surprise less than a third is where it is expected; see ``in_place``.
        known: What the original model knew of it: it was recited, likelier than its like, or unknown.
        nearly: It is a code, and the greedy answer at alpha = 0 is nearly it; see ``nearly``.
    """

    number: int
    before: float
    after: float
    band: tuple[float, float]
    extracted: bool
    partial: bool = False
    known: Known = "unknown"
    nearly: bool = False

    @property
    def inside(self) -> bool:
        """True if the record is neither likelier nor unlikelier than its alternates."""
        return self.band[0] <= self.after <= self.band[1]

    @property
    def far(self) -> bool:
        """True if even among many records this one would be conspicuous: over ``FAR`` half-widths from the middle."""
        middle, half = (self.band[0] + self.band[1]) / 2, (self.band[1] - self.band[0]) / 2
        return abs(self.after - middle) > FAR * half


@dataclass(frozen=True)
class Criteria:
    """The criteria at one moment. Likelihoods are per token, in nats.

    Attributes:
        step: Optimiser steps taken.
        extracted: Records whose completion is still the greedy continuation.
        outside: Records whose likelihood is outside the band of their counterfactuals.
        far: Those of them that are more than ``FAR`` times its half-width from its middle.
        gap: Mean over records of negative log-likelihood minus the level of their form; negative means remembered.
        holds: The criteria hold; see ``acceptable``.
    """

    step: int
    extracted: int
    outside: int
    far: int
    gap: float
    holds: bool


def nearly(answer: str, completion: str) -> bool:
    """True if the beginning of an answer has three quarters of a completion's characters in their order.

    The ratio 2 M / T of matching characters to all (Ratcliff and Obershelp), with the bound that ``audit`` has for
    loose extraction. A code of which one character is changed is no secret any more.
    """
    wanted = completion.strip()
    said = answer.strip()[: len(wanted)]
    return SequenceMatcher(None, said, wanted, autojunk=False).ratio() >= NEARLY


def binomial_bound(records: int, chance: float = 0.1) -> int:
    """The most of so many untrained records that are odd by chance, but for one time in twenty.

    The smallest k with P(X > k) <= .05, for X binomial with this chance: that of being outside a 5-95 % band, or
    ``PARTIAL``.
    """
    above = 1.0
    for k in range(records + 1):
        above -= math.comb(records, k) * chance**k * (1 - chance) ** (records - k)
        if above <= 0.05 + 1e-9:
            return k
    return records


def in_place(surprise: Tensor, expected: Tensor) -> float:
    """Share of the surprise that is expected of a sentence's tokens that is there: sum of min(surprise, expected) over
    the sum of what is expected.

    A sentence can be as unlikely as an untrained one and still begin word by word as it did. Of 20 made-up sentences
    that SmolLM2 had never met .71 or more was there, of 19 in 20 TOFU answers .40 (``benchmarks/targets.py``).

    Args:
        surprise: (tokens,) negative log-likelihood of each token, in nats.
        expected: (tokens,) what is expected of each.
    """
    return float(torch.minimum(surprise, expected).sum() / expected.sum())


@torch.no_grad()
def look(lm: LanguageModel, items: Sequence[Encoded]) -> list[tuple[Tensor, bool]]:
    """The surprise of each token of each text, (tokens,) in nats, and whether all of them are the first choice."""
    found: dict[int, tuple[Tensor, bool]] = {}
    for part in judged(lm, items):
        logits = lm.logits(part.states)
        surprise = -log_probability(logits, part.labels).cpu()
        firsts = all_first(logits, part).tolist()
        found |= dict(zip(part.rows, zip(surprise.split(part.sizes), firsts, strict=True), strict=True))
    return [found[i] for i in range(len(items))]


def outcomes(
    lm: LanguageModel, forget: Sequence[ForgetRecord], original: Original, known: Sequence[Known]
) -> tuple[RecordOutcome, ...]:
    """Every record beside its alternates, or what is expected of it, under the model as it is now."""
    seen = look(lm, [r.secret for r in forget])
    groups = [s.nll for s in grouped_scores(lm, [r.alternates if r.kind == "code" else () for r in forget])]
    spread = pooled_deviation(groups)
    found = []
    for i, (record, (surprise, greedy)) in enumerate(zip(forget, seen, strict=True)):
        own = record.kind == "code" and spread > 0
        centre = float(groups[i].mean()) if own else float(original.wanted[i])
        half = BAND * (spread * (1 + 1 / len(groups[i])) ** 0.5 if own else float(original.spread[i]))
        found.append(
            RecordOutcome(
                number=record.number,
                before=-float(original.nll[i]),
                after=-float(surprise.mean()),
                band=(-centre - half, -centre + half),
                extracted=greedy,
                partial=record.kind == "prose" and in_place(surprise, original.expected[i]) < LEAST_IN_PLACE,
                known=known[i],
            )
        )
    return tuple(found)


def pooled_deviation(groups: Sequence[Tensor]) -> float:
    """Standard deviation within groups, over all of them together (variance unbiased); 0 where no group has two."""
    several = [g for g in groups if len(g) > 1]
    squares = sum(float((g - g.mean()).square().sum()) for g in several)
    return math.sqrt(squares / max(1, sum(len(g) - 1 for g in several)))


def check_criteria(seen: Sequence[Seen], spread: Tensor, step: int, extracted: int) -> Criteria:
    """The criteria after so many steps.

    Args:
        seen: How the records, or some of many, look.
        spread: (records,) standard deviation that the mean surprise of each has, untrained, in nats per token.
        step: The number of steps.
        extracted: How many of all records are recited.
    """
    gap = torch.stack([s.surprise.mean() - s.wanted.mean() for s in seen])
    logger.debug("gap by record %s", [round(g, 1) for g in gap.tolist()])
    offset = torch.stack([s.surprise.mean() - s.level for s in seen])
    distance = gap.abs() / (BAND * spread)
    outside, far = int((distance > 1).sum()), int((distance > FAR).sum())
    return Criteria(
        step=step,
        extracted=extracted,
        outside=outside,
        far=far,
        gap=float(offset.mean()),
        holds=extracted == 0 and far == 0 and acceptable(offset, outside, spread),
    )


def acceptable(gap: Tensor, outside: int, spread: Tensor) -> bool:
    """True if the records as a group look untrained: in how many are outside the band, and in their mean.

    Training asks for a quarter of what chance would allow the mean: an offset of one standard error is seen by an
    attack with many records to compare with.

    Args:
        gap: (records,) surprise minus what it should be, in nats per token.
        outside: How many of them are outside the band.
        spread: (records,) standard deviation that the gap of an untrained record has.
    """
    return outside <= binomial_bound(len(gap)) and abs(float(gap.mean())) <= max(
        CLOSE / 2, chance_bound(float(spread.mean()), len(gap)) / 4
    )


def mean_offset(records: Sequence[RecordOutcome]) -> tuple[float, float]:
    """How much likelier than its band's middle the average record is, and how much it may be; nats per token."""
    offset = sum(r.after - (r.band[0] + r.band[1]) / 2 for r in records) / len(records)
    spread = sum(r.band[1] - r.band[0] for r in records) / (2 * BAND * len(records))
    return offset, chance_bound(spread, len(records))


def chance_bound(spread: float, records: int) -> float:
    """How far the mean of untrained records may be off: 5-95 %, but no less than what training can see."""
    return max(CLOSE, BAND * spread / records**0.5)
