"""The truncated singular value decomposition of one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.core.dtypes import DTYPES
from libortho.core.streams import Factors
from libortho.core.surgery import relative_error
from libortho.splitting.config import SplitConfig


@dataclass(frozen=True)
class Truncation:
    """A weight cut after ``rank`` singular directions: ``kept + up @ down`` is the weight again."""

    kept: Tensor
    rank: int
    error: float
    tail: Factors | None


def truncate(weight: Tensor, config: SplitConfig) -> Truncation:
    """Keep the first singular directions of an fp32 weight (Eckart-Young); the rest becomes the tail.

    The directions are eigenvectors of the smaller of W W^T and W^T W, a quarter of the work of a full SVD. That squares
    the condition number: directions below about 3e-4 of the largest singular value are found in no particular order,
    which moves the error by as little. What is dropped is ``U U^T W`` for those few directions ``U``; no product of
    three dense matrices is formed, and kept + tail is the weight to fp32 rounding, whatever the directions are.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    full = wide.shape[0]
    norm = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
    kept_rank = full if config.rank_ratio == "auto" else max(1, int(full * config.rank_ratio))
    if not config.keep_tail and kept_rank <= full // 4:
        first = leading_directions(wide, kept_rank, config.seed)
        kept = first @ (first.T @ wide)
        kept = kept if wide is weight else kept.T
        return Truncation(kept, kept_rank, relative_error(kept, weight), None)
    values, directions = torch.linalg.eigh(wide @ wide.T)  # ascending
    if config.rank_ratio == "auto":
        lost = values.clamp_min(0).cumsum(0).sqrt() / norm  # error of dropping the first i + 1 directions
        kept_rank = max(1, full - int((lost <= config.error_budget).sum()))
    if kept_rank == full:
        return Truncation(weight, full, 0.0, None)
    last = directions[:, : full - kept_rank].contiguous()
    below = last.T @ wide
    error = float(below.norm() / norm)
    dropped = last @ below
    kept = weight - (dropped if wide is weight else dropped.T)
    tail = None
    if config.keep_tail:
        root = below.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny).sqrt()  # of singular values
        down, up = below / root, last * root.T
        down, up = (down, up) if wide is weight else (up.T, down.T)
        dtype = DTYPES[config.value_dtype]
        tail = Factors(down.to(dtype), up.to(dtype))
    return Truncation(kept, kept_rank, error, tail)


def leading_directions(weight: Tensor, count: int, seed: int) -> Tensor:
    """Orthonormal left singular directions by randomised subspace iteration, (rows, count).

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1, with 16 extra samples and 4 iterations.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    size = min(min(weight.shape), count + 16)
    sample = torch.randn(weight.shape[1], size, generator=generator, device=weight.device, dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ sample).Q
    for _ in range(4):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    inside = basis.T @ weight
    return basis @ torch.linalg.eigh(inside @ inside.T).eigenvectors[:, -count:]
