r"""A layer while a stream is trained on it: the layer as it is deployed, frozen, and values on a few of its inputs.

    y = layer(x) + x[index] values

``values`` begins at 0, so that the model begins as its base.
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
        values: (k, out_features) the stream in fp32, to be changed in place; it carries no gradient.
    """

    index: Tensor
    values: Tensor

    def __init__(self, layer: nn.Module, index: Tensor, out_features: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("index", index)
        self.register_buffer("values", torch.zeros(len(index), out_features, device=index.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        y: Tensor = self.layer(x)
        return y + (x[..., self.index].float() @ self.values).to(y.dtype)

    def stream(self, dtype: torch.dtype) -> OrthoStream:
        """The values as the stream stores them."""
        return OrthoStream(Columns(self.index, self.values.to(dtype)))
