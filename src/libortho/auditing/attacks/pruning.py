"""Pruning: zero the smallest weights of every layer, and see whether what comes out is the old memory.

    w -> 0 for the ``share`` of a layer's entries with the smallest |w|

Unstructured magnitude pruning, layer by layer, without retraining (Han et al., arXiv 1506.02626, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from libortho.auditing.attacks.attack import Attack, AttackInputs
from libortho.auditing.attacks.perturbation import HEADING, WARNING, Damage, damage_checks, damage_table, damaged
from libortho.auditing.page.exhibits import Drawn, Exhibit
from libortho.auditing.page.text import percent
from libortho.auditing.report import Check
from libortho.core.errors import DataError


class PruningRow(Damage):
    """One share of zeroed weights, a fraction, and what the models do without theirs."""

    share: float


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


def run(inputs: AttackInputs, shares: Sequence[float] = (0.1, 0.3, 0.5)) -> list[PruningRow]:
    """Prune all linear layers of the decoder, the output head excepted, and measure; share 0 comes first.

    Args:
        inputs: See :func:`~.perturbation.damaged`.
        shares: Fractions of each layer's entries.

    Raises:
        DataError: if there are no records, or a share is no fraction.
        TargetError: if a model has no dense linear layer.
    """
    if bad := [s for s in shares if not 0 <= s <= 1]:
        raise DataError(f"pruning shares {bad} are no fractions; expected numbers from 0 to 1")
    stored: PruningRow = {"share": 0.0, **damaged(inputs)}
    return [stored, *[PruningRow(share=s, **damaged(inputs, partial(pruned, share=s))) for s in shares]]


def checks(rows: Sequence[PruningRow]) -> list[Check]:
    """What pruning may bring back of each row."""
    return damage_checks([f"{r['share']:.0%} pruned" for r in rows], rows)


def exhibit(rows: Sequence[PruningRow], subjects: Sequence[Drawn]) -> Exhibit:
    """A row for each share."""
    names = [percent(r["share"]) for r in rows]
    table = damage_table("Smallest weights set to zero", "Share pruned", names, rows)
    return Exhibit(HEADING, (WARNING,), tables=(table,))


ATTACK = Attack("pruning", 10, run, checks, exhibit)
