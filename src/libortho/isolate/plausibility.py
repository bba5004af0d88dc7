"""How surprising a completion would be to a model that had never met it.

Codes and names have alternates that are exchangeable with them: what those get is the answer. A sentence has not:
words drawn at random are far less likely than what a person wrote, and the model's own samples are likelier. For
sentences the surprise is predicted token by token from what memorisation leaves alone, by least squares on human text
that the model was not asked to forget:

    nll_t ~ [1, u, u^2, H, H u, s, s u, m]
    u   surprise of the token out of context (the model's mean next-token distribution over human text)
    H   entropy of the next-token distribution with the true token removed
    m   surprise of the likeliest other token
    s   1 if the token stands earlier in the text

Removing the true token is what makes memorised and ordinary text comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.data import IGNORE, Encoded, collate
from libortho.isolate.language_model import LanguageModel

POSITIONS = 64
"""Positions whose logits exist at one time."""


@dataclass(frozen=True)
class PlausibilityModel:
    """Least-squares fit of human surprise.

    Attributes:
        out_of_context: Surprise of each token out of context, (vocabulary,), in nats.
        weights: (8,) coefficients of the features in the module's text.
        deviation: Standard deviation of what the fit leaves unexplained of one token, in nats.
    """

    out_of_context: Tensor
    weights: Tensor
    deviation: float

    def predict(self, lm: LanguageModel, item: Encoded) -> float:
        """Expected mean negative log-likelihood of the completion, in nats per token; at least 0."""
        return max(0.0, float(self.by_token(lm, item).mean()))

    def by_token(self, lm: LanguageModel, item: Encoded) -> Tensor:
        """Expected negative log-likelihood of each token of the completion, (tokens,) in nats; may be below 0."""
        return _features(_Position.of(lm, item), self.out_of_context) @ self.weights


def fit(lm: LanguageModel, texts: Sequence[Sequence[int]]) -> PlausibilityModel:
    """Fit on tokenised human texts, some thousand tokens in all."""
    positions = [_Position.of(lm, Encoded(tuple(t), tuple(t))) for t in texts if len(t) > 1]
    count = sum(len(p.nll) for p in positions)
    mean = torch.stack([p.distribution for p in positions]).sum(0) / count
    out_of_context = -mean.clamp_min(1e-12).log()
    features = torch.cat([_features(p, out_of_context) for p in positions])
    target = torch.cat([p.nll for p in positions])
    ridge = 1e-3 * torch.eye(features.shape[1], dtype=torch.float64)
    x, y = features.double(), target.double()
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    deviation = float((y - x @ weights).square().mean().sqrt())
    return PlausibilityModel(out_of_context, weights.float(), deviation)


@dataclass(frozen=True)
class _Position:
    """Statistics of the judged positions of one text; each (positions,), the distribution (vocabulary,)."""

    labels: Tensor
    nll: Tensor
    entropy: Tensor
    runner_up: Tensor
    seen: Tensor
    distribution: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LanguageModel, item: Encoded) -> _Position:
        batch = collate([item]).to(lm.device)
        judged = batch.labels[0, 1:] != IGNORE
        states, labels = lm.hidden(batch)[0, :-1][judged], batch.labels[0, 1:][judged]
        parts = [
            cls._statistics(lm, *some) for some in zip(states.split(POSITIONS), labels.split(POSITIONS), strict=True)
        ]
        nll, entropy, runner_up = (torch.cat([p[i] for p in parts]).cpu() for i in range(3))
        ends = judged.nonzero()[:, 0].tolist()
        seen = torch.tensor([float(item.ids[t + 1] in item.ids[: t + 1]) for t in ends])
        return cls(labels.cpu(), nll, entropy, runner_up, seen, torch.stack([p[3] for p in parts]).sum(0).cpu())

    @staticmethod
    def _statistics(lm: LanguageModel, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Surprise, entropy without the label and surprise of the runner-up, (positions,), and summed probabilities."""
        log_p, index = lm.logits(states).log_softmax(-1), labels.unsqueeze(-1)
        others = log_p.scatter(-1, index, -torch.inf).log_softmax(-1)
        entropy = -(others.exp() * others.masked_fill(others == -torch.inf, 0.0)).sum(-1)
        return -log_p.gather(-1, index).squeeze(-1), entropy, -others.amax(-1), log_p.exp().sum(0)


def _features(p: _Position, out_of_context: Tensor) -> Tensor:
    u, h, s = out_of_context[p.labels], p.entropy, p.seen
    return torch.stack([torch.ones_like(u), u, u * u, h, h * u, s, s * u, p.runner_up], 1)
