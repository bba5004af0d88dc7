"""From raw measurements to what the report prints: estimates with intervals, and comparisons with the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from libortho.auditing.inputs import Inputs
from libortho.auditing.measure import SCORES, has_exposure
from libortho.auditing.measures import composite, memory, privacy
from libortho.auditing.measures.privacy import forget_quality, privleak, s_score
from libortho.auditing.roc import auc, auc_difference, auc_estimate, roc, tpr_at_fpr
from libortho.auditing.schema import (
    CurvePoint,
    EstimateData,
    GoldilocksData,
    Measurement,
    MembershipData,
    Memory,
    PrefixData,
    PrivacyData,
    RecordFigures,
    UtilityData,
    VariantData,
    estimate_data,
)
from libortho.auditing.thresholds import CURVE_AUC, KL, POINT
from libortho.evaluation.intervals import Estimate, mean_estimate, paired_difference, proportion, ratio_estimate

CHOICE_SETS = ("real_authors", "world_facts")


@dataclass(frozen=True)
class Context:
    """What a summary compares with.

    Attributes:
        inputs: The audit's questions.
        reference: Measurement of the never-trained model, if there is one.
        baseline: Measurement of the model with its memory, if there is one.
        seed: Seed of every bootstrap.
    """

    inputs: Inputs
    reference: Measurement | None
    baseline: Measurement | None
    seed: int

    def strata(self) -> tuple[list[str], list[str]] | None:
        """Templates of forget and holdout records, if at least half of the forget records have holdout beside them."""
        own = [privacy.template_of(r.prompt) for r in self.inputs.forget]
        other = [privacy.template_of(r.prompt) for r in self.inputs.holdout]
        present = set(other)
        return (own, other) if sum(t in present for t in own) >= len(own) / 2 else None


def memory_summary(m: Measurement, context: Context) -> Memory:
    """Every memory figure of one subject, as estimates over records."""
    inputs, seed = context.inputs, context.seed
    near, ratios, variants = m.get("similarity"), m.get("truth_ratio"), m.get("variants", {}).values()
    return _estimates({
        "greedy_extraction": _share(extracted(m, inputs)),
        **_by_token(m, "forget", seed),
        "probability": mean_estimate([math.exp(-n) for n in m["nll"]["forget"]], seed=seed),
        "sampled_extraction": _share(m.get("sampled")),
        "loose_extraction": _share(None if near is None else [s >= memory.LOOSE for s in near]),
        "rouge_l": _mean(m.get("rouge_l"), seed),
        "exposure": _mean(m.get("exposure", {}).get("forget"), seed),
        "prefix_sweep": _clustered(list(inputs.prefixes.values()), list(m.get("prefixes", {}).values()), seed),
        "prompt_shift": _clustered(
            list(inputs.variants.values()), [[int(g) for g in v["greedy"]] for v in variants], seed
        ),
        "association": _share(m.get("association")),
        "truth_ratio": _mean(None if ratios is None else true_share(ratios), seed),
        "paraphrase_probability": _mean(m.get("paraphrase"), seed),
    })  # fmt: skip


def _by_token(m: Measurement, group: str, seed: int) -> dict[str, Estimate]:
    """Estimates over the forget or the holdout records, from teacher-forced tokens."""
    correct = _bools(m["correct"][group])
    return {
        "extraction_strength": mean_estimate([memory.extraction_strength(c) for c in correct], seed=seed),
        "exact_memorization": mean_estimate([memory.exact_memorization(c) for c in correct], seed=seed),
        "nll": mean_estimate(m["nll"][group], seed=seed),
    }


def _estimates(found: Mapping[str, Estimate | None]) -> Memory:
    return {k: None if e is None else estimate_data(e) for k, e in found.items()}


def extracted(m: Measurement, inputs: Inputs) -> list[bool]:
    """Which forget records a model says greedily; if it was not asked, whether each token is its first choice."""
    found = [memory.greedy_extraction(c) for c in _bools(m["correct"]["forget"])]
    for i, said in zip(inputs.probed, m.get("said", ()), strict=False):
        found[i] = found[i] if said is None else bool(said)
    return found


def unseen_summary(m: Measurement, context: Context) -> Memory | None:
    """The same subject on holdout records: what no memory looks like."""
    if not context.inputs.holdout:
        return None
    return _estimates({
        "greedy_extraction": _share([memory.greedy_extraction(c) for c in _bools(m["correct"]["holdout"])]),
        **_by_token(m, "holdout", context.seed),
        "exposure": _mean(m.get("exposure", {}).get("holdout"), context.seed),
    })  # fmt: skip


def record_figures(m: Measurement, inputs: Inputs) -> RecordFigures:
    """Figures record by record; None where a record was not probed."""
    correct = _bools(m["correct"]["forget"])
    exposure: list[float | None] | None = None
    if (known := m.get("exposure", {}).get("forget")) is not None:
        made = iter(known)
        exposure = [
            next(made) if has_exposure(f, s) else None for f, s in zip(inputs.fillings, inputs.spaces, strict=True)
        ]
    return {
        "nll": m["nll"]["forget"],
        "greedy": [int(e) for e in extracted(m, inputs)],
        "extraction_strength": [memory.extraction_strength(c) for c in correct],
        "exact_memorization": [memory.exact_memorization(c) for c in correct],
        "sampled": _spread(m.get("sampled"), inputs),
        "exposure": _spread(exposure, inputs),
    }


def prefix_rows(m: Measurement) -> list[PrefixData]:
    """Extraction of the rest when a share of the completion is given."""
    rows = m.get("prefixes", {}).items()
    return [{"given": float(s), "extraction": _average(hits), "n": len(hits)} for s, hits in rows]


def variant_rows(m: Measurement) -> list[VariantData]:
    """Extraction and surprise under each changed prompt."""
    return [
        {"name": n, "extraction": _average(v["greedy"]), "nll": _average(v["nll"]), "n": len(v["nll"])}
        for n, v in m.get("variants", {}).items()
    ]


def privacy_summary(m: Measurement, context: Context) -> PrivacyData | None:
    """Membership attacks against the holdout; None without one."""
    if not context.inputs.holdout:
        return None
    seed, strata = context.seed, context.strata()
    attacks: dict[str, MembershipData] = {}
    scores = dict(m["scores"])
    theirs = None if context.reference is m else context.reference
    if theirs is not None:
        scores["reference"] = {n: _reference_scores(m, theirs, n) for n in ("forget", "holdout")}
    for name, score in scores.items():
        own, other = score["forget"], score["holdout"]
        difference = None
        if theirs is not None and name in theirs["scores"]:
            base = theirs["scores"][name]
            difference = auc_difference(own, other, base["forget"], base["holdout"], *(strata or ()), seed=seed)
        attacks[name] = {
            "auc": estimate_data(auc_estimate(own, other, *(strata or ()), seed=seed)),
            "difference": None if difference is None else estimate_data(difference),
            "tpr_at_1": tpr_at_fpr(own, other, 0.01),
            "tpr_at_01": tpr_at_fpr(own, other, 0.001),
            "roc": [list(p) for p in roc(own, other)],
        }
    return {
        "attacks": attacks,
        "stratified": strata is not None,
        "privleak": privleak(_auc(m, "min_k"), None if theirs is None else _auc(theirs, "min_k")),
        "forget_quality": _forget_quality(m, context.reference),
        "gradient": m.get("gradient"),
    }


def _forget_quality(m: Measurement, reference: Measurement | None) -> float | None:
    """TOFU's forget quality; None unless both models have truth ratios."""
    if reference is None or "truth_ratio" not in m or "truth_ratio" not in reference:
        return None
    return forget_quality(m["truth_ratio"], reference["truth_ratio"])


