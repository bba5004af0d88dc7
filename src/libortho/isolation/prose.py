"""How surprising a completion would be to a model that had never met it.

Codes and names have alternates that are exchangeable with them: what those get is the answer. A sentence has not:
words drawn at random are far less likely than what a person wrote, and the model's own samples are likelier. For
sentences the surprise is predicted token by token from what memorisation leaves alone, by least squares on human text
that the model was not asked to forget:

    nll_t ~ [1, v, H, m, H v, s, c, c v]
    v   surprise of the token after no more than the two tokens before it, too few to call up a memory
    H   entropy of the next-token distribution with the true token removed
    m   surprise of the likeliest other token
    s   1 if the token stands earlier in the text
    c   1 if it has followed the token before it earlier in the text, and could be copied

Removing the true token is what makes memorised and ordinary text comparable. The two tokens before it know how words
and phrases go on, and how those of the fine-tuning data do, which a token's frequency does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from libortho.lm.head import HEAD_POSITIONS
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import in_parts, judged, log_probability, scoring_tokens
from libortho.text.corpus import shipped_text
from libortho.text.encoding import Encoded, batches, collate, predicting
from libortho.text.tokens import text_ids

SHORT_CONTEXT = 2
"""Tokens of context after which a token's surprise says how words go on, and nothing of a memory."""

HUMAN_TEXTS, HUMAN_TOKENS = 30, 40
"""Texts that the fit reads, and tokens of each: as many again predict no better and cost twice the time."""
LEAST_SURPRISE = 0.01
"""Smallest surprise, in nats, that is expected of a token."""


@dataclass(frozen=True)
class SurprisalRegressor:
    """Least-squares fit of human surprise.

    Attributes:
        weights: (8,) coefficients of the features in the module's text.
        deviation: Standard deviation of what the fit leaves unexplained of one token, in nats.
        opening: Special tokens that this model expects before every text.
    """

    weights: Tensor
    deviation: float
    opening: tuple[int, ...] = ()

    def predict(self, lm: LanguageModel, item: Encoded) -> float:
        """Expected mean negative log-likelihood of the completion, in nats per token."""
        return float(self.by_token(lm, [item])[0].mean())

    def by_token(self, lm: LanguageModel, items: Sequence[Encoded]) -> list[Tensor]:
        """Expected negative log-likelihood of each token of each completion, (tokens,) in nats, at least
        ``LEAST_SURPRISE``."""
        return [(p.features @ self.weights).clamp_min(LEAST_SURPRISE) for p in _Position.of(lm, items, self.opening)]


def human_texts(tokenizer: Any, limit: int | None = None) -> list[list[int]]:
    """Token ids of the human text that the fit reads, each of at most ``limit`` tokens: what ships with the package."""
    longest = HUMAN_TOKENS if limit is None else min(limit, HUMAN_TOKENS)
    return [text_ids(text, tokenizer)[:longest] for text in shipped_text()[:HUMAN_TEXTS]]


def fit(lm: LanguageModel, texts: Sequence[Sequence[int]], opening: Sequence[int] = ()) -> SurprisalRegressor:
    """Fit on tokenised human texts, see ``human_texts``; ``opening``: what the model expects before a text."""
    positions = _Position.of(lm, [Encoded(tuple(t), tuple(t)) for t in texts if len(t) > 1], opening)
    x = torch.cat([p.features for p in positions]).double()
    y = torch.cat([p.nll for p in positions]).double()
    ridge = 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    deviation = float((y - x @ weights).square().mean().sqrt())
    return SurprisalRegressor(weights.float(), deviation, tuple(opening))


@dataclass(frozen=True)
class _Position:
    """Judged positions of one text: surprise (positions,) and features (positions, 8)."""

    nll: Tensor
    features: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LanguageModel, items: Sequence[Encoded], opening: Sequence[int]) -> list[_Position]:
        found: dict[int, _Position] = {}
        short = _short_contexts(lm, items, opening)
        for part in judged(lm, items):
            columns = zip(*in_parts(lm, part.states, part.labels, cls._statistics, HEAD_POSITIONS), strict=True)
            split = [torch.cat(c).cpu().split(part.sizes) for c in columns]
            for i, *own in zip(part.rows, *split, strict=True):
                found[i] = cls._from(items[i], own, short[i])
        return [found[i] for i in range(len(items))]

    @classmethod
    def _from(cls, item: Encoded, statistics: Sequence[Tensor], short: Tensor) -> _Position:
        nll, entropy, runner_up = statistics
        pairs = list(zip(item.ids, item.ids[1:], strict=False))
        places = [t + 1 for t in predicting(item)]
        seen = torch.tensor([float(item.ids[t] in item.ids[:t]) for t in places])
        copied = torch.tensor([float(pairs[t - 1] in pairs[: t - 1]) for t in places])
        columns = [torch.ones_like(nll), short, entropy, runner_up, entropy * short, seen, copied, copied * short]
        return cls(nll, torch.stack(columns, 1))

    @staticmethod
    def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Surprise, entropy without the label and surprise of the runner-up, (positions,)."""
        log_p, index = logits.log_softmax(-1), labels.unsqueeze(-1)
        others = log_p.scatter(-1, index, -torch.inf).log_softmax(-1)
        entropy = -(others.exp() * others.masked_fill(others == -torch.inf, 0.0)).sum(-1)
        return -log_p.gather(-1, index).squeeze(-1), entropy, -others.amax(-1)


def _short_contexts(lm: LanguageModel, items: Sequence[Encoded], opening: Sequence[int]) -> list[Tensor]:
    """Surprise of each judged token of each text after the ``SHORT_CONTEXT`` before it alone, (positions,)."""
    places = [[t + 1 for t in predicting(e)] for e in items]
    pairs = [(e.ids, t) for e, own in zip(items, places, strict=True) for t in own]
    contexts = [Encoded((*opening, *ids[max(0, t - SHORT_CONTEXT) : t]), ()) for ids, t in pairs]
    following = [ids[t] for ids, t in pairs]
    found = torch.zeros(len(pairs))
    for rows in batches(contexts, scoring_tokens(lm.device)):
        ids = [contexts[i].ids for i in rows]
        batch = collate([Encoded(t, t) for t in ids]).to(lm.device)
        last = lm.hidden(batch)[range(len(ids)), [len(t) - 1 for t in ids]]
        labels = torch.tensor([following[i] for i in rows], device=lm.device)
        found[rows] = -log_probability(lm.logits(last), labels).cpu()
    return list(found.split([len(own) for own in places]))
