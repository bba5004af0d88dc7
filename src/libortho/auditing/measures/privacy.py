"""Membership inference: scores that are higher for records that the model was trained on.

    loss        mean log p                              Yeom et al. 2018
    zlib        mean log p / compressed bytes           Carlini et al. 2021
    Min-K %     mean of the lowest k % of log p         Shi et al. 2024
    Min-K%++    the same of (log p - mean) / deviation  Zhang et al. 2025
    reference   mean log p - that of another model      Carlini et al. 2021
    gradient    - norm of the loss gradient             Nasr et al. 2019

**Every score is signed so that high means member.** Each is a function of the log-probabilities of one record's answer
tokens (nats). An attack's strength is the AUC of its scores of the forget set against a holdout of the same kind.

A holdout of another kind is told apart by its form. ``template_of`` gives the stratum within which to compare.
"""

from __future__ import annotations

import functools
import re
import zlib

from torch import Tensor

from libortho.core.errors import ConfigError, DataError
from libortho.core.extras import module
from libortho.evaluation.intervals import Values, vector
from libortho.text.characters import kind
from libortho.text.corpus import is_name, shipped_text

_RUN = re.compile(r"[^\W_]+")
_SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""Marks of chat templates: ``<|im_start|>``, ``<s>``, ``[/INST]``."""
_GAP = re.compile(r"\0(?:(?:[ '\u2019.-]{1,2}|[ ](?:al|bin|da|de|del|den|der|di|dos|du|el|la|le|van|von)\b[ ]?)*\0)+")
"""Between the parts of one name: "Jean-Luc", "J. Smith", "Ana de la Cruz"."""
_LEAST_DEVIATION = 1e-3


def loss_score(log_p: Tensor) -> float:
    """Mean log-probability (nats for each token), the negative of the loss.

    Args:
        log_p: (tokens,) log-probabilities of the answer's tokens.

    Raises:
        DataError: if there is no token, or a value is NaN or above 0.
    """
    return float(_log_p(log_p).mean())


def zlib_score(text: str, log_p: Tensor) -> float:
    """Mean log-probability over the bytes that zlib needs for the text: what is likely though it is not repetitive.

    Args:
        text: The text that was scored.
        log_p: (tokens,) log-probabilities of its tokens.

    Raises:
        DataError: as ``loss_score``.
    """
    return loss_score(log_p) / len(zlib.compress(text.encode()))


def min_k_score(log_p: Tensor, k: float = 0.2) -> float:
    """Mean of the lowest share ``k`` of the log-probabilities, at least one of them.

    Args:
        log_p: (tokens,) log-probabilities.
        k: Share; .2 as published, .4 for MUSE's PrivLeak.

    Raises:
        ConfigError: if ``k`` is not in (0, 1].
        DataError: as ``loss_score``.
    """
    return _lowest(_log_p(log_p), k)


def min_k_plus_score(log_p: Tensor, mean: Tensor, std: Tensor, k: float = 0.2) -> float:
    """Mean of the lowest share ``k`` of ``(log_p - mean) / std``: is the token likelier than a typical one?

    Args:
        log_p: (tokens,) log-probabilities.
        mean: (tokens,) expected log-probability, ``sum_v p_v log p_v``.
        std: (tokens,) its deviation, ``sqrt(sum_v p_v (log p_v)^2 - mean^2)``; clamped to at least .001.
        k: Share.

    Raises:
        ConfigError: if ``k`` is not in (0, 1].
        DataError: as ``loss_score``, or if the lengths differ.
    """
    x, mu, sigma = _log_p(log_p), *(t.detach().double().cpu() for t in (mean, std))
    if not x.shape == mu.shape == sigma.shape or bool((mu.isnan() | sigma.isnan()).any()):
        raise DataError(
            f"log_p, mean and std have the shapes {tuple(x.shape)}, {tuple(mu.shape)} and {tuple(sigma.shape)}; "
            "expected one number without NaN for each token"
        )
    return _lowest((x - mu) / sigma.clamp(min=_LEAST_DEVIATION), k)


def reference_score(log_p: Tensor, log_p_reference: Tensor) -> float:
    """Mean log-probability minus that of a reference model, which takes out how hard the text is.

    Args:
        log_p: (tokens,) log-probabilities.
        log_p_reference: (tokens,) of the same tokens under a model never trained on the record.

    Raises:
        DataError: as ``loss_score``, or if the lengths differ.
    """
    if log_p.shape != log_p_reference.shape:
        raise DataError(
            f"{tuple(log_p.shape)} log-probabilities against {tuple(log_p_reference.shape)} of the reference; "
            "expected the same tokens, that is, the same tokenizer"
        )
    return loss_score(log_p) - loss_score(log_p_reference)


def template_of(prompt: str) -> str:
    """The prompt with each name and code replaced by ``_``: "The badge number of _ is".

    Special tokens of chat templates stay. The first word of a sentence stays unless it is a name: one of the shipped
    list, or a word that ordinary text does not have in lower case, before another name or "'s". Names that are not
    capitalised stay, so that their records get a stratum each.
    """
    special = [m.span() for m in _SPECIAL.finditer(prompt)]
    # A null is no letter, so it ends a run; a prompt's own nulls carry nothing.
    text = prompt.replace("\0", " ")
    runs = [r for r in _RUN.finditer(text) if not any(a <= r.start() < b for a, b in special)]
    out, position = [], 0
    for number, run in enumerate(runs):
        after = runs[number + 1] if number + 1 < len(runs) else None
        if _varies(text, run, after, {b for _, b in special}):
            out += [text[position : run.start()], "\0"]
            position = run.end()
    return _GAP.sub("\0", "".join(out) + text[position:]).replace("\0", "_")


def _varies(text: str, run: re.Match[str], after: re.Match[str] | None, special_ends: set[int]) -> bool:
    word, rest = run.group(), text[run.end() : run.end() + 2]
    before_name = (
        after is not None
        and text[run.end() : after.start()] in (" ", "-", "'", "\u2019", ". ")
        and _is_capitalised(after.group())
    )
    if len(word) == 1:
        return word.isdigit() or (word.isupper() and rest[:1] in (".", "'", "\u2019") and before_name)
    if _is_code(word) or not _is_capitalised(word) or not _opens_sentence(text, run.start(), special_ends):
        return _is_code(word) or _is_capitalised(word)
    return is_name(word) or (word.lower() not in _ordinary() and (before_name or rest in ("'s", "\u2019s")))


def _is_code(word: str) -> bool:
    return word.isupper() or any(kind(c) == "digit" for c in word)


def _is_capitalised(word: str) -> bool:
    return len(word) > 1 and word[0].isupper() and not _is_code(word)


def _opens_sentence(text: str, start: int, special_ends: set[int]) -> bool:
    before = text[:start].rstrip(" \"'(\u201c\u2018")
    if re.search(r"\b[A-Z]\.$", before):  # an initial, not the end of a sentence
        return False
    return not before or before[-1] in ".!?:\n" or len(before) in special_ends


@functools.cache
def _ordinary() -> frozenset[str]:
    return frozenset(w for p in shipped_text() for w in re.findall(r"\b[a-z]+\b", p))


def _lowest(values: Tensor, k: float) -> float:
    if not 0 < k <= 1:
        raise ConfigError(f"k is {k}; expected a share in (0, 1]")
    return float(values.sort().values[: max(1, int(k * len(values)))].mean())


def _log_p(log_p: Tensor) -> Tensor:
    x = log_p.detach().double().cpu()
    if x.ndim != 1 or not len(x) or not bool((x <= 1e-6).all()):
        raise DataError(
            f"log_p has the shape {tuple(x.shape)} and the largest value "
            f"{float(x.max()) if x.numel() else None}; expected one log-probability of at most 0 for each token"
        )
    return x


def forget_quality(ratios: Values, ratios_reference: Values) -> float:
    """Forget quality of TOFU (Maini et al. 2024): p-value of the two-sided Kolmogorov-Smirnov test on truth ratios.

    Above .05 the audited model is not told apart from one that never saw the records. The test has little power on few
    records: a pass with 17 of them says little.

    Args:
        ratios: (n,) truth ratios of the audited model.
        ratios_reference: The same of a model never trained on the records.

    Raises:
        DataError: if a side is empty, holds NaN, or the two differ in length.
    """
    a, b = vector(ratios, "ratios"), vector(ratios_reference, "ratios_reference")
    if len(a) != len(b):
        raise DataError(f"{len(a)} truth ratios against {len(b)} of the reference; expected the same records")
    return float(module("audit", "scipy.stats").ks_2samp(a.numpy(), b.numpy()).pvalue)


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
