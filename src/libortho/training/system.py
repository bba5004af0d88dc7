"""The equations of one Gauss-Newton step, as they are collected pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from libortho.lm.gradients import Tapped, tapped
from libortho.lm.logits import record_means
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import training_tokens
from libortho.text.encoding import Encoded, batches, collate
from libortho.training.gauss_newton import DAMPING, GaussNewton

HELD = 4.0
"""Weight of texts to keep beside records."""
LEAST = 1e-6
"""Smallest divergence, in nats, whose direction is asked for."""


class System:
    """Residuals, and their whitened gradients by layer.

    Args:
        lm: The model.
        layers: The layers whose values move.
        supports: The columns of each, (k,), that these values are on.
        optimiser: What solves the equations.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layers: Mapping[str, nn.Module],
        supports: Mapping[str, Tensor],
        optimiser: GaussNewton,
    ) -> None:
        self._lm, self._layers, self._supports, self._optimiser = lm, layers, supports, optimiser
        self.residuals: list[Tensor] = []
        self.rows: dict[str, list[Tensor]] = {n: [] for n in layers}

    def _read(self, texts: Sequence[Encoded]) -> Iterator[tuple[list[int], Tapped]]:
        for rows in batches(texts, training_tokens(self._lm.device)):
            yield rows, tapped(self._lm, self._layers, collate([texts[r] for r in rows]).to(self._lm.device))

    def _put(self, seen: Tapped, of_states: Tensor, residual: Tensor, scale: Tensor, *, again: bool = False) -> None:
        """Add an equation for each text of a pass; its gradient is ``scale`` (texts,) times that of the states."""
        self.residuals.append(residual)
        for name, g in self._gradients(seen, of_states, again=again):
            self.rows[name].append(self._optimiser.whiten(name, g * scale.to(g.device)[:, None, None]))

    def _gradients(self, seen: Tapped, of_states: Tensor, *, again: bool) -> Iterator[tuple[str, Tensor]]:
        """By layer, of the values, (texts, k, out_features)."""
        for name, g in seen.gradients(of_states, again=again).items():
            yield name, seen.inputs[name][..., self._supports[name]].float().mT @ g.float()

    def solve(self, share: float, damping: float = DAMPING, pull: float = 0.0) -> None:
        """Go this share of the way to where all of them hold; see :meth:`GaussNewton.step`."""
        self._optimiser.step(self.rows, torch.cat(self.residuals), share, damping, pull)


def root_of_divergence(divergence: Tensor) -> Tensor:
    """The residual whose half square is this divergence, (texts,) in nats."""
    return (2 * divergence).clamp_min(LEAST).sqrt()


def shares(seen: Tapped) -> Tensor:
    """What each judged token is of its text's mean."""
    return 1 / torch.bincount(seen.owner)[seen.owner].float()


def by_text(seen: Tapped, values: Tensor) -> Tensor:
    """Mean of each text's tokens, (texts,)."""
    return record_means(values, seen.owner, int(seen.owner.max()) + 1)
