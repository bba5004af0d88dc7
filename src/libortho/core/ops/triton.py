"""Triton kernels for few tokens on a GPU: the base product from the integer codes, and an ortho stream's columns.

    y[t, n]  = sum_k x[t, k] * code[n, k] * scale[n, k // group]        INT8 or packed INT4, no dense weight is built
    y[t, n] += alpha[t] * sum_j x[t, index[j]] * values[j, n]           in place, the gather is part of the kernel

Sums are fp32; a weight with group scales is rounded to the inputs' dtype first, as
:func:`libortho.core.ops.quantisation.dequantise` does it, and one scale per output channel is taken to the sum. Beyond
:data:`MOST_TOKENS`, where a gradient is wanted, and where :func:`takes` says no, torch does the same. Free entries and
factors are torch's on every device.

Nothing here has been timed: tiles and :data:`MOST_TOKENS` are what the shapes suggest, to be measured on a GPU with
``benchmarks/gpu.py``. What the kernels compute is tested under Triton's interpreter, on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton comes with torch's CUDA builds, not with its CPU builds
    triton = None

MOST_TOKENS = 64
"""Largest number of tokens for which the kernels are used; beyond, one dense product should win. Not measured."""


class Tile(NamedTuple):
    """What one program computes: tokens x outputs, in steps of so many inputs."""

    tokens: int
    outputs: int
    inputs: int


FEW = Tile(16, 16, 128)
"""Decode: 16 tokens are the least that a tensor core takes, narrow outputs spread over the processor. Not measured."""

MANY = Tile(64, 64, 64)
"""More than 16 tokens of bf16 or fp16. Not measured. (In fp32, Triton takes TF32 for such a tile on Blackwell.)"""

_LEAST_CAPABILITY = (8, 0)
"""NVIDIA architectures before it are not Triton's, nor have they bf16."""


def available() -> bool:
    """True if Triton is installed."""
    return triton is not None


def takes(x: Tensor, *others: Tensor) -> bool:
    """True if the kernels serve ``x`` (tokens, in_features) on a GPU: few tokens, and no gradient wanted."""
    return (
        available()
        and x.shape[0] <= MOST_TOKENS
        and all(t.dtype in _DTYPES for t in (x, *others))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)))
        and _capable(x.device.index)
    )


def base_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """``x @ dequantise(codes)^T``, (tokens, out_features) in the dtype of ``x``.

    Args:
        x: (tokens, in_features), fp32, bf16 or fp16.
        codes: INT8 (out_features, in_features), or packed INT4 (out_features, in_features / 2) uint8.
        scales: (out_features, groups).
        bits: 8 or 4.
    """
    (tokens, columns), rows, groups = x.shape, codes.shape[0], scales.shape[1]
    y = x.new_empty(tokens, rows)
    if y.numel():
        tile = _tile(tokens, x.dtype)
        with torch.cuda.device_of(x):
            _base_kernel[_grid(tile, tokens, rows)](
                x.contiguous(), codes.contiguous(), scales.contiguous(), y, tokens, rows, columns,
                BITS=bits, GROUPS=groups, GROUP=columns // groups, DOT=_dot_dtype(x),
                TOKENS=tile.tokens, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
            )  # fmt: skip
    return y


def add_columns(y: Tensor, x: Tensor, index: Tensor, values: Tensor, alpha: float | Tensor) -> Tensor:
    """``y += alpha * x[:, index] @ values`` in place; the product's operands are rounded to the dtype of ``y``.

    Args:
        y: (tokens, out_features), any strides.
        x: (tokens, in_features).
        index: (k,) int, the input columns.
        values: (k, out_features).
        alpha: Float or (tokens, 1).
    """
    (tokens, rows), count = y.shape, index.shape[0]
    if y.numel() and count:
        tile = _tile(tokens, y.dtype)
        factor = alpha.to(torch.float32).reshape(-1) if isinstance(alpha, Tensor) else float(alpha)
        with torch.cuda.device_of(x):
            _columns_kernel[_grid(tile, tokens, rows)](
                y, x.contiguous(), index.contiguous(), values.contiguous(), factor,
                tokens, rows, x.shape[1], count, y.stride(0), y.stride(1),
                PER_TOKEN=isinstance(factor, Tensor), DOT=_dot_dtype(y),
                TOKENS=tile.tokens, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
            )  # fmt: skip
    return y


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _capable(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def _tile(tokens: int, dtype: torch.dtype) -> Tile:
    return FEW if tokens <= FEW.tokens or dtype is torch.float32 else MANY


def _grid(tile: Tile, tokens: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(rows, tile.outputs), triton.cdiv(tokens, tile.tokens)


def _dot_dtype(x: Tensor) -> Any:
    """Dtype of a product's operands: that of ``x``, but fp32 in the interpreter, whose NumPy knows no bf16.

    The operands are rounded to the dtype of ``x`` before, and bf16 products are exact in fp32: the result is the same.
    """
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return tl.float32 if x.device.type == "cpu" else names[x.dtype]


def _jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _base_kernel(  # type: ignore[no-untyped-def]
    x, codes, scales, y, tokens, rows, columns,
    BITS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)[:, None]
    t = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, columns, INPUTS):
        k = start + tl.arange(0, INPUTS)[None, :]
        inputs = tl.load(x + t * columns + k, mask=(t < tokens) & (k < columns), other=0.0)
        if BITS == 4:
            byte = start // 2 + tl.arange(0, INPUTS // 2)[None, :]
            packed = tl.load(codes + n * (columns // 2) + byte, mask=(n < rows) & (byte < columns // 2), other=0)
            weight = tl.interleave(packed & 15, packed >> 4).to(tl.float32) - 8  # even columns are the low nibbles
        else:
            weight = tl.load(codes + n * columns + k, mask=(n < rows) & (k < columns), other=0).to(tl.float32)
        if GROUPS > 1:
            scale = tl.load(scales + n * GROUPS + k // GROUP, mask=(n < rows) & (k < columns), other=0.0)
            weight *= scale.to(tl.float32)
        weight = weight.to(inputs.dtype).to(DOT)  # integers below 256 are exact in bf16 and fp16
        total = tl.dot(inputs.to(DOT), weight.trans(), total, input_precision="ieee")
    n = n.reshape(1, OUTPUTS)
    if GROUPS == 1:
        total *= tl.load(scales + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + t * rows + n, total, mask=(t < tokens) & (n < rows))


@_jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    y, x, index, values, alpha, tokens, rows, columns, count, y_token, y_output,
    PER_TOKEN: tl.constexpr, DOT: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)[None, :]
    t = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    narrow: tl.constexpr = y.dtype.element_ty  # under autocast, x is wider than y
    for start in range(0, count, INPUTS):
        j = start + tl.arange(0, INPUTS)
        source = tl.load(index + j, mask=j < count, other=0).to(tl.int64)
        inputs = tl.load(x + t * columns + source[None, :], mask=(t < tokens) & (j < count)[None, :], other=0.0)
        part = tl.load(values + j[:, None] * rows + n, mask=(j < count)[:, None] & (n < rows), other=0.0)
        total = tl.dot(inputs.to(narrow).to(DOT), part.to(narrow).to(DOT), total, input_precision="ieee")
    factor = alpha
    if PER_TOKEN:
        factor = tl.load(alpha + t, mask=t < tokens, other=0.0)
    place = y + t * y_token + n * y_output
    inside = (t < tokens) & (n < rows)
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    after = before + factor * total
    if PER_TOKEN:
        after = tl.where(factor == 0.0, before, after)  # whatever the product is: 0 * inf is no zero
    tl.store(place, after, mask=inside)
