"""Pruning: zero the smallest weights of every layer, and see whether what comes out is the old memory.

    w -> 0 for the ``share`` of a layer's entries with the smallest |w|

Unstructured magnitude pruning, layer by layer, without retraining (Han et al., arXiv 1506.02626, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from libortho.audit.attacks.measuring import Level, Progress, decoder_weights, general_subset, measure
from libortho.audit.subjects import Subject, dense_copy
from libortho.data import Encoded
from libortho.errors import DataError
from libortho.isolate.language_model import LanguageModel


def pruned(weight: Tensor, share: float) -> Tensor:
    """``weight`` with its ``round(share * entries)`` smallest absolute entries set to zero; ties go by position."""
    flat = weight.flatten().clone()
    order = flat.abs().float().argsort(stable=True)
    flat[order[: round(share * len(flat))]] = 0
    return flat.view(weight.shape)


@dataclass(frozen=True)
class PruningRow:
    """One share of zeroed weights, a fraction, and what the model does without them."""

    share: float
    level: Level


@dataclass(frozen=True)
class Pruning:
    """Share 0 first."""

    rows: tuple[PruningRow, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict per row."""
        return [{"share": r.share, **r.level.to_dict()} for r in self.rows]


@torch.no_grad()
def pruning(
    subject: Subject,
    forget: Sequence[Encoded],
    general: Sequence[Encoded],
    *,
    shares: Sequence[float] = (0.1, 0.3, 0.5),
    progress: Progress | None = None,
) -> Pruning:
    """Prune all linear layers of the decoder, the output head excepted, and measure.

    Args:
        subject: Whose weights are pruned; its model is not changed.
        forget: What must stay forgotten.
        general: General text for the perplexity; its first tokens are used.
        shares: Fractions of each layer's entries.
        progress: Called after every share.

    Raises:
        DataError: if ``forget`` is empty or a share is no fraction.
        TargetError: if the model has no dense linear layer.
    """
    if bad := [s for s in shares if not 0 <= s <= 1]:
        raise DataError(f"pruning shares {bad} are no fractions; expected numbers from 0 to 1")
    text = general_subset(general)
    with subject.enter():
        rows = [PruningRow(0.0, measure(subject.language_model(), forget, text))]
    for done, share in enumerate(shares, 1):
        copied = dense_copy(subject)
        for weight in decoder_weights(copied).values():
            weight.copy_(pruned(weight, share))
        rows.append(PruningRow(share, measure(LanguageModel(copied), forget, text)))
        if progress is not None:
            progress("pruning", done, len(shares))
    return Pruning(tuple(rows))
