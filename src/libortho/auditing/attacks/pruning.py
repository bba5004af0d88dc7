"""Pruning: zero the smallest weights of every layer, and see whether what comes out is the old memory.

    w -> 0 for the ``share`` of a layer's entries with the smallest |w|

Unstructured magnitude pruning, layer by layer, without retraining (Han et al., arXiv 1506.02626, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from libortho.auditing.attacks.measuring import (
    Level,
    Progress,
    changed_levels,
    general_subset,
    reference_dict,
    stored_levels,
)
from libortho.auditing.subjects import Subject
from libortho.core.errors import DataError
from libortho.text.encoding import Encoded


def pruned(weight: Tensor, share: float) -> Tensor:
    """``weight`` with its ``round(share * entries)`` smallest absolute entries set to zero; ties go by position."""
    count = round(share * weight.numel())
    if count == 0:
        return weight.clone()
    flat = weight.flatten().clone()
    size = flat.abs().float()
    threshold = size.kthvalue(count).values
    flat[size < threshold] = 0
    ties = (size == threshold).nonzero()[:, 0]
    flat[ties[: count - int((size < threshold).sum())]] = 0
    return flat.view(weight.shape)


@dataclass(frozen=True)
class PruningRow:
    """One share of zeroed weights, a fraction, and what the model and the reference do without theirs."""

    share: float
    level: Level
    reference: Level | None = None


@dataclass(frozen=True)
class Pruning:
    """Share 0 first."""

    rows: tuple[PruningRow, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict per row."""
        return [{"share": r.share, **r.level.to_dict(), **reference_dict(r.reference)} for r in self.rows]


@torch.no_grad()
def pruning(
    subject: Subject,
    forget: Sequence[Encoded],
    general: Sequence[Encoded],
    *,
    shares: Sequence[float] = (0.1, 0.3, 0.5),
    reference: Subject | None = None,
    progress: Progress | None = None,
) -> Pruning:
    """Prune all linear layers of the decoder, the output head excepted, and measure.

    Args:
        subject: Whose weights are pruned; its model is not changed.
        forget: What must stay forgotten.
        general: General text for the perplexity; its first tokens are used.
        shares: Fractions of each layer's entries.
        reference: A model that never saw the forget set, pruned too: what pruning does to anyone.
        progress: Called after every share.

    Raises:
        DataError: if ``forget`` is empty or a share is no fraction.
        TargetError: if the model has no dense linear layer.
    """
    if bad := [s for s in shares if not 0 <= s <= 1]:
        raise DataError(f"pruning shares {bad} are no fractions; expected numbers from 0 to 1")
    text = general_subset(general)
    rows = [PruningRow(0.0, *stored_levels(subject, reference, forget, text))]
    for done, share in enumerate(shares, 1):
        rows.append(PruningRow(share, *changed_levels(partial(pruned, share=share), subject, reference, forget, text)))
        if progress is not None:
            progress("pruning", done, len(shares))
    return Pruning(tuple(rows))
