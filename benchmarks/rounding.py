"""What the base costs before anything is moved: nearest codes, and codes that make up for each other.

    python benchmarks/rounding.py                                   the demonstration's 17 secrets
    python benchmarks/rounding.py --case final --seeds 11 12        100 canaries

Every `down_proj` of SmolLM2-135M with records planted (made at the first call, see forgetting.py), rounded as by
`isolate`, but no column is left out. Read for the compensation: 1536 tokens of general text, and up to 64 records
(`isolate` reads its retain text, and neighbours too). Measured: divergence from the dense model on 8 windows of
WikiText-2, nats per token; perplexity on 24; and how many of the records are still the greedy continuation.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import RESULTS, save, wikitext
from forgetting import case, models
from libortho.audit.utility import general_items
from libortho.data import Encoded, collate, encode, load_records
from libortho.isolate import counterfactuals
from libortho.isolate.language_model import LanguageModel
from libortho.isolate.retain import chunk
from libortho.isolate.rounding import compensated_bases
from libortho.isolate.trainer import divergence, hidden_states, score
from libortho.metrics import general_perplexity
from libortho.models import load_model
from libortho.targets import find_targets

FORMATS = ((8, -1), (4, 64), (4, 32))
TEXTS, RECORDS, WINDOWS = 12, 64, 8


@torch.no_grad()
def measure(name: str, seed: int, count: int) -> list[dict[str, Any]]:
    """A row for the dense model and for each base."""
    model, tokenizer = load_model(models(name, seed, count) / "implanted", torch.float32)
    lm, layers = LanguageModel(model), find_targets(model, "mlp-out")
    texts = [Encoded(tuple(t), tuple(t)) for t in chunk(counterfactuals.shipped_text(), tokenizer, 128)[:TEXTS]]
    records = [encode(r, tokenizer) for r in load_records(case(name, seed, count)[0], tokenizer)]
    read = [collate([e]) for e in (*texts, *records[:RECORDS])]
    windows = general_items(tokenizer, wikitext())
    dense = {n: m.weight.detach().clone() for n, m in layers.items()}  # type: ignore[operator]
    before = hidden_states(lm, windows[:WINDOWS])

    def measured(label: str, seconds: float) -> dict[str, Any]:
        _, recited = score(lm, records)
        row = {
            "case": name, "seed": seed, "records": len(records), "base": label,
            "kl": divergence(lm, windows[:WINDOWS], before), "perplexity": general_perplexity(lm, windows),
            "recited": int(recited.sum()), "seconds": seconds,
        }  # fmt: skip
        logging.info("%s", row)
        return row

    rows = [measured("dense", 0.0)]
    for bits, group in FORMATS:
        for compensated in (False, True):
            began = time.perf_counter()
            bases = compensated_bases(lm, layers, {}, read if compensated else [], bits, group)
            seconds = time.perf_counter() - began
            for n, layer in layers.items():
                layer.weight.copy_(bases[n].dense())  # type: ignore[operator, union-attr]
            rows.append(measured(f"INT{bits} {group} {'compensated' if compensated else 'nearest'}", seconds))
            for n, layer in layers.items():
                layer.weight.copy_(dense[n])  # type: ignore[operator, union-attr]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="demo", choices=["demo", "final", "tuning"])
    parser.add_argument("--count", type=int, default=100, help="canaries to plant")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "rounding.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for seed in arguments.seeds:
        made = measure(arguments.case, seed, arguments.count)
        same = tuple(made[0][k] for k in ("case", "seed", "records"))
        rows = [r for r in rows if tuple(r.get(k) for k in ("case", "seed", "records")) != same] + made
        save("rounding", {"rows": rows})
    table = Table("case", "seed", "base", "KL", "perplexity", "recited", "seconds")
    for r in rows:
        table.add_row(r["case"], str(r["seed"]), r["base"], f"{r['kl']:.5f}", f"{r['perplexity']:.2f}",
                      f"{r['recited']} of {r['records']}", f"{r['seconds']:.1f}")  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
