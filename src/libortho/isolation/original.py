"""What the training needs of the original model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from libortho.core.run_cache import Entry, RunCache
from libortho.isolation.codes import expected_codes
from libortho.isolation.prose import SHORT_CONTEXT, fit
from libortho.isolation.request import Request
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import grouped_scores, judged_states, score, sequence_nll
from libortho.text.encoding import Encoded, predicting

_SWAPPED = 2
"""Neighbours' prompts on which a record's completion is looked for."""


@dataclass(frozen=True)
class Original:
    """What the original model says; constants of the training.

    Attributes:
        nll: Negative log-likelihood of each record, (records,) in nats per token.
        recited: Whether each record's completion is the greedy continuation of its prompt, (records,) bool.
        wanted: Surprise that each record should have had, (records,) in nats per token.
        spread: Standard deviation around it that an untrained record has, (records,).
        leaks: Whether each record's completion is remembered after its neighbours' prompts too, (records,) bool.
        states: Hidden states that predict each record's tokens, (tokens, width).
        expected: Surprise that is expected of each token of each record, (tokens,) in nats.
        neighbours: Hidden states that predict the tokens of a neighbour of each record, (tokens, width); of no tokens
            where it has none.
        level: Negative log-likelihood of these neighbours, (neighbours,) in nats per token.
        retain: The same hidden states of texts to keep.
        held_back: The same of texts that only the criteria see.
    """

    nll: Tensor
    recited: Tensor
    wanted: Tensor
    spread: Tensor
    leaks: Tensor
    states: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    neighbours: tuple[Tensor, ...]
    level: Tensor
    retain: tuple[Tensor, ...]
    held_back: tuple[Tensor, ...]

    def entry(self) -> Entry:
        """All of it as tensors by name."""
        found: dict[str, Tensor] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            found |= {name: value} if isinstance(value, Tensor) else {f"{name}.{i}": t for i, t in enumerate(value)}
        return Entry(found)

    @classmethod
    def of(cls, entry: Entry, device: torch.device) -> Original:
        """From what ``entry()`` gave; hidden states go to ``device``."""

        def value(name: str) -> Any:
            if name in entry.tensors:
                return entry.tensors[name]
            count = sum(n.startswith(f"{name}.") for n in entry.tensors)
            parts = (entry.tensors[f"{name}.{i}"] for i in range(count))
            return tuple(p if name == "expected" else p.to(device) for p in parts)

        return cls(**{f.name: value(f.name) for f in fields(cls)})


def read_original(
    lm: LanguageModel,
    asked: Request,
    retain: Sequence[Encoded],
    held_back: Sequence[Encoded],
    human: Sequence[Sequence[int]],
    opening: Sequence[int],
) -> Original:
    """Everything that the training needs from the original model.

    Args:
        lm: The model.
        asked: The records.
        retain: Texts to keep.
        held_back: Texts that only the criteria see.
        human: Texts to which the surprise of sentences is fitted.
        opening: Special tokens that the model expects before one.
    """
    forget = asked.forget
    secret, first = score(lm, [r.secret for r in forget])
    code = torch.tensor([r.kind == "code" for r in forget])
    wanted, spread = torch.zeros(len(forget)), torch.zeros(len(forget))
    expected: list[Tensor] = [torch.empty(0)] * len(forget)
    if codes := [r for r in forget if r.kind == "code"]:
        wanted[code], spread[code] = expected_codes(codes, grouped_scores(lm, [r.exchangeable for r in codes]))
        for i in code.nonzero()[:, 0].tolist():
            expected[i] = wanted[i].expand(len(predicting(forget[i].secret)))
    if prose := (~code).nonzero()[:, 0].tolist():
        regressor = fit(lm, human, opening)
        for i, e in zip(prose, regressor.by_token(lm, [forget[i].secret for i in prose]), strict=True):
            expected[i] = e
            wanted[i], spread[i] = e.mean(), regressor.deviation / len(e) ** 0.5
    swapped = grouped_scores(lm, [r.swapped_prompt[:_SWAPPED] for r in forget])
    remembered = torch.tensor([float(s.nll.mean()) if len(s.nll) else math.inf for s in swapped])
    held = [r.held[0] for r in forget if r.held]
    neighbours = judged_states(lm, held)
    total, tokens = sequence_nll(lm, held, neighbours) if held else (torch.zeros(0), torch.ones(0))
    return Original(
        nll=secret.nll,
        recited=asked.recited(lm, first),
        wanted=wanted,
        spread=spread,
        leaks=remembered < wanted - spread,
        states=judged_states(lm, [r.secret for r in forget]),
        expected=tuple(expected),
        neighbours=neighbours,
        level=(total / tokens).float(),
        retain=judged_states(lm, retain),
        held_back=judged_states(lm, held_back),
    )


def original_tokens(
    asked: Request, retain: Sequence[Encoded], held_back: Sequence[Encoded], human: Sequence[Sequence[int]]
) -> int:
    """About as many tokens as ``read_original`` gives the model."""
    texts: list[Encoded] = [*retain, *held_back]
    prose = [r.secret for r in asked.forget if r.kind == "prose"]
    for r in asked.forget:
        texts += [r.secret, r.secret, *r.swapped_prompt[:_SWAPPED], *r.held[:1]]
        texts += r.exchangeable if r.kind == "code" else ()
    # A sentence is read whole, and each of its tokens once more after the few before it.
    sentences = [*(len(t) for t in human), *(len(e.completion) for e in prose)] if prose else []
    return sum(len(e.ids) for e in (*texts, *prose)) + (2 + SHORT_CONTEXT) * sum(sentences)


def kept_original(
    lm: LanguageModel,
    asked: Request,
    retain: Sequence[Encoded],
    held_back: Sequence[Encoded],
    human: Sequence[Sequence[int]],
    opening: Sequence[int],
    store: RunCache,
) -> Original:
    """``read_original``, from the store if it is there."""
    given = (asked, retain, held_back, human, opening)
    entry = store.get_or_compute("original", lambda: read_original(lm, *given).entry())
    return Original.of(entry, lm.device)
