"""The audit of the demonstration's model: what it finds, what it costs, and whether it says the same twice.

    libortho demo --out DIR && python benchmarks/audit.py DIR                 quick and full
    python benchmarks/audit.py DIR --profiles quick --repeat                  once more, and compare the JSON

Beside the shipped text it measures WikiText-2, LAMBADA, ARC-easy, HellaSwag and PIQA from ``$LIBORTHO_DATA``.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from _common import DATA, RESULTS, save, wikitext
from libortho import AuditConfig, AuditReport, audit, load
from libortho.models import load_model
from libortho.tables import show_audit

TASKS = (
    "lambada/lambada_openai_test.jsonl",
    "arc/arc_easy_test.jsonl",
    "hellaswag/hellaswag_val_1000.jsonl",
    "piqa/piqa_valid.jsonl",
)


def run(directory: Path, profile: Any, seed: int, tasks: bool) -> tuple[AuditReport, float]:
    model, tokenizer = load(directory / "isolated")
    reference, _ = load_model(directory / "never_trained")
    original, _ = load_model(directory / "implanted")
    began = time.monotonic()
    report = audit(
        model,
        tokenizer,
        directory / "forget.jsonl",
        holdout=directory / "holdout.jsonl",
        reference=reference,
        original=original,
        general=wikitext(),
        tasks=[DATA / t for t in TASKS] if tasks else (),
        name="the demonstration's model",
        config=AuditConfig(profile=profile, seed=seed),
        progress=lambda phase, done, total: logging.info("%s %d/%d", phase, done, total),
    )
    return report, time.monotonic() - began


def brief(report: AuditReport) -> dict[str, Any]:
    """The report without what is long: figures record by record, and ROC curves."""
    data = report.to_dict()
    kept = ("key", "label", "role", "memory", "unseen", "prefixes", "variants", "privacy", "utility")
    subjects = [{k: s[k] for k in kept} for s in data["subjects"]]
    for s in subjects:
        for attack in s["privacy"]["attacks"].values():
            attack.pop("roc")
    left_out = ("subjects", "records", "generations")
    return {**{k: v for k, v in data.items() if k not in left_out}, "subjects": subjects}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what `libortho demo --out` wrote")
    parser.add_argument("--profiles", nargs="+", default=["quick", "full"], choices=["quick", "full"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tasks", action="store_true", help="arithmetic alone, as without any data")
    parser.add_argument("--repeat", action="store_true", help="run each twice and compare the JSON")
    parser.add_argument("--html", type=Path, help="directory for the pages")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    kept = RESULTS / "audit.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    found.pop("machine", None)
    for profile in arguments.profiles:
        report, seconds = run(arguments.directory, profile, arguments.seed, not arguments.no_tasks)
        found[profile] = {"wall_seconds": seconds, "parts": dict(report.seconds), **brief(report)}
        if arguments.repeat:
            again, _ = run(arguments.directory, profile, arguments.seed, not arguments.no_tasks)
            found[profile]["same_json_twice"] = again.to_json() == report.to_json()
        found["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if arguments.html is not None:
            report.to_html(arguments.html / f"audit_{profile}.html")
        show_audit(report, Console(width=180))
        save("audit", found)


if __name__ == "__main__":
    main()
