"""Scores of the entries of one weight, from the weight and its residual alone. Larger means: into the ortho stream."""

from __future__ import annotations

import torch
from torch import Tensor


def absolute(residual: Tensor, weight: Tensor) -> Tensor:
    """``|R|``: the support with the smallest Frobenius error of what remains."""
    return residual.abs()


def relative(residual: Tensor, weight: Tensor) -> Tensor:
    """``|R| / (|W| + mean |W|)``: the floor keeps weights near zero, where any rounding is total, off the support."""
    size = weight.abs()
    return residual.abs() / (size + size.mean().clamp_min(torch.finfo(weight.dtype).tiny))


def magnitude(residual: Tensor, weight: Tensor) -> Tensor:
    """``|W|``: the largest weights, whatever the base makes of them. A control."""
    return weight.abs()


SCORES = {"absolute": absolute, "relative": relative, "magnitude": magnitude}


def top_entries(score: Tensor, ratio: float) -> Tensor:
    """Mask of the ``floor(ratio * entries)`` highest scores, exactly, with shape (out_features, in_features)."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[score.flatten().topk(int(ratio * score.numel())).indices] = True
    return mask.view_as(score)


def top_columns(score: Tensor, ratio: float) -> Tensor:
    """Indices, ascending, of the :func:`column_count` columns with the largest sum of squares."""
    return score.square().sum(0).topk(column_count(ratio, score.shape[1])).indices.sort().values


def column_count(ratio: float, inputs: int) -> int:
    """Columns that a layer with so many inputs gives: the budget, rounded, and one at least."""
    return max(1, round(ratio * inputs))
