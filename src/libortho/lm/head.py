"""Losses on logits whose gradient is taken while the logits exist.

A row of logits is as wide as the vocabulary. Those of a whole step, kept for the backward pass, would be the largest
tensors of the training, and made once more there they would cost the output head a second time. So the positions are
taken in parts: logits, loss, the gradient of the hidden states, and then the logits are dropped (as fused linear
cross-entropy does, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from libortho.lm.model import LanguageModel

HEAD_POSITIONS = 64
"""Positions whose logits exist at one time."""
PartLoss = Callable[[Tensor, slice], Tensor]
"""Logits (positions, vocabulary) of a part, and which positions these are, to what they add to the loss, a scalar."""


def summed(lm: LanguageModel, states: Tensor, loss: PartLoss, parts: Sequence[slice]) -> Tensor:
    """The sum of ``loss`` over the parts of ``states`` (positions, width), a scalar; differentiable in them once.

    ``loss`` is called with gradients enabled and must not hold on to the logits.
    """
    return _Summed.apply(states, lm, loss, parts)


class _Summed(torch.autograd.Function):
    """``summed``, with the gradient of the states made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, lm: LanguageModel, loss: PartLoss, parts: Sequence[slice]) -> Tensor:
        gradient = torch.zeros_like(states)
        total = torch.zeros((), device=states.device)
        for part in parts:
            some = states[part].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                added = loss(lm.logits(some), part)
                if added.requires_grad:
                    [gradient[part]] = torch.autograd.grad(added, some)
            total += added.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None


def evenly(positions: int) -> list[slice]:
    """Parts of ``HEAD_POSITIONS``, of so many positions."""
    return [slice(i, i + HEAD_POSITIONS) for i in range(0, positions, HEAD_POSITIONS)]


def by_record(sizes: Sequence[int]) -> list[slice]:
    """Parts of whole records where they fit into ``HEAD_POSITIONS``; longer ones are cut.

    Args:
        sizes: Positions of each record, in their order.
    """
    parts, begin, end = [], 0, 0
    for size in sizes:
        if end > begin and end + size - begin > HEAD_POSITIONS:
            parts.append(slice(begin, end))
            begin = end
        end += size
        while end - begin > HEAD_POSITIONS:
            parts.append(slice(begin, begin + HEAD_POSITIONS))
            begin += HEAD_POSITIONS
    return [*parts, slice(begin, end)] if end > begin else parts
