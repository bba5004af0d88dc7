"""Memory measures by definition, by enumeration, by hand, and against SciPy and mpmath."""

import math
import random
from collections.abc import Callable

import mpmath
import pytest
import torch
from scipy import stats

from libortho.auditing.measures import memory as m
from libortho.core.errors import ConfigError, DataError
from libortho.evaluation.intervals import mean_estimate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_token_measures_follow_their_definitions() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tokens = rng.randint(1, 12)
        correct = [rng.random() < 0.8 for _ in range(tokens)]
        t = torch.tensor(correct)
        smallest = min(k for k in range(tokens + 1) if all(correct[k:]))
        assert m.extraction_strength(t) == pytest.approx(1 - smallest / tokens)
        assert m.exact_memorization(t) == pytest.approx(sum(correct) / tokens)
        assert m.greedy_extraction(t) == all(correct)
        assert m.greedy_extraction(t) == (m.extraction_strength(t) == 1)


def test_a_wrong_last_token_leaves_no_extraction_strength() -> None:
    t = torch.tensor([True, True, True, False])
    assert m.extraction_strength(t) == 0
    assert m.exact_memorization(t) == 0.75


def _distance(a: str, b: str) -> int:
    """Levenshtein's recursion, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def test_levenshtein_similarity() -> None:
    assert m.levenshtein_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert m.levenshtein_similarity(" Y0K-7788 and so on for ever", " Y0K-7788.") == 1
    assert m.levenshtein_similarity("", "abcd") == 0
    rng = random.Random(1)
    for _ in range(200):
        truth = "".join(rng.choice("abc") for _ in range(rng.randint(1, 9)))
        generated = "".join(rng.choice("abc") for _ in range(rng.randint(0, len(truth))))
        value = m.levenshtein_similarity(generated, truth)
        assert value == pytest.approx(1 - _distance(generated, truth) / len(truth))
        assert 0 <= value <= 1


def test_rouge_l_by_hand() -> None:
    assert m.rouge_l("the cat lay on a mat", "The cat sat on the mat.") == pytest.approx(2 / 3)  # the, cat, on, mat
    assert m.rouge_l("the cat sat", "the cat sat on the mat") == 0.5
    assert m.rouge_l("bbbb aaaa", "aaaa bbbb") == 0.5  # order counts
    assert m.rouge_l("running", "runs") == 1  # one stem
    assert m.rouge_l("", "runs") == 0


def _codes(seed: int = 0) -> torch.Tensor:
    """Negative log-likelihoods of all 10,000 four-digit codes under a model that prefers some digits."""
    p = torch.randn(4, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    nll = torch.zeros(1, dtype=torch.float64)
    for digit in p:
        nll = (nll[:, None] - digit.log()).flatten()
    assert float((-nll).exp().sum()) == pytest.approx(1)
    return nll


def test_exposure_by_enumeration_is_the_rank_in_the_sorted_list() -> None:
    nll = _codes()
    order = sorted(nll.tolist())
    for index in (0, 17, 4321, 9999):
        secret = float(nll[index])
        others = torch.cat([nll[:index], nll[index + 1 :]])
        rank = max(i for i, x in enumerate(order, 1) if x <= secret)
        assert m.exposure_exact(secret, others) == pytest.approx(math.log2(10_000) - math.log2(rank))
    assert m.exposure_exact(-1.0, nll[1:]) == pytest.approx(math.log2(10_000))


def test_a_secret_that_was_never_seen_has_a_mean_exposure_of_one_over_log_two() -> None:
    nll = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bits = [m.exposure_exact(float(nll[i]), torch.cat([nll[:i], nll[i + 1 :]])) for i in range(1000)]
    assert sum(bits) / 1000 == pytest.approx(1 / math.log(2), abs=0.01)


def test_a_model_that_knows_nothing_exposes_nothing() -> None:
    assert m.exposure_exact(3.0, [3.0] * 99) == 0
    assert m.exposure_sampled(3.0, [3.0] * 99) == 0


def test_sampled_exposure_estimates_the_exact_one_up_to_its_ceiling() -> None:
    nll = _codes()
    sample = nll[torch.randperm(10_000, generator=torch.Generator().manual_seed(1))[:1023]]
    secret = float(nll.sort().values[499])  # rank 500: 4.3 bits
    assert m.exposure_sampled(secret, sample, 10_000) == pytest.approx(math.log2(20), abs=0.4)
    assert m.exposure_sampled(0.001, sample, 10_000) == 10  # of 1,024
    assert m.exposure_sampled(0.001, sample, 64) == 6  # a space of 64 holds no more than 6 bits
    assert m.exposure_sampled(2.0, [1.0, 3.0, 4.0]) == pytest.approx(1)  # second of four


@pytest.mark.parametrize("seed", range(4))
def test_extrapolated_exposure_reaches_beyond_its_sample(seed: int) -> None:
    nll = _codes(seed)
    sample = nll[torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))[:400]]
    secret = float(nll.sort().values[19])  # rank 20 of 10,000: more than 400 fillings can show
    exact = math.log2(10_000) - math.log2(20)
    result = m.exposure_extrapolated(secret, sample, 10_000)
    assert exact > math.log2(401)
    assert result == pytest.approx(exact, abs=2)
    assert m.exposure_extrapolated(0.01, sample, 10_000) == math.log2(10_000)
    assert m.exposure_extrapolated(0.01, sample) > math.log2(10_000)
    assert m.exposure_extrapolated(secret, sample, 10_000) == result


@pytest.mark.parametrize("shape", [-4.0, -1.5, 0.0, 1.5, 4.0])
@pytest.mark.parametrize(("location", "scale"), [(20.0, 2.5), (-3.0, 0.01)])
def test_the_fit_recovers_a_known_skew_normal(shape: float, location: float, scale: float) -> None:
    known = stats.skewnorm(shape, location, scale)
    sample = torch.tensor(known.ppf([(i + 0.5) / 2000 for i in range(2000)]))
    for quantile in (0.5, 0.1, 1e-3, 1e-5):
        result = m.exposure_extrapolated(float(known.ppf(quantile)), sample)
        assert result == pytest.approx(-math.log2(quantile), rel=0.05)


@pytest.mark.parametrize("shape", [-10.0, 0.5, 10.0])
def test_the_lower_tail_agrees_with_arithmetic_of_thirty_digits(shape: float) -> None:
    with mpmath.workdps(30):
        for z in (-25.0, -6.0, -1.0, -0.3, 1.0):
            ends = [-mpmath.inf, z - 20, z - 4, z - 1, z - 0.3, z - 0.05, z]
            exact = mpmath.log(mpmath.quad(lambda x: 2 * mpmath.npdf(x) * mpmath.ncdf(shape * x), ends))
            assert m.skew_normal_log_cdf(z, shape) == pytest.approx(float(exact), rel=1e-6, abs=1e-9)


def test_an_outlier_in_the_sample_does_not_break_the_fit() -> None:
    sample = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 20
    sample[0] = 60.0
    assert 5 < m.exposure_extrapolated(15.0, sample) < 500


@pytest.mark.parametrize("sample", [torch.full((200,), 7.0), torch.arange(5.0) + 3])
def test_a_sample_that_cannot_be_fitted_gives_the_sampled_exposure(sample: torch.Tensor) -> None:
    assert m.exposure_extrapolated(1.0, sample, 10_000) == m.exposure_sampled(1.0, sample, 10_000)


def test_truth_ratio_by_hand() -> None:
    # Wrong answers of probability 1/2 and 1/8 have the geometric mean 1/4; the right one 1/2.
    ratio = m.truth_ratio([math.log(2), math.log(8)], math.log(2))
    assert ratio == pytest.approx(0.5)
    assert m.truth_ratio([0.0], 1000.0) == pytest.approx(1e10)  # the guard against division by 0


def test_a_ratio_below_one_prefers_the_truth() -> None:
    ratios = torch.tensor([0.5, 2.0, 1.0, 0.0])
    assert m.true_better(ratios).tolist() == pytest.approx([0.5, 0, 0, 1])
    assert mean_estimate(m.true_better(ratios), seed=0).value == pytest.approx(0.375)


def test_model_utility_is_near_its_worst_part() -> None:
    assert m.model_utility([0.5] * 9) == pytest.approx(0.5)
    assert m.model_utility([1.0] * 8 + [0.1]) == pytest.approx(9 / 18)
    assert m.model_utility([1.0] * 8 + [0.0]) == 0
    with pytest.raises(DataError, match="nine"):
        m.model_utility([0.5] * 8)


def test_distinct_share_ignores_blanks_and_case() -> None:
    assert m.distinct_share(["I am.", " i  am.\n", "You are."]) == pytest.approx(2 / 3)
    assert m.distinct_share(["no"] * 10) == 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.exact_memorization(torch.zeros(0, dtype=torch.bool)), "one or more tokens"),
        (lambda: m.extraction_strength(torch.tensor([1, 0])), "torch.int64"),
        (lambda: m.levenshtein_similarity("text", ""), "blank"),
        (lambda: m.exposure_exact(1.0, []), "vector of some"),
        (lambda: m.exposure_sampled(math.nan, [1.0]), "NaN"),
        (lambda: m.exposure_extrapolated(math.inf, [1.0]), "infinite"),
        (lambda: m.truth_ratio([], 1.0), "vector of some"),
        (lambda: m.distinct_share([]), "at least one"),
    ],
)
def test_bad_data_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="space_size is 0"):
        m.exposure_sampled(1.0, [2.0], 0)
