"""The audit report as one HTML page: verdicts first, every number with its interval and its controls beside it.

``render`` takes the report's dict and returns text; it reads no clock, no network and no model, so the same report
gives the same bytes. The page needs nothing but itself: style inline, charts inline SVG (``charts``), no script that
runs. Every string in a report may come from a model or from training data and is treated as hostile: autoescaped,
invisible and direction-changing characters made visible, and a content security policy in the page forbids scripts and
requests even if all of that failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal, cast

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from libortho.auditing.attacks import ATTACKS
from libortho.auditing.page.exhibits import Drawn, merged
from libortho.auditing.page.figures import (
    alpha_figures,
    attack_names,
    depth_figures,
    drawn_subjects,
    exposure_figures,
    forest_figures,
    layer_figures,
    names,
    prefix_figures,
    roc_figures,
    variant_figures,
)
from libortho.auditing.page.glossary import (
    MEMBERSHIP,
    MEMORY,
    METRICS,
    PRIVACY,
    QUESTIONS,
    SHARE,
    TERMS,
    UTILITY,
    Metric,
    attack_label,
)
from libortho.auditing.page.marks import DASH
from libortho.auditing.page.text import UNSEEN, cell, embedded_json, number, prose, target, visible
from libortho.auditing.report import json_ready
from libortho.auditing.schema import OFF, ORIGINAL, SCHEMA, RecordData, ReportData, SubjectData, VerdictData
from libortho.core.errors import DataError

SHOWN_RECORDS = 100


SHOWN_CHECKS = 5


MAIN_MEMORY = (
    "greedy_extraction",
    "sampled_extraction",
    "extraction_strength",
    "exact_memorization",
    "nll",
    "exposure",
)


MAIN_UTILITY = ("perplexity", "kl", "top1_agreement")


def render(report: Mapping[str, Any]) -> str:
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
    data = cast(ReportData, json_ready(report))
    template, css = _sources()
    page = template.render(report=data, css=css, data=embedded_json(data), **_view(data))
    page = UNSEEN.sub(lambda m: f"U+{ord(m[0]):04X}", page)  # what stood in attributes and charts
    # a lone surrogate cannot be written as UTF-8
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cache
def _sources() -> tuple[Template, Markup]:
    """The page's template and style sheet, our own files beside this one."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number, "visible": visible, "prose": prose, "cell": cell, "target": target
    }  # fmt: skip
    here = resources.files("libortho.auditing.page")
    template = environment.from_string(here.joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template, Markup(here.joinpath("report.css").read_text(encoding="utf-8"))


def _view(report: ReportData) -> dict[str, Any]:
    ordered = sorted(report["subjects"], key=lambda s: s["role"] != "audited")
    subjects: list[Drawn] = [{**s, "style": _style(s)} for s in ordered]
    by_key = {s["key"]: s for s in subjects}
    drawn = drawn_subjects(subjects)
    utilities = [s["utility"] for s in subjects if s["utility"] is not None]
    unseen = [s["unseen"] for s in subjects if s["unseen"] is not None]
    attacks, depth = report["attacks"] or {}, report["depth"]
    return {
        "audited": subjects[0],
        "unseen": [s for s in subjects if s["unseen"]],
        "unseen_metrics": [m for m in MEMORY if any(u.get(m.key) for u in unseen)],
        "title": report["model"]["name"] or "unnamed model",
        "headline": _headline(report["verdicts"]),
        "verdicts": [
            {
                **v,
                "question": _question(v["key"])[0],
                "checks": sorted(v["checks"], key=lambda c: (c["ok"] is not False, c["ok"] is not None)),
            }
            for v in report["verdicts"]
        ],
        "subjects": subjects,
        "by_key": by_key,
        "gains": names(u["task_differences"] or {} for u in utilities),
        "change": Metric(share=False, signed=True),
        "main": _main(subjects),
        "memory": [m for m in MEMORY if any(s["memory"].get(m.key) is not None for s in subjects)],
        "utility": [m for m in UTILITY if any(u.get(m.key) is not None for u in utilities)],
        "tasks": names(u["tasks"] for u in utilities),
        "tofu": names(u["tofu"] or {} for u in utilities),
        "attack_names": attack_names(subjects),
        "any_privacy": any(s["privacy"] for s in subjects),
        "any_utility": bool(utilities),
        "curves": alpha_figures(report, by_key),
        "rocs": roc_figures(drawn),
        "forest": forest_figures(drawn),
        "exposure": exposure_figures(drawn),
        "prefixes": prefix_figures(drawn),
        "prefix_shares": names([p["given"] for p in s["prefixes"]] for s in subjects),
        "variants": names([v["name"] for v in s["variants"]] for s in subjects),
        "variant_figures": variant_figures(drawn),
        "attacks": merged(a.exhibit(attacks[a.name], subjects) for a in ATTACKS if attacks.get(a.name)),
        "depths": depth_figures(depth, subjects) if depth else [],
        "layers": layer_figures(report["layer_map"]),
        "per_record": _per_record(report["records"], drawn),
        "shown_records": SHOWN_RECORDS,
        "shown_checks": SHOWN_CHECKS,
        "drawn": drawn,
        "why": {v["key"]: v["text"] for v in report["verdicts"] if v["status"] == "withheld"},
        "metrics": METRICS,
        "membership": MEMBERSHIP,
        "terms": TERMS.items(),
        "share": SHARE,
    }


def _style(subject: SubjectData) -> str:
    known = subject["key"] in DASH
    return subject["key"] if known else OFF if subject["role"] == "audited" else ORIGINAL


def _question(verdict: str) -> tuple[str, str]:
    plain = verdict.replace("_", " ")
    return QUESTIONS.get(verdict, (plain.capitalize(), plain))


def _headline(verdicts: Sequence[VerdictData]) -> dict[str, Any]:
    count = {s: sum(v["status"] == s for v in verdicts) for s in ("pass", "fail", "withheld")}
    if not verdicts:
        status, text = "withheld", "This audit gave no verdict."
    elif count["fail"]:
        failed = [_question(v["key"])[1] for v in verdicts if v["status"] == "fail"]
        which = " and ".join(filter(None, [", ".join(failed[:-1]), failed[-1]]))
        status, text = "fail", f"This model did not pass its audit. What failed: {which}."
    elif not count["pass"]:
        status, text = "withheld", "Nothing could be judged."
    elif count["withheld"]:
        status, text = "withheld", "Nothing that could be judged failed, but not everything could be judged."
    else:
        status, text = "pass", "This model passed its audit."
    return {"status": status, "text": text, "count": count}


def _main(subjects: Sequence[Drawn]) -> dict[str, Any]:
    memory = [m for m in MEMORY if m.key in MAIN_MEMORY and any(s["memory"].get(m.key) is not None for s in subjects)]
    groups: list[dict[str, Any]] = [{"name": "Memory of the forget set", "columns": memory}]
    attack = next((a for a in attack_names(subjects)), None)
    if attack:
        groups.append(
            {
                "name": f"Privacy ({attack_label(attack)} attack)",
                "columns": [m for m in PRIVACY if m.key in ("auc", "difference")],
            }
        )
    if any(s["utility"] for s in subjects):
        groups.append({"name": "Utility", "columns": [m for m in UTILITY if m.key in MAIN_UTILITY]})

    def value(subject: Drawn, metric: Metric) -> Any:
        if metric in MEMORY:
            return subject["memory"].get(metric.key)
        figures: Mapping[str, Any] = subject["utility"] or {}
        if metric in PRIVACY:
            figures = subject["privacy"]["attacks"].get(attack or "") or {} if subject["privacy"] else {}
        return figures.get(metric.key)

    columns = [m for g in groups for m in g["columns"]]
    return {
        "groups": groups,
        "rows": [{"subject": s, "cells": [cell(value(s, m), m) for m in columns]} for s in subjects],
    }


def _per_record(records: Sequence[RecordData], drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    names: tuple[Literal["nll", "greedy", "exposure"], ...] = ("nll", "greedy", "exposure")
    return [
        {"record": r, "values": [{n: _at(s["per_record"][n], i) for n in names} for s in drawn]}
        for i, r in enumerate(records[:SHOWN_RECORDS])
    ]


def _at(values: Sequence[Any] | None, i: int) -> Any:
    return values[i] if values is not None and i < len(values) else None
