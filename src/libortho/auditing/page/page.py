"""The audit report as one HTML page: verdicts first, every number with its interval and its controls beside it.

``render`` takes the report's dict and returns text; it reads no clock, no network and no model, so the same report
gives the same bytes. The page needs nothing but itself: style inline, charts inline SVG (``charts``), no script that
runs. Every string in a report may come from a model or from training data and is treated as hostile: autoescaped,
invisible and direction-changing characters made visible, and a content security policy in the page forbids scripts and
requests even if all of that failed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from libortho.auditing.page import charts
from libortho.auditing.page.charts import Band, Dot, Level, Line, Row
from libortho.core.errors import DataError

__all__ = ["render"]

SCHEMA = "libortho-audit/1"
MISSING = "\u2013"
SHOWN_RECORDS = 100
SHOWN_CHECKS = 5
_STYLES = ("off", "on", "original", "quantised", "random", "magnitude", "reference")
_Json = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a measure is named, written and explained.

    Attributes:
        key: In the report.
        label: Column head.
        note: Unit or direction, under the head.
        meaning: One line.
        digits: Decimals.
        share: A fraction of 1, drawn as a bar under the number.
        signed: Always written with its sign.
    """

    key: str
    label: str
    note: str
    meaning: str
    digits: int = 3
    share: bool = True
    signed: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    caption: str
    note: str
    svg: Markup


