"""What every attack measures, and what it may change.

    extraction = share of records whose every completion token is the argmax given the true ones before it
    nll        = mean over records of the mean negative log-likelihood of the completion's tokens, in nats
    perplexity = exp(mean negative log-likelihood per token of general text)

Given a true prefix, greedy decoding returns the completion exactly if every token is the argmax (Carlini et al.,
arXiv 2202.07646, section 3), so one forward pass tells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libortho.auditing.subjects import Subject, dense_copy
from libortho.core.errors import DataError, TargetError
from libortho.core.surgery import linear_weight
from libortho.core.targets import is_linear
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity
from libortho.lm.token_statistics import token_statistics
from libortho.text.encoding import Encoded

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""
GENERAL_TOKENS = 1024
"""Tokens of general text behind each perplexity: enough to compare a model with itself on the same text."""


@dataclass(frozen=True)
class Level:
    """One model, measured.

    Attributes:
        extraction: Share of records extracted greedily, a fraction.
        nll: Mean negative log-likelihood of the completions, in nats per token.
        perplexity: Of general text; None if no text was given.
    """

    extraction: float
    nll: float
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {"extraction": self.extraction, "nll": self.nll, "perplexity": self.perplexity}


def measure(lm: LanguageModel, forget: Sequence[Encoded], general: Sequence[Encoded] = ()) -> Level:
    """Extraction and nll of ``forget``, perplexity of ``general``.

    Raises:
        DataError: if ``forget`` is empty.
    """
    if not forget:
        raise DataError("there is no forget record to measure; expected at least one")
    statistics = token_statistics(lm, forget)
    return Level(
        extraction=sum(bool(s.correct.all()) for s in statistics) / len(statistics),
        nll=sum(s.nll for s in statistics) / len(statistics),
        perplexity=perplexity(lm, general) if general else None,
    )


def general_subset(general: Sequence[Encoded], tokens: int = GENERAL_TOKENS) -> list[Encoded]:
    """The first sequences of ``general``, until they hold ``tokens`` tokens; never more than one sequence over."""
    chosen: list[Encoded] = []
    for item in general:
        if sum(len(e.ids) for e in chosen) >= tokens:
            break
        chosen.append(item)
    return chosen


def halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Two random halves of ``range(count)``, each ascending; the first is the smaller if ``count`` is odd.

    Raises:
        DataError: if there are fewer than two records, so that nothing would be left to judge.
    """
    if count < 2:
        raise DataError(f"the forget set holds {count} record(s); half is attacked and half is judged, give at least 2")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def decoder_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of all dense linear layers but the output head, (out_features, in_features), views to write into.

    Raises:
        TargetError: if the decoder has none.
    """
    lm = LanguageModel(model)
    found = {n: linear_weight(m) for n, m in lm.decoder.named_modules() if is_linear(m) and m is not lm.head}
    if not found:
        raise TargetError(f"{type(model).__name__} has no dense linear layer to attack; expected nn.Linear or Conv1D")
    return found


def stored_levels(
    subject: Subject, reference: Subject | None, forget: Sequence[Encoded], general: Sequence[Encoded]
) -> tuple[Level, Level | None]:
    """Levels of a subject and of the reference as they are; the reference's without perplexity."""
    with subject.enter():
        own = measure(subject.language_model(), forget, general)
    if reference is None:
        return own, None
    with reference.enter():
        return own, measure(reference.language_model(), forget)


@torch.no_grad()
def changed_levels(
    change: Callable[[Tensor], Tensor],
    subject: Subject,
    reference: Subject | None,
    forget: Sequence[Encoded],
    general: Sequence[Encoded],
) -> tuple[Level, Level | None]:
    """The same after ``change`` of every weight (out_features, in_features) of copies' decoders."""

    def level(changed: Subject, text: Sequence[Encoded]) -> Level:
        copied = dense_copy(changed)
        for weight in decoder_weights(copied).values():
            weight.copy_(change(weight))
        return measure(LanguageModel(copied), forget, text)

    return level(subject, general), None if reference is None else level(reference, ())


def reference_dict(level: Level | None) -> dict[str, float | None]:
    """The reference's figures of one row; None where there is no reference."""
    return {
        "reference_nll": None if level is None else level.nll,
        "reference_extraction": None if level is None else level.extraction,
    }


@torch.no_grad()
def normal_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal fp32 noise in the shape of ``weight``; the same on every device."""
    return torch.randn(weight.shape, generator=generator).to(weight.device)
