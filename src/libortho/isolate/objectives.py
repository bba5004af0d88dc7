"""Losses on the forget set. Pure functions of per-record statistics; each returns one loss per record.

A memorised token has p close to 1, so the gradient of its negative log-likelihood vanishes; the log-odds of the label
(its logit minus the logsumexp of all others) has a gradient of 1 whatever p is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Per-record statistics of completions under one model. Each tensor has shape (records,).

    Attributes:
        nll: Mean negative log-likelihood of the completion's tokens, in nats.
        odds: Mean log-odds of the completion's tokens, in nats.
        tokens: Number of completion tokens.
    """

    nll: Tensor
    odds: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Scores:
        """The same scores on another device."""
        return Scores(self.nll.to(device), self.odds.to(device), self.tokens.to(device))

    @property
    def total(self) -> Tensor:
        """Summed log-likelihood of the completion, in nats."""
        return -self.nll * self.tokens


def label_log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_y - logsumexp_{v != y} z_v`` for logits (..., vocabulary) and labels (...)."""
    index = labels.unsqueeze(-1)
    others = logits.scatter(-1, index, -torch.inf)
    return logits.gather(-1, index).squeeze(-1) - others.logsumexp(-1)


def completion_scores(logits: Tensor, labels: Tensor, record: Tensor, records: int) -> Scores:
    """Per-record means over completion tokens.

    Args:
        logits: (tokens, vocabulary) fp32, at the positions that predict completion tokens.
        labels: (tokens,) the completion tokens.
        record: (tokens,) index of the record that each token belongs to.
        records: Number of records.
    """
    odds = label_log_odds(logits, labels)
    tokens = torch.zeros(records, device=logits.device).index_add_(0, record, torch.ones_like(odds))

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(records, device=logits.device).index_add_(0, record, values) / tokens

    return Scores(mean(F.softplus(-odds)), mean(odds), tokens)


def log_odds(secret: Scores, target: Scores) -> Tensor:
    """Match the record to its target: neither likelier (remembering) nor unlikelier (as visible).

    Huber distance of the mean negative log-likelihood, which is what a membership test sees; plus, while the record is
    likelier than its target, Huber distance of the mean log-odds, whose gradient does not vanish as p approaches 1.
    """
    excess = (secret.odds - target.odds).relu()
    return F.smooth_l1_loss(secret.nll, target.nll, reduction="none") + F.smooth_l1_loss(
        excess, torch.zeros_like(excess), reduction="none"
    )


def grad_diff(secret: Scores) -> Tensor:
    """Gradient ascent on the record (Liu et al. 2022); the retain term is added by the trainer. Unbounded below."""
    return -secret.nll


def npo(secret: Scores, original: Scores, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation (arXiv 2404.05868, eq. 3), on summed log-likelihoods."""
    return -(2 / beta) * F.logsigmoid(-beta * (secret.total - original.total))


def simnpo(secret: Scores, beta: float = 3.5, delta: float = 1.0) -> Tensor:
    """Reference-free, length-normalised NPO (arXiv 2410.07163, eq. 4)."""
    return -(2 / beta) * F.logsigmoid(beta * (secret.nll - delta))


def altpo(secret: Scores, original: Scores, alternate: Scores, alternate_original: Scores, beta: float = 0.1) -> Tensor:
    """DPO that prefers an in-domain alternate to the record (AltPO, arXiv 2409.13474)."""
    margin = (alternate.total - alternate_original.total) - (secret.total - original.total)
    return -(2 / beta) * F.logsigmoid(beta * margin)


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """``KL(reference || model)`` in nats for each position; both (positions, vocabulary)."""
    reference = F.log_softmax(reference_logits.float(), -1)
    return (reference.exp() * (reference - F.log_softmax(logits.float(), -1))).sum(-1)