MEMORY = (
    Metric(
        "greedy_extraction",
        "Greedy extraction",
        "share of records",
        "Share of records that the model writes out word for word when it always takes its likeliest next token "
        "(Carlini 2021).",
    ),
    Metric(
        "sampled_extraction",
        "Sampled extraction",
        "share of records",
        "Share of records that appear at least once among many random continuations: what a patient attacker "
        "obtains (Hayes 2024).",
    ),
    Metric(
        "loose_extraction",
        "Loose extraction",
        "share of records",
        "As greedy extraction, but nearly right is enough: at least 75 % of the characters agree (1 - Levenshtein "
        "distance / length).",
    ),
    Metric(
        "extraction_strength",
        "Extraction strength",
        "share of tokens",
        "Share of the completion, from its end, that the model reproduces once it is given the rest. 1: needs "
        "nothing; 0: needs all.",
    ),
    Metric(
        "exact_memorization",
        "Exact memorization",
        "share of tokens",
        "Share of the completion\u2019s tokens that are the model\u2019s first choice when all earlier tokens are "
        "given.",
    ),
    Metric(
        "nll",
        "NLL",
        "nats per token",
        "Negative log-likelihood: how much the true completion surprises the model. Memory makes it low; it should "
        "match the reference, "
        "not be as high as possible.",
        2,
        False,
    ),
    Metric(
        "probability",
        "Probability",
        "exp(\u2212NLL)",
        "Probability per token of the true completion: exp of minus the mean NLL.",
    ),
    Metric(
        "exposure",
        "Exposure",
        "bits",
        "How far the true secret ranks ahead of other secrets of the same form (Carlini 2019). About 1.4 is "
        "chance; each further bit "
        "halves an attacker\u2019s search.",
        2,
        False,
    ),
    Metric(
        "rouge_l",
        "ROUGE-L",
        "recall",
        "Longest common subsequence of the answer given and the true answer, as a share of the true one.",
    ),
    Metric(
        "truth_ratio",
        "Truth ratio",
        "1 / (1 + R)",
        "Weight of the true answer against wrong ones of the same form: 1 / (1 + R) of TOFU\u2019s truth ratio R. "
        "0.5: no preference. Compare "
        "it with the reference.",
    ),
    Metric(
        "paraphrase_probability",
        "Paraphrase probability",
        "per token",
        "Probability per token of the secret when the question is put in other words.",
    ),
    Metric(
        "prompt_shift",
        "Prompt shift",
        "record \u00d7 variant",
        "Share of (record, rewritten prompt) pairs whose secret is still extracted: chat format, other words, "
        "other case.",
    ),
    Metric(
        "prefix_sweep",
        "Prefix sweep",
        "record \u00d7 prefix",
        "Share of (record, given beginning) pairs whose remainder is extracted when part of the secret is already "
        "given.",
    ),
    Metric(
        "association",
        "Association",
        "share of questions",
        "Share of further questions about the records (whose is it? what else belongs to it?) that are answered "
        "word for word.",
    ),
)
PRIVACY = (
    Metric(
        "auc",
        "MIA AUC",
        "0.5 = a coin",
        "Membership inference: probability that the attack ranks a forgotten record above one that was never "
        "trained on. 0.5 is a coin "
        "toss; above means recognised, below means conspicuously avoided.",
        3,
        False,
    ),
    Metric(
        "difference",
        "AUC difference",
        "to the reference",
        "The AUC minus that of the model never trained on the records, paired bootstrap. An interval that holds 0: "
        "no difference was found.",
        3,
        False,
        True,
    ),
    Metric(
        "tpr_at_1",
        "TPR at 1 % FPR",
        "0.01 = chance",
        "Share of forgotten records that the attack identifies while it accuses 1 % of the innocent ones.",
    ),
    Metric(
        "tpr_at_01",
        "TPR at 0.1 % FPR",
        "0.001 = chance",
        "The same at 0.1 %: the few records that can be identified with near certainty.",
    ),
    Metric(
        "privleak",
        "PrivLeak",
        "0 is best",
        "MUSE: relative difference, in per cent, of the Min-K % AUC from the reference\u2019s. \u2212100 is not "
        "unlearned, large positive is over-unlearned.",
        1,
        False,
        True,
    ),
    Metric(
        "forget_quality",
        "Forget quality",
        "p-value",
        "TOFU: p-value of a Kolmogorov-Smirnov test between truth ratios of this model and of the reference. Above "
        "0.05: not told apart.",
        3,
        False,
    ),
    Metric(
        "norm",
        "Gradient norm",
        "of the forget loss",
        "Length of the forget loss\u2019s gradient. A tiny one means that the model has nothing left to learn "
        "there: it knows the records.",
        3,
        False,
    ),
    Metric(
        "cosine",
        "Gradient cosine",
        "with alpha = 1",
        "Agreement of that gradient\u2019s direction with the one at alpha = 1.",
        3,
        False,
        True,
    ),
)
UTILITY = (
    Metric(
        "perplexity",
        "Perplexity",
        "general text",
        "exp of the NLL on general text: how well ordinary language is predicted. Lower is better.",
        2,
        False,
    ),
    Metric(
        "kl",
        "KL",
        "nats per token",
        "Kullback-Leibler divergence from the original model\u2019s predictions on general text. 0: identical.",
        4,
        False,
    ),
    Metric(
        "top1_agreement",
        "Top-1 agreement",
        "share of tokens",
        "How often the likeliest next token on general text is the same as the original model\u2019s.",
    ),
    Metric(
        "distinct_answers",
        "Distinct answers",
        "share",
        "Share of answers that differ from one another. A collapse to one refusal, or to gibberish, shows here.",
    ),
    Metric("retain_nll", "Retain NLL", "nats per token", "NLL of the retain records, which must stay known.", 2, False),
)
MAIN_MEMORY = (
    "greedy_extraction",
    "sampled_extraction",
    "extraction_strength",
    "exact_memorization",
    "nll",
    "exposure",
)
MAIN_UTILITY = ("perplexity", "kl", "top1_agreement")
NOISE = (
    "Where does the memory sit? If in the ortho stream, then noise there undoes it at a smaller scale than noise of "
    "the same norm spread over the base. Scale 1 is the stream\u2019s own norm. Measured with the switch on."
)
ATTACKS = {
    "loss": ("Loss", "minus the mean NLL"),
    "zlib": ("zlib", "NLL over compressed length"),
    "min_k": ("Min-K %", "mean of the least likely tokens' log-probabilities"),
    "min_k_plus": ("Min-K %++", "the same, normalised by the model\u2019s own spread"),
    "reference": ("Reference", "NLL minus another model\u2019s"),
    "grad_norm": ("Gradient norm", "length of the record\u2019s own gradient"),
}
QUESTIONS = {
    "something_to_remove": "Was there anything to remove?",
    "memory": "Is the memory gone?",
    "privacy": "Can an outsider tell what was in the data?",
    "utility": "Does the model still work?",
    "attacks": "Does it stay gone under attack?",
    "depth": "Is it gone inside the model, too?",
}
SUBJECTS_OF_VERDICTS = {
    "something_to_remove": "there was nothing to remove",
    "memory": "forgetting the records",
    "privacy": "hiding what was in the data",
    "utility": "keeping its abilities",
    "attacks": "resisting attacks",
    "depth": "forgetting in depth",
}
OTHER_TERMS = (
    (
        "alpha",
        "The switch. 1: the model as it was; 0: the ortho stream is off, and the model must behave as if never "
        "trained on the records.",
    ),
    (
        "Interval",
        "The two small figures under a number. Intervals made in this way hold the true value in 95 of 100 audits "
        "with other records of the kind.",
    ),
    (
        "Controls",
        "Models that show what a number is worth: the original, one merely quantised, one with random and one with "
        "the largest columns moved.",
    ),
    ("Reference", "A model that never saw the records. It is the target: not the lowest number, but its number."),
    ("Goldilocks interval", "The settings of alpha at which the memory is gone and the model still works."),
    (
        "Relearning",
        "Training alpha = 0 again for some steps. If the secret returns faster than in the reference, it was "
        "hidden, not gone.",
    ),
    ("Recovery", "(after the attack \u2212 before) / (alpha = 1 \u2212 before): 0, nothing came back; 1, all of it."),
    (
        "Unlearning depth (UDS)",
        "Hidden states of alpha = 0 are patched into alpha = 1, layer by layer. 0: the knowledge is intact inside; "
        "1: erased to the reference\u2019s level.",
    ),
    ("Logit lens", "Log-probability of the secret read off after each layer: where in the model it becomes known."),
    ("Withheld", "The audit did not have what it needs to judge, and therefore does not."),
)


