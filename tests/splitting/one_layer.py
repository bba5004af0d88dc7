"""Splits of a single layer."""

from typing import Any

import torch
from torch import nn

import libortho
from libortho.core.layer import LayerReport, OrthoLinear

WAYS: list[dict[str, Any]] = [
    {},
    {"structure": "columns"},
    {"keep_tail": False},
    {"use_low_rank": False},
    {"bits": 4, "rank_ratio": 0.7},
    {"bits": None},
    {"rank_ratio": "auto"},
    {"score": "relative", "value_dtype": "float16"},
    {"rank_ratio": 0.1, "keep_tail": False, "max_low_rank_error": 1.0},
]


def decaying(rows: int, columns: int, decay: float = 0.9) -> torch.Tensor:
    """A weight with singular values ``decay ** i``."""
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return (u * decay ** torch.arange(min(rows, columns))) @ v


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.layer.weight.data.copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def split_one(weight: torch.Tensor, **options: Any) -> OrthoLinear:
    return libortho.split(One(weight), libortho.SplitConfig(target_modules="layer", **options)).layer


def report_of(layer: OrthoLinear) -> LayerReport:
    assert layer.report is not None
    return layer.report
