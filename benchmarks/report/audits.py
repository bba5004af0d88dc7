"""Audits of the demonstration's model and of TOFU: verdicts with their limits, then every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .tables import (
    UNMEASURED,
    UNRECORDED,
    Row,
    earlier,
    interval,
    is_earlier,
    judged,
    made_by,
    number,
    page,
    read,
    share,
    table,
)

Column = tuple[str, Callable[[Row], str]]
STATUS = {"pass": "holds", "fail": "**fails**", "withheld": "undecided"}
PARTS = ("memory", "privacy", "utility", "overall")


def at(found: Any, *keys: str) -> Any:
    """What lies at the end of ``keys``, or None where the way ends before."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def estimate(*keys: str) -> Callable[[Row], str]:
    return lambda s: interval(at(s, *keys))


def percent(*keys: str) -> Callable[[Row], str]:
    return lambda s: share(at(s, *keys, "value"))


def value(*keys: str, form: str = ".3g") -> Callable[[Row], str]:
    return lambda s: number(at(s, *keys), form)


EXTRACTION: list[Column] = [
    ("said greedily", percent("memory", "greedy_extraction")),
    ("in samples", percent("memory", "sampled_extraction")),
    ("beginning given", percent("memory", "prefix_sweep")),
    ("exposure, bits", estimate("memory", "exposure")),
    ("nats per token", estimate("memory", "nll")),
]
AUCS: list[Column] = [
    (f"AUC of {label}", estimate("privacy", "attacks", attack, "auc"))
    for attack, label in {
        "loss": "loss", "zlib": "zlib", "min_k": "Min-K %", "min_k_plus": "Min-K%++", "grad_norm": "gradient norm",
    }.items()
]  # fmt: skip
GENERAL: list[Column] = [
    ("WikiText perplexity", estimate("utility", "perplexity")),
    ("KL from alpha = 1", value("utility", "kl")),
]
ANSWERS: list[Column] = [
    ("probability of forgotten answers", estimate("memory", "probability")),
    ("ROUGE-L of forgotten answers", estimate("memory", "rouge_l")),
    ("forget quality, p", value("privacy", "forget_quality")),
    ("privleak", value("privacy", "privleak")),
    ("model utility", value("utility", "tofu", "model_utility")),
    ("probability of retained answers", value("utility", "tofu", "retain_probability")),
]


def verdicts(report: Row) -> str:
    """What each verdict is, and each condition with its limit."""
    said = ", ".join(f"{v['key'].replace('_', ' ')} {STATUS[v['status']]}" for v in report["verdicts"])
    rows = [
        (v["key"].replace("_", " "), c["name"], judged(number(c["value"], ".5g"), c["ok"]), c["target"])
        for v in report["verdicts"]
        for c in v["checks"]
    ]  # fmt: skip
    return f"Verdicts: {said}.\n\n" + table(["verdict", "condition", "value", "limit"], rows)


def subjects(report: Row, columns: Sequence[Column]) -> str:
    """One row for each model; columns that no model has are left out."""
    kept = [(name, cells) for name, cell in columns if set(cells := [cell(s) for s in report["subjects"]]) != {"-"}]
    rows = [[s["label"], *(cells[i] for _, cells in kept)] for i, s in enumerate(report["subjects"])]
    return table(["model", *(name for name, _ in kept)], rows)


def head(report: Row, script: str, title: str) -> list[str]:
    counts = report["counts"]
    judged_on = ", ".join(
        f"{n} {counts[n]}"
        for n in ("forget", "holdout", "probed", "samples", "questions", "general_tokens")
        if n in counts
    )
    return [
        f"## {title}",
        earlier([report], script) if is_earlier(report) else "",
        made_by(script, [report], lambda r: ""),
        f"Counts: {judged_on}. In brackets: 95 % intervals.",
        verdicts(report),
    ]  # fmt: skip


def curve(report: Row) -> str:
    names = ("alpha", "greedy_extraction", "nll", "auc", "perplexity", "kl")
    rows = [[number(point.get(n), ".4g") for n in names] for point in report["curve"] or ()]
    return table(["alpha", "said greedily", "nats per token", "AUC of loss", "WikiText perplexity", "KL"], rows)


def audit(results: Path) -> str:
    found, parts = read(results, "audit"), []
    for profile in ("quick", "full"):
        if report := found.get(profile):
            parts += head(report, "audit", f"Profile {profile}, seed {report['seed']}")
            parts += [subjects(report, columns) for columns in (EXTRACTION, AUCS, GENERAL)]
            parts += [curve(report), f"Took {report['wall_seconds']:.0f} s."]
    return page(
        "The audit of the demonstration",
        "The audit looks for 17 planted secrets in the demonstration's model, with controls and a never-trained model. "
        "Its verdicts follow from limits that are fixed before the figures are seen.",
        *(parts or [UNMEASURED]),
    )


def composite(report: Row) -> str:
    """Composite scores, and the overall one as a share of the retrained model's."""
    scores, retrained = report["composite"], report["composite"]["reference"]["overall"]
    rows = []
    for s in report["subjects"]:
        if (own := scores.get(s["key"])) is not None:
            of = None if own["overall"] is None or not retrained else own["overall"] / retrained
            rows.append([s["label"], *(number(own[p]) for p in PARTS), number(of)])
    return table(["model", *(f"{p} score" for p in PARTS), "overall / retrained"], rows)


def isolation(report: Row) -> str:
    done = report.get("isolation")
    if done is None:
        return f"Records far outside their band, and what `isolate` itself says it missed: {UNRECORDED}."
    far = f"{done['far']} of {done['records']}" if "far" in done else UNRECORDED
    cost = f"Isolated in {done['seconds']:.0f} s and {done['steps']} steps; retain divergence {done['retain_kl']:.4f}."
    cost += f" Records far outside their band: {far}."
    missed = "\n".join(f"- {m}." for m in done["missed"])
    return f"{cost} What `isolate` itself says it missed:\n\n{missed or '- nothing.'}"


def tofu(results: Path) -> str:
    parts = []
    for path in sorted(results.glob("tofu*.json")):
        report = read(results, path.stem)
        depths = {report["subjects"][0]["key"]: at(report, "depth", "uds"), **(at(report, "depth", "others") or {})}
        depth: Column = ("depth", lambda s, depths=depths: interval(depths.get(s["key"])))  # type: ignore[misc]
        parts += head(report, "tofu", f"`{path.name}`: {report['split']}, seed {report['seed']}")
        parts += [composite(report), subjects(report, [*ANSWERS, depth])]
        parts += [subjects(report, columns) for columns in (EXTRACTION, AUCS, GENERAL)]
        parts.append(isolation(report))
    return page(
        "TOFU",
        "A model is fine-tuned on questions about made-up authors, and some of the answers are isolated. "
        "The audit compares it with a model retrained without these answers, and with other methods. "
        "All models of a section are judged in one run, on the same records and questions.",
        *(parts or [UNMEASURED]),
    )
