"""From raw measurements to what the report prints: estimates with intervals, and comparisons with the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from libortho.auditing.inputs import Inputs
from libortho.auditing.measure import ATTACKS, Measurement, has_exposure
from libortho.auditing.measures import composite, memory, privacy
from libortho.auditing.measures.privacy import forget_quality, privleak, s_score
from libortho.auditing.roc import auc, auc_difference, auc_estimate, roc, tpr_at_fpr
from libortho.auditing.thresholds import CURVE_AUC, KL, POINT
from libortho.evaluation.intervals import Estimate, mean_estimate, paired_difference, proportion, ratio_estimate

CHOICE_SETS = ("real_authors", "world_facts")


@dataclass(frozen=True)
class Context:
    """What a summary compares with.

    Attributes:
        inputs: The audit's questions.
        reference: Measurement of the never-trained model, if there is one.
        before: Measurement of the model with its memory, if there is one.
        seed: Seed of every bootstrap.
    """

    inputs: Inputs
    reference: Measurement | None
    before: Measurement | None
    seed: int

    def strata(self) -> tuple[list[str], list[str]] | None:
        """Templates of forget and holdout records, if at least half of the forget records have holdout beside them."""
        own = [privacy.template_of(r.prompt) for r in self.inputs.forget]
        other = [privacy.template_of(r.prompt) for r in self.inputs.holdout]
        present = set(other)
        return (own, other) if sum(t in present for t in own) >= len(own) / 2 else None


def memory_summary(m: Measurement, context: Context) -> dict[str, Any]:
    """Every memory figure of one subject, as estimates over records."""
    mat, seed = context.inputs, context.seed
    correct = _bools(m.correct["forget"])
    found: dict[str, Estimate | None] = {
        "greedy_extraction": _share(extracted(m, mat)),
        "extraction_strength": mean_estimate([memory.extraction_strength(c) for c in correct], seed=seed),
        "exact_memorization": mean_estimate([memory.exact_memorization(c) for c in correct], seed=seed),
        "nll": mean_estimate(m.nll["forget"], seed=seed),
        "probability": mean_estimate([math.exp(-n) for n in m.nll["forget"]], seed=seed),
        "sampled_extraction": None if m.sampled is None else _share([h > 0 for h in m.sampled]),
        "loose_extraction": None if m.similarity is None else _share([s >= memory.LOOSE for s in m.similarity]),
        "rouge_l": None if m.rouge_l is None else mean_estimate(m.rouge_l, seed=seed),
        "exposure": _mean(m.exposure.get("forget"), seed),
        "prefix_sweep": _clustered(list(mat.prefixes.values()), list(m.prefixes.values()), seed),
        "prompt_shift": _clustered(
            list(mat.variants.values()), [[int(g) for g in v["greedy"]] for v in m.variants.values()], seed
        ),
        "association": None if m.association is None else _share(m.association),
        "truth_ratio": None if m.truth_ratio is None else mean_estimate(true_share(m.truth_ratio), seed=seed),
        "paraphrase_probability": _mean(m.paraphrase, seed),
    }
    return {k: None if e is None else e.to_dict() for k, e in found.items()}


def extracted(m: Measurement, inputs: Inputs) -> list[bool]:
    """Which forget records a model says greedily; if it was not asked, whether each token is its first choice."""
    found = [memory.greedy_extraction(c) for c in _bools(m.correct["forget"])]
    for i, said in zip(inputs.probed, m.said or (), strict=False):
        found[i] = found[i] if said is None else bool(said)
    return found


def unseen_summary(m: Measurement, context: Context) -> dict[str, Any] | None:
    """The same subject on holdout records: what no memory looks like."""
    if not context.inputs.holdout:
        return None
    seed, correct = context.seed, _bools(m.correct["holdout"])
    found = {
        "greedy_extraction": _share([memory.greedy_extraction(c) for c in correct]),
        "extraction_strength": mean_estimate([memory.extraction_strength(c) for c in correct], seed=seed),
        "exact_memorization": mean_estimate([memory.exact_memorization(c) for c in correct], seed=seed),
        "nll": mean_estimate(m.nll["holdout"], seed=seed),
        "exposure": _mean(m.exposure.get("holdout"), seed),
    }
    return {k: None if e is None else e.to_dict() for k, e in found.items()}


def record_figures(m: Measurement, inputs: Inputs) -> dict[str, Any]:
    """Figures record by record; None where a record was not probed."""
    correct = _bools(m.correct["forget"])
    exposure: list[float | None] | None = None
    if (known := m.exposure.get("forget")) is not None:
        made = iter(known)
        exposure = [
            next(made) if has_exposure(f, s) else None for f, s in zip(inputs.fillings, inputs.spaces, strict=True)
        ]
    return {
        "nll": m.nll["forget"],
        "greedy": [int(e) for e in extracted(m, inputs)],
        "extraction_strength": [memory.extraction_strength(c) for c in correct],
        "exact_memorization": [memory.exact_memorization(c) for c in correct],
        "sampled": _spread(m.sampled, inputs),
        "exposure": _spread(exposure, inputs),
    }


def prefix_rows(m: Measurement, inputs: Inputs) -> list[dict[str, Any]]:
    """Extraction of the rest when a share of the completion is given."""
    return [{"given": float(s), "extraction": _average(hits), "n": len(hits)} for s, hits in m.prefixes.items()]


def variant_rows(m: Measurement) -> list[dict[str, Any]]:
    """Extraction and surprise under each changed prompt."""
    return [
        {"name": n, "extraction": _average(v["greedy"]), "nll": _average(v["nll"]), "n": len(v["nll"])}
        for n, v in m.variants.items()
    ]


def privacy_summary(m: Measurement, context: Context) -> dict[str, Any] | None:
    """Membership attacks against the holdout; None without one."""
    inputs, seed = context.inputs, context.seed
    if not inputs.holdout:
        return None
    strata = context.strata()
    attacks = {}
    scores = dict(m.scores)
    if context.reference is not None and context.reference is not m:
        scores["reference"] = {n: _reference_scores(m, context.reference, n) for n in ("forget", "holdout")}
    for name, score in scores.items():
        own, other = score["forget"], score["holdout"]
        difference = None
        if context.reference is not None and context.reference is not m and name in context.reference.scores:
            base = context.reference.scores[name]
            difference = auc_difference(own, other, base["forget"], base["holdout"], *(strata or ()), seed=seed)
        attacks[name] = {
            "auc": auc_estimate(own, other, *(strata or ()), seed=seed).to_dict(),
            "difference": None if difference is None else difference.to_dict(),
            "tpr_at_1": tpr_at_fpr(own, other, 0.01),
            "tpr_at_01": tpr_at_fpr(own, other, 0.001),
            "roc": [list(p) for p in roc(own, other)],
        }
    theirs = context.reference
    return {
        "attacks": attacks,
        "stratified": strata is not None,
        "privleak": privleak(_auc(m, "min_k"), None if theirs is None or theirs is m else _auc(theirs, "min_k")),
        "forget_quality": _forget_quality(m, theirs),
        "gradient": m.gradient,
    }


def _forget_quality(m: Measurement, reference: Measurement | None) -> float | None:
    """TOFU's, where both models have truth ratios."""
    if reference is None or m.truth_ratio is None or reference.truth_ratio is None:
        return None
    return forget_quality(m.truth_ratio, reference.truth_ratio)


def _auc(m: Measurement, attack: str) -> float:
    return auc(m.scores[attack]["forget"], m.scores[attack]["holdout"])


def _reference_scores(m: Measurement, reference: Measurement, name: str) -> list[float]:
    return [
        privacy.reference_score(torch.tensor(a), torch.tensor(b))
        for a, b in zip(m.log_p[name], reference.log_p[name], strict=True)
    ]


def utility_summary(m: Measurement, context: Context) -> dict[str, Any] | None:
    """Ability on general text and on tasks."""
    if m.general is None:
        return None
    seed = context.seed
    nats = ratio_estimate(m.general["nll"], m.general["tokens"], seed=seed)
    return {
        "perplexity": nats.map(math.exp).to_dict(),
        "kl": m.kl,
        "top1_agreement": m.top1,
        "distinct_answers": None if m.answers is None else memory.distinct_share(m.answers),
        "retain_nll": None if m.retain is None else mean_estimate(m.retain, seed=seed).to_dict(),
        "tasks": {n: mean_estimate(t["correct"], seed=seed).to_dict() for n, t in m.tasks.items()},
        "task_differences": _differences(m, context, "correct"),
        "task_nll_differences": _differences(m, context, "nll"),
        "tofu": tofu_utility(m.question_sets),
    }


def _differences(m: Measurement, context: Context, figure: str) -> dict[str, Any] | None:
    """Change of accuracy or of surprise on each task from the model with its memory, paired by row."""
    if context.before is None or context.before is m:
        return None
    found = {}
    for name, task in m.tasks.items():
        theirs = context.before.tasks[name][figure]
        found[name] = paired_difference(task[figure], theirs, seed=context.seed).to_dict()
    return found


def curve_point(value: float, m: Measurement) -> dict[str, Any]:
    """One point of the alpha curve."""
    correct = _bools(m.correct["forget"])
    assert m.general is not None
    return {
        "alpha": value,
        "greedy_extraction": _average([float(memory.greedy_extraction(c)) for c in correct]),
        "extraction_strength": _average([memory.extraction_strength(c) for c in correct]),
        "nll": _average(m.nll["forget"]),
        "auc": _auc(m, "loss") if m.nll["holdout"] else None,
        "perplexity": math.exp(sum(m.general["nll"]) / sum(m.general["tokens"])),
        "kl": m.kl,
    }


