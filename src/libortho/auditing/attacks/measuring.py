"""What every attack measures, and the parts of a model and of the data that attacks share.

    extraction = share of records whose every completion token is the argmax given the true ones before it
    nll        = mean over records of the mean negative log-likelihood of the completion's tokens, in nats
    perplexity = exp(mean negative log-likelihood per token of general text)

Given a true prefix, greedy decoding returns the completion exactly if every token is the argmax (Carlini et al.,
arXiv 2202.07646, section 3), so one forward pass tells.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from libortho.auditing.subjects import Subject
from libortho.core.errors import DataError, TargetError
from libortho.core.layer import OrthoLinear, ortho_layers, touched
from libortho.core.streams import OrthoStream
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity
from libortho.lm.token_statistics import token_statistics
from libortho.text.encoding import Encoded

GENERAL_TOKENS = 1024
"""Tokens of general text behind each perplexity: enough to compare a model with itself on the same text."""


class Level(TypedDict):
    """One model, measured.

    Attributes:
        extraction: Share of records extracted greedily, a fraction.
        nll: Mean negative log-likelihood of the completions, in nats per token.
        perplexity: Of general text; None if no text was given.
    """

    extraction: float
    nll: float
    perplexity: float | None


def measure(lm: LanguageModel, forget: Sequence[Encoded], general: Sequence[Encoded] = ()) -> Level:
    """Extraction and nll of ``forget``, perplexity of ``general``.

    Raises:
        DataError: if ``forget`` is empty.
    """
    if not forget:
        raise DataError("there is no forget record to measure; expected at least one")
    statistics = token_statistics(lm, forget)
    return {
        "extraction": sum(bool(s.correct.all()) for s in statistics) / len(statistics),
        "nll": sum(s.nll for s in statistics) / len(statistics),
        "perplexity": perplexity(lm, general) if general else None,
    }


def measure_subject(subject: Subject, forget: Sequence[Encoded], general: Sequence[Encoded] = ()) -> Level:
    """The same of a subject under its setting."""
    with subject.enter():
        return measure(subject.language_model(), forget, general)


def general_subset(general: Sequence[Encoded]) -> list[Encoded]:
    """The first sequences of ``general``, until they hold ``GENERAL_TOKENS``; never more than one sequence over."""
    chosen: list[Encoded] = []
    for item in general:
        if sum(len(e.ids) for e in chosen) >= GENERAL_TOKENS:
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


def support_weight(layer: OrthoLinear) -> Tensor:
    """The supports of all streams of a layer as one dense fp32 weight (out_features, in_features)."""
    weight = torch.zeros(layer.out_features, layer.in_features, device=touched(layer).device)
    for stream in layer.streams.values():
        if isinstance(stream, OrthoStream) and stream.support is not None:
            stream.support.add_to(weight)
    return weight


def edited_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    """The split layers that have any support.

    Raises:
        TargetError: if there is none.
    """
    found = {n: m for n, m in ortho_layers(model).items() if bool(touched(m).any())}
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no layer with a column or sparse ortho stream; this attack needs a model from "
            "libortho.isolate, or from libortho.split with a ratio above 0"
        )
    return found
