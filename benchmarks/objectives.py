"""Losses of other methods on the forget set: the peers of ``isolate``. Each returns one loss per record, (records,).

Mean negative log-likelihoods and token counts are those of the record's completion, in nats: see
``libortho.lm.logits.Scores``. The retain term is the trainer's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from libortho.lm.logits import Scores


def total(scores: Scores) -> Tensor:
    """Summed log-likelihood of each completion, (records,) in nats."""
    return -scores.nll * scores.tokens


def grad_diff(secret: Scores) -> Tensor:
    """Gradient ascent on the record (Liu et al. 2022). Unbounded below."""
    return -secret.nll


def npo(secret: Scores, original: Scores, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation (arXiv 2404.05868, eq. 3), on summed log-likelihoods."""
    return -(2 / beta) * F.logsigmoid(-beta * (total(secret) - total(original)))


def simnpo(secret: Scores, beta: float = 3.5, delta: float = 1.0) -> Tensor:
    """Reference-free, length-normalised NPO (arXiv 2410.07163, eq. 4)."""
    return -(2 / beta) * F.logsigmoid(beta * (secret.nll - delta))


def altpo(secret: Scores, original: Scores, alternate: Scores, alternate_original: Scores, beta: float = 0.1) -> Tensor:
    """DPO that prefers an in-domain alternate to the record (AltPO, arXiv 2409.13474)."""
    margin = (total(alternate) - total(alternate_original)) - (total(secret) - total(original))
    return -(2 / beta) * F.logsigmoid(beta * margin)
