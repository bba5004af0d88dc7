"""The interval of a paired difference."""

import random

import pytest

from libortho.core.errors import DataError
from libortho.evaluation.intervals import paired_difference


def test_paired_difference_covers_the_truth():
    """Of 400 samples of 60 rows, as many intervals as promised hold the true difference, -0.10."""
    rng = random.Random(0)
    hits = 0
    for _ in range(400):
        pairs = [(1, 1) if (u := rng.random()) < 0.6 else (0, 1) if u < 0.75 else (1, 0) if u < 0.8 else (0, 0)
                 for _ in range(60)]  # fmt: skip
        d = paired_difference([a for a, _ in pairs], [b for _, b in pairs], seed=0)
        hits += d.low <= -0.10 <= d.high
    assert 0.92 <= hits / 400 <= 0.98


def test_paired_difference_by_hand():
    d = paired_difference([1, 1, 0, 1], [0, 1, 1, 0], seed=0)  # won 2, lost 1
    half = 1.959964 * (4 - 1 / 6) ** 0.5 / 6
    assert (d.value, d.low, d.high, d.n) == pytest.approx((0.25, 1 / 6 - half, 1 / 6 + half, 4), abs=1e-6)
    assert paired_difference([0] * 20, [0] * 20, seed=0).high > 0
    smooth = paired_difference([1.5, 2.5, 4.0], [1.0, 2.0, 3.0], seed=0)
    assert smooth.value == pytest.approx(2 / 3)
    assert 0.5 <= smooth.low < smooth.high <= 1.0
    with pytest.raises(DataError, match="3 values and 2"):
        paired_difference([1, 0, 1], [1, 0], seed=0)