def render(report: _Json) -> str:
    """The report as a complete HTML page.

    Args:
        report: What ``AuditReport.to_dict()`` returns. Numbers that are not finite are shown and embedded as missing.

    Returns:
        Text of a page, to be written as UTF-8; the same for the same report.

    Raises:
        DataError: if this is not a report of the known schema.
    """
    if not isinstance(report, Mapping) or report.get("schema") != SCHEMA:
        given = report.get("schema") if isinstance(report, Mapping) else type(report).__name__
        raise DataError(
            f"the report's schema is {given!r}; expected {SCHEMA!r}; render what AuditReport.to_dict() returns"
        )
    report = _finite(report)
    template, css = _sources()
    page = template.render(
        report=report,
        css=css,
        data=embedded_json(report),
        **_view(report),
    )
    page = _UNSEEN.sub(lambda m: f"U+{ord(m[0]):04X}", page)  # what stood in attributes and charts
    return page.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )  # a lone surrogate cannot be written as UTF-8


@cache
def _sources() -> tuple[Template, Markup]:
    """The page's template and style sheet, our own files beside this one."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number, "visible": visible, "prose": prose, "cell": cell, "rowlabel": row_label, "target": target
    }  # fmt: skip
    here = resources.files("libortho.auditing.page")
    template = environment.from_string(here.joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template, Markup(here.joinpath("report.css").read_text(encoding="utf-8"))


# Text and numbers


def number(value: Any, digits: int = 3, signed: bool = False, tiny: bool = True) -> str:
    """A number as people read it: ``digits`` decimals, thousands apart, a true minus sign; an en dash for none.

    Whole numbers (``int``) stay whole. What is very large, or with ``tiny`` would round to zero, looks like 3.2e-5.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        text = f"{value:+,}" if signed else f"{value:,}"
    elif value != 0 and ((tiny and abs(value) < 0.5 * 10.0**-digits) or abs(value) >= 1e6):
        mantissa, exponent = f"{value:+.1e}".split("e") if signed else f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        value = round(value, digits) + 0.0  # no minus before a zero
        text = f"{value:+,.{digits}f}" if signed and value != 0 else f"{value:,.{digits}f}"
    return text.replace("-", "\u2212")


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def visible(text: Any) -> Markup:
    """Escaped text; masked characters are marked, invisible or direction-changing ones written as code points."""
    safe = str(escape(str(text)))
    safe = _UNSEEN.sub(lambda m: f'<span class="unseen">U+{ord(m[0]):04X}</span>', safe)
    return Markup(re.sub("\u2022+", lambda m: f'<span class="mask">{m[0]}</span>', safe))


def prose(text: Any) -> Markup:
    """Like ``visible``, for sentences: `code` set as code, proper signs, and no "Withheld:", which the page says."""
    signs = str(text).removeprefix("Withheld: ").replace("<=", "\u2264").replace(">=", "\u2265")
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(visible(signs))))


