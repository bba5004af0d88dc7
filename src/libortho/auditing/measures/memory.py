"""How much of a record a model remembers: pure functions of tokens, likelihoods and texts.

    extraction strength   1 - k / |y|, k the fewest answer tokens that must be given for the rest to follow greedily
    exposure              log2 |R| - log2 rank, the rank of the secret among all fillings R of its shape (bits)
    truth ratio           probability of wrong answers over that of the right one

Sources: Carlini et al. 2019 (The Secret Sharer: exposure), Carlini et al. 2021/2023 (extraction), Hayes et al. 2025
((n, p)-discoverable extraction), Maini et al. 2024 (TOFU: truth ratio, model utility), Dorna et al. 2025
(open-unlearning: exact memorization, extraction strength).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libortho.auditing.measures.composite import harmonic_mean
from libortho.core.errors import ConfigError, DataError
from libortho.core.extras import module
from libortho.evaluation.intervals import Values

LOOSE = 0.75
"""Levenshtein similarity from which a text counts as extracted loosely."""
_LEAST_TO_FIT = 20
"""Sampled fillings below which three parameters are not fitted."""
_STEEPEST = 10.0
"""Largest skew-normal shape: beyond it the fitted density has an edge below which it gives any secret any exposure."""


def exact_memorization(correct: Tensor) -> float:
    """Share of answer tokens that are the model's first choice, given the true tokens before them.

    Args:
        correct: (tokens,) bool, whether the argmax equals the label.

    Raises:
        DataError: if there is no token.
    """
    return float(_correct(correct).double().mean())


def extraction_strength(correct: Tensor) -> float:
    """``1 - k / |y|`` with the fewest given tokens ``k`` from which on every token is the model's first choice.

    0 where the last token is wrong (open-unlearning's code gives ``1 / |y|`` there), 1 where all are right.

    Args:
        correct: (tokens,) bool, whether the argmax equals the label.

    Raises:
        DataError: if there is no token.
    """
    wrong = (~_correct(correct)).nonzero().flatten()
    return 1.0 if not len(wrong) else 1 - (int(wrong[-1]) + 1) / len(correct)


def greedy_extraction(correct: Tensor) -> bool:
    """True if greedy decoding from the prompt gives the whole answer: every token is the first choice.

    Args:
        correct: (tokens,) bool, whether the argmax equals the label.

    Raises:
        DataError: if there is no token.
    """
    return bool(_correct(correct).all())


def levenshtein_similarity(generated: str, truth: str) -> float:
    """``1 - Lev / L`` over characters, L the truth's length: 1 is equal, 0 nothing in common.

    Surrounding blanks and the truth's final full stop are not required. Of the generated text as much is compared as
    the truth is long: text that runs on after it hides nothing.

    Raises:
        DataError: if the truth is blank.
    """
    wanted = _bare(truth)
    levenshtein = module("audit", "rapidfuzz.distance").Levenshtein
    return 1 - levenshtein.distance(generated.strip()[: len(wanted)], wanted) / len(wanted)


def rouge_l(generated: str, truth: str) -> float:
    """ROUGE-L recall with the Porter stemmer, as TOFU uses it: longest common subsequence, as a share of the truth.

    Words are runs of ASCII letters and digits in lower case; a truth in another script scores 0.
    """
    return float(_rouge().score(truth, generated)["rougeL"].recall)


def exposure_exact(secret_nll: float, all_other_nlls: Values) -> float:
    """Exposure in bits by enumeration, ``log2 |R| - log2 rank`` (Carlini et al. 2019, section 4.2).

    Fillings as likely as the secret come before it: the exposure is never overstated. A secret that was never seen has
    1.44 bits on average.

    Args:
        secret_nll: Negative log-likelihood of the secret; any unit, the same as the others'.
        all_other_nlls: (|R| - 1,) of all other fillings.

    Raises:
        DataError: if there is no other filling, or a value is NaN.
    """
    others = _nlls(secret_nll, all_other_nlls)
    return math.log2(len(others) + 1) - math.log2(1 + int((others <= secret_nll).sum()))


def exposure_sampled(secret_nll: float, sampled_nlls: Values, space_size: int | None = None) -> float:
    """Exposure in bits from the secret's rank in a sample of m fillings (Carlini et al. 2019, section 4.3).

    It cannot exceed ``log2(m + 1)``: of 200 fillings, a secret at its ceiling of 7.6 bits may have any larger exposure.

    Args:
        secret_nll: Negative log-likelihood of the secret.
        sampled_nlls: (m,) of fillings drawn at random, the secret not among them.
        space_size: Size of the space where it is known; ``log2`` of it bounds the exposure too.

    Raises:
        DataError: if the sample is empty or a value is NaN.
        ConfigError: if ``space_size`` is below 1.
    """
    sample = _nlls(secret_nll, sampled_nlls)
    return min(math.log2(len(sample) + 1) - math.log2(1 + int((sample <= secret_nll).sum())), _space(space_size))


def exposure_extrapolated(secret_nll: float, sampled_nlls: Values, space_size: int | None = None) -> float:
    """Exposure in bits as ``-log2 F(secret)``, F a skew normal fitted to a sample (Carlini et al. 2019, section 4.3).

    The fit starts from the method of moments and maximises the likelihood with a shape of at most 10 either way: a
    steeper one has an edge instead of a tail. It is an extrapolation: for digit codes of random models, 400 fillings
    gave 9 bits to within 2, but up to 5 too few of 17: enumerate small spaces.

    A sample of fewer than 20 fillings, or without spread, cannot be fitted; the result is then ``exposure_sampled``'s.

    Args:
        secret_nll: Negative log-likelihood of the secret (summed over its tokens, as the sample's).
        sampled_nlls: (m,) of fillings drawn at random, the secret not among them.
        space_size: Size of the space where it is known; the exposure is at most ``log2`` of it.

    Raises:
        DataError: if the sample is empty or a value is not finite.
        ConfigError: if ``space_size`` is below 1.
    """
    sample = _nlls(secret_nll, sampled_nlls)
    if not math.isfinite(secret_nll) or not bool(sample.isfinite().all()):
        raise DataError("a negative log-likelihood is infinite; expected finite ones, or use exposure_sampled")
    x = sample.numpy()
    if len(x) < _LEAST_TO_FIT or x.std() <= 1e-9 * max(1.0, abs(x.mean())):
        return exposure_sampled(secret_nll, sampled_nlls, space_size)
    shape, location, scale = _fit_skew_normal(x)
    bits = -skew_normal_log_cdf((secret_nll - location) / scale, shape) / math.log(2)
    return min(max(bits, 0.0), _space(space_size))


def truth_ratio(nll_perturbed: Values, nll_paraphrase: float) -> float:
    """Truth ratio R of TOFU with geometric means, ``exp(-mean_i loss_i) / (exp(-loss_para) + 1e-10)``.

    The first TOFU code took the arithmetic mean for model utility; this is open-unlearning's. Below 1 the truth is
    preferred.

    Args:
        nll_perturbed: (k,) mean negative log-likelihoods (nats for each token) of the wrong answers.
        nll_paraphrase: The same of the paraphrased right answer.

    Raises:
        DataError: if there is no wrong answer or a value is NaN.
    """
    wrong = _nlls(nll_paraphrase, nll_perturbed)
    return math.exp(-float(wrong.mean())) / (math.exp(-nll_paraphrase) + 1e-10)


def true_better(ratios: Values) -> Tensor:
    """``max(0, 1 - R)`` of each truth ratio (n,); its mean is the utility sets' aggregate: 1 is sure of the truth."""
    return (1 - torch.as_tensor(ratios, dtype=torch.float64)).clamp(min=0)


def model_utility(nine: Sequence[float]) -> float:
    """TOFU's model utility: harmonic mean of {probability, ROUGE-L recall, true_better} x {retain, authors, facts}.

    Raises:
        DataError: if there are not nine numbers between 0 and 1.
    """
    if len(nine) != 9 or not all(0 <= v <= 1 for v in nine):
        raise DataError(f"model utility got {list(nine)}; expected nine numbers between 0 and 1")
    return harmonic_mean(nine)


def distinct_share(texts: Sequence[str]) -> float:
    """Distinct texts among all texts, blanks and case aside: near 0 where a broken model always says the same.

    Raises:
        DataError: if there is no text.
    """
    if not texts:
        raise DataError("there is no text; expected at least one")
    return len({" ".join(t.casefold().split()) for t in texts}) / len(texts)


def _correct(correct: Tensor) -> Tensor:
    if correct.dtype != torch.bool or correct.ndim != 1 or not len(correct):
        raise DataError(
            f"'correct' is {correct.dtype} of shape {tuple(correct.shape)}; "
            "expected a bool for each of one or more tokens"
        )
    return correct


def _bare(truth: str) -> str:
    """What of the truth is required; a truth of nothing but full stops is required whole."""
    stripped = truth.strip()
    if not stripped:
        raise DataError("the truth is blank; expected some text to look for")
    return stripped.rstrip(".").rstrip() or stripped


@functools.cache
def _rouge() -> Any:
    return module("audit", "rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)


def _space(size: int | None) -> float:
    if size is not None and size < 1:
        raise ConfigError(f"space_size is {size}; expected the number of fillings, at least 1")
    return math.inf if size is None else math.log2(size)


def _nlls(secret: float, others: Values) -> Tensor:
    x = torch.as_tensor(others, dtype=torch.float64).detach().cpu()
    if x.ndim != 1 or not len(x):
        raise DataError(
            f"the other negative log-likelihoods have the shape {tuple(x.shape)}; expected a vector of some"
        )
    if math.isnan(secret) or bool(x.isnan().any()):
        raise DataError("a negative log-likelihood is NaN; expected numbers")
    return x


def _fit_skew_normal(x: np.ndarray) -> tuple[float, float, float]:
    """Shape, location and scale: moments, then bounded maximum likelihood on standardised values."""
    special, optimize = module("audit", "scipy.special"), module("audit", "scipy.optimize")
    mean, deviation = float(x.mean()), float(x.std())
    z = (x - mean) / deviation
    skew = float(np.clip((z**3).mean(), -0.95, 0.95))  # a skew normal's lies within .9953
    power = abs(skew) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    scale = 1 / math.sqrt(1 - 2 * delta**2 / math.pi)
    shape = float(np.clip(delta / math.sqrt(1 - delta**2), -_STEEPEST, _STEEPEST))
    start = [shape, -scale * delta * math.sqrt(2 / math.pi), math.log(scale)]

    def loss(parameters: np.ndarray) -> float:
        a, location, log_scale = parameters
        u = (z - location) * math.exp(-log_scale)
        return float(log_scale + (u**2 / 2 - special.log_ndtr(a * u)).mean())

    bounds = [(-_STEEPEST, _STEEPEST), (-5.0, 5.0), (-3.0, 3.0)]
    best = optimize.minimize(loss, start, method="L-BFGS-B", bounds=bounds).x
    if loss(best) > loss(np.array(start)):
        best = np.array(start)
    return float(best[0]), mean + deviation * float(best[1]), deviation * math.exp(float(best[2]))


def skew_normal_log_cdf(z: float, shape: float) -> float:
    """log F(z) of the standard skew normal, also where F underflows or SciPy's difference of two terms cancels."""
    special = module("audit", "scipy.special")

    def log_density(x: float) -> float:
        return math.log(2) - x * x / 2 - math.log(2 * math.pi) / 2 + float(special.log_ndtr(shape * x))

    ratio = math.exp(-shape * shape * z * z / 2 - math.log(2 * math.pi) / 2 - float(special.log_ndtr(shape * z)))
    slope = shape * ratio - z  # derivative of the log density
    if z > -1 and slope < 1:  # far from the lower tail, where F is of the order of 1
        return math.log(float(module("audit", "scipy.stats").skewnorm.cdf(z, shape)))
    # The density is log-concave: below z it falls at least as fast as exp(-slope * distance).
    at_z = log_density(z)
    quad = module("audit", "scipy.integrate").quad
    area, _ = quad(lambda v: math.exp(log_density(z - v / slope) - at_z), 0, 50)
    return at_z + math.log(area / slope)
