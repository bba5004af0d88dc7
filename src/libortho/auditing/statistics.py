"""Numbers with their uncertainty: means, shares, areas under ROC curves, and what is computed from them.

    AUC = P(score of a member > score of a non-member) + 1/2 P(equal)          0.5: the two cannot be told apart

Every interval is a 95 % one. A share of yes/no outcomes gets Wilson's (J. Am. Stat. Assoc. 22, 1927), which has a width
even where nothing or everything happened; other means and AUCs get the bootstrap percentile interval (Efron and
Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13). The same seed gives the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.core.errors import ConfigError, DataError
from libortho.core.extras import module
from libortho.lm import metrics

Values = Tensor | Sequence[float]

ROUNDS = 1000
"""Bootstrap resamples behind an interval."""
_TAIL = 0.025
_Z = 1.959963984540054
_ROC_POINTS = 64
_BLOCK = 4_000_000
"""Elements of the largest temporary of the bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval, None where a single record gives none.
        high: Upper end.
        n: Records behind it.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON; what is not finite becomes None."""
        return {"value": _finite(self.value), "low": _finite(self.low), "high": _finite(self.high), "n": self.n}

    def map(self, monotone: Callable[[float], float]) -> Estimate:
        """The estimate of a monotone function of the same quantity, such as perplexity from nats for each token."""
        ends = sorted(monotone(x) for x in (self.low, self.high) if x is not None)
        low, high = ends if len(ends) == 2 else (None, None)
        return Estimate(monotone(self.value), low, high, self.n)


@dataclass(frozen=True)
class StratifiedAuc:
    """An AUC within strata.

    Attributes:
        value: Mean over the strata, weighted by their members.
        members: Members that were compared.
        left_out: Strata without a non-member; their members are not in ``value``.
    """

    value: float
    members: int
    left_out: tuple[Hashable, ...]


def proportion(successes: int, n: int) -> Estimate:
    """Share of successes with Wilson's score interval.

    Raises:
        DataError: if there are no trials, or more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(
            f"{successes} successes in {n} trials; expected at least one trial and 0 <= successes <= trials"
        )
    share, z2 = successes / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Both ends touch 0 or 1 exactly in theory; rounding must not put them beyond.
    return Estimate(share, max(0.0, middle - half) if successes else 0.0, min(1.0, middle + half), n)


def mean_estimate(values: Values, *, seed: int, rounds: int = ROUNDS) -> Estimate:
    """Mean of (n,) values with its bootstrap interval; with Wilson's where every value is 0 or 1.

    Raises:
        DataError: if there are no values, or one is NaN.
    """
    x = _vector(values, "values")
    if bool(((x == 0) | (x == 1)).all()):
        return proportion(int(x.sum()), len(x))
    return ratio_estimate(x, torch.ones_like(x), seed=seed, rounds=rounds)


def ratio_estimate(totals: Values, counts: Values, *, seed: int, rounds: int = ROUNDS) -> Estimate:
    """``sum(totals) / sum(counts)``, for example nats for each token, resampled by record.

    Tokens of one text depend on each other; resampling texts, not tokens, keeps the interval as wide as it must be.

    Args:
        totals: (n,) sums, one for each record.
        counts: (n,) positive numbers of things summed.
        seed: Seed of the bootstrap.
        rounds: Resamples.

    Raises:
        DataError: if there is no record, the lengths differ, or a count is not positive.
    """
    total, count = _vector(totals, "totals"), _vector(counts, "counts")
    if len(total) != len(count) or not bool((count > 0).all()):
        raise DataError(f"{len(total)} totals and {len(count)} counts; expected as many, and every count above 0")
    value, n = float(total.sum() / count.sum()), len(total)
    if n == 1:
        return Estimate(value, None, None, 1)
    means = []
    for index in _draws(n, rounds, _generator(seed, rounds)):
        means.append(total[index].sum(1) / count[index].sum(1))
    return Estimate(value, *_percentiles(torch.cat(means)), n)


def paired_difference(values: Sequence[float], others: Sequence[float], *, seed: int) -> Estimate:
    """Mean of ``values - others`` with its 95 % interval: Agresti and Min's for shares, otherwise the bootstrap's.

    Raises:
        DataError: if there are no values, or not as many of both.
    """
    n = len(values)
    if n == 0 or len(others) != n:
        raise DataError(f"{n} values and {len(others)} to compare with; expected as many, and at least one")
    change = [a - b for a, b in zip(values, others, strict=True)]
    if not {*values, *others} <= {0, 1}:
        return ratio_estimate(change, [1.0] * n, seed=seed)
    won, lost = change.count(1), change.count(-1)
    middle = (won - lost) / (n + 2)
    half = _Z * math.sqrt(won + lost + 1 - (won - lost) ** 2 / (n + 2)) / (n + 2)
    return Estimate((won - lost) / n, max(-1.0, middle - half), min(1.0, middle + half), n)


