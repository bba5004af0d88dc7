"""What a model says of given tokens: forward, take the judged positions, reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from libortho.lm.head import HEAD_POSITIONS
from libortho.lm.logits import (
    Scores,
    completion_scores,
    token_profile,
)
from libortho.lm.model import LanguageModel
from libortho.text.encoding import IGNORE, Batch, Encoded, collate, predicting

SCORING_TOKENS, SCORING_TOKENS_GPU = 512, 4096
"""Tokens of one forward pass without gradients, on a CPU and elsewhere."""


TRAINING_TOKENS, TRAINING_TOKENS_GPU = 320, 8192
"""Tokens of one forward and backward pass of the default objective, on a CPU and elsewhere, or one longer text: what is
kept between the passes is the most memory that training takes."""


def token_profiles(lm: LanguageModel, items: Sequence[Encoded]) -> list[Tensor]:
    """``token_profile`` of each text's own judged tokens, each (tokens, 3)."""
    if not items:
        return []
    places = [list(predicting(e)) for e in items]
    states = torch.cat([h[p] for h, p in zip(hidden_states(lm, items), places, strict=True)])
    labels = torch.tensor([e.ids[t + 1] for e, p in zip(items, places, strict=True) for t in p], device=lm.device)
    return list(profiles_of_states(lm, states, labels).cpu().split([len(p) for p in places]))


@torch.no_grad()
def profiles_of_states(lm: LanguageModel, states: Tensor, labels: Tensor) -> Tensor:
    """``token_profile`` from hidden states (tokens, width), a few positions at a time; (tokens, 3)."""
    pairs = zip(states.split(HEAD_POSITIONS), labels.split(HEAD_POSITIONS), strict=True)
    return torch.cat([token_profile(lm.logits(some), of) for some, of in pairs])


@torch.no_grad()
def score(lm: LanguageModel, items: Sequence[Encoded]) -> tuple[Scores, Tensor]:
    """Scores of completions, and whether each is the greedy continuation of its prompt, (records,) bool."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    nll, tokens, greedy = (torch.zeros(len(items)) for _ in range(3))
    for rows in scoring_batches(order, items, lm.device):
        batch = collate([items[i] for i in rows]).to(lm.device)
        logits, labels, owner = judged_logits(lm, lm.hidden(batch), batch)
        scores = completion_scores(logits, labels, owner, len(rows))
        wrong = torch.zeros(len(rows), device=logits.device).index_add_(0, owner, (logits.argmax(-1) != labels).float())
        index = torch.tensor(rows)
        nll[index], tokens[index] = scores.nll.cpu(), scores.tokens.cpu()
        greedy[index] = (wrong == 0).float().cpu()
    return Scores(nll, tokens), greedy.bool()


@torch.no_grad()
def hidden_states(lm: LanguageModel, items: Sequence[Encoded]) -> tuple[Tensor, ...]:
    """Last hidden states of each text, (tokens, width)."""
    out: list[Tensor] = [torch.empty(0)] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    for rows in scoring_batches(order, items, lm.device):
        batch = collate([items[i] for i in rows]).to(lm.device)
        for i, states in zip(rows, lm.hidden(batch), strict=True):
            out[i] = states[: len(items[i].ids)].clone()
    return tuple(out)


def judged_logits(lm: LanguageModel, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the positions that predict completion tokens, those tokens, and the row that each belongs to."""
    states, labels, row = predicting_states(hidden, batch)
    return lm.logits(states), labels, row


def predicting_states(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """As ``judged_logits``, with hidden states in place of logits."""
    labels = batch.labels[:, 1:]
    judged = labels != IGNORE
    return hidden[:, :-1][judged], labels[judged], judged.nonzero()[:, 0]


def take(scores: Scores, index: Tensor) -> Scores:
    """The scores of some records."""
    return Scores(scores.nll[index], scores.tokens[index])


def grouped_scores(lm: LanguageModel, groups: Sequence[Sequence[Encoded]]) -> tuple[Scores, ...]:
    """The scores of each group of texts."""
    flat, _ = score(lm, [e for group in groups for e in group])
    ends = torch.tensor([len(g) for g in groups]).cumsum(0).tolist()
    return tuple(take(flat, torch.arange(end - len(group), end)) for group, end in zip(groups, ends, strict=True))


@torch.no_grad()
def scores_of_states(lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor]) -> Scores:
    """Scores of completions whose hidden states are known."""
    places = [list(predicting(e)) for e in items]
    logits = lm.logits(torch.cat([s[p] for s, p in zip(states, places, strict=True)]))
    labels = torch.tensor([e.ids[t + 1] for e, p in zip(items, places, strict=True) for t in p], device=lm.device)
    owner = torch.tensor([i for i, p in enumerate(places) for _ in p], device=lm.device)
    found = completion_scores(logits, labels, owner, len(items))
    return Scores(found.nll.cpu(), found.tokens.cpu())


def scoring_batches(order: Sequence[int], items: Sequence[Encoded], device: torch.device) -> Iterator[list[int]]:
    """Cut a length-sorted order into batches of at most as many padded tokens as suit the device."""
    return cut_order(order, items, SCORING_TOKENS if device.type == "cpu" else SCORING_TOKENS_GPU)


def training_batches(items: Sequence[Encoded], device: torch.device) -> Iterator[list[int]]:
    """Batches of texts that a backward pass goes through at one time, by length."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    return cut_order(order, items, TRAINING_TOKENS if device.type == "cpu" else TRAINING_TOKENS_GPU)


def cut_order(order: Sequence[int], items: Sequence[Encoded], limit: int) -> Iterator[list[int]]:
    """Batches of at most ``limit`` padded tokens, in this order."""
    rows: list[int] = []
    for i in order:
        if rows and (len(rows) + 1) * len(items[i].ids) > limit:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows
