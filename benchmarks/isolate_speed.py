"""What `isolate` costs beside planting what it forgets, and where its time goes.

    python benchmarks/isolate_speed.py                                   the demonstration's 17 secrets
    python benchmarks/isolate_speed.py --case final --count 100          canaries; --case chat: in chats
    python benchmarks/isolate_speed.py --case tofu --count 200           answers of TOFU
    python benchmarks/isolate_speed.py --npo                             also NPO on the same layers
    python benchmarks/isolate_speed.py --memory                          peak memory alone

Planting is plain fine-tuning of the same layers in the same dtype until every record is recited; NPO (arXiv 2404.05868)
trains them until none is, with the negative log-likelihood of general text beside it. All in one process and in this
order, text sampled from the model included. Peak memory is that of a whole `isolate` in a process of its own, above
the loaded model.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from _canaries import case, plant
from _common import RESULTS, save
from _tofu_data import rows as tofu_rows
from libortho import IsolateConfig, isolate
from libortho.checkpoint.dense import load_model
from libortho.core.models import denormals_flushed
from libortho.core.targets import find_targets
from libortho.demo.model import move_off_grid, packaged_model
from libortho.lm.checks import training_dtype
from libortho.lm.logits import Scores, completion_scores
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_logits, score
from libortho.text.corpus import shipped_text
from libortho.text.encoding import Encoded, chunk, collate, encode
from libortho.text.records import Record, load_records
from objectives import npo

NPO_RATE, NPO_BATCH, NPO_RETAIN, NPO_STEPS = 5e-5, 4, 5.0, 400
"""Learning rate, records in a step, weight of the text beside them (both as TOFU's peers have them), and most steps."""
MEMORY_TARGET = 0.6e9
MEMORY = """
import torch
from libortho import IsolateConfig, isolate
from libortho.demo.facts import secrets
from libortho.demo.model import packaged_model
from libortho.checkpoint.dense import load_model
from libortho.lm.checks import training_dtype
def resident():
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))["VmRSS"].split()[0]) * 1024
torch.set_num_threads(1)
model, tokenizer = load_model(packaged_model(), training_dtype())
with torch.no_grad():
    model(torch.arange(10).unsqueeze(0))
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
isolate(model, tokenizer, secrets(0), config=IsolateConfig(max_steps=5, allow_unknown=True))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024 - before)
"""


def records_of(name: str, seed: int, count: int) -> tuple[list[Any], list[int] | None]:
    """Rows to plant and how often each is repeated in an epoch."""
    if name == "tofu":
        found = tofu_rows("tofu_mini", "forget")[:count]
        return [{"prompt": r["question"], "completion": " " + r["answer"]} for r in found], None
    forget, _, repetitions = case(name, seed, count)
    return forget, repetitions


@denormals_flushed()
def unlearn(model: nn.Module, tokenizer: Any, records: Sequence[Record], seed: int) -> int:
    """NPO until no record is recited; returns the steps."""
    rng, lm = random.Random(seed), LanguageModel(model)
    items = [encode(r, tokenizer) for r in records]
    texts = [Encoded(tuple(t), tuple(t)) for t in chunk(shipped_text(), tokenizer, 128)]
    before, _ = score(lm, items)
    weights = [m.weight for m in find_targets(model, "mlp-out").values() if isinstance(m.weight, nn.Parameter)]
    masters = [w.detach().float().clone() for w in weights]
    optimiser = torch.optim.AdamW(masters, lr=NPO_RATE, weight_decay=0.01)
    for weight in weights:
        weight.requires_grad_(True)
    for step in range(1, NPO_STEPS + 1):
        chosen = rng.sample(range(len(items)), min(NPO_BATCH, len(items)))
        logits, labels, owner = judged_logits(lm, collate([items[i] for i in chosen]))
        original = Scores(before.nll[chosen], before.tokens[chosen])
        loss = npo(completion_scores(logits, labels, owner, len(chosen)), original).mean()
        kept, labels, _ = judged_logits(lm, collate(rng.sample(texts, NPO_BATCH)))
        gradients = torch.autograd.grad(loss + NPO_RETAIN * F.cross_entropy(kept, labels), weights)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        optimiser.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        if step % 5 == 0 and not score(lm, items)[1].any():
            return step
    return NPO_STEPS


def run(name: str, seed: int, count: int, with_npo: bool) -> dict[str, Any]:
    """Plant, unlearn a copy, isolate: seconds and steps of each."""
    forget, repetitions = records_of(name, seed, count)
    loaded, tokenizer = load_model(packaged_model(), torch.float32)
    model: Any = move_off_grid(loaded, seed).to(training_dtype())
    records = load_records(forget, tokenizer)
    began = time.monotonic()
    steps = plant(model, tokenizer, records, repetitions, seed)
    row: dict[str, Any] = {"case": name, "records": len(records), "seed": seed, "dtype": str(training_dtype())}
    row |= {"plant_seconds": time.monotonic() - began, "plant_steps": steps}
    if with_npo:
        copied = copy.deepcopy(model)
        began = time.monotonic()
        row |= {"npo_steps": unlearn(copied, tokenizer, records, seed), "npo_seconds": time.monotonic() - began}
    result = isolate(model, tokenizer, forget, config=IsolateConfig(seed=seed))
    row |= {"isolate_seconds": result.seconds, "isolate_steps": result.steps, "phases": result.phase_seconds}
    row |= {"extracted": sum(r.extracted for r in result.records), "missed": list(result.missed)}
    row["isolate / planting"] = row["isolate_seconds"] / row["plant_seconds"]
    return row


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each run: seconds, their ratios, and the share of each phase."""
    table = Table("records", "planted, s", "isolated, s", "isolate / planting", "NPO, s", "share of each phase, %")
    for r in rows:
        total = r["isolate_seconds"]
        shares = ", ".join(f"{n} {100 * s / total:.0f}" for n, s in sorted(r["phases"].items(), key=lambda p: -p[1]))
        table.add_row(
            f"{r['case']} {r['records']}", f"{r['plant_seconds']:.0f}", f"{total:.0f}",
            f"{r['isolate / planting']:.2f}", f"{r['npo_seconds']:.0f}" if "npo_seconds" in r else "", shares,
        )  # fmt: skip
    Console(width=160).print(table)


def peak_memory() -> int:
    """Bytes of a whole `isolate` above the loaded model."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    return int(done.stdout)


def stored(part: str) -> list[dict[str, Any]]:
    """Rows of earlier runs, read when they are wanted: another run may have ended meanwhile."""
    path = RESULTS / "isolate_speed.json"
    return json.loads(path.read_text()).get(part, []) if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="demo", choices=["demo", "final", "tuning", "chat", "tofu"])
    parser.add_argument("--count", type=int, default=100, help="records of the other cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--npo", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        taken = peak_memory()
        print(f"peak memory above the model: {taken / 1e6:.0f} MB (target <= {MEMORY_TARGET / 1e6:.0f})")
        save(
            "isolate_speed", {"runs": stored("runs"), "memory": [{"bytes_above_model": taken, "target": MEMORY_TARGET}]}
        )
        return
    row = run(arguments.case, arguments.seed, arguments.count, arguments.npo)
    key = ("case", "records", "seed")
    rows = [r for r in stored("runs") if any(r[k] != row[k] for k in key)] + [row]
    save("isolate_speed", {"runs": rows, "memory": stored("memory")})
    show(rows)


if __name__ == "__main__":
    main()
