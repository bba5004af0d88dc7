"""``x @ dequantise(codes)^T``: the product with the base stream.

Many tokens: dequantise, then one matrix product in the input's dtype. Few bf16 tokens on a CPU, without autograd:
torch's INT8/INT4 pack kernels, which read the integers and never build the dense weight. Those kernels fall to a scalar
loop on fp32 inputs and lose to the matrix product beyond a few tokens, hence both conditions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from libortho.ops.reference import dequantise, unpack_int4

DECODE_TOKENS = 4
"""Largest number of tokens for which the pack kernels are used (measured: they win up to about 4)."""

_INT8_STEP = 32
"""The INT8 kernel reads whole vectors of inputs; where they do not divide the layer, it would read past its end."""


def decodes(x: Tensor) -> bool:
    """True if ``x`` (tokens, in_features) is what the CPU pack kernels are for."""
    return (
        x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[0] <= DECODE_TOKENS
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def base_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int, packed: Tensor | None = None) -> Tensor:
    """Product of the input with the base weights.

    Args:
        x: (tokens, in_features), floating point.
        codes: INT8 (out_features, in_features), or packed INT4 (out_features, in_features / 2) uint8.
        scales: (out_features, groups).
        bits: 8 or 4.
        packed: For INT4, the same codes in the layout of torch's CPU kernel, as made by :func:`pack_for_decode`.

    Returns:
        (tokens, out_features) in the dtype of ``x``.
    """
    if decodes(x):
        x = x.contiguous()
        if bits == 8 and scales.shape[1] == 1 and x.shape[1] % _INT8_STEP == 0:
            return torch._weight_int8pack_mm(x, codes, scales.view(-1).to(x.dtype))
        if bits == 4 and packed is not None:
            group = codes.shape[1] * 2 // scales.shape[1]
            zeros = torch.zeros_like(scales)
            pairs = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous().to(x.dtype)
            return torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
    weight = dequantise(codes if bits == 8 else unpack_int4(codes), scales, x.dtype)
    return F.linear(x, weight)


def pack_for_decode(codes: Tensor, group_size: int) -> Tensor | None:
    """INT4 bytes in the layout of torch's CPU kernel, or None where that kernel does not take the shape."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    if codes.device.type != "cpu" or group_size not in (32, 64, 128, 256) or rows % 16 or columns % group_size:
        return None
    unsigned = (unpack_int4(codes) + 8).to(torch.int32)
    return torch._convert_weight_to_int4pack_for_cpu(unsigned, 1)
