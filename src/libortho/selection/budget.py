"""Divide a budget among layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from libortho.core.surgery import linear_shape


def balanced_weights(saliency: Tensor, keep: int, rounds: int = 20) -> Tensor:
    """Record weights under which a support of ``keep`` columns serves every record about equally well.

    Args:
        saliency: (records, columns), the columns of all layers side by side, already divided by the retain part.
        keep: Columns in the support.
        rounds: Multiplicative-weights updates.

    Returns:
        (records,), summing to the number of records.
    """
    keep = min(keep, saliency.shape[1])
    best = saliency.topk(keep, dim=1).values.sum(1).clamp_min(1e-30)  # what a record alone would get
    unit = saliency / best[:, None]
    weights = torch.ones(len(saliency), device=saliency.device)
    total = torch.zeros_like(weights)
    for _ in range(rounds):
        chosen = (weights @ unit).topk(keep).indices
        coverage = unit[:, chosen].sum(1)
        weights = weights * (coverage.mean() / coverage.clamp_min(1e-3)).clamp(0.5, 2.0).sqrt()
        weights = weights * (len(weights) / weights.sum())
        total += weights
    return total / rounds / best * best.mean()


def allocate(
    scores: dict[str, Tensor], ratio: float, cap: float, unit: dict[str, int], *, limit: int | None = None
) -> dict[str, Tensor]:
    """Take the best-scored columns or entries of all layers together, within one budget.

    Args:
        scores: Name to a score per column (in_features,) or per entry (out_features, in_features); minus infinity keeps
            an item out.
        ratio: Budget as a fraction of all weights of these layers.
        cap: No layer takes more than ``cap`` times its even share.
        unit: Weights that one scored item costs (out_features for columns, 1 for entries).
        limit: No layer takes more items than this, whatever its share; None for no such limit.

    Returns:
        Name to the ascending flat indices that were chosen; layers with nothing are left out. The total never exceeds
        the budget, unless one single column does.
    """
    weights = {n: s.numel() * unit[n] for n, s in scores.items()}
    budget = ratio * sum(weights.values())
    kept: list[tuple[Tensor, Tensor, str]] = []
    for name, score in scores.items():
        flat = score.flatten()
        most = min(flat.numel(), max(1, int(cap * ratio * flat.numel())), limit or flat.numel())
        best = flat.topk(most)
        free = best.values != -torch.inf
        kept.append((best.values[free], best.indices[free], name))
    values = torch.cat([v for v, _, _ in kept])
    cost = torch.cat([torch.full((len(v),), float(unit[n])) for v, _, n in kept])
    owner = torch.cat([torch.full((len(v),), i) for i, (v, _, _) in enumerate(kept)])
    index = torch.cat([i for _, i, _ in kept])
    order = values.cpu().argsort(descending=True)
    affordable = cost[order].cumsum(0) <= budget
    affordable[:1] = True
    chosen = order[affordable]
    result = {}
    for number, (_, _, name) in enumerate(kept):
        mine = index[chosen[owner[chosen] == number]]
        if len(mine):
            result[name] = mine.sort().values
    return result


def retain_floor(retain: dict[str, Tensor]) -> dict[str, Tensor]:
    """``r + mean r`` of each layer: what forget saliency is divided by."""
    return {n: r + r.mean() + 1e-30 for n, r in retain.items()}


def column_costs(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Weights of one column of each layer: its out_features."""
    return {n: linear_shape(m)[0] for n, m in layers.items()}
