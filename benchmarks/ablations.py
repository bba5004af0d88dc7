"""What each part of `isolate` is good for: canaries as in forgetting.py, one thing changed at a time.

    python benchmarks/ablations.py                                       all variants, three seeds, tuning templates
    python benchmarks/ablations.py --device cuda --workers 10            the same on a GPU, ten at a time
    python benchmarks/ablations.py --variants "as it is" "no metric" --count 30
    python benchmarks/ablations.py --case chat --seeds 11                canaries that are asked for in chats
    python benchmarks/ablations.py --show                                the table of what was measured

100 canaries are planted in SmolLM2-135M off its grid. Means over seeds, with 95 % intervals of the mean (Student's t).
AUCs are at alpha = 0 minus those of the never-trained model on the same records: 0 is the aim, below 0 the records look
*less* known than strangers' codes, above 0 more.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from torch import Tensor, nn
from transformers import AutoTokenizer

from _canaries import ATTACKS, case, compared, device_name, figures, models, unedited
from _common import RESULTS, save
from known_support import attribution
from libortho import IsolateConfig, alpha, isolate
from libortho.checkpoint.dense import load_model
from libortho.core.surgery import linear_weight
from libortho.isolation.support import RequestReadings, Select, select_columns
from libortho.lm.model import LanguageModel
from libortho.selection.budget import allocate, column_costs
from libortho.selection.columns import LAYER_CAP
from libortho.text.encoding import Encoded
from libortho.text.records import load_records

Scores = Callable[[LanguageModel, Mapping[str, nn.Module], Sequence[Encoded]], dict[str, Tensor]]
"""A score for every column of every layer, larger is better, from the model, its layers and the records."""


def columns_by(score: Scores, readings: RequestReadings, config: IsolateConfig) -> dict[str, Tensor]:
    """The columns that are best by this score, under the budget and the cap of ``isolate``."""
    scores = score(readings.lm, readings.targets, [r.secret for r in readings.forget])
    return allocate(scores, float(config.ratio), LAYER_CAP, column_costs(readings.targets))


def _drawn(lm: LanguageModel, layers: Mapping[str, nn.Module], records: Sequence[Encoded]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {n: torch.rand(linear_weight(m).shape[1], generator=rng).to(lm.device) for n, m in layers.items()}


def _largest(lm: LanguageModel, layers: Mapping[str, nn.Module], records: Sequence[Encoded]) -> dict[str, Tensor]:
    return {n: linear_weight(m).float().norm(dim=0) for n, m in layers.items()}


VARIANTS: dict[str, tuple[dict[str, Any], Select]] = {
    "as it is": ({}, select_columns),
    "support: random columns": ({}, partial(columns_by, _drawn)),
    "support: weight times gradient": ({}, partial(columns_by, attribution)),
    "support: largest columns": ({}, partial(columns_by, _largest)),
    "layers: whole MLP": ({"target_modules": ("gate_proj", "up_proj", "down_proj")}, select_columns),
    "layers: all linear": ({"target_modules": "all-linear"}, select_columns),
    "density 0.1 %": ({"ratio": 0.001}, select_columns),
    "density 0.25 %": ({"ratio": 0.0025}, select_columns),
    "density 1 %": ({"ratio": 0.01}, select_columns),
    "base INT4": ({"bits": 4}, select_columns),
    "no metric": ({"damping": 1e9}, select_columns),
    "damping 0.1": ({"damping": 0.1}, select_columns),
    "damping 0.01": ({"damping": 0.01}, select_columns),
}


def prepare(name: str, seed: int, count: int, device: str) -> None:
    """The models of one seed, and what they say of the records."""
    place = models(name, seed, count, device=device)
    tokenizer = AutoTokenizer.from_pretrained(place / "never")
    forget, unseen = (load_records(r, tokenizer) for r in case(name, seed, count)[:2])
    unedited(place, forget, unseen, 0, seed, device, sampling=False)


def run(variant: str, name: str, seed: int, count: int, device: str) -> dict[str, Any]:
    """Isolate with one thing changed, and measure."""
    torch.set_num_threads(1)
    place = models(name, seed, count, device=device)
    model, tokenizer = load_model(place / "implanted", device=device)
    forget, unseen = (load_records(r, tokenizer) for r in case(name, seed, count)[:2])
    plain = unedited(place, forget, unseen, 0, seed, device, sampling=False)
    changed, select = VARIANTS[variant]
    result = isolate(model, tokenizer, forget, config=IsolateConfig(**{"seed": seed, **changed}), select=select)
    off, on = (
        figures(model, tokenizer, partial(alpha, model, a), forget, unseen, 0, seed, attacks=a == 0.0, sampling=False)
        for a in (0.0, 1.0)
    )
    found = compared(off, on, plain["never"], plain["implanted"], forget, unseen, seed)
    mine, told = found["models"]["alpha 0"], found["models"]["alpha 1"]
    return {
        "variant": variant, "case": name, "seed": seed, "records": len(forget),
        "device": device_name(device), "density": result.density,
        **{f"AUC {a}": found["auc_difference"][a][0] for a in ATTACKS},
        "extracted %": 100 * mine["greedy"], "alpha 1 %": 100 * told["greedy"],
        "nats - unseen": mine["nll"] - mine["nll_unseen"],
        "neighbours": mine["neighbours_nll"] - told["neighbours_nll"],
        "WikiText": mine["wikitext"] / told["wikitext"], "KL": result.retain_kl - result.quantised_kl,
        "outside": sum(not r.inside for r in result.records), "steps": result.steps, "seconds": result.seconds,
    }  # fmt: skip


SHOWN = {"AUC loss": 3, "AUC min_k": 3, "AUC min_k_plus": 3, "AUC grad_norm": 3, "extracted %": 1, "nats - unseen": 2,
         "neighbours": 2, "WikiText": 3, "KL": 3, "outside": 0, "steps": 0}  # fmt: skip
"""Figures of the table, and their digits."""


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t."""
    if len(values) < 2:
        return math.nan
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each variant on records of one kind and number."""
    table = Table("records", "variant", "seeds", *SHOWN)
    order = [
        *VARIANTS,
        *sorted({r["variant"] for r in rows}.difference(VARIANTS)),
    ]
    for about, variant in sorted({(_about(r), r["variant"]) for r in rows}, key=lambda k: (k[0], order.index(k[1]))):
        same = [r for r in rows if (_about(r), r["variant"]) == (about, variant)]
        cells = []
        for figure, digits in SHOWN.items():
            values = [r[figure] for r in same]
            spread = "" if len(values) < 2 else f" ±{half_width(values):.{digits}f}"
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        table.add_row(about, variant, str(len(same)), *cells)
    Console(width=240).print(table)


def _about(row: dict[str, Any]) -> str:
    return f"{row['case']} {row['records']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--case", default="tuning", choices=["tuning", "final", "chat"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=100, help="canaries to plant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    stored = RESULTS / "ablations.json"
    rows = json.loads(stored.read_text())["runs"] if stored.is_file() else []
    if not arguments.show:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        about = (arguments.count, arguments.device)
        jobs = [(v, arguments.case, s, *about) for v in arguments.variants for s in arguments.seeds]
        with ProcessPoolExecutor(
            arguments.workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            # Once for each seed, before its variants want the same models side by side.
            list(pool.map(prepare, *zip(*((arguments.case, s, *about) for s in arguments.seeds), strict=True)))
            for row in pool.map(run, *zip(*jobs, strict=True)):
                key = ("variant", "case", "seed", "records")
                rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
                save("ablations", {"runs": rows})
    show(rows)


if __name__ == "__main__":
    main()
