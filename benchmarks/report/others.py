"""Speed, rounding, known support, split by weights, and what isolating costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .tables import UNMEASURED, Row, earlier, judged, made_by, newest, number, page, read, table


def ratio(found: Row | None, limit: float | None = None) -> str:
    if found is None:
        return "-"
    text, limit = f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]", found.get("target") or limit
    return text if limit is None else judged(f"{text}, limit {limit:g}", found["median"] <= limit)


def by_seed(rows: Sequence[Row], names: dict[str, str], key: str) -> list[list[str]]:
    """One row for each value of ``key``; in each cell the raw values of all seeds. ``names``: heading and format."""
    kinds = dict.fromkeys(r[key] for r in rows)
    same = {kind: [r for r in rows if r[key] == kind] for kind in kinds}
    return [[k, *(", ".join(number(r.get(n), f) for r in same[k]) for n, f in names.items())] for k in kinds]


def speed(results: Path) -> str:
    parts = []
    for path in sorted(results.glob("speed_1*.json")):
        data = read(results, path.stem)
        shapes = data["results"]
        names = dict.fromkeys(n for found in shapes.values() for n in found if not n.endswith("milliseconds"))
        rows = [[n, *(ratio(found.get(n)) for found in shapes.values())] for n in names]
        parts += [f"## `{path.name}`: {data['kernels']} kernels", made_by("speed", [data], lambda r: "")]
        parts += [table(["ratio", *shapes], rows)]
    if counted := read(results, "speed_instructions"):
        phases = [
            [p, number(counted[p]["base alone"], ".0f"), f"{counted[p]['difference']:+.2%}"]
            for p in ("decode", "prefill")
        ]
        parts += ["## Instructions counted", made_by("speed", [counted], lambda r: "")]
        parts += [table(["phase", "base alone", "alpha 0, more"], phases)]
    if whole := read(results, "split_speed"):
        parts += ["## Splitting beside an SVD of the same layers", made_by("split_speed", [whole], lambda r: "")]
        parts += [table(["ratio", "median [quartiles]"], [["split / SVD", ratio(whole["ratio"], whole["target"])]])]
    return page(
        "Speed",
        "A split model stands beside the same base kernel without a switch, dense bf16, and other libraries. "
        "Each cell is the median ratio of interleaved rounds with its quartiles, and below 1 the first is faster.",
        *(parts or [UNMEASURED]),
    )  # fmt: skip


def rounding(results: Path) -> str:
    rows = read(results, "rounding").get("rows", [])
    cells = [
        [
            r["base"].replace(" -1 ", " per channel "),
            number(r["kl"], ".5f"),
            number(r["perplexity"], ".2f"),
            str(r["recited"]),
            number(r["seconds"], ".1f"),
        ]
        for r in rows
    ]
    parts = [
        made_by("rounding", rows, lambda r: r["base"]),
        table(["base", "KL from dense, nats", "WikiText perplexity", "recited of 17", "seconds"], cells),
    ]
    return page(
        "Rounding the base",
        "Every `down_proj` of the planted model is rounded, to nearest integers or to such as make up for each other. "
        "The table says what general text and the planted secrets lose; it is one run, and no limit is set.",
        *(parts if rows else [UNMEASURED]),
    )  # fmt: skip


def known_support(results: Path) -> str:
    runs, note = newest(read(results, "known_support").get("runs", []), "known_support")
    flat = [{**s, "score": n} for r in runs for n, s in r["scores"].items()]
    rows = by_seed(
        [{**s, "precision": 100 * s["precision"]} for s in flat], {"precision": ".1f", "recited": "d"}, "score"
    )
    seeds = ", ".join(str(r["seed"]) for r in runs)
    parts = [
        note,
        made_by("known_support", runs, lambda r: f"seed {r['seed']}"),
        f"Recited after planting: {', '.join(str(r['planted']) for r in runs)} of 17.",
        table(["score", f"right columns, % (seeds {seeds})", f"still recited of 17 (seeds {seeds})"], rows),
    ]
    return page(
        "Known support",
        "Secrets are trained into random columns, and each score names as many columns as were used. "
        "The table says how many are right, and what is still recited once the named columns are put back.",
        *(parts if runs else [UNMEASURED]),
    )  # fmt: skip


def split(results: Path) -> str:
    rows = read(results, "split").get("rows", [])
    dense = {r["seed"]: r["perplexity"] for r in rows if r["setting"] == "dense"}
    shown = [{**r, "relative": r["perplexity"] / dense[r["seed"]]} for r in rows if r["setting"] != "dense"]
    names = {"low_rank_layers": "d", "base_error": ".2%", "max_base_error": ".2%", "final_error": ".2%",
             "ortho_density": ".3%", "tail_density": ".2%", "relative": ".4f", "seconds": ".1f"}  # fmt: skip
    headings = ["low-rank layers", "base error", "worst layer", "final error", "density", "tail density",
                "WikiText / dense", "seconds"]  # fmt: skip
    parts = [
        made_by("split", rows, lambda r: f"seed {r['seed']}"),
        f"Raw values of seeds {', '.join(map(str, dense))}. No limit is set.",
        table(["setting", *headings], by_seed(shown, names, "setting")),
    ]
    return page(
        "Split by the weights alone",
        "Every `down_proj` is split without knowledge of any record, in several settings. "
        "Perplexity is that of alpha = 0 on 24 windows of 256 tokens of WikiText-2, beside the dense model's.",
        *(parts if rows else [UNMEASURED]),
    )  # fmt: skip


def memory(data: Row) -> str:
    """Peak memory of isolating the demonstration's records, above the loaded model."""
    if not (found := data.get("memory")):
        return UNMEASURED
    taken, limit = found[-1]["bytes_above_model"], found[-1]["target"]
    return judged(f"{taken / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB", taken <= limit)


