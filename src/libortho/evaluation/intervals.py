"""Estimates with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.core.errors import ConfigError, DataError

Values = Tensor | Sequence[float]


ROUNDS = 1000
"""Bootstrap resamples behind an interval."""


_TAIL = 0.025


_Z = 1.959963984540054


BLOCK = 4_000_000
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
    x = vector(values, "values")
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
    total, count = vector(totals, "totals"), vector(counts, "counts")
    if len(total) != len(count) or not bool((count > 0).all()):
        raise DataError(f"{len(total)} totals and {len(count)} counts; expected as many, and every count above 0")
    value, n = float(total.sum() / count.sum()), len(total)
    if n == 1:
        return Estimate(value, None, None, 1)
    means = []
    for index in _draws(n, rounds, resampler(seed, rounds)):
        means.append(total[index].sum(1) / count[index].sum(1))
    return Estimate(value, *percentiles(torch.cat(means)), n)


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


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def vector(values: Values, name: str) -> Tensor:
    """The values as a float64 vector on the CPU; DataError if they are none."""
    x = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if x.ndim != 1 or not len(x):
        raise DataError(f"{name} has the shape {tuple(x.shape)}; expected a vector of at least one number")
    if bool(x.isnan().any()):
        raise DataError(f"{name} holds NaN at position {int(x.isnan().nonzero()[0])}; expected numbers")
    return x


def resampler(seed: int, rounds: int) -> torch.Generator:
    """A seeded generator for this many resamples; ConfigError if there are none."""
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; expected at least one resample")
    return torch.Generator().manual_seed(seed)


def _draws(n: int, rounds: int, generator: torch.Generator) -> Iterator[Tensor]:
    """(rounds, n) positions drawn with replacement, in blocks of rounds that fit in memory."""
    step = max(1, BLOCK // n)
    for start in range(0, rounds, step):
        yield torch.randint(n, (min(step, rounds - start), n), generator=generator)


def percentiles(means: Tensor) -> tuple[float, float]:
    """The bounds of the 95 % interval of resampled means."""
    low, high = torch.quantile(means, torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)).tolist()
    return low, high


def counts(n: int, rounds: int, generator: torch.Generator) -> Tensor:
    """(rounds, n) how often each of n records is drawn in n draws."""
    parts = []
    for index in _draws(n, rounds, generator):
        ones = torch.ones_like(index, dtype=torch.float64)
        parts.append(torch.zeros_like(ones).scatter_add_(1, index, ones))
    return torch.cat(parts)
