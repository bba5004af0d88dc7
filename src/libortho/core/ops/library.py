"""The arithmetic of a split layer as ``torch.library`` operators, for ``torch.compile`` and ``torch.export``.

    libortho::base_linear(x, codes, scales, bits, activation_bits) -> y
    libortho::alpha(x, switch, stream) -> (sequences,)
    libortho::add_columns(y, x, index, values, alpha) -> y'
    libortho::add_entries(y, x, rows, columns, values, alpha) -> y'
    libortho::add_factors(y, x, down, up, alpha) -> y'

A compiled graph holds no alpha: ``libortho::alpha`` reads the switch whenever the graph runs, so one graph serves every
value, of all sequences or of each, and needs no recompilation. Where it is zero for all sequences the others return a
copy of ``y`` at once. Eager code calls the functions behind the operators and saves their dispatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from libortho.core.errors import AlphaError
from libortho.core.ops import base as eager_base
from libortho.core.ops import ortho as eager_ortho
from libortho.core.ops.cpu import DECODE_TOKENS, few, int4_layout
from libortho.core.ops.derived import Derived
from libortho.core.switch.alpha import switch_of

_LAYOUTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""INT4 codes to their layout for the CPU kernel: a graph carries only what is stored."""


@torch.library.custom_op("libortho::base_linear", mutates_args=())
def base_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int, activation_bits: int | None = None) -> Tensor:
    """See :func:`libortho.core.ops.base.base_linear`."""
    layout = None
    with torch.no_grad():
        if bits == 4 and few(x, DECODE_TOKENS[4]):
            layout = _LAYOUTS.setdefault(codes, Derived()).get(int4_layout, codes, scales)
        return eager_base.base_linear(x, codes, scales, bits, layout, activation_bits)


@base_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bits: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _save_base(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, bits, *_ = inputs
    ctx.save_for_backward(codes, scales)
    ctx.bits = bits


def _base_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    return (eager_base.base_gradient(grad, codes, scales, ctx.bits), *[None] * 4)


base_linear.register_autograd(_base_backward, setup_context=_save_base)


@torch.library.custom_op("libortho::alpha", mutates_args=())
def alpha(x: Tensor, switch: int, stream: str, sorted_rows: bool = True) -> Tensor:
    """Alpha of one stream for each of the first dimension of ``x``, fp32 on the CPU, read when the graph runs.

    Raises:
        AlphaError: if per-sequence values do not fit ``x``; see :meth:`libortho.alpha.AlphaState.tokens_each`.
        AlphaContextError: if this thread cannot know its alpha.
    """
    owner = switch_of(switch)
    if stream not in owner.streams:
        raise AlphaError(
            f"this graph was made from a model with a stream {stream!r}, and the model in its place has "
            f"{sorted(owner.streams)}; compiled and exported graphs serve the process that made them"
        )
    state = owner.current()
    value = state.of(stream)
    if isinstance(value, tuple):
        each = state.tokens_each(stream, x, sorted_rows)
        return torch.tensor(value, dtype=torch.float32).repeat_interleave(each if x.dim() == 2 else 1)
    return torch.full((x.shape[0],), value, dtype=torch.float32)


@alpha.register_fake
def _(x: Tensor, switch: int, stream: str, sorted_rows: bool = True) -> Tensor:
    return torch.empty(x.shape[0], dtype=torch.float32, device="cpu")


@torch.library.custom_op("libortho::add_columns", mutates_args=())
def add_columns(y: Tensor, x: Tensor, index: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """See :func:`libortho.core.ops.ortho.add_columns`; alpha is (sequences,), their tokens are consecutive."""
    return _accumulate(eager_ortho.add_columns, y, x, alpha, index, values)


@torch.library.custom_op("libortho::add_entries", mutates_args=())
def add_entries(y: Tensor, x: Tensor, rows: Tensor, columns: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """See :func:`libortho.core.ops.ortho.add_sparse`."""
    return _accumulate(eager_ortho.add_sparse, y, x, alpha, rows, columns, values)


@torch.library.custom_op("libortho::add_factors", mutates_args=())
def add_factors(y: Tensor, x: Tensor, down: Tensor, up: Tensor, alpha: Tensor) -> Tensor:
    """See :func:`libortho.core.ops.ortho.add_factors`."""
    return _accumulate(eager_ortho.add_factors, y, x, alpha, down, up)


def _accumulate(add: Any, y: Tensor, x: Tensor, alpha: Tensor, *part: Tensor) -> Tensor:
    if not bool(alpha.any()):
        return y.clone()
    with torch.no_grad():
        first = alpha[0]
        same = bool((alpha == first).all())
        return add(y.clone(), x, *part, float(first) if same else _per_token(alpha, y))


def _per_token(alpha: Tensor, y: Tensor) -> Tensor:
    return alpha.to(y.device).repeat_interleave(y.shape[0] // max(1, alpha.shape[0])).unsqueeze(1)


def _fake_accumulate(y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


def _columns_gradient(grad: Tensor, index: Tensor, values: Tensor, features: int) -> Tensor:
    return grad.new_zeros(grad.shape[0], features).index_add(1, index, grad @ values.to(grad.dtype).T)


@torch.library.custom_op("libortho::entries_gradient", mutates_args=())
def _entries_gradient(grad: Tensor, rows: Tensor, columns: Tensor, values: Tensor, features: int) -> Tensor:
    gradient = eager_ortho.sparse_gradient(grad.float(), rows, columns, values.float(), features)
    return gradient.to(grad.dtype).contiguous()


@_entries_gradient.register_fake
def _(grad: Tensor, rows: Tensor, columns: Tensor, values: Tensor, features: int) -> Tensor:
    return grad.new_empty(grad.shape[0], features)


def _factors_gradient(grad: Tensor, down: Tensor, up: Tensor, features: int) -> Tensor:
    return (grad @ up.to(grad.dtype)) @ down.to(grad.dtype)


def _differentiable(operator: Any, gradient: Any) -> None:
    """Gradients for ``y`` and ``x``; what a stream holds is constant."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, *part, alpha = inputs
        ctx.save_for_backward(*part, alpha)
        ctx.features, ctx.dtype = x.shape[1], x.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *part, alpha = ctx.saved_tensors
        each = _per_token(alpha, grad)
        found = gradient(grad * each.to(grad.dtype), *part, ctx.features).masked_fill(each == 0, 0)
        return (grad, found.to(ctx.dtype), *[None] * (len(part) + 1))

    operator.register_fake(_fake_accumulate)
    operator.register_autograd(backward, setup_context=save)


_differentiable(add_columns, _columns_gradient)
_differentiable(add_entries, _entries_gradient)
_differentiable(add_factors, _factors_gradient)