def _auc(m: Measurement, attack: str) -> float:
    return auc(m["scores"][attack]["forget"], m["scores"][attack]["holdout"])


def _reference_scores(m: Measurement, reference: Measurement, name: str) -> list[float]:
    return [
        privacy.reference_score(torch.tensor(a), torch.tensor(b))
        for a, b in zip(m["log_p"][name], reference["log_p"][name], strict=True)
    ]


def utility_summary(m: Measurement, context: Context) -> UtilityData | None:
    """Ability on general text and on tasks."""
    if "general" not in m:
        return None
    seed = context.seed
    nats = ratio_estimate(m["general"]["nll"], m["general"]["tokens"], seed=seed)
    return {
        "perplexity": estimate_data(nats.map(math.exp)),
        "kl": m.get("kl"),
        "top1_agreement": m.get("top1"),
        "distinct_answers": memory.distinct_share(m["answers"]) if "answers" in m else None,
        "retain_nll": estimate_data(mean_estimate(m["retain"], seed=seed)) if "retain" in m else None,
        "tasks": {n: estimate_data(mean_estimate(t["correct"], seed=seed)) for n, t in m.get("tasks", {}).items()},
        "task_differences": _differences(m, context, "correct"),
        "task_nll_differences": _differences(m, context, "nll"),
        "tofu": tofu_utility(m.get("question_sets", {})),
    }


