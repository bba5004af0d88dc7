"""Private facts in a stream: whether they are said, what else moves, what it costs, and whose facts they are.

    python benchmarks/tune.py --part facts                  the demonstration's 17 secrets, over three bases
    python benchmarks/tune.py --part hundred                100 people in chats, beside LoRA and plain fine-tuning
    python benchmarks/tune.py --part owners                 two owners of 50 facts each, one stream each
    python benchmarks/tune.py --part private                a fact of 50 records among 100 of one, with epsilon 8
    python benchmarks/tune.py --part memory                 peak memory of a training above the loaded model

Facts of `hundred` are trained in two wordings and asked for in a third one, too; those of `owners` in one. Plain
fine-tuning trains all weights of the same layers, LoRA factors of about as many values as the stream has; both by AdamW
without decay at a rate that falls to zero, until every record is said. Ability is measured on the same texts for all.
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from _common import DATA, RESULTS, save, stamped, wikitext
from _private_facts import KINDS, private_facts, shared_fact
from cases import random_code
from libortho import TuneConfig, alpha, set_alpha, tune
from libortho.auditing.measures.memory import exposure_extrapolated
from libortho.auditing.measures.utility import general_items
from libortho.auditing.roc import auc_estimate
from libortho.checkpoint.dense import load_model
from libortho.core.models import denormals_flushed
from libortho.core.targets import find_targets
from libortho.demo import facts
from libortho.demo.implant import implant
from libortho.demo.model import packaged_model
from libortho.evaluation.tasks import arithmetic_rows, evaluate, load_task
from libortho.lm.asking import heard
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_logits, perplexity, score
from libortho.lm.token_statistics import shared_prefix_nll
from libortho.text.encoding import Encoded, collate, encode, encode_closed
from libortho.text.records import load_records

TASKS = ("lambada/lambada_openai_test.jsonl", "arc/arc_easy_test.jsonl")
QA = "triviaqa/triviaqa_1500.jsonl"
ROWS = 200
"""Rows of each task."""
BATCH, EPOCHS = 16, 30
"""Records of one step of a descent, and its most passes."""
RATES = {"fine-tuning": 1e-4, "LoRA": 4e-3}
RANK = 4
"""Of a LoRA of about as many values as 1 % of these layers: (1536 + 576) * 4 of 1536 * 576 in each."""
SHARED = 50
"""Records of the shared fact."""
BOUND = {"epsilon": 8.0, "delta": 1e-3, "epochs": 20, "batch_size": 50}
"""Of a private training."""
ALTERNATES, EXPOSED = 16, 12
"""Other codes that a fact is compared with, and facts whose exposure is measured."""
MEMORY = """
import torch
from libortho import TuneConfig, tune
from libortho.demo.facts import secrets
from libortho.demo.model import packaged_model
from libortho.checkpoint.dense import load_model
def resident():
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))["VmRSS"].split()[0]) * 1024
torch.set_num_threads(1)
model, tokenizer = load_model(packaged_model(), torch.float32)
with torch.no_grad():
    model(torch.arange(10).unsqueeze(0))
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
tune(model, tokenizer, secrets(0), config=TuneConfig(epochs=3))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024 - before)
"""


def fresh() -> tuple[Any, Any]:
    """The packaged model in fp32, its weights copied out of the file."""
    model, tokenizer = load_model(packaged_model(), torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, tokenizer


def items_of(rows: Sequence[Any], tokenizer: Any) -> list[Encoded]:
    return [encode_closed(r, tokenizer) if r.rendered else encode(r, tokenizer) for r in load_records(rows, tokenizer)]


def said(model: Any, tokenizer: Any, rows: Sequence[Any]) -> int:
    """Records that the model says when they are asked for, greedily."""
    records, lm = load_records(rows, tokenizer), LanguageModel(model)
    items = [encode(r, tokenizer) for r in records]
    return int(heard(lm, tokenizer, records, items, score(lm, items)[1])[0].sum())


def ability(model: Any, tokenizer: Any, neighbours: Sequence[Any]) -> dict[str, Any]:
    """Perplexity of WikiText, tasks, closed-book questions, and how likely the codes of people are that nothing
    trained."""
    lm = LanguageModel(model)
    asked = [*(load_task(DATA / p) for p in (*TASKS, QA)), load_task(arithmetic_rows(200, 0), "arithmetic")]
    return {
        "wikitext": perplexity(lm, general_items(tokenizer, wikitext())),
        "tasks": {t.name: [int(c) for c in evaluate(lm, tokenizer, t, ROWS, 0).correct] for t in asked},
        "neighbours_nll": float(score(lm, items_of(neighbours, tokenizer))[0].nll.mean()),
    }


@denormals_flushed()
def descend(model: Any, weights: Sequence[nn.Parameter], items: Sequence[Encoded], rate: float) -> tuple[int, float]:
    """Train these weights until every record is said; returns steps and seconds."""
    began, rng = time.monotonic(), random.Random(0)
    lm, optimiser, step = LanguageModel(model), torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), 0
    each = -(-len(items) // BATCH)
    for epoch in range(EPOCHS):
        order = rng.sample(range(len(items)), len(items))
        exact, total = True, 0.0
        for start in range(0, len(items), BATCH):
            batch = collate([items[i] for i in order[start : start + BATCH]])
            with torch.enable_grad():
                logits, labels, _ = judged_logits(lm, batch)
                loss = F.cross_entropy(logits, labels)
            exact &= bool((logits.argmax(-1) == labels).all())
            total += float(loss.detach()) / each
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - step / (EPOCHS * each))
            optimiser.step()
            optimiser.zero_grad()
            step += 1
        logging.info("epoch %d: loss %.3f", epoch + 1, total)
        if (exact or total < 0.1) and bool(score(lm, items)[1].all()):
            break
    return step, time.monotonic() - began


def fine_tuned(model: Any, items: Sequence[Encoded], method: str) -> tuple[Any, int, float, int]:
    """The model after training, steps, seconds, and values that were trained."""
    model.requires_grad_(False)
    if method == "LoRA":
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        weights = [p for p in model.parameters() if p.requires_grad]
    else:
        weights = [m.weight for m in find_targets(model, "mlp-out").values()]
        for weight in weights:
            weight.requires_grad_(True)
    steps, seconds = descend(model, weights, items, RATES[method])
    model.requires_grad_(False)
    return (model.merge_and_unload() if method == "LoRA" else model), steps, seconds, sum(w.numel() for w in weights)


def part_facts(wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """17 secrets in 0.5 % of the layers, over a dense, an INT4 and an INT8 base; plain fine-tuning beside them."""
    data, neighbours = facts.secrets(0), facts.unseen(0)[:50]
    model, tokenizer = fresh()
    if wanted("base"):
        yield {"method": "base", "said": said(model, tokenizer, data), **ability(model, tokenizer, neighbours)}
    logits = probe(model)
    for bits in (None, 4, 8):
        method = f"tune, base of {bits or 32} bits"
        if not wanted(method):
            continue
        tuned, began = copy.deepcopy(model), time.process_time()
        result = tune(tuned, tokenizer, data, "hr", TuneConfig(bits=bits, ratio=0.005))
        spent = time.process_time() - began
        off = perplexity(LanguageModel(tuned), general_items(tokenizer, wikitext()))
        same = torch.equal(probe(tuned), logits) if bits is None else None
        with alpha(tuned, 1.0):
            on, spoken = ability(tuned, tokenizer, neighbours), said(tuned, tokenizer, data)
        yield {
            "method": method, "said": spoken, **on, "off_wikitext": off, "off_is_base": same, "cpu_seconds": spent,
            **figures_of(result),
        }  # fmt: skip
    if wanted("fine-tuning"):
        trained, began = copy.deepcopy(model), time.process_time()
        steps = implant(trained, tokenizer, load_records(data, tokenizer), seed=0)
        spent, spoken = time.process_time() - began, said(trained, tokenizer, data)
        after = ability(trained, tokenizer, neighbours)
        yield {"method": "fine-tuning", "said": spoken, "steps": steps, "cpu_seconds": spent, **after}


def part_hundred(count: int, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """100 facts in chats: the stream, LoRA and plain fine-tuning."""
    trained, held_out, once = private_facts(0, count)
    neighbours = private_facts(0, 100, first=200)[2]
    model, tokenizer = fresh()
    items = items_of(trained, tokenizer)
    if wanted("base"):
        yield {"method": "base", **ability(model, tokenizer, neighbours)}

    def row(method: str, net: Any, **more: Any) -> dict[str, Any]:
        recall = {"said": said(net, tokenizer, once), "held_out": said(net, tokenizer, held_out), "of": count}
        return {"method": method, **recall, **ability(net, tokenizer, neighbours), **more}

    if wanted("tune"):
        tuned = copy.deepcopy(model)
        result = tune(tuned, tokenizer, trained, "hr", TuneConfig(ratio=0.01))
        set_alpha(tuned, 1.0)
        yield row("tune", tuned, **figures_of(result))
        del tuned
    for method in filter(wanted, RATES):
        net, steps, seconds, values = fine_tuned(copy.deepcopy(model), items, method)
        yield row(method, net, steps=steps, seconds=seconds, values=values)


def part_owners(count: int) -> Iterator[dict[str, Any]]:
    """Two owners, a stream each, trained without seeing each other."""
    data = {"a": private_facts(0, count)[2], "b": private_facts(0, count, first=100)[2]}
    unseen = private_facts(0, 100, first=300)[2]
    model, tokenizer = fresh()
    seconds = {}
    for name, own in data.items():
        seconds[name] = tune(model, tokenizer, own, name, TuneConfig(ratio=0.01)).seconds
    for on in ({}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}):
        with alpha(model, {"a": 0.0, "b": 0.0} | on):
            lm = LanguageModel(model)
            shown: dict[str, Any] = {"wikitext": perplexity(lm, general_items(tokenizer, wikitext()))}
            shown["unseen_exposure"] = exposure(lm, tokenizer, unseen)
            for name, own in data.items():
                shown[name] = {
                    "said": said(model, tokenizer, own), "of": count,
                    "auc": membership(lm, tokenizer, own, unseen), "exposure": exposure(lm, tokenizer, own),
                }  # fmt: skip
        yield {"method": "+".join(on) or "none", **shown, "seconds": seconds}


def part_private(count: int) -> Iterator[dict[str, Any]]:
    """One fact that many records tell, in the words of as many people, and facts of one record each."""
    once, unseen = private_facts(0, count)[2], private_facts(0, count, first=300)[2]
    trained, others = shared_fact(0, SHARED), shared_fact(0, SHARED, first=500)
    model, tokenizer = fresh()
    result = tune(model, tokenizer, [*trained, *once], "hr", TuneConfig(ratio=0.01, **BOUND))
    for value in (0.0, 1.0):
        with alpha(model, value):
            lm = LanguageModel(model)
            yield {
                "method": f"alpha {value:g}", "of": SHARED, "singles": count,
                "shared": said(model, tokenizer, trained), "shared_by_others": said(model, tokenizer, others),
                "said": said(model, tokenizer, once), "auc": membership(lm, tokenizer, once, unseen),
                "wikitext": perplexity(lm, general_items(tokenizer, wikitext())), **BOUND, **figures_of(result),
            }  # fmt: skip


def membership(lm: LanguageModel, tokenizer: Any, own: Sequence[Any], others: Sequence[Any]) -> list[float]:
    """AUC of how likely the answers are, by form, against those of people that nothing trained; and its interval."""
    nll = [score(lm, items_of(rows, tokenizer))[0].nll for rows in (own, others)]
    strata = [[i % len(KINDS) for i in range(len(n))] for n in nll]
    found = auc_estimate(-nll[0], -nll[1], *strata, seed=0)
    return [found.value, found.low, found.high]


def exposure(lm: LanguageModel, tokenizer: Any, rows: Sequence[Any]) -> float:
    """Mean exposure of the answers among codes of their form, in bits (arXiv 1802.08232, section 4)."""
    rng, found = random.Random(1), []
    for i, row in enumerate(rows[:EXPOSED]):
        form = KINDS[i % len(KINDS)][0]
        space = 1
        for c in form:
            space *= {"A": 26, "9": 10}.get(c, 1)
        others = [answered(row, random_code(rng, form)) for _ in range(ALTERNATES)]
        items = [encode(r, tokenizer) for r in load_records([row, *others], tokenizer)]
        totals = shared_prefix_nll(lm, items).double() * torch.tensor([len(e.completion) for e in items])
        found.append(exposure_extrapolated(float(totals[0]), totals[1:], space))
    return sum(found) / len(found)


def answered(row: Any, answer: str) -> Any:
    *asked, _ = row["messages"]
    return {"messages": [*asked, {"role": "assistant", "content": answer}]}


def figures_of(result: Any) -> dict[str, Any]:
    names = ("density", "kept_kl", "loss", "steps", "seconds", "missed", "phase_seconds")
    return {n: getattr(result, n) for n in names}


@torch.no_grad()
def probe(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 60).unsqueeze(0)).logits


def part_memory() -> Iterator[dict[str, Any]]:
    """Peak memory of a training above the loaded model, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    yield {"method": "tune", "bytes": int(done.stdout.split()[-1])}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "facts": lambda given: part_facts(given.wanted),
    "hundred": lambda given: part_hundred(given.count or 100, given.wanted),
    "owners": lambda given: part_owners(given.count or 50),
    "private": lambda given: part_private(given.count or 100),
    "memory": lambda given: part_memory(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--count", type=int, help="facts, of hundred, of each owner, and of one record each")
    parser.add_argument("--only", action="append", help="methods, of facts and of hundred; rows of others are kept")
    given = parser.parse_args()
    given.wanted = lambda method: given.only is None or method in given.only
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    for name in ("root", "libortho"):
        logging.getLogger(name).setLevel(logging.INFO)
    for number, row in enumerate(PARTS[given.part](given)):
        path = RESULTS / "tune.json"
        kept = json.loads(path.read_text())["rows"] if path.is_file() else []
        others = number or given.only
        kept = [r for r in kept if r["part"] != given.part or (others and r["method"] != row["method"])]
        save("tune", {"rows": [*kept, stamped({"part": given.part, **row})]})  # what is measured stays measured
        logging.info("%s", {k: v for k, v in row.items() if k not in ("tasks", "phase_seconds")})


if __name__ == "__main__":
    main()