def cell(value: Any, metric: Metric) -> Markup:
    """A table cell from an Estimate or a number: the number, its interval, and for a share a thin bar."""
    estimate = value if isinstance(value, Mapping) else {"value": value, "low": None, "high": None}
    shown = number(estimate["value"], metric.digits, metric.signed)
    if estimate["value"] is None:
        return Markup(f'<span class="none">{shown}</span>')
    low, high = estimate.get("low"), estimate.get("high")
    size = f' title="n = {number(estimate["n"])}"' if estimate.get("n") is not None else ""
    parts = [f'<span class="value"{size}>{shown}</span>']
    if low is not None and high is not None:
        wide = metric.digits > 1 and high - low >= 5 * 10.0 ** (1 - metric.digits)
        digits = metric.digits - wide  # the last decimal of a wide interval says nothing
        ends = f"{number(low, digits, metric.signed, False)} to {number(high, digits, metric.signed, False)}"
        parts.append(f'<span class="interval">{ends}</span>')
    if metric.share:
        v, a, b = (
            max(0.0, min(1.0, float(x))) * 100
            for x in (estimate["value"], *((low, high) if low is not None and high is not None else (0.0, 0.0)))
        )
        parts.append(
            f'<span class="rail" aria-hidden="true"><i style="width:{v:.1f}%"></i><b '
            f'style="left:{a:.1f}%;width:{b - a:.1f}%"></b></span>'
        )
    return Markup("".join(parts))


def target(text: Any) -> Markup:
    """A check's target such as ``<= 0.05`` with proper signs, which stay with their number."""
    signs = re.sub(r"(<=|>=|<|>) ", lambda m: {"<=": "\u2264", ">=": "\u2265"}.get(m[1], m[1]) + "\u00a0", str(text))
    return visible(re.sub(r"-(?=[0-9.])", "\u2212", signs))


def row_label(row: _Json, kind: str) -> tuple[str, _Json]:
    """A row of disturbed weights with its name: the format, the share, or where and how large the noise is."""
    if kind == "share":
        return _percent(row["share"]), row
    return (f"{row['where']}, {row['scale']:g}", row) if kind == "noise" else (row[kind], row)


