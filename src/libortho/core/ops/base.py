"""``x @ dequantise(codes)^T``: the product with the base stream.

Few bf16 tokens on a CPU: torch's INT8/INT4 pack kernels (:mod:`libortho.core.ops.cpu`). Few tokens on a GPU: Triton's
(:mod:`libortho.core.ops.triton`). Otherwise the weight is built and one matrix product run in the input's dtype. In
bf16, INT8 codes with one scale per output channel need no scaled weight: integers below 256 are exact in bf16, and the
scale is taken to the few outputs instead of the many weights. (Not so in fp16, whose range such sums leave, nor in
fp32, where the result equals the stored weight's to the last bit.)

    y[t, n] = scale[n] * sum_k x[t, k] code[n, k]

With ``activation_bits=8`` the inputs are rounded too, with one scale per token (W8A8, opt-in): faster than bf16 in
prefill (docs/explanation/speed.md), at a cost in accuracy that the caller has to measure. Shapes that the GPU's product
does not take stay W8A16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from libortho.core.ops import triton
from libortho.core.ops.cpu import DECODE_TOKENS, Int4Layout, decode, few
from libortho.core.ops.quantisation import dequantise, unpack_int4


def base_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    layout: Int4Layout | None = None,
    activation_bits: int | None = None,
) -> Tensor:
    """Product of the input with the base weights; gradients flow to ``x``, and nothing dense is kept for them.

    Args:
        x: (tokens, in_features), floating point.
        codes: INT8 (out_features, in_features), or packed INT4 (out_features, in_features / 2) uint8.
        scales: (out_features, groups).
        bits: 8 or 4.
        layout: For INT4, the same codes as made by :func:`libortho.core.ops.cpu.int4_layout`.
        activation_bits: 8 rounds the inputs as well, where codes are INT8 with one scale per output channel.

    Returns:
        (tokens, out_features) in the dtype of ``x``.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _BaseProduct.apply(x, codes, scales, bits)
    if few(x, DECODE_TOKENS[bits]):
        y = decode(x, codes, scales, bits, layout)
        if y is not None:
            return y
    if activation_bits == 8 and bits == 8 and scales.shape[1] == 1 and int8_product_takes(x, codes):
        return _int8_product(x, codes, scales)
    if x.is_cuda and triton.takes(x, scales):
        return triton.base_linear(x, codes, scales, bits)
    return _product(x, codes, scales, bits)


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (tokens, in_features) and fp32 scales (tokens, 1) of the inputs: the largest of a token is 127."""
    scales = (x.abs().amax(1, keepdim=True).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scales).round_().to(torch.int8), scales


def int8_product_takes(x: Tensor, codes: Tensor) -> bool:
    """True if torch multiplies INT8 matrices of these shapes: on a CPU always, on a GPU by the rules of cuBLAS."""
    return not x.is_cuda or (x.shape[0] > 16 and codes.shape[0] % 8 == 0 and codes.shape[1] % 8 == 0)


def _int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    rounded, token_scales = round_activations(x)
    return (torch._int_mm(rounded, codes.t()).float().mul_(token_scales)).mul_(scales.view(-1)).to(x.dtype)


def _product(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    if _scale_outputs(x.dtype, scales, bits):
        return F.linear(x, codes.to(x.dtype)).mul_(scales.view(-1))
    return F.linear(x, _dense(codes, scales, bits, x.dtype))


def _scale_outputs(dtype: torch.dtype, scales: Tensor, bits: int) -> bool:
    return bits == 8 and scales.shape[1] == 1 and dtype is torch.bfloat16


def _dense(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return dequantise(codes if bits == 8 else unpack_int4(codes), scales, dtype)


class _BaseProduct(torch.autograd.Function):
    """The product with a gradient for ``x``, for which the weight is built once more instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.bits, ctx.dtype = bits, x.dtype
        return _product(x, codes, scales, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        codes, scales = ctx.saved_tensors
        return base_gradient(grads[0], codes, scales, ctx.bits).to(ctx.dtype), None, None, None


def base_gradient(grad: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Gradient of :func:`base_linear` for ``x``, (tokens, in_features), from that of its output."""
    if _scale_outputs(grad.dtype, scales, bits):
        return (grad * scales.view(-1).to(grad.dtype)) @ codes.to(grad.dtype)
    return grad @ _dense(codes, scales, bits, grad.dtype)
