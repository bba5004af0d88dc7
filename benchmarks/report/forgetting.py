"""Canaries in text and in chats: one table for each kind of run, one column for each seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from libortho.auditing import thresholds

from .tables import UNMEASURED, Row, called, judged, made_by, newest, number, page, read, share, table

SEQUENTIAL = ("sequential", "--seeds", "11")
GROUP = ("model", "case", "records", "objective", "gradient_weight", "ratio", "device")
ATTACKS = {"loss": "loss", "zlib": "zlib", "min_k": "Min-K %", "min_k_plus": "Min-K%++", "grad_norm": "gradient norm"}
NOISE = (
    "A limit holds by value; the interval says how far chance reaches. "
    "WikiText is read in 24 windows of 256 tokens, the same for all models; other windows give other ratios."
)
MEASURE_REQUESTS = f"{UNMEASURED[0].upper()}{UNMEASURED[1:]}. To measure, run {called('forgetting', SEQUENTIAL)}."
Figure = tuple[str, str, Callable[[Row], str]]


def models(r: Row) -> tuple[Row, Row, Row, Row]:
    """Planted, alpha 1, alpha 0, never trained."""
    found = r["models"]
    return found["implanted"], found["alpha 1"], found["alpha 0"], found["never trained"]


def said(key: str) -> Callable[[Row], str]:
    """A share of the records at alpha = 0 beside that of the never-trained model."""

    def cell(r: Row) -> str:
        _, _, off, never = models(r)
        if key not in off:
            return "-"
        return judged(f"{share(off[key])} ({share(never[key])})", off[key] <= never[key] + thresholds.POINT)

    return cell


def exposure(r: Row) -> str:
    off = models(r)[2]
    apart = abs(off["exposure"] - off["exposure_unseen"])
    return judged(f"{off['exposure']:.2f} ({off['exposure_unseen']:.2f})", apart <= thresholds.EXPOSURE_BITS)


def auc(attack: str) -> Callable[[Row], str]:
    def cell(r: Row) -> str:
        _, _, off, never = models(r)
        value, low, high = r["auc_difference"][attack]
        spread = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"  # one record has no interval
        text = f"{value:+.3f}{spread} ({off['auc'][attack]:.3f}, {never['auc'][attack]:.3f})"
        return judged(text, abs(value) <= thresholds.AUC)

    return cell


def nats(r: Row) -> str:
    return "{:.2f} ({:.2f})".format(*(m["nll"] for m in models(r)[2:]))


def neighbours(r: Row) -> str:
    _, on, off, _ = models(r)
    gained = off["neighbours_nll"] - on["neighbours_nll"]
    return judged(f"{gained:+.3f}", gained <= thresholds.RETAIN_NATS)


def wikitext(r: Row) -> str:
    planted, on, off, never = (m["wikitext"] for m in models(r))
    text = f"{off / on:.4f} ({planted:.2f}, {on:.2f}, {off:.2f}, {never:.2f})"
    return judged(text, off / on <= thresholds.PERPLEXITY)


def task(name: str) -> Callable[[Row], str]:
    def cell(r: Row) -> str:
        _, on, off, _ = models(r)
        if name not in off["tasks"]:
            return "-"
        change = off["tasks"][name] - on["tasks"][name]
        return judged(f"{100 * change:+.1f}", round(change, 6) >= -thresholds.TASK)

    return cell


def rounded(r: Row) -> str:
    if "attacks" not in r:
        return "-"
    stored, *others = r["attacks"]["requantisation"]
    gained = {o["format"]: stored["nll"] - o["nll"] for o in others}
    return ", ".join(judged(f"{n} {g:+.2f}", g <= thresholds.NATS) for n, g in gained.items())


def relearned(r: Row) -> str:
    if "attacks" not in r:
        return "-"
    excess = r["attacks"]["relearning"]["excess"]
    return ", ".join(judged(f"{n} {e:+.3f}", e <= thresholds.RELEARN) for n, e in excess.items())


def asked(r: Row) -> str:
    if "attacks" not in r:
        return "-"
    found = r["attacks"]["other_prompts"]
    text = f"{share(found['alpha 0'])} ({share(found['alpha 1'])}, {found['asked']} asked)"
    return judged(text, found["alpha 0"] <= thresholds.POINT)


def rows_of(runs: Sequence[Row]) -> list[Figure]:
    point = f"<= never trained + {share(thresholds.POINT)}"
    near = f"within {thresholds.AUC} of 0"
    tasks = dict.fromkeys(t for r in runs for t in r["models"]["alpha 0"]["tasks"])
    return [
        ("said greedily: planted, alpha 1", "", lambda r: ", ".join(share(m["greedy"]) for m in models(r)[:2])),
        ("said greedily: alpha 0 (never trained)", point, said("greedy")),
        ("said in 20 samples: alpha 0 (never trained)", point, said("sampled")),
        ("said when given a beginning: alpha 0 (never trained)", point, said("beginning_given")),
        ("exposure, bits: alpha 0 (its unseen ones)", f"within {thresholds.EXPOSURE_BITS} of unseen", exposure),
        *((f"AUC of {label}, alpha 0 minus never trained [95 %] (both)", near, auc(a)) for a, label in ATTACKS.items()),
        ("nats per token: alpha 0 (never trained)", "", nats),
        ("neighbours, nats gained from alpha 1 to 0", f"<= {thresholds.RETAIN_NATS}", neighbours),
        ("WikiText perplexity, alpha 0 / 1 (planted, 1, 0, never trained)", f"<= {thresholds.PERPLEXITY}", wikitext),
        *((f"{t}, points from alpha 1 to 0", f">= {-100 * thresholds.TASK:g}", task(t)) for t in tasks),
        ("rounded afterwards: nats that records get likelier", f"<= {thresholds.NATS}", rounded),
        ("half relearned: share of the rest back, beyond never trained", f"<= {thresholds.RELEARN}", relearned),
        ("said to other prompts: alpha 0 (alpha 1)", f"<= {share(thresholds.POINT)}", asked),
        ("steps", "", lambda r: str(r["steps"])),
        ("seconds", "", lambda r: number(r["seconds"], ".0f")),
        ("density", "", lambda r: f"{r['density']:.3%}"),
        ("criteria of `isolate` that were missed", "0", lambda r: judged(str(len(r["missed"])), not r["missed"])),
    ]  # fmt: skip


def group(runs: Sequence[Row]) -> str:
    """The table of runs that differ in their seed alone."""
    r = runs[0]
    title = f"## {r['model']}, {r['case']}, {r['records']} records, {r['objective']}"
    title += f", gradient weight {r['gradient_weight']:g}" if r["gradient_weight"] else ""
    title += f", ratio {r['ratio']}, {r['device']}"
    figures = [(n, limit, *map(cell, runs)) for n, limit, cell in rows_of(runs)]
    figures = [f for f in figures if set(f[2:]) != {"-"}]
    seeds = [f"seed {r['seed']}" for r in runs]
    missed = "\n".join(f"- seed {r['seed']}: {m}." for r in runs for m in r["missed"])
    return "\n\n".join(
        p
        for p in (
            title,
            made_by("forgetting", runs, lambda r: f"seed {r['seed']}"),
            table(["figure", "limit", *seeds], figures),
            missed and f"What `isolate` itself says it missed:\n\n{missed}",
        )
        if p
    )


def requests(run: Row) -> str:
    """Records in several requests, one after another."""
    names = {"forgotten_nll": "forgotten, nats", "waiting_nll": "waiting, nats", "unseen_nll": "unseen, nats",
             "neighbours_nll": "neighbours, nats", "wikitext": "WikiText", "steps": "steps",
             "seconds": "seconds"}  # fmt: skip
    whole = {"steps": ".0f", "seconds": ".0f"}
    rows = [
        [str(r["requests"]), str(r["extracted"]), *(number(r.get(k), whole.get(k, ".2f")) for k in names)]
        for r in run["rows"]
    ]
    return "\n\n".join((
        f"## {run['records']} records in {len(run['rows']) - 1} requests, {run['case']}, seed {run['seed']}",
        newest([run], "forgetting")[1],
        made_by("forgetting", [run], lambda r: f"seed {r['seed']}"),
        f"With all streams on, {run['recited_on']} of {run['records']} records are recited.",
        table(["requests", "extracted (limit 0)", *names.values()], rows),
    ))  # fmt: skip


def write(results: Path, title: str, about: str, chats: bool) -> str:
    data = read(results, "forgetting")
    runs, note = newest([r for r in data.get("runs", []) if (r["case"] == "chat") is chats], "forgetting")
    groups: dict[str, list[Row]] = {}
    for r in sorted(runs, key=lambda r: r["seed"]):
        groups.setdefault(str([r[k] for k in GROUP]), []).append(r)
    largest = sorted(groups.values(), key=lambda g: (-g[0]["records"], -len(g)))
    parts = [NOISE, *map(group, largest)] if runs else [UNMEASURED]
    if not chats:
        parts += [*map(requests, data.get("sequential", []))] or ["## Records in ten requests", MEASURE_REQUESTS]
    return page(title, about, note, *parts)


def canaries(results: Path) -> str:
    return write(
        results,
        "Canaries",
        "Random codes of made-up people are planted in a model by fine-tuning and isolated with the defaults. "
        "The model at alpha = 0 stands beside one that never saw them, and beside 400 unseen codes.",
        chats=False,
    )


def chats(results: Path) -> str:
    return write(
        results,
        "Canaries in chats",
        "The same kind of codes is planted as answers in chats of one and of three turns. "
        "The figures and limits are those of the canaries in plain text.",
        chats=True,
    )
