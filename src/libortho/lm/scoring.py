"""What a model says of given tokens: the one loop of forward pass, judged positions and reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libortho.core.errors import DataError
from libortho.lm.logits import Scores, completion_scores
from libortho.lm.model import LanguageModel
from libortho.text.encoding import IGNORE, Batch, Encoded, batches, collate, predicting
from libortho.text.tokens import text_ids

SCORING_TOKENS, SCORING_TOKENS_GPU = 512, 4096
"""Padded tokens of one forward pass without gradients, on a CPU and elsewhere."""
TRAINING_TOKENS, TRAINING_TOKENS_GPU = 320, 8192
"""Padded tokens of one forward and backward pass, on a CPU and elsewhere, or one longer text: what is kept between the
passes is the most memory that training takes."""
PASS_TOKENS = 2048
"""Padded tokens of one forward pass where only statistics of tokens are kept, on any device."""
STATISTICS_ROWS = 256
"""Rows of logits held in fp32 at a time there."""


def scoring_tokens(device: torch.device) -> int:
    """Padded tokens of one forward pass without gradients on this device."""
    return SCORING_TOKENS if device.type == "cpu" else SCORING_TOKENS_GPU


def training_tokens(device: torch.device) -> int:
    """Padded tokens of one forward and backward pass on this device."""
    return TRAINING_TOKENS if device.type == "cpu" else TRAINING_TOKENS_GPU


@dataclass(frozen=True)
class Judged:
    """The positions of one forward pass that predict judged tokens, text by text.

    Attributes:
        rows: Indices of the texts that were read.
        states: (positions, width) last hidden states.
        labels: (positions,) the judged tokens.
        owner: (positions,) index into ``rows`` of the text that each belongs to.
    """

    rows: list[int]
    states: Tensor
    labels: Tensor
    owner: Tensor

    @property
    def sizes(self) -> list[int]:
        """Judged tokens of each text."""
        return torch.bincount(self.owner, minlength=len(self.rows)).tolist()


@torch.no_grad()
def judged(lm: LanguageModel, items: Sequence[Encoded], limit: int | None = None) -> Iterator[Judged]:
    """Read all items, by length, in passes of at most ``limit`` padded tokens; by default what suits the device."""
    for rows in batches(items, limit or scoring_tokens(lm.device)):
        batch = collate([items[i] for i in rows]).to(lm.device)
        yield Judged(rows, *predicting_states(lm.hidden(batch), batch))


def predicting_states(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict judged tokens, (positions, width), those tokens, and the row each belongs to."""
    labels = batch.labels[:, 1:]
    places = labels != IGNORE
    return hidden[:, :-1][places], labels[places], places.nonzero()[:, 0]


def judged_logits(lm: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """As ``predicting_states``, with logits in place of hidden states."""
    states, labels, owner = predicting_states(lm.hidden(batch), batch)
    return lm.logits(states), labels, owner


@torch.no_grad()
def judged_states(lm: LanguageModel, items: Sequence[Encoded], limit: int | None = None) -> tuple[Tensor, ...]:
    """Last hidden states that predict each item's judged tokens, (tokens, width)."""
    found: list[Tensor] = [torch.empty(0)] * len(items)
    for part in judged(lm, items, limit):
        for i, states in zip(part.rows, part.states.split(part.sizes), strict=True):
            found[i] = states.clone()
    return tuple(found)


@torch.no_grad()
def in_parts(
    lm: LanguageModel, states: Tensor, labels: Tensor, reduce: Callable[[Tensor, Tensor], Any], rows: int
) -> list[Any]:
    """``reduce(logits, labels)`` of so many rows at a time: logits of all would be the largest tensor of all."""
    pairs = zip(states.split(rows), labels.split(rows), strict=True)
    return [reduce(lm.logits(some), of) for some, of in pairs]


def judged_labels(items: Sequence[Encoded]) -> tuple[Tensor, list[int]]:
    """Judged tokens of all items, (tokens,), and how many each has.

    Raises:
        DataError: if there is none.
    """
    labels = [[e.ids[t + 1] for t in predicting(e)] for e in items]
    if not any(labels):
        raise DataError("the text holds no token that can be judged; expected at least two tokens")
    return torch.tensor([y for own in labels for y in own]), [len(own) for own in labels]


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, (rows,) in nats."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))[:, 0]


@torch.no_grad()
def score(lm: LanguageModel, items: Sequence[Encoded]) -> tuple[Scores, Tensor]:
    """Scores of completions, and whether each is the greedy continuation of its prompt, (records,) bool."""
    nll, tokens, greedy = torch.zeros(len(items)), torch.zeros(len(items)), torch.zeros(len(items), dtype=torch.bool)
    for part in judged(lm, items):
        logits = lm.logits(part.states)
        scores = completion_scores(logits, part.labels, part.owner, len(part.rows))
        nll[part.rows], tokens[part.rows] = scores.nll.cpu(), scores.tokens.cpu()
        greedy[part.rows] = all_first(logits, part).cpu()
    return Scores(nll, tokens), greedy


def all_first(logits: Tensor, part: Judged) -> Tensor:
    """Whether every judged token of a text is the first choice, (texts,) bool."""
    return torch.bincount(part.owner[logits.argmax(-1) != part.labels], minlength=len(part.rows)) == 0


def take(scores: Scores, index: Tensor) -> Scores:
    """The scores of some records."""
    return Scores(scores.nll[index], scores.tokens[index])


def grouped_scores(lm: LanguageModel, groups: Sequence[Sequence[Encoded]]) -> tuple[Scores, ...]:
    """The scores of each group of texts."""
    flat, _ = score(lm, [e for group in groups for e in group])
    ends = torch.tensor([len(g) for g in groups]).cumsum(0).tolist()
    return tuple(take(flat, torch.arange(end - len(group), end)) for group, end in zip(groups, ends, strict=True))


@torch.no_grad()
def sequence_nll(
    lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each item in nats, (items,) float64, and its judged tokens, (items,).

    Perplexity is ``exp(nll.sum() / tokens.sum())``; items resampled with replacement give its interval.

    Args:
        lm: The model.
        items: Windows of text.
        states: The model's own ``judged_states``, where they are at hand.

    Raises:
        DataError: if there is no token to judge.
    """
    labels, sizes = judged_labels(items)
    rows = torch.cat(list(judged_states(lm, items, PASS_TOKENS) if states is None else states)).to(lm.device)
    log_p = torch.cat(in_parts(lm, rows, labels.to(lm.device), log_probability, STATISTICS_ROWS)).cpu()
    return summed_nll(log_p, sizes)


def summed_nll(log_p: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As ``sequence_nll``, from the log-probabilities of all items, (tokens,), and how many tokens each has."""
    return torch.stack([-part.double().sum() for part in log_p.split(list(sizes))]), torch.tensor(sizes)


def perplexity(lm: LanguageModel, items: Sequence[Encoded]) -> float:
    """``exp`` of the mean negative log-likelihood over all judged tokens of all items.

    Raises:
        DataError: if there is no token to judge.
    """
    nll, tokens = sequence_nll(lm, items)
    return math.exp(float(nll.sum() / tokens.sum()))


def text_perplexity(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Perplexity of one text, given its first token."""
    ids = tuple(text_ids(text, tokenizer))
    return perplexity(LanguageModel(model), [Encoded(ids, ids)])
