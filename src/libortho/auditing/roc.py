"""Numbers with their uncertainty: means, shares, areas under ROC curves, and what is computed from them.

    AUC = P(score of a member > score of a non-member) + 1/2 P(equal)          0.5: the two cannot be told apart

Every interval is a 95 % one. A share of yes/no outcomes gets Wilson's (J. Am. Stat. Assoc. 22, 1927), which has a width
even where nothing or everything happened; other means and AUCs get the bootstrap percentile interval (Efron and
Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13). The same seed gives the same interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from libortho.core.errors import ConfigError, DataError
from libortho.evaluation.intervals import (
    BLOCK,
    ROUNDS,
    Estimate,
    Values,
    counts,
    percentiles,
    proportion,
    resampler,
    vector,
)

_ROC_POINTS = 64


def auc(members: Values, others: Values) -> float:
    """Probability that a member's score exceeds a non-member's, ties counting half (the Mann-Whitney U statistic).

    Args:
        members: (m,) scores; higher means more member-like.
        others: (n,) scores.

    Raises:
        DataError: if a side is empty or holds NaN.
    """
    a, b = vector(members, "members"), vector(others, "others").sort().values
    below, up_to = torch.searchsorted(b, a), torch.searchsorted(b, a, right=True)
    return float((below + up_to).double().mean() / (2 * len(b)))


def roc(members: Values, others: Values) -> list[tuple[float, float]]:
    """Corners of the ROC curve as (false-positive rate, true-positive rate), from (0, 0) to (1, 1).

    At most 64 points: where there are more corners, those nearest to equal steps along the curve.

    Raises:
        DataError: if a side is empty or holds NaN.
    """
    false, true = _operating_points(members, others)
    fpr, tpr = false.double() / false[-1], true.double() / true[-1]
    run, rise = false.diff(), true.diff()
    corner = torch.ones(len(fpr), dtype=torch.bool)
    corner[1:-1] = run[:-1] * rise[1:] != run[1:] * rise[:-1]
    fpr, tpr = fpr[corner], tpr[corner]
    if len(fpr) > _ROC_POINTS:
        length = fpr + tpr  # city-block length of the curve up to each corner, for it never falls
        wanted = torch.linspace(0, 2, _ROC_POINTS, dtype=torch.float64)
        keep = (length[None, :] - wanted[:, None]).abs().argmin(1).unique()
        fpr, tpr = fpr[keep], tpr[keep]
    return list(zip(fpr.tolist(), tpr.tolist(), strict=True))


def tpr_at_fpr(members: Values, others: Values, fpr: float) -> float:
    """Largest true-positive rate of a threshold whose false-positive rate is at most ``fpr``; nothing is interpolated.

    With fewer than ``1 / fpr`` non-members this is the rate at no false positive at all: it cannot resolve ``fpr``.
    (Carlini et al. 2022, Membership Inference Attacks From First Principles, section III-A.)

    Raises:
        ConfigError: if ``fpr`` is not between 0 and 1.
        DataError: if a side is empty or holds NaN.
    """
    if not 0 <= fpr <= 1:
        raise ConfigError(f"fpr is {fpr}; expected a share between 0 and 1")
    false, true = _operating_points(members, others)
    return int(true[false.double() / false[-1] <= fpr].max()) / int(true[-1])


def stratified_auc(
    members: Values, others: Values, member_strata: Sequence[Hashable], other_strata: Sequence[Hashable]
) -> float:
    """AUC within strata, so that a difference between strata (the template of a prompt) is not taken for memory.

    The mean over the strata that have both sides, weighted by their members; members of other strata do not count.

    Args:
        members: (m,) scores.
        others: (n,) scores.
        member_strata: m strata.
        other_strata: n strata.

    Raises:
        DataError: if lengths differ, or no stratum has both members and non-members.
    """
    a, b = vector(members, "members"), vector(others, "others")
    shared = _strata(len(a), len(b), member_strata, other_strata)
    return sum(len(i) * auc(a[i], b[j]) for i, j in shared) / sum(len(i) for i, _ in shared)


def auc_estimate(
    members: Values,
    others: Values,
    member_strata: Sequence[Hashable] | None = None,
    other_strata: Sequence[Hashable] | None = None,
    *,
    seed: int,
    rounds: int = ROUNDS,
) -> Estimate:
    """AUC, within strata where they are given, with its bootstrap interval; ``n`` counts the members compared.

    Members are resampled over all strata, each compared with its own stratum, and non-members within theirs: a stratum
    that has a single member would otherwise count as known exactly. Where separation is perfect no resample differs;
    Wilson's interval of ``min(members, non-members)`` trials then stands in, which is wider than the truth.

    Raises:
        DataError: see ``stratified_auc``.
    """
    a, b = vector(members, "members"), vector(others, "others")
    shared = _strata(len(a), len(b), member_strata, other_strata)
    value, means = _bootstrap([(a, b, 1.0)], shared, seed, rounds)
    m, n = (sum(len(part[side]) for part in shared) for side in (0, 1))
    if min(m, n) == 1:
        return Estimate(value, None, None, m)
    if value in (0.0, 1.0):
        trials = min(m, n)
        stand_in = proportion(trials * int(value), trials)
        return Estimate(value, stand_in.low, stand_in.high, m)
    return Estimate(value, *percentiles(means), m)


def auc_difference(
    a_members: Values,
    a_others: Values,
    b_members: Values,
    b_others: Values,
    member_strata: Sequence[Hashable] | None = None,
    other_strata: Sequence[Hashable] | None = None,
    *,
    seed: int,
    rounds: int = ROUNDS,
) -> Estimate:
    """AUC of scores ``a`` minus AUC of scores ``b`` on the same records, with the interval of the paired bootstrap.

    Both scores of a record are drawn together, so what makes a record easy for both cancels. Two perfect separations
    differ by exactly 0 in every resample, so that their interval has no width.

    Raises:
        DataError: if the two do not score the same number of records; see also ``stratified_auc``.
    """
    a, b = vector(a_members, "a_members"), vector(a_others, "a_others")
    c, d = vector(b_members, "b_members"), vector(b_others, "b_others")
    if len(a) != len(c) or len(b) != len(d):
        raise DataError(
            f"{len(a)} and {len(c)} members, {len(b)} and {len(d)} non-members; "
            "expected two scores of each record, in the same order"
        )
    shared = _strata(len(a), len(b), member_strata, other_strata)
    value, means = _bootstrap([(a, b, 1.0), (c, d, -1.0)], shared, seed, rounds)
    m, n = (sum(len(part[side]) for part in shared) for side in (0, 1))
    return Estimate(value, None, None, m) if min(m, n) == 1 else Estimate(value, *percentiles(means), m)


def _operating_points(members: Values, others: Values) -> tuple[Tensor, Tensor]:
    """False and true positives at each threshold, from above every score down to below every score."""
    a, b = vector(members, "members"), vector(others, "others")
    thresholds = torch.cat([a, b]).unique().flip(0)
    a, b = a.sort().values, b.sort().values
    zero = torch.zeros(1, dtype=torch.int64)
    true, false = (torch.cat([zero, len(x) - torch.searchsorted(x, thresholds)]) for x in (a, b))
    return false, true


def _strata(
    m: int, n: int, member_strata: Sequence[Hashable] | None, other_strata: Sequence[Hashable] | None
) -> list[tuple[Tensor, Tensor]]:
    """Positions of members and of non-members in each stratum that has both."""
    if member_strata is None and other_strata is None:
        return [(torch.arange(m), torch.arange(n))]
    if member_strata is None or other_strata is None or (len(member_strata), len(other_strata)) != (m, n):
        given = [None if s is None else len(s) for s in (member_strata, other_strata)]
        raise DataError(f"strata of {given} records for {m} members and {n} non-members; expected one for each score")
    others = set(other_strata)
    both = [s for s in dict.fromkeys(member_strata) if s in others]
    if not both:
        raise DataError(
            f"none of the {len(set(member_strata))} strata of the members has a non-member; "
            "give a holdout of the same kind, or compare without strata"
        )

    def places(strata: Sequence[Hashable], stratum: Hashable) -> Tensor:
        return torch.tensor([k for k, s in enumerate(strata) if s == stratum])

    return [(places(member_strata, s), places(other_strata, s)) for s in both]


def _bootstrap(
    scores: Sequence[tuple[Tensor, Tensor, float]], strata: Sequence[tuple[Tensor, Tensor]], seed: int, rounds: int
) -> tuple[float, Tensor]:
    """Weighted sum of the AUCs of ``scores`` (members, others, weight), and its (rounds,) resamples.

    The share of its stratum's non-members that a member exceeds is linear in how often each of them is drawn; so an
    AUC is ``a W b`` with the counts ``a`` and ``b`` of a resample.
    """
    generator = resampler(seed, rounds)
    m = sum(len(i) for i, _ in strata)
    a = counts(m, rounds, generator)
    value, means, start = 0.0, torch.zeros(rounds, dtype=torch.float64), 0
    for i, j in strata:
        b = counts(len(j), rounds, generator)
        for block in torch.arange(len(i)).split(max(1, BLOCK // len(j))):
            wins = torch.zeros(len(block), len(j), dtype=torch.float64)
            for members, others, weight in scores:
                x, y = members[i[block]][:, None], others[j][None, :]
                wins += weight * ((x > y).double() + 0.5 * (x == y).double())
            value += float(wins.sum()) / (len(j) * m)
            means += ((a[:, start + block] @ wins) * b).sum(1) / (len(j) * m)
        start += len(i)
    return value, means