def auc(members: Values, others: Values) -> float:
    """Probability that a member's score exceeds a non-member's, ties counting half (the Mann-Whitney U statistic).

    Args:
        members: (m,) scores; higher means more member-like.
        others: (n,) scores.

    Raises:
        DataError: if a side is empty or holds NaN.
    """
    return metrics.auc(_vector(members, "members"), _vector(others, "others"))


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
) -> StratifiedAuc:
    """AUC within strata, so that a difference between strata (the template of a prompt) is not taken for memory.

    Args:
        members: (m,) scores.
        others: (n,) scores.
        member_strata: m strata.
        other_strata: n strata.

    Raises:
        DataError: if lengths differ, or no stratum has both members and non-members.
    """
    a, b = _vector(members, "members"), _vector(others, "others")
    shared, left_out = _strata(len(a), len(b), member_strata, other_strata)
    compared = sum(len(i) for i, _ in shared)
    value = sum(len(i) * auc(a[i], b[j]) for i, j in shared) / compared
    return StratifiedAuc(value, compared, left_out)


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
    a, b = _vector(members, "members"), _vector(others, "others")
    shared, _ = _strata(len(a), len(b), member_strata, other_strata)
    value, means = _bootstrap([(a, b, 1.0)], shared, seed, rounds)
    m, n = (sum(len(part[side]) for part in shared) for side in (0, 1))
    if min(m, n) == 1:
        return Estimate(value, None, None, m)
    if value in (0.0, 1.0):
        trials = min(m, n)
        stand_in = proportion(trials * int(value), trials)
        return Estimate(value, stand_in.low, stand_in.high, m)
    return Estimate(value, *_percentiles(means), m)


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
    a, b = _vector(a_members, "a_members"), _vector(a_others, "a_others")
    c, d = _vector(b_members, "b_members"), _vector(b_others, "b_others")
    if len(a) != len(c) or len(b) != len(d):
        raise DataError(
            f"{len(a)} and {len(c)} members, {len(b)} and {len(d)} non-members; "
            "expected two scores of each record, in the same order"
        )
    shared, _ = _strata(len(a), len(b), member_strata, other_strata)
    value, means = _bootstrap([(a, b, 1.0), (c, d, -1.0)], shared, seed, rounds)
    m, n = (sum(len(part[side]) for part in shared) for side in (0, 1))
    return Estimate(value, None, None, m) if min(m, n) == 1 else Estimate(value, *_percentiles(means), m)


def harmonic_mean(values: Sequence[float]) -> float:
    """``n / sum(1 / x)``; 0 if any value is 0.

    Raises:
        DataError: if there are no values, or one is negative or not finite.
    """
    if not values or not all(math.isfinite(v) and v >= 0 for v in values):
        raise DataError(f"the values are {list(values)}; expected at least one, all finite and at least 0")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / v for v in values)


