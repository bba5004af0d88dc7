"""torch's CPU kernels for few tokens, and when each is used.

Measured (one thread, AVX-512 with bf16, weights out of cache): reading the integers and never building a dense weight
wins up to about 8 tokens for INT8 and 32 for INT4; beyond, one conversion and one matrix product win. The kernels fall
to a scalar loop, 20 to 100 times slower, on fp32 inputs, so they get bf16 only. A bf16 matrix product with a single row
costs 25 to 40 microseconds before it begins, an fp32 one under 10: what a stream adds to few tokens is computed in
fp32, from a copy of its values.

Where the C++ kernels are built (:mod:`libortho.core.ops.native`), INT8 up to the same 8 tokens and bf16 columns are
theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from libortho.core.ops import native
from libortho.core.ops.quantisation import unpack_int4

DECODE_TOKENS = {8: 8, 4: 32}
"""Bits to the largest number of tokens for which the pack kernels are used."""

WIDE_TOKENS = 8
"""Largest number of tokens for which an ortho stream is computed in fp32."""

_INT8_STEP = 32
"""The INT8 kernel reads whole vectors of inputs; where they do not divide the layer, it would read past its end."""


class Int4Layout(NamedTuple):
    """INT4 weights as torch's CPU kernel takes them.

    Attributes:
        packed: (out_features, in_features / 2) uint8, in blocks that depend on the processor.
        pairs: (groups, out_features, 2) bf16, scale and zero point.
    """

    packed: Tensor
    pairs: Tensor


def few(x: Tensor, limit: int) -> bool:
    """True if ``x`` (tokens, features) is at most ``limit`` bf16 tokens on a CPU, and no gradient is wanted."""
    return (
        x.shape[0] <= limit
        and x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def int4_layout(codes: Tensor, scales: Tensor) -> Int4Layout | None:
    """INT4 bytes and scales for torch's CPU kernel, or None where that kernel does not take the shape.

    Args:
        codes: (out_features, in_features / 2) uint8.
        scales: (out_features, groups).
    """
    rows, columns = codes.shape[0], codes.shape[1] * 2
    group = columns // scales.shape[1]
    if codes.device.type != "cpu" or group not in (32, 64, 128, 256) or rows % 16:
        return None
    unsigned = (unpack_int4(codes) + 8).to(torch.int32)
    pairs = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1)
    return Int4Layout(torch._convert_weight_to_int4pack_for_cpu(unsigned, 1), pairs.contiguous().to(torch.bfloat16))


def decode(x: Tensor, codes: Tensor, scales: Tensor, bits: int, layout: Int4Layout | None) -> Tensor | None:
    """The product by a pack kernel, (tokens, out_features) bf16, or None where there is none for this shape."""
    if bits == 8 and scales.shape[1] == 1:
        if native.int8_linear is not None and (y := native.int8_linear(x, codes, scales)) is not None:
            return y
        if x.shape[1] % _INT8_STEP == 0:
            return torch._weight_int8pack_mm(x.contiguous(), codes, scales.view(-1).to(x.dtype))
    if bits == 4 and layout is not None:
        group = x.shape[1] // scales.shape[1]
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), layout.packed, group, layout.pairs)
    return None
