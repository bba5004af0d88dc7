"""One step that makes many divergences vanish at once, and moves what must stay as little as that allows.

    minimise  |r + J d|^2 + damping * d^T F d          r_i: residual of equation i, J_i its gradient, F: curvature of
                                                       text to keep
    d = -F^-1 J^T (J F^-1 J^T + damping I)^-1 r

This is the Gauss-Newton step (Nocedal and Wright, Numerical Optimization, 10.3) in the metric of F, by the Woodbury
identity: there are far fewer equations than values, and only their Gram matrix is inverted. A part of the damping can
weigh the whole way w from the start in place of this step, as ridge regression does:

    minimise  |r + J d|^2 + (damping - pull) * d^T F d + pull * (w + d)^T F (w + d)

Of all values with which the equations hold, steps then end near those that are closest to the start.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.selection.curvature import KroneckerPreconditioner

DAMPING = 0.1
"""Weight of the divergence of text to keep, as a share of the mean of the Gram matrix's diagonal."""


class GaussNewton:
    """Moves of the values of some layers, (k, out_features) each.

    Args:
        values: What moves, by layer; changed in place.
        metrics: The curvature of text to keep on each.
    """

    def __init__(self, values: Mapping[str, Tensor], metrics: Mapping[str, KroneckerPreconditioner]) -> None:
        self.values, self.metrics = values, metrics
        self.start = {n: v.detach().clone() for n, v in values.items()}

    def whiten(self, name: str, gradients: Tensor) -> Tensor:
        """Gradients of equations, (equations, k, out_features), as ``step`` takes them."""
        return self.metrics[name].whitened(gradients)

    @torch.no_grad()
    def decay(self, share: float) -> None:
        """Take this share of all moves back."""
        for name, value in self.values.items():
            value.lerp_(self.start[name], share)

    @torch.no_grad()
    def step(
        self,
        rows: dict[str, list[Tensor]],
        residuals: Tensor,
        share: float,
        damping: float = DAMPING,
        pull: float = 0.0,
    ) -> None:
        """Go this share of the way to where all residuals (equations,) vanish.

        Args:
            rows: By layer, parts of the whitened gradients of all equations, (equations, k, out_features); emptied as
                they are joined, for they are the largest thing in memory.
            residuals: Of all equations.
            share: Of the way, (0 to 1).
            damping: As ``DAMPING``; a larger one takes shorter steps.
            pull: What of the damping weighs the whole way from the start; at most all of it does.
        """
        joined = {n: torch.cat(rows.pop(n)) for n in list(rows)}
        gram = torch.zeros(len(residuals), len(residuals), dtype=torch.float64)
        for found in joined.values():
            flat = found.flatten(1)
            gram += (flat @ flat.T).cpu()
        gram.diagonal().add_(damping * gram.diagonal().mean())
        wanted, back = residuals.double().cpu(), min(1.0, pull / damping)
        if back:
            for name, found in joined.items():
                way = self.metrics[name].whitened_move(self.values[name] - self.start[name])
                wanted -= back * (found.flatten(1) @ way.flatten()).double().cpu()
            self.decay(share * back)
        solved = torch.linalg.solve(gram, wanted).float()
        for name, found in joined.items():
            move = -share * torch.tensordot(solved.to(found.device), found, 1)
            self.values[name].add_(self.metrics[name].unwhitened(move))
