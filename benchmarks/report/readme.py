"""The marked blocks of README.md."""

from __future__ import annotations

import re
from pathlib import Path

from .audits import at
from .others import LIMITS, cost
from .tables import MISSED, UNMEASURED, Row, earlier, is_earlier, number, read, share, table

BLOCK = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- /report -->)", re.DOTALL)
ROWS = (
    ("secrets said greedily", ("memory", "greedy_extraction", "value"), "extracted greedily"),
    ("secrets said in {samples} samples", ("memory", "sampled_extraction", "value"), "extracted in any sample"),
    ("membership AUC (loss)", ("privacy", "attacks", "loss", "auc", "value"), "AUC of loss"),
    ("perplexity of general text (WikiText)", ("utility", "perplexity", "value"), "perplexity / alpha = 1"),
)
ATTACKS = (
    ("half of them trained again: memory of the rest back", "relearned on forget half: share of the memory back, "
     "beyond never trained", share),
    ("base rounded to INT4: nats per token likelier", "rounded to int4: nats gained", lambda v: number(v, "+.2f")),
)  # fmt: skip
"""What an attack gives back: label, check of the audit, and how the value is written."""


def chosen(results: Path) -> Row | None:
    """The audit to show: of the present method if there is one, the full one first."""
    found = [r for p in ("full", "quick") if (r := read(results, "audit").get(p))]
    return next((r for r in found if not is_earlier(r)), found[-1] if found else None)


def figure(value: float, check: str) -> str:
    if check.startswith("extracted"):
        return share(value)
    return number(value, ".2f" if check.startswith("perplexity") else ".3f")


def checked(report: Row, name: str) -> Row | None:
    """The condition of that name, if the audit has it."""
    return next((c for v in report["verdicts"] for c in v["checks"] if c["name"] == name), None)


def limit(report: Row, name: str) -> str:
    """What a check asks for, and whether it is reached."""
    check = checked(report, name)
    if check is None:
        return UNMEASURED
    target = check["target"]
    if name.startswith("relearned"):
        target = f"beyond never trained <= {share(float(target.removeprefix('<= ')))}"
    if name.startswith("extracted"):
        target = f"<= {share(float(target.removeprefix('<= ')))}"
    elif name.startswith("perplexity"):
        target = f"alpha 0 / alpha 1 {target}, is {check['value']:.4f}"
    return f"{target}: {'holds' if check['ok'] else MISSED if check['ok'] is False else 'undecided'}"


def relative_cost(results: Path) -> list[str]:
    """The last row: what isolating takes beside planting, of the records of the audit."""
    runs = [r for r in read(results, "isolate_speed").get("runs", []) if r["case"] == "demo"]
    found = [r["isolate / planting"] for r in runs]
    cell = ", ".join(number(f, ".2f") for f in found) or UNMEASURED
    kept = f"<= {LIMITS['demo']:g}: {'holds' if max(found) <= LIMITS['demo'] else MISSED}" if found else UNMEASURED
    return ["cost of isolating, in times of planting", "1", cell, "-", kept]


def summary(results: Path) -> str:
    """Planted, alpha 0 and never trained, with limits."""
    report, rows = chosen(results), []
    if report is not None:
        models = {s["key"]: s for s in report["subjects"]}
        for label, keys, check in ROWS:
            found = [at(models.get(key), *keys) for key in ("original", "off", "reference")]
            cells = ["not measured" if v is None else figure(v, check) for v in found]
            rows.append([label.format(**report["counts"]), *cells, limit(report, check)])
        for label, name, written in ATTACKS:
            if found := checked(report, name):
                rows.append([label, "-", written(found["value"]), "-", limit(report, name)])
    rows.append(relative_cost(results))
    shown = table(["figure", "planted", "alpha 0", "never trained", "limit"], rows)
    return "\n\n".join((shown, *([] if report is None else source(report))))


def source(report: Row) -> list[str]:
    """Where the audit's rows come from."""
    of = f"{report['counts']['forget']} records, profile {report['profile']}, seed {report['seed']}"
    said = f"The rows but the last are of [the audit](docs/results/audit.md): {of}, commit {report['commit']}."
    return [said, *([earlier([report], "audit")] if is_earlier(report) else [])]


def costs(results: Path) -> str:
    return f"{cost(results)}\n\nWhat made each row: [docs/results/isolating.md](docs/results/isolating.md)."


BLOCKS = {"summary": summary, "cost": costs}


def rewritten(text: str, results: Path) -> str:
    """README with its marked blocks as they should be. An unknown name is an error."""

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise SystemExit(f"README.md has an unknown block: {found[2]}; known: {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[found[2]](results)}\n{found[3]}"

    return BLOCK.sub(block, text)
