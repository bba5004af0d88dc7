"""Scores of columns, whose best within a budget a stream takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from libortho.core.errors import ConfigError
from libortho.core.layer import OrthoLinear, touched
from libortho.core.streams.ortho import MAX_RANK
from libortho.selection.budget import allocate, balanced_weights, column_costs, retain_floor

LAYER_CAP = 4.0
"""No layer takes more than this many times its even share of the budget."""


def contrast(
    own: Mapping[str, Tensor], kept: Sequence[Mapping[str, Tensor]], held: Mapping[str, Tensor], ratio: float
) -> dict[str, Tensor]:
    """How much each column's gradient is about the records and not about text to keep, (in_features,) by layer.

        score = sum_i w_i s_ic / (r_c + mean r)

    The weights w_i rise until every record has about the same share of what it could have from this budget. It is the
    forget-to-retain Fisher ratio of SSD (arXiv 2308.07707) on log-odds in place of losses.

    Args:
        own: Saliency of the records, (records, in_features) by layer; see :mod:`.readings`.
        kept: The same of each kind of text to keep.
        held: Columns that are not free, as ``taken`` gives them.
        ratio: The budget, as a fraction of all columns.
    """
    floor = retain_floor({n: torch.stack([s[n].mean(0) for s in kept]).sum(0) for n in own})
    free = without(own, held, 0.0)
    side_by_side = torch.cat([s / floor[n] for n, s in free.items()], 1)
    weights = balanced_weights(side_by_side, max(1, int(ratio * side_by_side.shape[1])))
    return without({n: weights @ s / floor[n] for n, s in free.items()}, held, -torch.inf)


def best_columns(scores: dict[str, Tensor], ratio: float, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Ascending indices of the best-scored columns of all layers within the budget, of a stream that can be saved."""
    return allocate(scores, ratio, LAYER_CAP, column_costs(targets), limit=MAX_RANK)


def taken(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Columns, any entry of which an earlier stream has, (in_features,) bool, by layer, split or not."""
    masks = {n: touched(m) for n, m in targets.items() if isinstance(m, OrthoLinear)}
    masks = {n: mask.any(0) for n, mask in masks.items()}
    return {n: mask for n, mask in masks.items() if mask.any()}


def without(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], value: float) -> dict[str, Tensor]:
    """``scores`` (..., as the masks) with ``value`` where something is taken.

    Raises:
        ConfigError: if nothing is left.
    """
    if all(n in masks and bool(masks[n].all()) for n in scores):
        raise ConfigError("earlier streams have every column of these layers; name further layers in target_modules")
    return {n: s.masked_fill(masks[n], value) if n in masks else s for n, s in scores.items()}
