"""The audit of the demonstration's model: what it finds, what it costs, and whether it says the same twice.

    python benchmarks/audit.py                              quick and full
    python benchmarks/audit.py --profiles quick             one of them
    python benchmarks/audit.py DIR --profiles quick         of what `libortho demo --out DIR` wrote
    python benchmarks/audit.py --profiles quick --repeat    once more, and compare the JSON

Without DIR it is the demonstration in the cache, which the first call makes (half an hour on one thread). It measures
WikiText-2, LAMBADA, ARC-easy, HellaSwag and PIQA from ``$LIBORTHO_DATA``; with ``--no-data`` the general text of the
package and arithmetic alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from _common import DATA, RESULTS, STAMP, save, stamped, wikitext
from libortho import AuditConfig, AuditReport, audit, load
from libortho.checkpoint.dense import load_model
from libortho.cli.tables import show_audit
from libortho.core.cache import cache_directory
from libortho.demo import demo

TASKS = (
    "lambada/lambada_openai_test.jsonl",
    "arc/arc_easy_test.jsonl",
    "hellaswag/hellaswag_val_1000.jsonl",
    "piqa/piqa_valid.jsonl",
)


PROFILES = ("quick", "full")
PARTS = ("never_trained", "implanted", "isolated", "forget.jsonl", "holdout.jsonl")
"""What a demonstration writes."""


def demonstration(directory: Path | None) -> Path:
    """The given demonstration if it is whole, or the one in the cache, made at the first call."""
    place = directory or cache_directory() / "benchmarks" / "demonstration"
    missing = [p for p in PARTS if not (place / p).exists()]
    if directory is None and missing:
        logging.info("making the demonstration in %s", place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            demo.run(out=Path(made) / "demo")
            (Path(made) / "demo").rename(place)
    elif missing:
        raise SystemExit(f"{place} has no {', '.join(missing)}; make it with: libortho demo --out {place}")
    return place


def run(
    directory: Path, profile: Any, seed: int, general: Path | None, tasks: Sequence[Path]
) -> tuple[AuditReport, float]:
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
        general=general,
        tasks=tasks,
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
    parser.add_argument("directory", type=Path, nargs="?", help="what `libortho demo --out` wrote")
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), metavar="{quick,full}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tasks", action="store_true", help="of the tasks arithmetic alone")
    parser.add_argument("--no-data", action="store_true", help="nothing of $LIBORTHO_DATA")
    parser.add_argument("--repeat", action="store_true", help="run each twice and compare the JSON")
    parser.add_argument("--html", type=Path, help="directory for the pages")
    arguments = parser.parse_args()
    if arguments.directory is None and arguments.profiles[-1] not in PROFILES:
        arguments.directory = Path(arguments.profiles.pop())  # --profiles quick DIR
    if not arguments.profiles or set(arguments.profiles) - set(PROFILES):
        parser.error(f"--profiles is {' '.join(arguments.profiles) or 'empty'}; expected quick, full or both")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    general = None if arguments.no_data else wikitext()
    tasks = () if arguments.no_data or arguments.no_tasks else [DATA / t for t in TASKS]
    directory = demonstration(arguments.directory)
    kept = RESULTS / "audit.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    found = {k: v for k, v in found.items() if k not in STAMP}
    for profile in arguments.profiles:
        report, seconds = run(directory, profile, arguments.seed, general, tasks)
        row = {"wall_seconds": seconds, "parts": dict(report.seconds), **brief(report)}
        if arguments.repeat:
            again, _ = run(directory, profile, arguments.seed, general, tasks)
            row["same_json_twice"] = again.to_json() == report.to_json()
        found[profile] = stamped(row)
        found["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if arguments.html is not None:
            report.to_html(arguments.html / f"audit_{profile}.html")
        show_audit(report, Console(width=180))
        save("audit", found)


if __name__ == "__main__":
    main()
