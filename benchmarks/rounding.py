"""What the base costs before anything is moved: nearest codes, and codes that make up for each other.

    python benchmarks/rounding.py

Every `down_proj` of SmolLM2-135M with the demonstration's 17 secrets planted (made at the first call, see
forgetting.py), rounded as by `isolate`, but no column is left out. Read for the compensation: 1536 tokens of general
text, and the records (`isolate` reads its retain text, and neighbours too). Measured: divergence from the dense model
on WikiText-2, nats per token; perplexity there; and how many of the secrets are still the greedy continuation.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _canaries import models
from _common import save, wikitext
from libortho.auditing.measures.utility import general_items
from libortho.checkpoint.dense import load_model
from libortho.core.targets import find_targets
from libortho.demo import facts
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states, perplexity, score
from libortho.selection.readings import read_layers, summed_odds
from libortho.text.corpus import shipped_text
from libortho.text.encoding import Encoded, chunk, encode
from libortho.text.records import load_records
from libortho.training.keep import divergence
from libortho.training.rounding import gptq_bases

FORMATS = ((8, -1), (4, 64), (4, 32))
TEXTS, WINDOWS = 12, 8


@torch.no_grad()
def main() -> None:
    place = models("demo", 0, 100)
    model, tokenizer = load_model(place / "implanted", torch.float32)
    lm, layers = LanguageModel(model), find_targets(model, "mlp-out")
    texts = [Encoded(tuple(t), tuple(t)) for t in chunk(shipped_text(), tokenizer, 128)[:TEXTS]]
    records = [encode(r, tokenizer) for r in load_records(facts.secrets(0), tokenizer)]
    given = read_layers(lm, layers, [*texts, *records], summed_odds).inputs
    none = {n: x[:0] for n, x in given.items()}
    windows = general_items(tokenizer, wikitext(), WINDOWS)
    dense = {n: m.weight.detach().clone() for n, m in layers.items()}  # type: ignore[operator]
    before = judged_states(lm, windows)

    def measured(label: str, seconds: float) -> dict[str, Any]:
        _, recited = score(lm, records)
        row = {"base": label, "kl": divergence(lm, windows, before), "perplexity": perplexity(lm, windows),
               "recited": int(recited.sum()), "seconds": seconds}  # fmt: skip
        logging.info("%s", row)
        return row

    rows = [measured("dense", 0.0)]
    for bits, group in FORMATS:
        for compensated in (False, True):
            began = time.perf_counter()
            bases = gptq_bases(layers, {}, (given if compensated else none).__getitem__, bits, group)
            seconds = time.perf_counter() - began
            for name, layer in layers.items():
                layer.weight.copy_(bases[name].dense())  # type: ignore[operator, union-attr]
            rows.append(measured(f"INT{bits} {group} {'compensated' if compensated else 'nearest'}", seconds))
            for name, layer in layers.items():
                layer.weight.copy_(dense[name])  # type: ignore[operator, union-attr]
    table = Table("base", "KL", "perplexity", "recited of 17", "seconds")
    for r in rows:
        table.add_row(r["base"], f"{r['kl']:.5f}", f"{r['perplexity']:.2f}", str(r["recited"]), f"{r['seconds']:.1f}")
    Console(width=100).print(table)
    save("rounding", {"rows": rows})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    main()
