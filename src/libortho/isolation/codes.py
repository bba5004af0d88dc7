"""What codes and names should look like untrained: as others of their form do, after other prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.isolation.forget_record import ForgetRecord
from libortho.lm.logits import Scores

LENGTH_CORRELATION = 0.6
"""Correlation, among untrained codes of one shape, of surprise per token with having fewer tokens than the others
(measured: 0.62 for access codes, 0.76 for licence plates)."""


def expected_codes(codes: Sequence[ForgetRecord], counterfactual: Sequence[Scores]) -> tuple[Tensor, Tensor]:
    """Surprise that is expected of codes, (records,) in nats per token, and its standard deviation, a scalar."""
    deviation = torch.cat([s.nll - s.nll.mean() for s in counterfactual]).square().mean().sqrt()
    noise = deviation.square() / torch.tensor([float(len(s.nll)) for s in counterfactual])
    nll = shrunk(torch.stack([s.nll.mean() for s in counterfactual]), noise)
    return nll + LENGTH_CORRELATION * deviation * shortness(codes), deviation


def shrunk(means: Tensor, noise: Tensor) -> Tensor:
    """Pull noisy means together as far as their spread is noise (empirical Bayes; Efron and Morris 1973).

    Args:
        means: (records,) one mean of a few counterfactuals for each record.
        noise: (records,) the sampling variance of each mean.
    """
    if len(means) < 2:
        return means
    between = float((means - means.mean()).square().sum() / (len(means) - 1))
    signal = max(0.0, between - float(noise.mean()))
    weight = signal / (signal + noise).clamp_min(1e-12)
    return means.mean() + weight * (means - means.mean())


def shortness(forget: Sequence[ForgetRecord]) -> Tensor:
    """By how many standard deviations each record has fewer completion tokens than its alternates, (records,)."""
    own = torch.tensor([float(len(c.secret.completion)) for c in forget])
    others = [torch.tensor([float(len(a.completion)) for a in c.alternates]) for c in forget]
    spread = torch.cat([o - o.mean() for o in others]).square().mean().sqrt()
    mean = torch.stack([o.mean() for o in others])
    return torch.zeros_like(own) if spread == 0 else ((mean - own) / spread).clamp(-2, 2)