_JSON_UNSAFE = re.compile("[<>&\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def embedded_json(value: Any) -> Markup:
    """JSON that no HTML parser can leave: ``<``, ``>``, ``&`` and unseen characters as ``\\uXXXX``."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    text = re.sub(
        r'\[[^\[\]{}"]*\]', lambda m: re.sub(r"\n *", " ", m[0]), text
    )  # lists of numbers on one line; no string holds a newline
    return Markup(_JSON_UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}", text))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What the template is given


def _view(report: _Json) -> dict[str, Any]:
    subjects = [{**s, "style": _style(s)} for s in sorted(report["subjects"], key=lambda s: s["role"] != "audited")]
    by_key = {s["key"]: s for s in subjects}
    drawn = _drawn(subjects)
    attacks, depth = report["attacks"], report["depth"]
    return {
        "audited": subjects[0],
        "unseen": [s for s in subjects if s.get("unseen")],
        "unseen_metrics": [m for m in MEMORY if any((s.get("unseen") or {}).get(m.key) for s in subjects)],
        "noise_note": NOISE,
        "title": report["model"]["name"] or "unnamed model",
        "headline": _headline(report["verdicts"]),
        "verdicts": [
            {
                **v,
                "question": QUESTIONS.get(v["key"], v["key"].replace("_", " ").capitalize()),
                "checks": sorted(v["checks"], key=lambda c: (c["ok"] is not False, c["ok"] is not None)),
            }
            for v in report["verdicts"]
        ],
        "subjects": subjects,
        "by_key": by_key,
        "gains": _names((s["utility"] or {}).get("task_differences") or {} for s in subjects),
        "change": Metric("", "", "", "", 3, False, True),
        "main": _main(subjects),
        "memory": [m for m in MEMORY if any(s["memory"].get(m.key) is not None for s in subjects)],
        "utility": [m for m in UTILITY if any((s["utility"] or {}).get(m.key) is not None for s in subjects)],
        "tasks": _names(s["utility"]["tasks"] for s in subjects if s["utility"]),
        "tofu": _names(s["utility"]["tofu"] for s in subjects if s["utility"] and s["utility"].get("tofu")),
        "attack_names": _attack_names(subjects),
        "any_privacy": any(s["privacy"] for s in subjects),
        "any_utility": any(s["utility"] for s in subjects),
        "curves": _alpha_figures(report, by_key),
        "rocs": _roc_figures(drawn),
        "forest": _forest_figures(drawn),
        "exposure": _exposure_figures(drawn),
        "prefixes": _prefix_figures(drawn),
        "prefix_shares": _names([p["given"] for p in s["prefixes"]] for s in subjects),
        "variants": _names([v["name"] for v in s["variants"]] for s in subjects),
        "variant_figures": _variant_figures(drawn),
        "relearning": _relearning_figures(attacks["relearning"], by_key)
        if attacks and attacks.get("relearning")
        else [],
        "depths": _depth_figures(depth, subjects) if depth else [],
        "layers": _layer_figures(report["layer_map"]),
        "per_record": _per_record(report["records"], drawn),
        "shown_records": SHOWN_RECORDS,
        "shown_checks": SHOWN_CHECKS,
        "drawn": drawn,
        "why": {v["key"]: v["text"] for v in report["verdicts"] if v["status"] == "withheld"},
        "metrics": {m.key: m for m in (*MEMORY, *PRIVACY, *UTILITY)},
        "attacks_explained": ATTACKS,
        "terms": OTHER_TERMS,
        "share": Metric("", "", "", ""),
    }


def _style(subject: _Json) -> str:
    known = subject["key"] in _STYLES
    return subject["key"] if known else "off" if subject["role"] == "audited" else "original"


def _drawn(subjects: Sequence[_Json]) -> list[_Json]:
    """Who appears in charts: the audited model, the one with its memory, and the reference."""
    by_key = {s["key"]: s for s in subjects}
    memory = next((by_key[k] for k in ("on", "original") if k in by_key), None)
    chosen = [subjects[0], memory, by_key.get("reference")]
    return list({s["key"]: s for s in chosen if s is not None}.values())


def _headline(verdicts: Sequence[_Json]) -> dict[str, Any]:
    count = {s: sum(v["status"] == s for v in verdicts) for s in ("pass", "fail", "withheld")}
    if not verdicts:
        status, text = "withheld", "This audit gave no verdict."
    elif count["fail"]:
        failed = [
            SUBJECTS_OF_VERDICTS.get(v["key"], v["key"].replace("_", " ")) for v in verdicts if v["status"] == "fail"
        ]
        which = " and ".join(filter(None, [", ".join(failed[:-1]), failed[-1]]))
        status, text = "fail", f"This model did not pass its audit. What failed: {which}."
    elif not count["pass"]:
        status, text = "withheld", "Nothing could be judged."
    elif count["withheld"]:
        status, text = "withheld", "Nothing that could be judged failed, but not everything could be judged."
    else:
        status, text = "pass", "This model passed its audit."
    return {"status": status, "text": text, "count": count}


def _main(subjects: Sequence[_Json]) -> dict[str, Any]:
    memory = [m for m in MEMORY if m.key in MAIN_MEMORY and any(s["memory"].get(m.key) is not None for s in subjects)]
    groups: list[dict[str, Any]] = [{"name": "Memory of the forget set", "columns": memory}]
    attack = next((a for a in _attack_names(subjects)), None)
    if attack:
        label = ATTACKS.get(attack, (attack, ""))[0]
        groups.append(
            {"name": f"Privacy ({label} attack)", "columns": [m for m in PRIVACY if m.key in ("auc", "difference")]}
        )
    if any(s["utility"] for s in subjects):
        groups.append({"name": "Utility", "columns": [m for m in UTILITY if m.key in MAIN_UTILITY]})

    def value(subject: _Json, metric: Metric) -> Any:
        if metric in MEMORY:
            return subject["memory"].get(metric.key)
        if metric in PRIVACY:
            return subject["privacy"]["attacks"].get(attack, {}).get(metric.key) if subject["privacy"] else None
        return subject["utility"].get(metric.key) if subject["utility"] else None

    columns = [m for g in groups for m in g["columns"]]
    return {
        "groups": groups,
        "rows": [{"subject": s, "cells": [cell(value(s, m), m) for m in columns]} for s in subjects],
    }


def _attack_names(subjects: Sequence[_Json]) -> list[str]:
    found = _names(s["privacy"]["attacks"] for s in subjects if s["privacy"])
    return [a for a in ATTACKS if a in found] + [a for a in found if a not in ATTACKS]


def _names(rows: Iterable[Iterable[Any]]) -> list[Any]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _per_record(records: Sequence[_Json], drawn: Sequence[_Json]) -> list[dict[str, Any]]:
    names = ("nll", "greedy", "exposure")
    return [
        {"record": r, "values": [{n: _at(s["per_record"].get(n), i) for n in names} for s in drawn]}
        for i, r in enumerate(records[:SHOWN_RECORDS])
    ]


def _at(values: Sequence[Any] | None, i: int) -> Any:
    return values[i] if values is not None and i < len(values) else None


# Figures


def _figure(caption: str, note: str, svg: str) -> Figure:
    return Figure(caption, note, Markup(svg))


def _percent(value: float) -> str:
    return f"{value * 100:.3g} %"


def _alpha_figures(report: _Json, by_key: _Json) -> list[Figure]:
    curve = sorted(report["curve"], key=lambda row: row["alpha"])
    reference = by_key.get("reference")
    intervals = (report["goldilocks"] or {}).get("intervals", [])
    figures = []
    measures = (
        ("greedy_extraction", "Greedy extraction", "share of records"),
        ("extraction_strength", "Extraction strength", "share of tokens"),
        ("nll", "NLL of the forget set", "nats per token"),
        ("auc", "MIA AUC", "0.5 is a coin toss"),
        ("perplexity", "Perplexity", "general text"),
        ("kl", "KL from the original", "nats per token"),
    )
    for key, caption, note in measures:
        points = [(row["alpha"], row.get(key)) for row in curve]
        values = [v for _, v in points if v is not None]
        if not values:
            continue
        levels = [
            Level(v, reference["label"]) for v in [_reference_value(reference, key)] if v is not None and reference
        ]
        if key in ("greedy_extraction", "extraction_strength", "auc"):
            y_range: tuple[float, float] | None = (0.0, 1.0)
        else:
            everything = [*values, *(level.value for level in levels)]
            low, high = min(everything), max(everything)
            # a wobble of half a per cent must not look like a cliff
            margin = max(0.0, 0.2 * high - (high - low)) / 2 if key == "perplexity" else 0.0
            ticks = charts.nice_ticks(low - margin if key == "perplexity" else 0.0, max(high + margin, 1e-9), 5)
            y_range = ticks[0], ticks[-1]
        bands = [Band(a, b, "Goldilocks" if i == 0 else "") for i, (a, b) in enumerate(intervals)]
        svg = charts.lines(
            f"alpha-{key}",
            f"{caption} over alpha",
            f"{caption} ({note}) from alpha {number(points[0][0], 2)}: {number(values[0])} to alpha "
            f"{number(points[-1][0], 2)}: "
            f"{number(values[-1])}." + (f" {levels[0].label}: {number(levels[0].value)}." if levels else ""),
            [Line(caption, points, "off")],
            x_label="alpha",
            y_range=y_range,
            bands=bands,
            levels=levels,
        )
        figures.append(_figure(caption, note, svg))
    return figures


def _reference_value(reference: _Json | None, key: str) -> float | None:
    if reference is None or key == "kl":
        return None
    if key == "auc":
        attacks = reference["privacy"]["attacks"] if reference["privacy"] else {}
        return attacks["loss"]["auc"]["value"] if "loss" in attacks else None
    source = reference["utility"] if key == "perplexity" else reference["memory"]
    return source[key]["value"] if source and source.get(key) else None


def _present(drawn: Sequence[_Json], part: str) -> list[_Json]:
    return [s for s in drawn if s[part]]


def _roc_figures(drawn: Sequence[_Json]) -> list[Figure]:
    subjects = _present(drawn, "privacy")
    figures = []
    for attack in _attack_names(subjects):
        series = [
            Line(s["label"], [(a, b) for a, b in s["privacy"]["attacks"][attack]["roc"]], s["style"], stepped=True)
            for s in subjects
            if s["privacy"]["attacks"].get(attack, {}).get("roc")
        ]
        positive = [v for line in series for point in line.points for v in point if v]
        if not positive:
            continue
        floor = 10.0 ** max(min(math.floor(math.log10(min(positive)) + 1e-9), -2), -4)
        label = ATTACKS.get(attack, (attack, ""))[0]
        text = "; ".join(
            f"{s['label']}: AUC {number(s['privacy']['attacks'][attack]['auc']['value'])}"
            for s in subjects
            if attack in s["privacy"]["attacks"]
        )
        svg = charts.lines(
            f"roc-{attack}",
            f"ROC of the {label} attack",
            f"True against false positive rate, both axes logarithmic; the dotted diagonal is chance. {text}.",
            series,
            x_label="false positive rate (log)",
            x_range=(floor, 1.0),
            y_range=(floor, 1.0),
            log=True,
            diagonal=True,
            legend=True,
            format_x=_percent,
            format_y=_percent,
        )
        figures.append(_figure(f"{label} attack", "true positive rate (log)", svg))
    return figures


def _forest_figures(drawn: Sequence[_Json]) -> list[Figure]:
    subjects = _present(drawn, "privacy")
    rows = []
    for attack in _attack_names(subjects):
        marks = []
        for s in subjects:
            auc = s["privacy"]["attacks"].get(attack, {}).get("auc")
            if auc and auc["value"] is not None:
                marks.append(Dot(s["style"], s["label"], auc["value"], auc["low"], auc["high"]))
        rows.append(Row(ATTACKS.get(attack, (attack, ""))[0], marks))
    if not any(row.dots for row in rows):
        return []
    text = "; ".join(f"{row.label}: " + ", ".join(f"{d.label} {number(d.value)}" for d in row.dots) for row in rows)
    svg = charts.dots(
        "auc",
        "AUC of every attack",
        f"With 95 % intervals. {text}.",
        rows,
        x_label="AUC (dotted: a coin toss)",
        x_range=(0.0, 1.0),
        level=0.5,
    )
    return [_figure("AUC of every attack", "with 95 % intervals", svg)]


def _exposure_figures(drawn: Sequence[_Json]) -> list[Figure]:
    rows = []
    for s in sorted(drawn, key=lambda s: s["key"] in ("on", "original")):
        values = [v for v in s["per_record"].get("exposure") or [] if v is not None]
        if values:
            rows.append(Row(s["label"], values=values, style=s["style"]))
    if not rows:
        return []
    svg = charts.histograms(
        "exposure",
        "Exposure of the records",
        "Number of records by exposure in bits, one histogram a model. "
        + "; ".join(f"{r.label}: {number(min(r.values), 1)} to {number(max(r.values), 1)} bits" for r in rows)
        + ".",
        rows,
        x_label="exposure (bits)",
        bins=18,
        unit=" bits",
    )
    return [_figure("Exposure", "number of records", svg)]


def _prefix_figures(drawn: Sequence[_Json]) -> list[Figure]:
    subjects = _present(drawn, "prefixes")
    if not subjects:
        return []
    series = [Line(s["label"], [(p["given"], p["extraction"]) for p in s["prefixes"]], s["style"]) for s in subjects]
    text = "; ".join(
        f"{line.label}: " + ", ".join(f"{_percent(x)} given {number(y, 2)}" for x, y in line.points) for line in series
    )
    svg = charts.lines(
        "prefixes",
        "Extraction when part of the secret is given",
        f"{text}.",
        series,
        x_label="share of the secret already given",
        x_range=(0.0, max(p["given"] for s in subjects for p in s["prefixes"]) or 1.0),
        y_range=(0.0, 1.0),
        format_x=_percent,
    )
    return [_figure("With part of the secret given", "share of records whose remainder is extracted", svg)]


def _variant_figures(drawn: Sequence[_Json]) -> list[Figure]:
    subjects = _present(drawn, "variants")
    rows = [
        Row(
            name,
            [
                Dot(s["style"], s["label"], v["extraction"])
                for s in subjects
                for v in s["variants"]
                if v["name"] == name and v["extraction"] is not None
            ],
        )
        for name in _names([v["name"] for v in s["variants"]] for s in subjects)
    ]
    if not any(row.dots for row in rows):
        return []
    text = "; ".join(f"{row.label}: " + ", ".join(f"{d.label} {number(d.value, 2)}" for d in row.dots) for row in rows)
    svg = charts.dots(
        "variants",
        "Extraction under rewritten prompts",
        f"{text}.",
        rows,
        x_label="share of records extracted",
        x_range=(0.0, 1.0),
    )
    return [_figure("With the prompt rewritten", "share of records extracted", svg)]


def _relearning_figures(relearning: _Json, by_key: _Json) -> list[Figure]:
    figures = []
    for i, data in enumerate(dict.fromkeys(c["data"] for c in relearning["curves"])):
        curves = [c for c in relearning["curves"] if c["data"] == data]
        for key, caption, y_range in (("extraction", "Extraction", (0.0, 1.0)), ("nll", "NLL", None)):
            series = [
                Line(
                    by_key[c["subject"]]["label"] if c["subject"] in by_key else c["subject"],
                    list(zip(relearning["steps"], c[key], strict=False)),
                    by_key[c["subject"]]["style"] if c["subject"] in by_key else "original",
                )
                for c in curves
                if c.get(key) and any(v is not None for v in c[key])
            ]
            if not series:
                continue
            if key == "nll":
                top = max(v for line in series for _, v in line.points if v is not None)
                y_range = 0.0, charts.nice_ticks(0.0, max(top, 1e-9), 5)[-1]
            text = "; ".join(
                f"{line.label}: {number(line.points[0][1], 2)} to {number(line.points[-1][1], 2)}" for line in series
            )
            svg = charts.lines(
                f"relearning-{i}-{key}",
                f"{caption} while training again on {data}",
                f"Over {relearning['steps'][-1] if relearning['steps'] else 0} steps. {text}.",
                series,
                x_label="training steps",
                whole=True,
                y_range=y_range,
            )
            note = "share of records" if key == "extraction" else "nats per token"
            figures.append(_figure(f"{caption}, trained on {data}", note, svg))
    return figures


def _depth_figures(depth: _Json, subjects: Sequence[_Json]) -> list[Figure]:
    figures = []
    layers = depth.get("layers") or []
    if layers:
        audited = subjects[0]
        series = [
            Line("never trained", [(row["layer"], row["full"]) for row in layers], "reference"),
            Line(audited["label"], [(row["layer"], row["off"]) for row in layers], audited["style"]),
        ]
        best = max(layers, key=lambda row: row["full"] if row["full"] is not None else -math.inf)
        svg = charts.lines(
            "depth-layers",
            "Effect of patching hidden states, by layer",
            f"Fall of the secret's log-probability. At layer {best['layer']}: {number(best['full'])} with the "
            f"reference's states, {number(best['off'])} with those of {audited['label']}.",
            series,
            x_label="layer",
            whole=True,
        )
        figures.append(
            _figure(
                "Hidden states patched into the model with its memory",
                "fall of the secret\u2019s log-probability, nats; equal curves: equally erased",
                svg,
            )
        )
    lens = depth.get("logit_lens") or {}
    series = [
        Line(s["label"], list(enumerate(lens[s["key"]])), s["style"]) for s in _drawn(subjects) if lens.get(s["key"])
    ]
    if series:
        text = "; ".join(f"{line.label} ends at {number(line.points[-1][1], 2)}" for line in series)
        svg = charts.lines(
            "depth-lens",
            "Logit lens",
            f"Mean log-probability of the secret read off after each layer; {text}.",
            series,
            x_label="layer",
            whole=True,
        )
        figures.append(_figure("Logit lens", "mean log-probability of the secret, nats", svg))
    return figures


def _layer_figures(layer_map: Sequence[_Json]) -> list[Figure]:
    if not layer_map:
        return []
    numbers = [re.search(r"\.(\d+)\.", row["name"]) for row in layer_map]
    places = [int(n[1]) if n else row["index"] for n, row in zip(numbers, layer_map, strict=True)]
    count = max(places) + 1
    columns, share = [0.0] * count, [0.0] * count
    for place, row in zip(places, layer_map, strict=True):
        columns[place] += row["columns"]
        share[place] += row["share"]
    figures = []
    for key, caption, note, values, unit in (
        (
            "share",
            "Share of the norm",
            "per cent of the ortho stream\u2019s squared norm",
            [100 * v for v in share],
            " %",
        ),
        ("columns", "Columns moved", "number, all modules of the layer", columns, " columns"),
    ):
        best = max(range(count), key=lambda i: values[i])
        svg = charts.bars(
            f"layers-{key}",
            f"{caption}, by layer",
            f"Highest in layer {best}: {number(values[best], 1)}{unit}.",
            values,
            x_label="layer",
            unit=unit,
        )
        figures.append(_figure(caption, note, svg))
    return figures
