"""A server under load: right answers, throughput, what the gateway costs, and what time tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .tables import UNMEASURED, Row, judged, made_by, page, read, table

MIXED, GENERATE, GATEWAY, TOLD, GROWTH = 0.95, 0.9, 0.005, 0.55, 0.02
"""Limits: throughput over that at one alpha, and over model.generate; seconds; AUC; growth of memory."""


def server(results: Path) -> str:
    rows = read(results, "serve").get("rows", [])
    parts = [part([r for r in rows if r["part"] == name]) for name, part in PARTS.items()]
    about = "`libortho serve` over SmolLM2 in fp32 with two streams. Clients speak HTTP. Limits are marked."
    return page("The server", about, *(p for found in parts for p in found))


def load(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## Load", UNMEASURED]
    [r] = rows
    wrong = sum(r.get(n, 0) for n in ("wrong answers", "wrong rights", "secrets"))
    failed = sum(v for n, v in r.items() if n.startswith("status 5"))
    growth = r["memory_growth"]
    cells = [
        ["requests, clients", f"{r['requests']}, {r['clients']}"],
        ["wrong answers, rights, secrets", judged(str(wrong), wrong == 0)],
        ["5xx", judged(str(failed), failed == 0)],
        ["given up by clients", str(r.get("cancelled", 0))],
        ["seconds", f"{r['seconds']:.0f}"],
        ["growth of memory after 1,000", UNMEASURED if growth is None else judged(f"{growth:+.1%}", growth <= GROWTH)],
    ]
    return ["## Load", made_by("serve", rows, lambda r: r["method"]), table(["what", "found"], cells)]


def throughput(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## Throughput", UNMEASURED]
    [r] = rows
    seconds = r["seconds"]

    def over(name: str) -> float:
        """The middle of the rounds' ratios of throughput."""
        ratios = sorted(b / a for a, b in zip(seconds["mixed"], seconds[name], strict=True))
        return ratios[len(ratios) // 2]

    cells = [
        ["one alpha", judged(f"{over('one alpha'):.2f}, limit {MIXED:g}", over("one alpha") >= MIXED)],
        ["batched model.generate", judged(f"{over('model.generate'):.2f}, limit {GENERATE:g}",
                                          over("model.generate") >= GENERATE)],
    ]  # fmt: skip
    told = f"{r['answers']} answers of up to {r['tokens']} tokens, {r['batch']} at a time; the middle of the rounds."
    return [
        "## Throughput",
        made_by("serve", rows, lambda r: r["method"]),
        table(["mixed alphas over", "throughput"], cells),
        told,
    ]


def gateway(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## What the gateway costs", UNMEASURED]
    [r] = rows
    median = judged(f"{1000 * r['median']:.1f}, limit {1000 * GATEWAY:g}", r["median"] <= GATEWAY)
    return [
        "## What the gateway costs",
        made_by("serve", rows, lambda r: r["method"]),
        table(["milliseconds of a request, median", "95 % of them within"], [[median, f"{1000 * r['p95']:.1f}"]]),
    ]


def timing(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## What time tells", UNMEASURED]
    cells = []
    for r in rows:
        auc = f"{r['auc'][0]:.2f} [{r['auc'][1]:.2f}, {r['auc'][2]:.2f}]"
        off, on = (f"{1000 * m:.1f}" for m in r["medians"])
        cells.append([r["method"], judged(auc, r["auc"][0] <= TOLD) if r["method"] == "constant" else auc, off, on])
    heads = ["timing", "AUC of alpha 1 against 0", "milliseconds at alpha 0", "at alpha 1"]
    return ["## What time tells", made_by("serve", list(rows), lambda r: r["method"]), table(heads, cells)]


PARTS = {"load": load, "throughput": throughput, "gateway": gateway, "timing": timing}
