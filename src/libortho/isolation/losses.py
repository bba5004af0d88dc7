"""Losses on the forget set. Pure functions of per-record statistics; each returns one loss per record.

A memorised token has p close to 1, so the gradient of its negative log-likelihood vanishes; the log-odds of the label
(its logit minus the logsumexp of all others) has a gradient of 1 whatever p is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_SURPRISE = 1e-3
_SMALL = 0.02
"""Nats of entropy or deviation below which differences hardly count."""


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
    tokens = torch.bincount(record, minlength=records).to(odds)
    return Scores(record_means(F.softplus(-odds), record, records), record_means(odds, record, records), tokens)


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
    z = (surprise - entropy) / (deviation + _SMALL)
    return 2 * z / (1 + (1 + z.abs()).sqrt())


def profile_distance(found: Tensor, odds: Tensor, target: Tensor) -> Tensor:
    """How far each token is from what it should look like, (tokens,).

    The sum of the Huber distances of surprise, of the logarithm of the entropy (where the model is sure, the gradient
    of the entropy itself vanishes) and of the standardised surprise from the target's; plus, while a token is likelier
    than it should be, that of its log-odds, whose gradient does not vanish as p approaches 1.

    Args:
        found: (tokens, 3), see ``token_profile``.
        odds: (tokens,), see ``label_log_odds``.
        target: (tokens, 3), what ``found`` should be.
    """
    mine, wanted = (
        torch.stack([x[:, 0], (x[:, 1].clamp_min(0.0) + _SMALL).log(), x[:, 2]], 1) for x in (found, target)
    )
    distance = F.smooth_l1_loss(mine, wanted, reduction="none").sum(-1)
    surprise = target[:, 0].clamp_min(_LEAST_SURPRISE)
    excess = (odds + surprise + torch.log(-torch.expm1(-surprise))).relu()
    return distance + F.smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none")


def record_means(values: Tensor, record: Tensor, records: int) -> Tensor:
    """Mean over the tokens of each record, (records,).

    Args:
        values: (tokens,).
        record: (tokens,) index of the record that each token belongs to.
        records: Number of records.
    """
    total = values.new_zeros(records).index_add_(0, record, values)
    return total / values.new_zeros(records).index_add_(0, record, torch.ones_like(values))


def log_odds(secret: Scores, target: Scores) -> Tensor:
    """Match the record to its target: neither likelier (remembering) nor unlikelier (as visible).

    Huber distance of the mean negative log-likelihood, which is what a membership test sees; plus, while the record is
    likelier than its target, Huber distance of the mean log-odds, whose gradient does not vanish as p approaches 1.
    """
    excess = (secret.odds - target.odds).relu()
    return F.smooth_l1_loss(secret.nll, target.nll, reduction="none") + F.smooth_l1_loss(
        excess, torch.zeros_like(excess), reduction="none"
    )


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
