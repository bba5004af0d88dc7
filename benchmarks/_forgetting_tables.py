"""Tables of what benchmarks/forgetting.py measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from _canaries import ATTACKS
from _method import METHOD
from libortho import IsolateConfig

KEY, OPTIONS = ("model", "case", "seed", "records"), ("objective", "gradient_weight", "ratio")
"""What tells stored runs apart, beside where they ran; options of the isolation."""


def show_sequential(runs: Sequence[dict[str, Any]]) -> None:
    for r in runs:
        title = f"{r['records']} records in requests, {r['case']} {r['seed']}; {r['recited_on']} recited with all on"
        table = Table("requests", "extracted", "forgotten", "waiting", "unseen", "neighbours", "WikiText", "steps",
                      "seconds", title=title)  # fmt: skip
        for row in r["rows"]:
            nats = [f"{row[k]:.2f}" if k in row else "" for k in
                    ("forgotten_nll", "waiting_nll", "unseen_nll", "neighbours_nll", "wikitext")]  # fmt: skip
            cost = [str(row.get("steps", "")), f"{row['seconds']:.0f}" if "seconds" in row else ""]
            table.add_row(str(row["requests"]), str(row["extracted"]), *nats, *cost)
        Console(width=140).print(table)


def show(runs: Sequence[dict[str, Any]]) -> None:
    """One row for each model of each run."""
    table = Table("case", "seed", "method", "state", "greedy %", "in 20 %", "beginning %", "exposure", "unseen",
                  "nats", "unseen", *(f"AUC {a}" for a in ATTACKS), "neighbours", "WikiText", "steps")  # fmt: skip
    for r in runs:
        for label, m in r["models"].items():
            cells = [f"{100 * m['sampled']:.0f}", f"{100 * m['beginning_given']:.1f}", f"{m['exposure']:.2f}",
                     f"{m['exposure_unseen']:.2f}"] if "auc" in m else [""] * 4  # fmt: skip
            table.add_row(
                _about(r), str(r["seed"]), _method(r), label, f"{100 * m['greedy']:.0f}", *cells,
                f"{m['nll']:.2f}", f"{m['nll_unseen']:.2f}",
                *(f"{m['auc'][a]:.3f}" if "auc" in m else "" for a in ATTACKS),
                f"{m['neighbours_nll']:.3f}", f"{m['wikitext']:.2f}", str(r["steps"]) if label == "alpha 0" else "",
            )  # fmt: skip
        table.add_section()
    console = Console(width=200)
    console.print(table)
    for r in runs:
        shown = ", ".join(
            f"{a} {v:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")  # of one record there is none
            for a, (v, low, high) in r["auc_difference"].items()
        )
        console.print(f"{_about(r)}, {r['seed']}, {_method(r)}: AUC minus never trained: {shown}")
        off, on = (r["models"][k]["tasks"] for k in ("alpha 0", "alpha 1"))
        console.print("   tasks alpha 0 / 1: " + ", ".join(f"{t} {off[t]:.3f} / {on[t]:.3f}" for t in off))
        console.print(f"   {r['steps']} steps, {r['seconds']:.0f} s on {r['device']}, density {r['density']:.5f}")
        console.print(f"   missed: {r['missed'] or 'nothing'}")
        if "attacks" in r:
            show_attacks(r["attacks"], console)


def _about(run: dict[str, Any]) -> str:
    return f"{run['model']} {run['case']} {run['records']}"


def _method(run: dict[str, Any]) -> str:
    """What was not as by default, after the objective, and where it ran."""
    plain = {**METHOD, "ratio": IsolateConfig().ratio}
    changed = [f"{n} {run[n]}" for n in OPTIONS if n != "objective" and run[n] != plain[n]]
    return ", ".join([run["objective"], *changed, run["device"]])


def show_attacks(attacks: dict[str, Any], console: Console) -> None:
    """Rounding, relearning and other prompts, in one line each."""
    rounded = "; ".join(
        f"{a['format']} {100 * a['extraction']:.0f} % {a['nll']:.2f} ({a['reference_nll']:.2f})"
        for a in attacks["requantisation"]
    )
    console.print(f"   rounded, extracted and nats (never trained): {rounded}")
    for c in attacks["relearning"]["curves"]:
        console.print(
            f"   relearning, {c['subject']}, {c['data']}: nats {c['nll'][0]:.2f} to {c['nll'][-1]:.2f}, extracted "
            f"{100 * c['extraction'][-1]:.0f} %"
        )
    for n, v in attacks["relearning"]["recovery"].items():
        excess = attacks["relearning"]["excess"][n]
        console.print(f"   recovery by {n}: {v}, beyond the never-trained model's: {excess}")
    other = attacks["other_prompts"]
    console.print(f"   {other['asked']} other prompts: {100 * other['alpha 0']:.1f} % at alpha 0, "
                  f"{100 * other['alpha 1']:.1f} % at alpha 1")  # fmt: skip


def summarise(runs: Sequence[dict[str, Any]]) -> None:
    """Over the seeds of each case and method: mean, and the smallest and largest."""
    table = Table("case", "method", "seeds", "figure", "mean", "from", "to")
    for about, method in dict.fromkeys((_about(r), _method(r)) for r in runs):
        same = [r for r in runs if (_about(r), _method(r)) == (about, method)]
        values = {f"AUC {a} - never trained": [r["auc_difference"][a][0] for r in same] for a in ATTACKS}
        off, on, never = ([r["models"][k] for r in same] for k in ("alpha 0", "alpha 1", "never trained"))
        values |= {
            "greedy %": [100 * m["greedy"] for m in off],
            "in 20 samples % - never trained": [
                100 * (m["sampled"] - n["sampled"]) for m, n in zip(off, never, strict=True)
            ],
            "beginning given %": [100 * m["beginning_given"] for m in off],
            "exposure - unseen's (bits)": [m["exposure"] - m["exposure_unseen"] for m in off],
            "neighbours - alpha 1's (nats)": [
                m["neighbours_nll"] - n["neighbours_nll"] for m, n in zip(off, on, strict=True)
            ],
            "WikiText alpha 0 / 1": [m["wikitext"] / n["wikitext"] for m, n in zip(off, on, strict=True)],
            "alpha 1 greedy %": [100 * m["greedy"] for m in on],
            "seconds": [r["seconds"] for r in same],
        }
        asked = [(m["tasks"], n["tasks"]) for m, n in zip(off, on, strict=True) if m["tasks"]]
        for task in asked[0][0] if asked else ():
            values[f"{task} alpha 0 - 1 (points)"] = [100 * (m[task] - n[task]) for m, n in asked]
        for figure, found in values.items():
            spread = [f"{v:+.3f}" for v in (sum(found) / len(found), min(found), max(found))]
            table.add_row(about, method, str(len(found)), figure, *spread)
        table.add_section()
    Console(width=140).print(table)
