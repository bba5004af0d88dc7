"""Statistics of tokens from logits. Pure functions."""

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
        tokens: Number of completion tokens.
    """

    nll: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Scores:
        """The same scores on another device."""
        return Scores(self.nll.to(device), self.tokens.to(device))


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
    surprise = F.softplus(-label_log_odds(logits, labels))
    return Scores(record_means(surprise, record, records), torch.bincount(record, minlength=records).to(surprise))


def record_means(values: Tensor, record: Tensor, records: int) -> Tensor:
    """Mean over the tokens of each record, (records,).

    Args:
        values: (tokens,).
        record: (tokens,) index of the record that each token belongs to.
        records: Number of records.
    """
    total = values.new_zeros(records).index_add_(0, record, values)
    return total / values.new_zeros(records).index_add_(0, record, torch.ones_like(values))


def with_log_probability(logits: Tensor, labels: Tensor, log_p: Tensor) -> Tensor:
    """Logits whose softmax gives each label this log-probability and keeps the proportions of all others.

    Args:
        logits: (tokens, vocabulary).
        labels: (tokens,).
        log_p: (tokens,) below 0.
    """
    index = labels.unsqueeze(-1)
    rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    own = rest + log_p - torch.log(-torch.expm1(log_p))
    return logits.scatter(-1, index, own.unsqueeze(-1))


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """``KL(reference || model)`` in nats for each position; both (positions, vocabulary)."""
    reference = F.log_softmax(reference_logits.float(), -1)
    return (reference.exp() * (reference - F.log_softmax(logits.float(), -1))).sum(-1)


def drawn(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row of logits (rows, vocabulary), drawn from its distribution, (rows,).

    One random number for each row, looked up in the cumulative distribution; ``torch.multinomial`` takes one for each
    token of the vocabulary, which on a CPU is as slow as a small model. ``generator``: torch's own if not given.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return found.clamp_max(logits.shape[-1] - 1)
