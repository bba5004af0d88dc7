"""TOFU end to end: does `isolate` forget like a model that was never trained, and do the usual methods?

    python benchmarks/tofu.py                                 the small cut (800 rows), seed 0, all peers
    python benchmarks/tofu.py --peers npo --rows 40           fewer models, fewer rows
    python benchmarks/tofu.py --profile quick --peers         without attacks and depth, and without peers
    python benchmarks/tofu.py --split forget10 --device cuda  the original sizes

Fine-tunes on all rows and, with the same recipe, on the retain rows alone; isolates the forget rows (defaults, but for
the weight of retain text); and audits the result beside the retrained model, the peers (all weights, one good recipe
each) and the same optimisation on random columns. The scores are composites of memory, privacy and utility (arXiv
2605.24614), each also as a share of the retrained model's. Models and finished parts of the audit lie in the cache: run
again to resume.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from rich.console import Console
from rich.table import Table

from _common import DATA, save
from _tofu_data import SPLITS, rows
from _tofu_training import PEERS
from libortho import AuditConfig, audit, set_alpha
from libortho.cli.tables import show_audit
from libortho.core.cache import cache_directory
from libortho.isolation.criteria import RecordOutcome
from tofu_models import build, folder

LABELS = {
    "npo": "NPO",
    "simnpo": "SimNPO",
    "altpo": "AltPO",
    "grad_diff": "GradDiff",
    "libortho_random": "random columns, trained",
}
PARTS = ("memory", "privacy", "utility", "overall")
TASKS = ("lambada/lambada_openai_test.jsonl", "arc/arc_easy_test.jsonl")


def thinned(items: list[Any], count: int) -> list[Any]:
    """Every n-th row, so that all authors are among them."""
    return items[:: max(1, len(items) // count)][:count]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    split, seed, device = arguments.split, arguments.seed, arguments.device
    made = {n: build(n, split, seed, device) for n in ("libortho", "full", "retain", *arguments.peers)}
    model, tokenizer = made["libortho"]
    if "libortho_random" in made:
        set_alpha(made["libortho_random"][0], 0.0)
    config = AuditConfig(
        profile=arguments.profile, seed=seed, samples=2, probe_records=16, general_sequences=12, task_rows=40,
        attack_records=12, depth_records=8, alphas=(0.0, 0.5, 1.0), max_new_tokens=48,
    )  # fmt: skip
    report = audit(
        model,
        tokenizer,
        forget=thinned(rows(split, "forget_perturbed"), arguments.rows),
        holdout=thinned(rows(split, "holdout"), arguments.rows),
        reference=made["retain"][0],
        original=made["full"][0],
        others={LABELS[n]: made[n][0] for n in arguments.peers},
        question_sets={
            n: thinned(rows(split, f"{n}_perturbed"), arguments.questions)
            for n in ("retain", "real_authors", "world_facts")
        },
        general=DATA / "wikitext2" / "wiki.test.raw.txt",
        tasks=[DATA / t for t in TASKS],
        name=f"TOFU {split}",
        config=config,
        resume=cache_directory() / "tofu" / "audit",
        progress=lambda phase, done, total: logging.info("%s %d/%d", phase, done, total),
    )
    if arguments.html:
        report.to_html(arguments.html)
    show_audit(report, Console(width=180))
    kept = ("key", "label", "role", "memory", "unseen", "privacy", "utility")
    subjects = [{k: s[k] for k in kept} for s in report.data["subjects"]]
    for s in subjects:
        for attack in s["privacy"]["attacks"].values():
            attack.pop("roc")
    isolated = json.loads(folder("libortho", split, seed).with_suffix(".json").read_text())
    outcomes = [RecordOutcome(**r) for r in isolated["records"]]
    figures = ("verdicts", "counts", "config", "model", "curve", "goldilocks", "attacks", "depth", "composite")
    return {
        "split": split,
        "seed": seed,
        "rows": arguments.rows,
        "subjects": subjects,
        "isolation": {
            **{k: isolated[k] for k in ("seconds", "steps", "missed", "retain_kl", "quantised_kl")},
            "records": len(outcomes),
            "far": sum(r.far for r in outcomes),
        },
        **{k: report.data[k] for k in figures},
        "counts": {**report.data["counts"], "questions": arguments.questions},
    }


def show(result: dict[str, Any]) -> None:
    """Composite scores, and as shares of the retrained model's."""
    console = Console(width=150)
    retrained = result["composite"]["reference"]
    table = Table("model", *PARTS, *(f"{p} / retrained" for p in PARTS), title="composite scores")
    for s in result["subjects"]:
        scores = result["composite"].get(s["key"])
        if scores is None:
            continue
        cells = ["-" if scores[p] is None else f"{scores[p]:.3f}" for p in PARTS]
        shares = ["-" if scores[p] is None or not retrained[p] else f"{scores[p] / retrained[p]:.3f}" for p in PARTS]
        table.add_row(s["label"], *cells, *shares)
    console.print(table)
    table = Table("model", "model utility", "truth ratio KS p", "privleak", "answer probability", "ROUGE-L", "UDS")
    depths = {result["subjects"][0]["key"]: result["depth"] and result["depth"]["uds"]}
    depths |= (result["depth"] or {}).get("others", {})
    for s in result["subjects"]:
        tofu, privacy, memory = (s["utility"] or {}).get("tofu"), s["privacy"], s["memory"]
        cells = (
            tofu and tofu["model_utility"], privacy["forget_quality"], privacy["privleak"],
            memory["probability"]["value"], memory["rouge_l"] and memory["rouge_l"]["value"],
            depths.get(s["key"]) and depths[s["key"]]["value"],
        )  # fmt: skip
        table.add_row(s["label"], *("-" if c is None else f"{c:.3g}" for c in cells))
    console.print(table)
    done = result["isolation"]
    console.print(f"isolated in {done['seconds']:.0f} s, {done['steps']} steps; missed: {done['missed'] or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="tofu_mini", choices=list(SPLITS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(LABELS))
    parser.add_argument("--rows", type=int, default=60, help="forget and holdout rows that are judged")
    parser.add_argument("--questions", type=int, default=40, help="rows of each model-utility set")
    parser.add_argument("--profile", default="full", choices=["quick", "full"])
    parser.add_argument("--html", help="write the report as a page")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    result = run(arguments)
    name = "tofu" if arguments.split == "tofu_mini" else f"tofu_{arguments.split}"
    save(name if arguments.profile == "full" else f"{name}_quick", result)
    show(result)


if __name__ == "__main__":
    main()
