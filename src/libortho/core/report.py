"""The table of what a split did, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from libortho.core.errors import TargetError
from libortho.core.layer import LayerReport, ortho_layers

_METHODS = "_libortho_methods"


class LayerReports(list[LayerReport]):
    """A list of :class:`LayerReport` that prints as a table and serialises."""

    def totals(self) -> dict[str, float]:
        """Means of the errors, and densities and bytes over all layers together (densities as fractions)."""
        weights = sum(r.shape[0] * r.shape[1] for r in self)
        size = [r.shape[0] * r.shape[1] for r in self]
        return {
            "layers": len(self),
            "low_rank_layers": sum(r.used_low_rank for r in self),
            "base_error": sum(r.base_error for r in self) / len(self),
            "max_base_error": max(r.base_error for r in self),
            "final_error": sum(r.final_error for r in self) / len(self),
            "max_final_error": max(r.final_error for r in self),
            "ortho_density": sum(r.ortho_density * n for r, n in zip(self, size, strict=True)) / weights,
            "tail_density": sum(r.tail_density * n for r, n in zip(self, size, strict=True)) / weights,
            "base_bytes": sum(r.base_bytes for r in self),
            "ortho_bytes": sum(r.ortho_bytes for r in self),
        }

    def to_dict(self) -> dict[str, Any]:
        """Totals and one entry per layer, JSON-ready."""
        return {"totals": self.totals(), "layers": [r.to_dict() for r in self]}

    def cells(self) -> list[tuple[str, ...]]:
        """The table as texts: its header, then a row for each layer."""
        rows: list[tuple[str, ...]] = [
            ("layer", "rank", "low-rank err", "base err", "final err", "density", "tail", "base MB", "ortho MB")
        ]
        for r in self:
            low_rank = "-" if r.low_rank_error is None else f"{r.low_rank_error:.2%}"
            rows.append(
                (
                    r.name,
                    f"{r.rank}{'' if r.used_low_rank else ' (direct)'}",
                    low_rank,
                    f"{r.base_error:.2%}",
                    f"{r.final_error:.2%}",
                    f"{r.ortho_density:.3%}",
                    f"{r.tail_density:.2%}",
                    f"{r.base_bytes / 1e6:.2f}",
                    f"{r.ortho_bytes / 1e6:.3f}",
                )
            )
        return rows

    def __str__(self) -> str:
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def layer_report(model: nn.Module) -> LayerReports:
    """What ``split``, ``isolate`` or ``load`` left in each split layer, in the model's order.

    Raises:
        TargetError: if no layer of the model is split.
    """
    reports = LayerReports(m.report for m in ortho_layers(model).values() if m.report is not None)
    if not reports:
        raise TargetError("no layer of this model is split; call libortho.split, isolate or load first")
    return reports


def record_method(model: nn.Module, stream: str, method: Mapping[str, Any]) -> None:
    """Note on the model what made a stream; ``save`` copies it into the stream's manifest.

    Args:
        model: The model that was split.
        stream: Name of the stream.
        method: JSON-ready settings and figures; never a record, a prompt or anything else that the stream hides.
    """
    setattr(model, _METHODS, {**methods(model), stream: dict(method)})


def methods(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Stream name to what :func:`record_method` noted about it."""
    return dict(getattr(model, _METHODS, {}))


def forget_method(model: nn.Module, stream: str) -> None:
    """Note that a stream is gone."""
    setattr(model, _METHODS, {n: m for n, m in methods(model).items() if n != stream})
