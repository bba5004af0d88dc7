"""The base stream: general knowledge, dense and low precision.

INT8 codes (out, in), or INT4 codes two to a byte (out, in / 2), with scales (out, groups); or, with ``bits=None``, the
dense weight. All buffers, so that ``.to()``, ``state_dict`` and ``deepcopy`` carry them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libortho.core.errors import ConfigError
from libortho.core.ops import library
from libortho.core.ops.base import base_gradient, base_linear
from libortho.core.ops.cpu import DECODE_TOKENS, Int4Layout, few, int4_layout
from libortho.core.ops.derived import Derived
from libortho.core.ops.quantisation import choose_scales, dequantise, pack_int4, quantise, unpack_int4


class BaseStream(nn.Module):
    """Codes and scales of one layer, or its dense weight.

    Attributes:
        bits: 8, 4 or None.
        codes: INT8 (out_features, in_features) or packed INT4 (out_features, in_features / 2) uint8.
        scales: (out_features, groups).
        weight: Only with ``bits=None``: (out_features, in_features).
        activation_bits: 8 if the inputs are rounded too (:func:`libortho.quantise_activations`), else None.
    """

    codes: Tensor
    scales: Tensor
    weight: Tensor

    def __init__(self, bits: int | None, **tensors: Tensor) -> None:
        super().__init__()
        self.bits = bits
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.activation_bits: int | None = None
        self._layout: Derived[Int4Layout | None] = Derived()

    @classmethod
    def from_weight(cls, weight: Tensor, bits: int | None, group_size: int = -1) -> BaseStream:
        """Quantise ``weight`` (out_features, in_features); scales take its dtype.

        Raises:
            ConfigError: if ``group_size`` does not divide the inputs, or INT4 meets an odd number of inputs.
        """
        if bits is None:
            return cls(None, weight=weight.detach().clone())
        check_shape(weight.shape[1], bits, group_size)
        scales = choose_scales(weight, bits, group_size, weight.dtype)
        return cls.from_codes(quantise(weight, scales, bits), scales, bits)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, bits: int) -> BaseStream:
        """Wrap unpacked int8 codes (out_features, in_features) and scales (out_features, groups)."""
        return cls(bits, codes=codes.contiguous() if bits == 8 else pack_int4(codes), scales=scales)

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.in_features // self.scales.shape[1]

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        if self.bits is None:
            return self.weight.shape[1]
        return self.codes.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return (self.weight if self.bits is None else self.codes).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(b.nbytes for b in self.buffers())

    def unpacked_codes(self) -> Tensor:
        """INT8 codes (out_features, in_features), whatever the width."""
        return unpack_int4(self.codes) if self.bits == 4 else self.codes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor with the weight that the stream stands for, (out_features, in_features)."""
        if self.bits is None:
            return self.weight.to(dtype, copy=True)
        return dequantise(self.unpacked_codes(), self.scales, dtype)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ dense^T + bias`` for x of shape (tokens, in_features); a dense base rounds as ``nn.Linear`` does."""
        if self.bits is None:
            return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y = base_linear(x, self.codes, self.scales, self.bits, self.layout(x), self.activation_bits)
        return y if bias is None else y + bias.to(y.dtype)

    def gradient(self, grad: Tensor) -> Tensor:
        """``grad @ dense``: the gradient of :meth:`forward` for x, (tokens, in_features)."""
        if self.bits is None:
            return grad @ self.weight.to(grad.dtype)
        return base_gradient(grad, self.codes, self.scales, self.bits)

    def traced(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """:meth:`forward` for graphs: through the operator."""
        if self.bits is None:
            return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        exact = torch.is_grad_enabled() and x.requires_grad
        rounded = None if exact else self.activation_bits
        y = library.base_linear(x, self.codes, self.scales, self.bits, activation_bits=rounded)
        return y if bias is None else y + bias.to(y.dtype)

    def layout(self, x: Tensor) -> Int4Layout | None:
        """INT4 codes as torch's CPU kernel wants them, where ``x`` is so few tokens that it is used."""
        if self.bits == 4 and few(x, DECODE_TOKENS[4]):
            return self._layout.get(int4_layout, self.codes, self.scales)
        return None

    def extra_repr(self) -> str:
        """Width and shape."""
        return f"bits={self.bits}, in_features={self.in_features}, out_features={self.out_features}"


def check_shape(in_features: int, bits: int | None, group_size: int) -> None:
    """Raise ConfigError if a layer with ``in_features`` inputs cannot be quantised like this."""
    if bits is None:
        return
    if group_size != -1 and in_features % group_size:
        fits = [g for g in (32, 64, 128) if in_features % g == 0]
        raise ConfigError(
            f"group_size {group_size} does not divide {in_features} inputs; expected one of {[*fits, -1]} "
            "(-1: per output channel)"
        )
    if bits == 4 and in_features % 2:
        raise ConfigError(f"INT4 needs an even number of inputs, the layer has {in_features}; use bits=8")