def goldilocks(curve: Sequence[Mapping[str, Any]], context: Context) -> dict[str, Any] | None:
    """Where on the curve privacy and ability are both acceptable, as intervals between points of the grid.

    Acceptable: extraction at most one point above the never-trained level; loss AUC within 0.1 of the never-trained
    model's on the same records (of 0.5 without one); divergence from alpha = 1 within its verdict's bound.
    """
    if not curve:
        return None
    reference, holdout = context.reference, context.inputs.holdout
    level, target = 0.0, 0.5
    if reference is not None:
        level = _average([float(memory.greedy_extraction(c)) for c in _bools(reference.correct["forget"])])
        if holdout:
            target = _auc(reference, "loss")
    good = [
        p["greedy_extraction"] <= level + POINT
        and (p["auc"] is None or abs(p["auc"] - target) <= CURVE_AUC)
        and (p["kl"] is None or p["kl"] <= KL)
        for p in curve
    ]
    intervals: list[list[float]] = []
    for point, ok, before in zip(curve, good, [False, *good], strict=False):
        if ok and before:
            intervals[-1][1] = point["alpha"]
        elif ok:
            intervals.append([point["alpha"], point["alpha"]])
    criteria = (
        f"extraction <= {level + POINT:.2f}, loss AUC within {CURVE_AUC} of {target:.2f}"
        f"{'' if holdout else ' (no holdout: not judged)'}, KL from alpha = 1 <= {KL} nats"
    )
    return {"intervals": intervals, "criteria": criteria}


def tofu_utility(sets: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float] | None:
    """TOFU's nine numbers and their harmonic mean (Maini et al. 2024, section 2.2.2); None unless all are there."""
    if not all(n in sets for n in ("retain", *CHOICE_SETS)):
        return None
    nine = {}
    for name in ("retain", *CHOICE_SETS):
        nine[f"{name}_probability"] = _average(sets[name]["probability"])
        nine[f"{name}_rouge_l"] = _average(sets[name]["rouge_l"])
        nine[f"{name}_truth_ratio"] = float(memory.true_better(sets[name]["truth_ratio"]).mean())
    return {**nine, "model_utility": memory.model_utility(list(nine.values()))}


def composite_summary(
    m: Measurement, context: Context, uds: Mapping[str, Any] | None
) -> dict[str, float | None] | None:
    """Memory, privacy, utility and overall score (arXiv 2605.24614, composition as checked on its released table).

    Utility is relative to the model with its memory. The paper's fluency is a classifier's; here it is left out
    (taken as equal), so that utility is that of TOFU's nine numbers alone.
    """
    ready = m.truth_ratio is not None and m.paraphrase is not None and context.reference is not None
    if not ready or not context.inputs.holdout:
        return None
    assert m.truth_ratio is not None
    assert m.paraphrase is not None
    assert context.reference is not None
    correct = _bools(m.correct["forget"])
    remembered = composite.memory_score(
        _average([memory.extraction_strength(c) for c in correct]),
        _average([memory.exact_memorization(c) for c in correct]),
        _average(m.paraphrase),
        _average(true_share(m.truth_ratio)),
    )
    closeness = {f"s_{a}": s_score(_auc(m, a), _auc(context.reference, a)) for a in ATTACKS}
    known = {n: c for n, c in closeness.items() if c is not None}
    private = (
        composite.privacy_score(**known, uds=None if uds is None else uds["value"])
        if len(known) == len(ATTACKS)
        else None
    )
    own = tofu_utility(m.question_sets)
    full = None if context.before is None else tofu_utility(context.before.question_sets)
    able = None
    if own is not None and full is not None and full["model_utility"] > 0:
        able = composite.utility_score(own["model_utility"], 1.0, full["model_utility"], 1.0)
    whole = None if private is None or able is None else composite.overall(remembered, private, able)
    return {"memory": remembered, "privacy": private, "utility": able, "overall": whole}


def true_share(ratios: Sequence[float]) -> list[float]:
    """Probability of the true answer among the true and the (mean) wrong one, ``1 / (1 + R)``, from truth ratios R."""
    return [1 / (1 + r) for r in ratios]


def _bools(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.tensor(r, dtype=torch.bool) for r in rows]


def _share(hits: Sequence[bool | int]) -> Estimate:
    return proportion(sum(map(bool, hits)), len(hits))


def _mean(values: Sequence[float] | None, seed: int) -> Estimate | None:
    return None if not values else mean_estimate(values, seed=seed)


def _clustered(pairs: Sequence[Sequence[tuple[int, Any]]], hits: Sequence[Sequence[int]], seed: int) -> Estimate | None:
    """Share of hits over records and probes; the interval resamples records, whose probes depend on each other."""
    if not hits:
        return None
    total: dict[int, int] = {}
    count: dict[int, int] = {}
    for asked, found in zip(pairs, hits, strict=True):
        for (i, _), hit in zip(asked, found, strict=True):
            total[i], count[i] = total.get(i, 0) + hit, count.get(i, 0) + 1
    estimate = ratio_estimate(list(total.values()), list(count.values()), seed=seed)
    if estimate.value in (0.0, 1.0):  # no resample differs
        stand_in = proportion(len(total) * int(estimate.value), len(total))
        return Estimate(estimate.value, stand_in.low, stand_in.high, len(total))
    return estimate


def _spread(values: Sequence[Any] | None, inputs: Inputs) -> list[Any] | None:
    if values is None:
        return None
    found: list[Any] = [None] * len(inputs.forget)
    for i, v in zip(inputs.probed, values, strict=True):
        found[i] = v
    return found


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