KINDS = {
    "demo": "secrets of the demonstration",
    "tuning": "codes, templates that were looked at",
    "final": "codes in plain text",
    "chat": "codes in chats",
    "tofu": "answers of TOFU",
}
LIMITS = dict.fromkeys(KINDS, 1.0) | {"tofu": 1.5}
"""Of isolating in times of planting."""


def beside_planting(run: Row) -> str:
    """Isolating in times of planting, beside its limit."""
    found, most = run["isolate / planting"], LIMITS[run["case"]]
    return judged(f"{found:.2f}, limit {most:g}", found <= most)


def cost(results: Path) -> str:
    """Isolating beside planting; also a block of README."""
    data = read(results, "isolate_speed")
    runs = sorted(data.get("runs", []), key=lambda r: list(KINDS).index(r["case"]))
    if not runs:
        return f"What isolating costs: {UNMEASURED}."
    rows = [
        [
            f"{r['records']} {KINDS[r['case']]}",
            number(r["plant_seconds"], ".0f"),
            number(r["isolate_seconds"], ".0f"),
            beside_planting(r),
        ]
        for r in runs
    ]
    shown = table(["records", "planted, s", "isolated, s", "isolated / planted"], rows)
    found = [r.get("machine", {}) for r in runs]
    names = sorted({f"{m['processor']} ({m['cpu_capability']}, {m['threads']} thread)" for m in found if m})
    where = f"Measured on {', '.join(names)}; other processors differ." if names else ""
    return f"{shown}\n\n{where} Peak memory above the model, of the demonstration's request: {memory(data)}."


def isolating(results: Path) -> str:
    data = read(results, "isolate_speed")
    runs = data.get("runs", [])
    parts = [cost(results)]
    if runs:
        rows = []
        for r in runs:
            phases = sorted(r["phases"].items(), key=lambda p: -p[1])
            shares = ", ".join(f"{n} {100 * s / r['isolate_seconds']:.0f} %" for n, s in phases)
            npo = f"{r['npo_seconds']:.0f} s, {r['npo_steps']} steps" if "npo_seconds" in r else UNMEASURED
            said = judged(f"{r['extracted']}, limit 0", r["extracted"] == 0)
            steps = f"{r['plant_steps']}, {r['isolate_steps']}"
            rows.append(
                [
                    f"{r['records']} {KINDS[r['case']]}, seed {r['seed']}",
                    steps,
                    said,
                    str(len(r["missed"])),
                    npo,
                    shares,
                ]
            )
        header = [
            "records",
            "steps of planting, isolating",
            "said at alpha 0",
            "criteria missed",
            "NPO",
            "share of each phase",
        ]
        made = made_by(
            "isolate_speed",
            [*runs, *data.get("memory", [])],
            lambda r: f"{r['case']} {r['records']}" if "case" in r else "peak memory",
        )
        missed = "\n".join(f"- {r['case']} {r['records']}: {m}." for r in runs for m in r["missed"])
        parts = [made, *parts, table(header, rows)]
        parts += [f"What `isolate` itself says it missed:\n\n{missed}"] if missed else []
    elif data:
        parts += [
            earlier([data], "isolate_speed"),
            "The stored figures are of another script and are left out.",
            made_by("isolate_speed", [data], str),
        ]
    return page(
        "What isolating costs",
        "Records are planted by plain fine-tuning of the same layers, then isolated, in one process. "
        "Peak memory is that of a whole `isolate` of the demonstration's records in a process of its own.",
        *parts,
    )  # fmt: skip
