r"""A layer while a stream is trained on it: the layer as it is deployed, frozen, and values on a few of its inputs.

    y = layer(x) + x[index] values

``values`` begins at 0, so that the model begins as its base; it is the weight of an ordinary linear layer of k inputs,
which optimisers and per-example gradients (Opacus) know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from libortho.core.streams import Columns, OrthoStream


class TunedLinear(nn.Module):
    """Stand-in for a linear layer, split or not.

    Attributes:
        layer: What the stream is trained on; none of it moves.
        index: (k,) input columns, ascending.
        added: The stream as a linear layer of k inputs, fp32.
    """

    index: Tensor

    def __init__(self, layer: nn.Module, index: Tensor, out_features: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("index", index)
        self.added = nn.Linear(len(index), out_features, bias=False, device=index.device, dtype=torch.float32)
        nn.init.zeros_(self.added.weight)
        self.requires_grad_(False)

    @property
    def values(self) -> Tensor:
        """The values, (k, out_features), to be changed in place; they carry no gradient."""
        return self.added.weight.detach().T

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        y: Tensor = self.layer(x)
        return y + self.added(x[..., self.index].float()).to(y.dtype)

    def stream(self, dtype: torch.dtype) -> OrthoStream:
        """The values as the stream stores them."""
        return OrthoStream(Columns(self.index, self.values.contiguous().to(dtype)))
