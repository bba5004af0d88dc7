"""What the weights-only split costs, on the real SmolLM2-135M, all `down_proj`.

    python benchmarks/split.py [--seeds 0 1 2]

Errors are relative Frobenius norms of the tensors as stored; perplexity is WikiText-2, 24 sequences of 256 tokens, in
bf16. The seed moves the weights off the grid of the file that they come from.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import save, wikitext
from libortho import SplitConfig, alpha, layer_report, split
from libortho.auditing.measures.utility import general_items
from libortho.checkpoint.dense import load_model
from libortho.demo.model import move_off_grid, packaged_model
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity

SETTINGS = {
    "rank 0.95, INT8": SplitConfig(rank_ratio=0.95),
    "rank 0.98, INT8": SplitConfig(rank_ratio=0.98),
    "rank 0.8, INT8 (falls back)": SplitConfig(rank_ratio=0.8),
    "rank auto (5 %), INT8": SplitConfig(rank_ratio="auto"),
    "direct, INT8": SplitConfig(use_low_rank=False),
    "direct, INT4 group 32": SplitConfig(use_low_rank=False, bits=4),
    "direct, INT4 group 64": SplitConfig(use_low_rank=False, bits=4, group_size=64),
}


def run(seed: int) -> list[dict[str, Any]]:
    model, tokenizer = load_model(packaged_model(), torch.float32)
    model = move_off_grid(model, seed).to(torch.bfloat16)
    general = general_items(tokenizer, wikitext())
    dense = perplexity(LanguageModel(model), general)
    rows: list[dict[str, Any]] = [{"seed": seed, "setting": "dense", "perplexity": dense}]
    for label, config in SETTINGS.items():
        copied = copy.deepcopy(model)
        began = time.monotonic()
        split(copied, config)
        seconds = time.monotonic() - began
        with alpha(copied, 0.0):
            public = perplexity(LanguageModel(copied), general)
        totals = layer_report(copied).totals()
        rows.append({"seed": seed, "setting": label, "seconds": seconds, "perplexity": public, **totals})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    rows = [row for seed in parser.parse_args().seeds for row in run(seed)]
    save("split", {"rows": rows})
    table = Table(
        "seed", "setting", "low-rank layers", "base err (max)", "final err (max)", "density", "tail", "ppl alpha 0",
        "ppl / dense", "seconds",
    )  # fmt: skip
    dense = 1.0
    for r in rows:
        if r["setting"] == "dense":
            dense = r["perplexity"]
            table.add_section()
            table.add_row(str(r["seed"]), "dense", "", "", "", "", "", f"{dense:.3f}", "", "")
            continue
        table.add_row(
            str(r["seed"]), r["setting"], f"{r['low_rank_layers']}/{r['layers']}",
            f"{r['base_error']:.2%} ({r['max_base_error']:.2%})",
            f"{r['final_error']:.2%} ({r['max_final_error']:.2%})",
            f"{r['ortho_density']:.3%}", f"{r['tail_density']:.2%}", f"{r['perplexity']:.3f}",
            f"{r['perplexity'] / dense:.4f}", f"{r['seconds']:.1f}",
        )  # fmt: skip
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
