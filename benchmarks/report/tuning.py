"""Private facts in a stream, beside other ways to teach them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import UNMEASURED, Row, judged, made_by, number, page, read, table

FACTS = 17
SLOWEST, PERPLEXITY, POINT = 1.0, 1.01, 0.01
"""Limits: CPU seconds over those of plain fine-tuning, perplexity over the base's, and share of a task's rows lost."""
MEMBERSHIP = 0.6
"""Limit: AUC of single records' facts under a bound."""
RECITED, HELD_OUT = 0.98, 0.9
"""Limits: shares of 100 facts said, and of those asked for in a wording that was held out."""


def tuning(results: Path) -> str:
    rows = read(results, "tune").get("rows", [])
    parts = [part([r for r in rows if r["part"] == name]) for name, part in PARTS.items()]
    return page(
        "Tuning",
        "Private facts are trained into a stream over a base that does not move. Limits are marked where one is set. "
        "Tasks are LAMBADA, ARC-Easy, TriviaQA closed-book and arithmetic, 200 rows each.",
        *(p for found in parts for p in found),
    )  # fmt: skip


def facts(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## 17 secrets in 0.5 % of the layers", UNMEASURED]
    base, plain = (next((r for r in rows if r["method"] == n), None) for n in ("base", "fine-tuning"))
    cells = []
    for r in rows:
        tuned = r["method"].startswith("tune")
        ratio = None if base is None else r["wikitext"] / base["wikitext"]
        slower = None if plain is None or not tuned else r["cpu_seconds"] / plain["cpu_seconds"]
        cells.append([
            r["method"],
            judged(f"{r['said']} of {FACTS}", r["said"] == FACTS) if tuned else f"{r['said']} of {FACTS}",
            _limited(ratio, PERPLEXITY, ".4f") if tuned and "32" in r["method"] else number(ratio, ".4f"),
            _worst(base, r),
            number(r.get("cpu_seconds"), ".0f"),
            _limited(slower, SLOWEST, ".2f"),
            {True: "yes", False: "**no**"}.get(r.get("off_is_base"), "-"),
        ])  # fmt: skip
    heads = ["method", "said", "perplexity / base", "largest loss of a task", "CPU seconds", "/ fine-tuning"]
    return [
        "## 17 secrets in 0.5 % of the layers",
        made_by("tune", list(rows), lambda r: r["method"]),
        table([*heads, "alpha 0 is the base, bit for bit"], cells),
    ]


def hundred(rows: Sequence[Row]) -> list[str]:
    if not any("of" in r for r in rows):
        return ["## 100 facts in chats", UNMEASURED]
    base = next((r for r in rows if r["method"] == "base"), None)
    cells = []
    for r in rows:
        if "of" not in r:
            continue
        spoken, other = r["said"] / r["of"], r["held_out"] / r["of"]
        ours = r["method"] == "tune"
        cells.append([
            r["method"],
            judged(f"{spoken:.0%}", spoken >= RECITED) if ours else f"{spoken:.0%}",
            judged(f"{other:.0%}", other >= HELD_OUT) if ours else f"{other:.0%}",
            number(None if base is None else r["wikitext"] / base["wikitext"], ".4f"),
            _worst(base, r),
            number(None if base is None else r["neighbours_nll"] - base["neighbours_nll"], "+.2f"),
            number(r.get("seconds"), ".0f"),
        ])  # fmt: skip
    heads = ["method", "said", "in a wording held out", "perplexity / base", "largest loss of a task"]
    return [
        "## 100 facts in chats",
        made_by("tune", list(rows), lambda r: r["method"]),
        table([*heads, "codes of other people, nats", "seconds"], cells),
    ]


def owners(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## Two owners", UNMEASURED]
    cells = []
    for r in rows:
        own = [
            f"{r[n]['said']} of {r[n]['of']}, AUC {r[n]['auc'][0]:.2f} [{r[n]['auc'][1]:.2f}, {r[n]['auc'][2]:.2f}], "
            f"exposure {r[n]['exposure']:.1f} bits"
            for n in ("a", "b")
        ]
        cells.append([r["method"], *own, f"{r['unseen_exposure']:.1f}", number(r["wikitext"], ".2f")])
    return [
        "## Two owners of 50 facts each",
        made_by("tune", list(rows), lambda r: r["method"]),
        table(["streams on", "facts of a", "facts of b", "exposure of unseen", "perplexity"], cells),
    ]


def private(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## A fact of many records, with a bound", UNMEASURED]
    cells = []
    for r in rows:
        auc, shared, others = r["auc"], r["shared"] / r["of"], r["shared_by_others"] / r["of"]
        ours = r["method"] == "alpha 1"
        found = f"{auc[0]:.2f} [{auc[1]:.2f}, {auc[2]:.2f}]"
        cells.append([
            r["method"],
            judged(f"{shared:.0%}", shared >= RECITED) if ours else f"{shared:.0%}",
            f"{others:.0%}",
            f"{r['said']} of {r['singles']}",
            judged(found, auc[0] <= MEMBERSHIP) if ours else found,
            number(r["wikitext"], ".2f"),
            number(r.get("seconds"), ".0f"),
        ])  # fmt: skip
    heads = ["stream", "shared fact said to those who told it", "to other people", "facts of one record said"]
    return [
        f"## A fact of {rows[0]['of']} records among {rows[0]['singles']} of one, epsilon {rows[0]['epsilon']:g}",
        made_by("tune", list(rows), lambda r: r["method"]),
        table([*heads, "membership AUC of those", "perplexity", "seconds"], cells),
    ]


def memory(rows: Sequence[Row]) -> list[str]:
    return [f"Peak memory of a training above the loaded model: {r['bytes'] / 1e6:.0f} MB." for r in rows]


PARTS = {"facts": facts, "hundred": hundred, "owners": owners, "private": private, "memory": memory}


def _limited(value: float | None, limit: float, form: str) -> str:
    return "-" if value is None else judged(f"{value:{form}}, limit {limit:g}", value <= limit)


def _worst(base: Row | None, row: Row) -> str:
    """The task that lost most, in points."""
    if base is None or base is row:
        return "-"
    lost = {t: _mean(base["tasks"][t]) - _mean(c) for t, c in row["tasks"].items()}
    task: Any = max(lost, key=lambda t: lost[t])
    text = f"{100 * lost[task]:.1f} points ({task})"
    return judged(text, lost[task] <= POINT) if row["method"].startswith("tune") else text


def _mean(correct: Sequence[int]) -> float:
    return sum(correct) / len(correct)