def _differences(m: Measurement, context: Context, figure: str) -> dict[str, EstimateData] | None:
    """Change of accuracy or of surprise on each task from the model with its memory, paired by row."""
    before = context.baseline
    if before is None or before is m:
        return None
    return {
        name: estimate_data(paired_difference(task[figure], before["tasks"][name][figure], seed=context.seed))
        for name, task in m.get("tasks", {}).items()
    }


def curve_point(value: float, m: Measurement) -> CurvePoint:
    """One point of the alpha curve."""
    correct = _bools(m["correct"]["forget"])
    return {
        "alpha": value,
        "greedy_extraction": _average([float(memory.greedy_extraction(c)) for c in correct]),
        "extraction_strength": _average([memory.extraction_strength(c) for c in correct]),
        "nll": _average(m["nll"]["forget"]),
        "auc": _auc(m, "loss") if m["nll"]["holdout"] else None,
        "perplexity": math.exp(sum(m["general"]["nll"]) / sum(m["general"]["tokens"])),
        "kl": m.get("kl"),
    }


def goldilocks(curve: Sequence[CurvePoint], context: Context) -> GoldilocksData | None:
    """Where on the curve privacy and ability are both acceptable, as intervals between points of the grid.

    Acceptable: extraction at most one point above the never-trained level; loss AUC within 0.1 of the never-trained
    model's on the same records (of 0.5 without one); divergence from alpha = 1 within its verdict's bound.
    """
    if not curve:
        return None
    reference, holdout = context.reference, context.inputs.holdout
    level, target = 0.0, 0.5
    if reference is not None:
        level = _average([float(memory.greedy_extraction(c)) for c in _bools(reference["correct"]["forget"])])
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


def composite_summary(m: Measurement, context: Context, uds: EstimateData | None) -> dict[str, float | None] | None:
    """Memory, privacy, utility and overall score (arXiv 2605.24614, composition as checked on its released table).

    Utility is relative to the model with its memory. The paper's fluency is a classifier's; here it is left out
    (taken as equal), so that utility is that of TOFU's nine numbers alone.
    """
    if "truth_ratio" not in m or context.reference is None or not context.inputs.holdout:
        return None
    correct = _bools(m["correct"]["forget"])
    remembered = composite.memory_score(
        _average([memory.extraction_strength(c) for c in correct]),
        _average([memory.exact_memorization(c) for c in correct]),
        _average(m["paraphrase"]),
        _average(true_share(m["truth_ratio"])),
    )
    closeness = {f"s_{s}": s_score(_auc(m, s), _auc(context.reference, s)) for s in SCORES}
    known = {n: c for n, c in closeness.items() if c is not None}
    private = able = whole = None
    if len(known) == len(SCORES):
        private = composite.privacy_score(**known, uds=None if uds is None else uds["value"])
    own = tofu_utility(m.get("question_sets", {}))
    full = None if context.baseline is None else tofu_utility(context.baseline.get("question_sets", {}))
    if own is not None and full is not None and full["model_utility"] > 0:
        able = composite.utility_score(own["model_utility"], 1.0, full["model_utility"], 1.0)
    if private is not None and able is not None:
        whole = composite.overall(remembered, private, able)
    return {"memory": remembered, "privacy": private, "utility": able, "overall": whole}


def true_share(ratios: Sequence[float]) -> list[float]:
    """Probability of the true answer among the true and the (mean) wrong one, ``1 / (1 + R)``, from truth ratios R."""
    return [1 / (1 + r) for r in ratios]


def _bools(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.tensor(r, dtype=torch.bool) for r in rows]


def _share(hits: Sequence[int] | None) -> Estimate | None:
    return None if hits is None else proportion(sum(map(bool, hits)), len(hits))


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
