"""The figures of the report's page: which numbers of a report go into which chart, and what is written beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from markupsafe import Markup

from libortho.auditing.page import charts
from libortho.auditing.page.exhibits import Drawn, Figure
from libortho.auditing.page.glossary import MEMBERSHIP, attack_label
from libortho.auditing.page.marks import Band, Dot, Level, Line, Row, nice_ticks
from libortho.auditing.page.text import number, percent
from libortho.auditing.schema import (
    BASELINES,
    REFERENCE,
    DepthData,
    LayerData,
    MembershipData,
    ReportData,
    baseline_key,
)

_CurveKey = Literal["greedy_extraction", "extraction_strength", "nll", "auc", "perplexity", "kl"]


def drawn_subjects(subjects: Sequence[Drawn]) -> list[Drawn]:
    """Who appears in charts: the audited model, the one with its memory, and the reference."""
    by_key = {s["key"]: s for s in subjects}
    keys = dict.fromkeys((subjects[0]["key"], baseline_key(by_key), REFERENCE))
    return [by_key[k] for k in keys if k in by_key]


def attack_names(subjects: Sequence[Drawn]) -> list[str]:
    """The membership attacks of these subjects, in the order of the glossary."""
    found = names(s["privacy"]["attacks"] for s in subjects if s["privacy"])
    return [a for a in MEMBERSHIP if a in found] + [a for a in found if a not in MEMBERSHIP]


def names(rows: Iterable[Iterable[Any]]) -> list[Any]:
    """The names in these rows, each once, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def figure(caption: str, note: str, svg: str) -> Figure:
    """A figure whose drawing is safe to embed."""
    return Figure(caption, note, Markup(svg))


def alpha_figures(report: ReportData, by_key: Mapping[str, Drawn]) -> list[Figure]:
    """The measures over alpha, with the never-trained model as a level."""
    curve = sorted(report["curve"], key=lambda row: row["alpha"])
    reference = by_key.get(REFERENCE)
    intervals = [] if report["goldilocks"] is None else report["goldilocks"]["intervals"]
    figures = []
    measures: tuple[tuple[_CurveKey, str, str], ...] = (
        ("greedy_extraction", "Greedy extraction", "share of records"),
        ("extraction_strength", "Extraction strength", "share of tokens"),
        ("nll", "NLL of the forget set", "nats per token"),
        ("auc", "MIA AUC", "0.5 is a coin toss"),
        ("perplexity", "Perplexity", "general text"),
        ("kl", "KL from the original", "nats per token"),
    )
    for key, caption, note in measures:
        points = [(row["alpha"], row[key]) for row in curve]
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
            ticks = nice_ticks(low - margin if key == "perplexity" else 0.0, max(high + margin, 1e-9), 5)
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
        figures.append(figure(caption, note, svg))
    return figures


def _reference_value(reference: Drawn | None, key: str) -> float | None:
    if reference is None or key == "kl":
        return None
    if key == "auc":
        loss = None if reference["privacy"] is None else reference["privacy"]["attacks"].get("loss")
        return None if loss is None else loss["auc"]["value"]
    if key == "perplexity":
        return None if reference["utility"] is None else reference["utility"]["perplexity"]["value"]
    figure = reference["memory"].get(key)
    return None if figure is None else figure["value"]


def _membership(subjects: Sequence[Drawn], attack: str) -> list[tuple[Drawn, MembershipData]]:
    """The subjects that were put to a membership attack, each with its figures."""
    found = ((s, s["privacy"]["attacks"].get(attack)) for s in subjects if s["privacy"] is not None)
    return [(s, figures) for s, figures in found if figures is not None]


def roc_figures(drawn: Sequence[Drawn]) -> list[Figure]:
    """The ROC curves of each membership attack, on logarithmic axes."""
    made = []
    for attack in attack_names(drawn):
        found = _membership(drawn, attack)
        series = [
            Line(s["label"], [(a, b) for a, b in m["roc"]], s["style"], stepped=True) for s, m in found if m["roc"]
        ]
        positive = [v for line in series for point in line.points for v in point if v]
        if not positive:
            continue
        floor = 10.0 ** max(min(math.floor(math.log10(min(positive)) + 1e-9), -2), -4)
        label = attack_label(attack)
        text = "; ".join(f"{s['label']}: AUC {number(m['auc']['value'])}" for s, m in found)
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
            format_x=percent,
            format_y=percent,
        )
        made.append(figure(f"{label} attack", "true positive rate (log)", svg))
    return made


