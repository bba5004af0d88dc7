"""The settings of ``split``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from libortho.core.config import StreamConfig, Structure, flag, fraction, one_of, whole
from libortho.core.field_docs import documented

Score = Literal["absolute", "relative", "magnitude"]


@documented
@dataclass(frozen=True, kw_only=True)
class SplitConfig(StreamConfig):
    """How ``split`` divides a weight into base and ortho, knowing nothing but the weight."""

    ratio: float = 0.005
    """Budget of the ortho stream, as a fraction of the weights of the layers that are split. In (0, 1]."""
    rank_ratio: float | Literal["auto"] = 0.95
    """Share of the singular directions that the base keeps; "auto" keeps the fewest within ``error_budget``."""
    use_low_rank: bool = True
    """False quantises the weight itself."""
    max_low_rank_error: float = 0.20
    """A layer whose truncation loses more than this (relative Frobenius) is quantised directly instead."""
    error_budget: float = 0.05
    """Largest relative Frobenius truncation error that ``rank_ratio="auto"`` accepts."""
    score: Score = "absolute"
    """What ranks the entries of the residual: its size, its size relative to the weight, or the weight's size."""
    structure: Structure = "unstructured"
    """Free entries, or whole input columns."""
    keep_tail: bool = True
    """Keep the discarded singular directions in the ortho stream, as factors."""
    seed: int = 0
    """Seed of the randomised SVD, which serves small kept ranks when ``keep_tail=False``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("seed", self.seed)
        fraction("ratio", self.ratio)
        if self.rank_ratio != "auto":
            fraction("rank_ratio", self.rank_ratio)
        fraction("max_low_rank_error", self.max_low_rank_error)
        fraction("error_budget", self.error_budget)
        one_of("score", self.score, ("absolute", "relative", "magnitude"))
        one_of("structure", self.structure, ("unstructured", "columns"))
        for name in ("use_low_rank", "keep_tail"):
            flag(name, getattr(self, name))
