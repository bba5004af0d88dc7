r"""A layer while its memory is being moved out: a frozen quantised base, and trainable values on the support only.

    y = W_q x + (Q(values) - W_q[support]) x[support] + bias

``values`` starts at the original weight (that of the base itself, where a base is edited further), lives in fp32, and
passes through the same grid as the base (straight-through), so the model that is trained is the integer model that will
be stored. Nothing off the support can move: it is not a parameter. No dense weight is kept for the backward pass; it is
rebuilt from the codes.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from libortho.core.ops.quantisation import pack_int4
from libortho.core.streams import BaseStream, Columns


class _ColumnProduct(torch.autograd.Function):
    """``x W^T + x[:, index] delta`` with gradients to x and delta, and the dense weight rebuilt in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, index: Tensor, base: BaseStream) -> Tensor:
        gathered, small = x.index_select(1, index), delta.to(x.dtype)
        ctx.save_for_backward(gathered, small, index)
        ctx.base, ctx.delta_dtype = base, delta.dtype
        return base.forward(x).addmm_(gathered, small)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        gathered, small, index = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.base.gradient(grad)
            grad_x.index_add_(1, index, grad @ small.T)
        grad_delta = (gathered.T @ grad).to(ctx.delta_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_delta, None, None


class EditLinear(nn.Module):
    """Stand-in for a linear layer during isolation.

    Attributes:
        support: Column indices (k,), ascending; None if the layer got no share.
        values: fp32 values on the support, (k, out_features).
    """

    def __init__(
        self,
        start: Tensor | BaseStream,
        bias: nn.Parameter | None,
        support: Tensor | None,
        bits: Literal[8, 4] | None,
        group_size: int,
        rounded: BaseStream | None = None,
    ) -> None:
        """From a weight (out_features, in_features), which is quantised, or from a base, which is left as it is.

        ``bits`` and ``group_size`` are those of the base that is made; ``rounded`` is the weight's base where it has
        one already, otherwise every code is the nearest.
        """
        super().__init__()
        if isinstance(start, BaseStream):
            self.base = start if support is None else copy.deepcopy(start)
            weight = None
        else:
            weight = start.contiguous()  # GPT-2's is a transposed view
            self.base = BaseStream.from_weight(weight, bits, group_size) if rounded is None else rounded
        self.register_parameter("bias", bias)
        self.support = support
        self.values: nn.Parameter | None = None
        if support is not None:
            self.base_values = self._on_support(self.base.dense(torch.float32))
            self.original = self.base_values if weight is None else self._on_support(weight.float())
            self.step = self._on_support(self._steps()) if self.base.bits is not None else None
            self.values = nn.Parameter(self.original.clone())

    def _steps(self) -> Tensor:
        """The grid's step of every weight, (out_features, in_features)."""
        return self.base.scales.float().repeat_interleave(self.base.group_size, 1)

    def _on_support(self, dense: Tensor) -> Tensor:
        assert self.support is not None
        return dense[:, self.support].T.contiguous()

    def codes(self) -> Tensor:
        """Integer codes of values, fp32, in the shape of values. Only for integer bases."""
        assert self.values is not None
        assert self.step is not None
        assert self.base.bits is not None
        top = 2 ** (self.base.bits - 1) - 1
        return (self.values.detach() / self.step).round().clamp_(-top, top)

    def stored(self) -> Tensor:
        """The values as the base will store them."""
        assert self.values is not None
        if self.step is None:
            return self.values.detach().to(self.base.weight.dtype).float()
        return self.codes() * self.step

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the values inside the grid's range, so that the straight-through gradient never points at a wall."""
        if self.values is not None and self.step is not None and self.base.bits is not None:
            limit = self.step * (2 ** (self.base.bits - 1) - 1)
            self.values.copy_(torch.minimum(torch.maximum(self.values, -limit), limit))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        flat = x.reshape(-1, x.shape[-1])
        if self.values is None or self.support is None:
            y = _ColumnProduct.apply(flat, self._none(flat), self._no_index(flat), self.base)
        else:
            delta = self.values + (self.stored() - self.values).detach() - self.base_values
            y = _ColumnProduct.apply(flat, delta, self.support, self.base)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)

    def _none(self, x: Tensor) -> Tensor:
        return torch.zeros((0, self.base.out_features), device=x.device)

    def _no_index(self, x: Tensor) -> Tensor:
        return torch.zeros(0, dtype=torch.long, device=x.device)

    @torch.no_grad()
    def finish(self, value_dtype: torch.dtype) -> tuple[BaseStream, Columns | None]:
        """The edited base, and what must be added to it to have the original weight on the support."""
        if self.values is None or self.support is None:
            return self.base, None
        base = self.base
        stored = self.stored()
        if base.bits is None:
            self._write(base.weight, stored.to(base.weight.dtype))
        else:
            codes = base.unpacked_codes().clone()
            self._write(codes, self.codes().to(torch.int8))
            base.codes = codes if base.bits == 8 else pack_int4(codes)
        values = self.original - stored
        return base, Columns(self.support, values.to(value_dtype))

    def _write(self, dense: Tensor, values: Tensor) -> None:
        assert self.support is not None
        dense[:, self.support] = values.T
