"""Losses on the forget set. Pure functions of per-record statistics; each returns one loss per record.

A memorised token has p close to 1, so the gradient of its negative log-likelihood vanishes; the log-odds of the label
(its logit minus the logsumexp of all others) has a gradient of 1 whatever p is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from libortho.lm.logits import SMALL

_LEAST_SURPRISE = 1e-3


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
    mine, wanted = (torch.stack([x[:, 0], (x[:, 1].clamp_min(0.0) + SMALL).log(), x[:, 2]], 1) for x in (found, target))
    distance = F.smooth_l1_loss(mine, wanted, reduction="none").sum(-1)
    surprise = target[:, 0].clamp_min(_LEAST_SURPRISE)
    excess = (odds + surprise + torch.log(-torch.expm1(-surprise))).relu()
    return distance + F.smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none")
