"""One number from many, as in the leaderboard of the unlearning depth score (arXiv 2605.24614).

    memory  = HM(1 - ES, 1 - EM, 1 - paraphrase probability, 1 - truth ratio)
    privacy = HM(HM(s_loss, s_zlib, s_min_k, s_min_k++), UDS)
    utility = min(1, HM(model utility, fluency) / the same of the full model)
    overall = HM(memory, privacy, utility)

A harmonic mean is near the worst of its parts, and 0 if one is: no score can be bought by giving up another. Every
part and every result lies between 0 and 1, and 1 is best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from libortho.core.errors import DataError


def memory_score(es: float, em: float, paraphrase_probability: float, truth: float) -> float:
    """How little is remembered: harmonic mean of what each measure leaves to 1.

    Args:
        es: Extraction strength, mean over the forget set.
        em: Exact memorization, mean.
        paraphrase_probability: ``exp(-nll)`` of the paraphrased answers, nll in nats for each token, mean.
        truth: p / (p + q) of paraphrased and perturbed answers (the geometric mean of theirs), mean: the
            leaderboard's "truth ratio" is correct / (correct + wrong), .5 where the truth is not preferred.

    Raises:
        DataError: if a part is not between 0 and 1.
    """
    parts = {"es": es, "em": em, "paraphrase_probability": paraphrase_probability, "truth": truth}
    return harmonic_mean([1 - v for v in _shares(**parts)])


def privacy_score(s_loss: float, s_zlib: float, s_min_k: float, s_min_k_plus: float, uds: float | None = None) -> float:
    """How closely membership inference and hidden states resemble those of a model never trained on the records.

    Args:
        s_loss: ``privacy.s_score`` of the loss attack.
        s_zlib: Of the zlib attack.
        s_min_k: Of Min-K %.
        s_min_k_plus: Of Min-K%++.
        uds: Unlearning depth score; the attacks alone where it is None, which is not comparable with the leaderboard.

    Raises:
        DataError: if a part is not between 0 and 1.
    """
    attacks = harmonic_mean(_shares(s_loss=s_loss, s_zlib=s_zlib, s_min_k=s_min_k, s_min_k_plus=s_min_k_plus))
    return attacks if uds is None else harmonic_mean([attacks, *_shares(uds=uds)])


def utility_score(model_utility: float, fluency: float, full_model_utility: float, full_fluency: float) -> float:
    """What is left of the full model's ability, at most 1.

    Args:
        model_utility: ``memory.model_utility`` of the audited model.
        fluency: Share of its answers that are fluent.
        full_model_utility: The same of the model before anything was removed.
        full_fluency: The same of that model.

    Raises:
        DataError: if a part is not between 0 and 1, or the full model can do nothing.
    """
    mine = harmonic_mean(_shares(model_utility=model_utility, fluency=fluency))
    full = harmonic_mean(_shares(full_model_utility=full_model_utility, full_fluency=full_fluency))
    if full == 0:
        raise DataError("the full model's utility is 0; expected a model that can do something to compare with")
    return min(1.0, mine / full)


def overall(memory: float, privacy: float, utility: float) -> float:
    """Harmonic mean of the three scores.

    Raises:
        DataError: if a score is not between 0 and 1.
    """
    return harmonic_mean(_shares(memory=memory, privacy=privacy, utility=utility))


def _shares(**parts: float) -> list[float]:
    for name, value in parts.items():
        if not 0 <= value <= 1:
            raise DataError(f"{name} is {value}; expected a number between 0 and 1")
    return list(parts.values())


def harmonic_mean(values: Sequence[float]) -> float:
    """``n / sum(1 / x)``; 0 if any value is 0.

    Raises:
        DataError: if there are no values, or one is negative or not finite.
    """
    if not values or not all(math.isfinite(v) and v >= 0 for v in values):
        raise DataError(f"the values are {list(values)}; expected at least one, all finite and at least 0")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / v for v in values)
