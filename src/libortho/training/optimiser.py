"""Adam on the values of a support, in the metric of text to keep.

    value  <-  value + step(Adam of the rotated gradient),     then     value  <-  value + decay * (start - value)

A preconditioner's basis makes a unit step one that text to keep notices equally in every direction (K-FAC, arXiv
1503.05671; Adam in its basis as SOAP, arXiv 2409.11321). Without one it is Adam on the values themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from libortho.selection.curvature import KroneckerPreconditioner


class PreconditionedAdam:
    """Adam with a preconditioner for each parameter, and a decay towards the values at its start.

    Args:
        values: Parameters (k, out_features).
        rates: Peak learning rate of each, in units of its values.
        metrics: Preconditioner of each, or None.
        decay: Share of the way back to its start that a value goes in a step at the peak rate.
    """

    def __init__(
        self,
        values: Sequence[nn.Parameter],
        rates: Sequence[float],
        metrics: Sequence[KroneckerPreconditioner | None],
        decay: float,
    ) -> None:
        self.values, self.rates, self.metrics, self.decay = values, rates, metrics, decay
        self.start = [v.detach().clone() for v in values]
        self.moves = [nn.Parameter(torch.zeros_like(v)) for v in values]  # from zero in every step
        self.adam = torch.optim.Adam([{"params": [m]} for m in self.moves], betas=(0.9, 0.95))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], share: float) -> None:
        """Take one step at this share of the peak rates."""
        for group, peak, move, metric, gradient in zip(
            self.adam.param_groups, self.rates, self.moves, self.metrics, gradients, strict=True
        ):
            group["lr"] = peak * share
            move.zero_()
            move.grad = gradient if metric is None else metric.rotated(gradient)
        self.adam.step()
        for value, move, metric in zip(self.values, self.moves, self.metrics, strict=True):
            value.add_(move if metric is None else metric.step(move))
        for value, start in zip(self.values, self.start, strict=True):
            value.lerp_(start, self.decay * share)

    def tensors(self) -> dict[str, Tensor]:
        """The values and Adam's moments by name."""
        found = {f"values.{i}": v.detach() for i, v in enumerate(self.values)}
        for i, moments in self.adam.state_dict()["state"].items():
            found |= {f"adam.{i}.{name}": t for name, t in moments.items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors`` gave; other names are passed over."""
        moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            kind, *rest = name.split(".")
            if kind == "values":
                self.values[int(rest[0])].copy_(tensor)
            elif kind == "adam":
                moments[int(rest[0])][rest[1]] = tensor
        self.adam.load_state_dict({**self.adam.state_dict(), "state": dict(moments)})