def forest_figures(drawn: Sequence[Drawn]) -> list[Figure]:
    """The AUC of each membership attack with its interval, all in one chart."""
    rows = []
    for attack in attack_names(drawn):
        aucs = [(s, m["auc"]) for s, m in _membership(drawn, attack)]
        dots = [Dot(s["style"], s["label"], a["value"], a["low"], a["high"]) for s, a in aucs if a["value"] is not None]
        rows.append(Row(attack_label(attack), dots))
    if not any(row.dots for row in rows):
        return []
    svg = charts.dots(
        "auc",
        "AUC of every attack",
        f"With 95 % intervals. {_in_words(rows, 3)}",
        rows,
        x_label="AUC (dotted: a coin toss)",
        x_range=(0.0, 1.0),
        level=0.5,
    )
    return [figure("AUC of every attack", "with 95 % intervals", svg)]


def _in_words(rows: Sequence[Row], digits: int) -> str:
    """The dots of each row as a sentence."""
    told = (f"{r.label}: " + ", ".join(f"{d.label} {number(d.value, digits)}" for d in r.dots) for r in rows)
    return "; ".join(told) + "."


def exposure_figures(drawn: Sequence[Drawn]) -> list[Figure]:
    """Histograms of the records' exposure, one for each subject."""
    rows = []
    for s in sorted(drawn, key=lambda s: s["key"] in BASELINES):
        values = [v for v in s["per_record"]["exposure"] or [] if v is not None]
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
        unit=" bits",
    )
    return [figure("Exposure", "number of records", svg)]


def prefix_figures(drawn: Sequence[Drawn]) -> list[Figure]:
    """Extraction of the rest over the share of the secret that is given."""
    subjects = [s for s in drawn if s["prefixes"]]
    if not subjects:
        return []
    series = [Line(s["label"], [(p["given"], p["extraction"]) for p in s["prefixes"]], s["style"]) for s in subjects]
    text = "; ".join(
        f"{line.label}: " + ", ".join(f"{percent(x)} given {number(y, 2)}" for x, y in line.points) for line in series
    )
    svg = charts.lines(
        "prefixes",
        "Extraction when part of the secret is given",
        f"{text}.",
        series,
        x_label="share of the secret already given",
        x_range=(0.0, max(p["given"] for s in subjects for p in s["prefixes"]) or 1.0),
        y_range=(0.0, 1.0),
        format_x=percent,
    )
    return [figure("With part of the secret given", "share of records whose remainder is extracted", svg)]


def variant_figures(drawn: Sequence[Drawn]) -> list[Figure]:
    """Extraction under each rewritten prompt."""
    rows = [
        Row(
            name,
            [
                Dot(s["style"], s["label"], v["extraction"])
                for s in drawn
                for v in s["variants"]
                if v["name"] == name and v["extraction"] is not None
            ],
        )
        for name in names([v["name"] for v in s["variants"]] for s in drawn)
    ]
    if not any(row.dots for row in rows):
        return []
    svg = charts.dots(
        "variants",
        "Extraction under rewritten prompts",
        _in_words(rows, 2),
        rows,
        x_label="share of records extracted",
        x_range=(0.0, 1.0),
    )
    return [figure("With the prompt rewritten", "share of records extracted", svg)]


def depth_figures(depth: DepthData, subjects: Sequence[Drawn]) -> list[Figure]:
    """The fall of log p under patches by layer, and the logit lens of each drawn subject."""
    figures = []
    layers = depth["layers"]
    if layers:
        audited = subjects[0]
        series = [
            Line("never trained", [(row["layer"], row["full"]) for row in layers], REFERENCE),
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
            figure(
                "Hidden states patched into the model with its memory",
                "fall of the secret\u2019s log-probability, nats; equal curves: equally erased",
                svg,
            )
        )
    lens = depth["logit_lens"]
    series = [
        Line(s["label"], list(enumerate(lens[s["key"]])), s["style"])
        for s in drawn_subjects(subjects)
        if lens.get(s["key"])
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
        figures.append(figure("Logit lens", "mean log-probability of the secret, nats", svg))
    return figures


def layer_figures(layer_map: Sequence[LayerData]) -> list[Figure]:
    """The stream's share of the squared norm, and the columns in it, by decoder layer."""
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
        figures.append(figure(caption, note, svg))
    return figures
