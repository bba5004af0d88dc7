"""Statistics of tokens from logits. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 0.02
"""Nats of entropy or deviation below which differences hardly count."""


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


def token_profile(logits: Tensor, labels: Tensor) -> Tensor:
    """Surprise, entropy and standardised surprise at each token, (tokens, 3).

    Surprise is ``-log p_y`` and entropy its mean under the model's own distribution, both in nats. The third is what
    Min-K%++ looks at (arXiv 2404.02936, eq. 3): by how many of the model's own deviations,
    ``sqrt(sum_v p_v log^2 p_v - H^2)``, the surprise is more than the entropy; as ``standardised`` has it.

    Args:
        logits: (tokens, vocabulary) fp32, at the positions that predict completion tokens.
        labels: (tokens,) the completion tokens.
    """
    return profile_and_odds(logits, labels)[0]


def profile_and_odds(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``token_profile`` (tokens, 3), and ``label_log_odds`` (tokens,), which it is made with."""
    odds = label_log_odds(logits, labels)
    entropy, deviation = moments(logits)
    surprise = F.softplus(-odds)
    return torch.stack([surprise, entropy, standardised(surprise, entropy, deviation)], 1), odds


def moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the surprise under the model's own distribution, each (tokens,), in nats."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    return entropy, ((p * log_p.square()).sum(-1) - entropy.square()).clamp_min(1e-6).sqrt()


def standardised(surprise: Tensor, entropy: Tensor, deviation: Tensor) -> Tensor:
    """The third column of ``token_profile``: ``2 sign(z) (sqrt(1 + |z|) - 1)``, ``z = (surprise - entropy) / s``.

    It is z near 0. Its tail is long: z itself would be about nothing else, and a logarithm would not see it.
    """
    z = (surprise - entropy) / (deviation + SMALL)
    return 2 * z / (1 + (1 + z.abs()).sqrt())


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