def ks_two_sample(a: Values, b: Values) -> float:
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test that both come from one distribution.

    Raises:
        DataError: if a side is empty or holds NaN.
    """
    stats = module("audit", "scipy.stats")
    return float(stats.ks_2samp(_vector(a, "a").numpy(), _vector(b, "b").numpy()).pvalue)


def forget_quality(ratios: Values, ratios_reference: Values) -> float:
    """Forget quality of TOFU (Maini et al. 2024): KS p-value of two models' truth ratios on the forget set.

    Above .05 the audited model is not told apart from one that never saw the records. The test has little power on few
    records: a pass with 17 of them says little.

    Args:
        ratios: (n,) truth ratios of the audited model.
        ratios_reference: The same of a model never trained on the records.

    Raises:
        DataError: if a side is empty, holds NaN, or the two differ in length.
    """
    a, b = _vector(ratios, "ratios"), _vector(ratios_reference, "ratios_reference")
    if len(a) != len(b):
        raise DataError(f"{len(a)} truth ratios against {len(b)} of the reference; expected the same records")
    return ks_two_sample(a, b)


def privleak(auc: float, auc_reference: float | None = None) -> float | None:
    """PrivLeak in per cent (Shi et al. 2024, MUSE, section 3.1): 0 is as good as retrained.

    MUSE's AUC is 1 minus ours: near 0 where the forget set looks like training data. With theirs,
    ``100 * (AUC - AUC_reference) / AUC_reference``: **negative means under-unlearned** (-100 where members are told
    apart perfectly), positive over-unlearned. Good is within 5 of 0.

    Args:
        auc: AUC of Min-40 % scores of members against holdout, in our orientation (members higher).
        auc_reference: The same of a model never trained on the members; .5 where there is none.

    Returns:
        None where the reference's AUC is 1, which leaves nothing to compare with.
    """
    theirs, reference = 1 - auc, 0.5 if auc_reference is None else 1 - auc_reference
    return None if reference == 0 else 100 * (theirs - reference) / reference


def s_score(auc: float, auc_reference: float = 0.5) -> float | None:
    """Closeness of an attack's AUC to the reference's, ``clip(1 - |AUC - ref| / ref, 0, 1)``; 1 is best.

    Source: unlearning depth score (arXiv 2605.24614). AUC in our orientation (members higher).

    Returns:
        None where the reference's AUC is 0, which leaves nothing to compare with.
    """
    return None if auc_reference == 0 else min(1.0, max(0.0, 1 - abs(auc - auc_reference) / auc_reference))


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _vector(values: Values, name: str) -> Tensor:
    x = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if x.ndim != 1 or not len(x):
        raise DataError(f"{name} has the shape {tuple(x.shape)}; expected a vector of at least one number")
    if bool(x.isnan().any()):
        raise DataError(f"{name} holds NaN at position {int(x.isnan().nonzero()[0])}; expected numbers")
    return x


def _generator(seed: int, rounds: int) -> torch.Generator:
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; expected at least one resample")
    return torch.Generator().manual_seed(seed)


def _draws(n: int, rounds: int, generator: torch.Generator) -> Iterator[Tensor]:
    """(rounds, n) positions drawn with replacement, in blocks of rounds that fit in memory."""
    step = max(1, _BLOCK // n)
    for start in range(0, rounds, step):
        yield torch.randint(n, (min(step, rounds - start), n), generator=generator)


def _percentiles(means: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(means, torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)).tolist()
    return low, high


def _operating_points(members: Values, others: Values) -> tuple[Tensor, Tensor]:
    """False and true positives at each threshold, from above every score down to below every score."""
    a, b = _vector(members, "members"), _vector(others, "others")
    thresholds = torch.cat([a, b]).unique().flip(0)
    a, b = a.sort().values, b.sort().values
    zero = torch.zeros(1, dtype=torch.int64)
    true, false = (torch.cat([zero, len(x) - torch.searchsorted(x, thresholds)]) for x in (a, b))
    return false, true


def _strata(
    m: int, n: int, member_strata: Sequence[Hashable] | None, other_strata: Sequence[Hashable] | None
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Hashable, ...]]:
    """Positions of members and of non-members in each stratum that has both, and the strata of members alone."""
    if member_strata is None and other_strata is None:
        return [(torch.arange(m), torch.arange(n))], ()
    if member_strata is None or other_strata is None or (len(member_strata), len(other_strata)) != (m, n):
        given = [None if s is None else len(s) for s in (member_strata, other_strata)]
        raise DataError(f"strata of {given} records for {m} members and {n} non-members; expected one for each score")
    shared, left_out = [], []
    for stratum in dict.fromkeys(member_strata):
        i = [k for k, s in enumerate(member_strata) if s == stratum]
        j = [k for k, s in enumerate(other_strata) if s == stratum]
        if j:
            shared.append((torch.tensor(i), torch.tensor(j)))
        else:
            left_out.append(stratum)
    if not shared:
        raise DataError(
            f"none of the {len(left_out)} strata of the members has a non-member; "
            "give a holdout of the same kind, or compare without strata"
        )
    return shared, tuple(left_out)


def _bootstrap(
    scores: Sequence[tuple[Tensor, Tensor, float]], strata: Sequence[tuple[Tensor, Tensor]], seed: int, rounds: int
) -> tuple[float, Tensor]:
    """Weighted sum of the AUCs of ``scores`` (members, others, weight), and its (rounds,) resamples.

    The share of its stratum's non-members that a member exceeds is linear in how often each of them is drawn; so an
    AUC is ``a W b`` with the counts ``a`` and ``b`` of a resample.
    """
    generator = _generator(seed, rounds)
    m = sum(len(i) for i, _ in strata)
    a = _counts(m, rounds, generator)
    value, means, start = 0.0, torch.zeros(rounds, dtype=torch.float64), 0
    for i, j in strata:
        b = _counts(len(j), rounds, generator)
        for block in torch.arange(len(i)).split(max(1, _BLOCK // len(j))):
            wins = torch.zeros(len(block), len(j), dtype=torch.float64)
            for members, others, weight in scores:
                x, y = members[i[block]][:, None], others[j][None, :]
                wins += weight * ((x > y).double() + 0.5 * (x == y).double())
            value += float(wins.sum()) / (len(j) * m)
            means += ((a[:, start + block] @ wins) * b).sum(1) / (len(j) * m)
        start += len(i)
    return value, means


def _counts(n: int, rounds: int, generator: torch.Generator) -> Tensor:
    """(rounds, n) how often each of n records is drawn in n draws."""
    parts = []
    for index in _draws(n, rounds, generator):
        ones = torch.ones_like(index, dtype=torch.float64)
        parts.append(torch.zeros_like(ones).scatter_add_(1, index, ones))
    return torch.cat(parts)
