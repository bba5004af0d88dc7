"""What corrects the training: the offset of the targets, and the length of the finished edit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.isolation.criteria import CLOSE
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.isolation.state import Training
from libortho.isolation.targets import current_targets
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.training.edit import EditLinear

logger = logging.getLogger(__name__)

_STRETCH, _SECANT_STEPS = (0.8, 1.25), 3
"""Range of the factor of the finished edit, and the most secant steps to find it."""
STEER_FROM, STEER, STEER_MOST, STEER_AHEAD = 15, 0.3, 0.4, 2.0
"""Step from which targets are corrected, share of the difference that a correction is, most that counts of it, and
for how many looks the training is trusted to go on as it goes."""


@torch.no_grad()
def steer(lm: LanguageModel, forget: Sequence[ForgetRecord], original: Original, state: Training, mine: Tensor) -> None:
    """Correct the targets by the difference that is left between the records and their controls (dual ascent).

    Records, their alternates and their neighbours pull at the same values, and where they balance the records are still
    a little too likely. Controls are read anew at every look, because a membership test compares under the edited
    model. What the trend of the training makes up for by itself is not corrected.

    ``mine`` is the mean profile of the records, (3,).
    """
    state.profiles = current_targets(lm, forget, original)
    before, state.residual = state.residual, torch.stack([p.mean(0) for p in state.profiles]).mean(0) - mine
    if state.step < STEER_FROM:
        return
    state.target_offset += STEER * extrapolated_residual(state.residual, before).clamp(-STEER_MOST, STEER_MOST)
    logger.debug("records lack %s", [round(x, 2) for x in state.residual.tolist()])


def extrapolated_residual(missing: Tensor, before: Tensor) -> Tensor:
    """The residual ``STEER_AHEAD`` looks ahead, by its change since the look before; zero where it changes sign.

    Without it, the corrections during the descent of a few records add up to more than is missing in the end.
    """
    ahead = missing + STEER_AHEAD * (missing - before)
    return torch.where(ahead * missing > 0, ahead, 0.0)


def calibrate(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    forget: Sequence[ForgetRecord],
    original: Original,
) -> float:
    """Scale the whole edit so that the records on average have the surprise of their controls; returns the factor.

    What training leaves is mostly an offset that all records share, and that is what a membership test sees. Secant
    steps find the factor, within ``_STRETCH``.
    """
    trained = {n: m.values.detach().clone() for n, m in layers.items() if m.values is not None}

    def stretch(factor: float) -> None:
        for name, values in trained.items():
            layers[name].rescale(values, factor)

    def offset(factor: float) -> float:
        stretch(factor)
        return float(surprise_offsets(lm, forget, original).mean())

    tried = {1.0: offset(1.0)}
    previous, factor = 1.0, 1.05 if tried[1.0] < 0 else 0.95
    for _ in range(_SECANT_STEPS):
        if abs(tried[previous]) < CLOSE or factor in tried:
            break
        tried[factor] = offset(factor)
        slope = (tried[factor] - tried[previous]) / (factor - previous)
        if slope <= 0:  # more edit no longer means less memory
            break
        previous, factor = factor, min(_STRETCH[1], max(_STRETCH[0], factor - tried[factor] / slope))
    best = min(tried, key=lambda f: abs(tried[f]))
    stretch(best)
    logger.info("edit rescaled by %.3f, offset %.2f to %.2f nats per token", best, tried[1.0], tried[best])
    return best


def surprise_offsets(lm: LanguageModel, forget: Sequence[ForgetRecord], original: Original) -> Tensor:
    """Surprise of each record minus that of its matched tokens in the present model, (records,) in nats per token."""
    profiles = current_targets(lm, forget, original)
    secret, _ = score(lm, [r.secret for r in forget])
    return secret.nll - torch.stack([p[:, 0].mean() for p in profiles])
