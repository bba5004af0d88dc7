"""The models that the TOFU benchmark compares, built once and kept in the cache.

    python benchmarks/tofu_models.py full retain npo libortho             the small cut, seed 0
    python benchmarks/tofu_models.py npo --split forget10 --device cuda   the original sizes

    start            SmolLM2-135M-Instruct, moved off its quantisation grid
    full             fine-tuned on forget + retain rows (LoRA, merged): what has to be cleaned
    retain           the same without the forget rows: the never-trained reference
    grad_diff, npo,
    simnpo, altpo    all-weight unlearning of ``full``, one good recipe each
    libortho         ``isolate`` (see ``isolation``); a split model
    libortho_random  the same optimisation on as many columns, drawn at random

Every result lies in ``<cache>/tofu/<name>-<hash>``; the hash covers the recipe, the bytes of the data, the parent model
and the seed. Training of peers and adapters resumes at the last finished epoch.

Rows come from ``$LIBORTHO_DATA/{tofu,tofu_mini}``, ready adapters from ``$LIBORTHO_MODELS/tofu_mini/{full,retain}``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

import libortho
from _common import MODELS
from _tofu_data import CHAT_TEMPLATE, SPLITS, read, rows
from _tofu_training import (
    NEAR_COPY,
    PEERS,
    TURN_END,
    Adapter,
    answer_scores,
    apart,
    by_length,
    encode_rows,
    mean_nll,
    part,
    pick,
    spans,
    store,
    train,
)
from libortho import IsolateConfig
from libortho.checkpoint.dense import load_model
from libortho.core.cache import cache_directory
from libortho.core.surgery import linear_weight
from libortho.demo.model import GGUF, move_off_grid, packaged_model
from libortho.isolation.support import RequestReadings, select_columns
from libortho.lm.checks import training_dtype
from libortho.lm.logits import Scores
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.encoding import Encoded
from libortho.text.records import load_records
from objectives import altpo, npo, simnpo

logger = logging.getLogger("tofu_models")


NAMES = ("start", "full", "retain", *PEERS, "libortho", "libortho_random")
ALTERNATE_TOKENS = 64
"""Tokens of the longest sampled alternate."""


@cache
def key(name: str, split: str, seed: int) -> str:
    """Hash of everything that decides the model."""
    forget, retain = [_digest(rows(split, w)) for w in ("forget", "retain")]
    content: dict[str, Any]
    if name == "start":
        content = {"model": GGUF, "template": CHAT_TEMPLATE, "seed": seed}
    elif name in ("full", "retain"):
        content = {"parent": key("start", split, seed), "adapter": _adapter_key(name, split, seed)}
    elif name in PEERS:
        content = {"parent": key("full", split, seed), "recipe": asdict(PEERS[name]), "seed": seed}
        content |= {"forget": forget, "retain": retain}
        if PEERS[name].alternates:
            content["sampling"] = [ALTERNATE_TOKENS, NEAR_COPY]
    elif name in ("libortho", "libortho_random"):
        content = {"parent": key("full", split, seed), "config": isolation(seed).to_dict()}
        content |= {"forget": forget, "retain": retain, "random": name == "libortho_random"}
    else:
        raise SystemExit(f"model is {name!r}; expected one of {', '.join(NAMES)}")
    return _digest(content)


def _adapter_key(name: str, split: str, seed: int) -> str:
    ready = _ready_adapter(name, split)
    if ready is not None:
        return hashlib.sha256((ready / "adapter_model.safetensors").read_bytes()).hexdigest()
    return _digest({"recipe": asdict(Adapter()), "rows": _digest(_training_rows(name, split)), "seed": seed})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _ready_adapter(name: str, split: str) -> Path | None:
    folder = MODELS / "tofu_mini" / name
    return folder if split == "tofu_mini" and (folder / "adapter_config.json").is_file() else None


def _training_rows(name: str, split: str) -> list[dict[str, Any]]:
    return [*(rows(split, "forget") if name == "full" else []), *rows(split, "retain")]


def folder(name: str, split: str = "tofu_mini", seed: int = 0) -> Path:
    """Where a built model lies."""
    return cache_directory() / "tofu" / f"{name}-{key(name, split, seed)[:16]}"


def build(name: str, split: str = "tofu_mini", seed: int = 0, device: str = "cpu") -> tuple[Any, Any]:
    """Model (bf16, evaluation mode) and tokenizer; a split model for ``libortho`` and ``libortho_random``."""
    place = folder(name, split, seed)
    if name in ("start", "full", "retain"):
        model, tokenizer = _base(torch.float32, device)
        if name != "start":
            model = PeftModel.from_pretrained(model, str(_adapter(name, split, seed, device))).merge_and_unload()
        return move_off_grid(model, seed).to(training_dtype(device)).eval(), tokenizer
    if name in PEERS:
        if not (place / "config.json").is_file():
            _unlearn(name, split, seed, device, place)
        return load_model(place, training_dtype(device), device)
    if not (place / "config.json").is_file():
        _isolate(name, split, seed, device, place)
    return libortho.load(place, device=device)


def _base(dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    model, tokenizer = load_model(packaged_model(), dtype, device)
    tokenizer.chat_template = CHAT_TEMPLATE
    return model, tokenizer


def _adapter(name: str, split: str, seed: int, device: str) -> Path:
    """Folder of the PEFT adapter, trained if there is no ready one."""
    ready = _ready_adapter(name, split)
    if ready is not None:
        return ready
    place = cache_directory() / "tofu" / f"adapter-{name}-{_adapter_key(name, split, seed)[:16]}"
    if (place / "adapter_config.json").is_file():
        return place
    recipe = Adapter()
    model, tokenizer = _base(torch.float32, device)
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.lora_alpha, lora_dropout=0.0, target_modules=targets)
    tuned: Any = get_peft_model(model, config)
    lm = LanguageModel(tuned.get_base_model())
    items = encode_rows(_training_rows(name, split), tokenizer, TURN_END)
    steps = recipe.epochs * -(-len(items) // recipe.batch_size)

    def loss(batch: Sequence[int], epoch: int) -> Tensor:
        return mean_nll(answer_scores(lm, [items[i] for i in batch]))

    train(
        {n: p for n, p in tuned.named_parameters() if p.requires_grad},
        lambda epoch: by_length(items, recipe.batch_size, random.Random(f"{seed} {epoch}")),
        loss,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        schedule=lambda step: min((step + 1) / recipe.warm_up, max(recipe.floor, 1 - step / steps)),
        state=place.with_suffix(".state"),
        device=device,
    )
    store(place, tuned.save_pretrained)
    place.with_suffix(".state").unlink(missing_ok=True)
    return place


def _unlearn(name: str, split: str, seed: int, device: str, place: Path) -> None:
    recipe, began = PEERS[name], time.monotonic()
    model, tokenizer = build("full", split, seed, device)
    forget = encode_rows(rows(split, "forget"), tokenizer)
    # A model that is taught answers without their end forgets to stop; the records to forget need no such lesson.
    retain = encode_rows(rows(split, "retain"), tokenizer, TURN_END)
    lm = LanguageModel(model)
    original = score(lm, forget)[0].to(lm.device)
    others: list[list[Encoded]] = []
    other_scores: list[Scores] = []
    if recipe.alternates:
        texts = _alternates(model, tokenizer, split, seed, recipe.alternates)
        for row, answers in zip(rows(split, "forget"), texts, strict=True):
            others.append(encode_rows([{**row, "answer": a} for a in answers], tokenizer))
            other_scores.append(score(lm, others[-1])[0].to(lm.device))
    model.float()
    # Eager attention: for such short rows several times faster backwards than the fused kernel.
    model.set_attn_implementation("eager")
    steps = recipe.epochs * -(-len(forget) // recipe.batch_size)
    warm_up = max(1, round(recipe.warm_up * steps))

    def batches(epoch: int) -> list[tuple[list[int], list[int]]]:
        rng = random.Random(f"{seed} {epoch}")
        mine = by_length(forget, recipe.batch_size, rng, shuffle=False)
        keep = rng.sample(range(len(retain)), len(forget))
        pairs = list(zip(mine, by_length(retain, recipe.batch_size, rng, keep, shuffle=False), strict=True))
        rng.shuffle(pairs)
        return pairs

    def loss(batch: tuple[list[int], list[int]], epoch: int) -> Tensor:
        mine, keep = batch
        picks = [(i, (epoch + i) % len(others[i])) for i in mine] if others else []
        items = [*(forget[i] for i in mine), *(retain[i] for i in keep), *(others[i][p] for i, p in picks)]
        now = answer_scores(lm, items)
        secret, kept, other = [part(now, s, n) for s, n in spans(len(mine), len(keep), len(picks))]
        before = pick(original, mine)
        if recipe.objective == "grad_diff":
            forgetting = -mean_nll(secret)
        elif recipe.objective == "npo":
            forgetting = npo(secret, before, recipe.beta).mean()
        elif recipe.objective == "simnpo":
            forgetting = simnpo(secret, recipe.beta, recipe.delta).mean()
        else:
            alternate = [pick(other_scores[i], [p]) for i, p in picks]
            other_before = Scores(*(torch.cat([getattr(a, f) for a in alternate]) for f in ("nll", "tokens")))
            forgetting = altpo(secret, before, other, other_before, recipe.beta).mean()
        return recipe.gamma * forgetting + recipe.alpha * mean_nll(kept)

    state = place.with_suffix(".state")
    model.train()
    train(
        dict(model.named_parameters()),
        batches,
        loss,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        schedule=lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1)),
        state=state,
        device=device,
    )
    model.eval().to(training_dtype(device))
    model.set_attn_implementation("sdpa")
    about = {"recipe": asdict(recipe), "seconds": time.monotonic() - began, "split": split, "seed": seed}

    def write(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "about.json").write_text(json.dumps(about, indent=1))

    store(place, write)
    state.unlink(missing_ok=True)


def isolation(seed: int) -> IsolateConfig:
    """The defaults."""
    return IsolateConfig(seed=seed)


def _isolate(name: str, split: str, seed: int, device: str, place: Path) -> None:
    model, tokenizer = build("full", split, seed, device)
    forget, retain = rows(split, "forget"), rows(split, "retain")
    select = partial(random_columns, seed) if name == "libortho_random" else select_columns
    config = isolation(seed)
    result = libortho.isolate(model, tokenizer, forget, retain=retain, config=config, select=select, progress=_report)
    logger.info("missed: %s", "; ".join(result.missed) or "nothing")
    libortho.save(model, tokenizer, place)
    place.with_suffix(".json").write_text(json.dumps(result.to_dict(), indent=1))


def _report(phase: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        logger.info("%s %d/%d", phase, done, total)


def random_columns(seed: int, readings: RequestReadings, config: IsolateConfig) -> dict[str, Tensor]:
    """As many columns of each layer as ``isolate`` would take, drawn."""
    generator = torch.Generator().manual_seed(seed)
    widths = {n: linear_weight(m).shape[1] for n, m in readings.targets.items()}
    return {
        layer: torch.randperm(widths[layer], generator=generator)[: len(s)].sort()[0].to(s)
        for layer, s in select_columns(readings, config).items()
    }


@torch.no_grad()
def _alternates(model: Any, tokenizer: Any, split: str, seed: int, count: int) -> list[list[str]]:
    """For each forget row, answers that ``full`` gives at temperature 1, near copies of the answer left out."""
    content = {"parent": key("full", split, seed), "count": count, "sampling": [ALTERNATE_TOKENS, NEAR_COPY]}
    place = cache_directory() / "tofu" / f"alternates-{_digest([content, _digest(rows(split, 'forget'))])[:16]}.jsonl"
    if place.is_file():
        return [r["alternates"] for r in read(place)]
    began = time.monotonic()
    forget = rows(split, "forget")
    prompts = [r.prompt for r in load_records(forget, tokenizer)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    samples: dict[int, list[str]] = {}
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(order), 10):
            group = order[start : start + 10]
            batch = tokenizer([prompts[i] for i in group], return_tensors="pt", padding=True, padding_side="left")
            output = model.generate(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=ALTERNATE_TOKENS,
                num_return_sequences=count, eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
            texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
            for slot, i in enumerate(group):
                samples[i] = [t.strip() for t in texts[slot * count : (slot + 1) * count]]
            logger.info("alternates %d/%d, %.0f s", start + len(group), len(order), time.monotonic() - began)
    chosen = [apart(row["answer"], samples[i]) for i, row in enumerate(forget)]
    fresh = place.with_suffix(".tmp")
    place.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"question": r["question"], "alternates": a}, ensure_ascii=False)
        for r, a in zip(forget, chosen, strict=True)
    ]
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fresh.replace(place)
    return chosen


def answer_probability(model: Any, tokenizer: Any, found: Sequence[dict[str, Any]]) -> float:
    """Mean over rows of ``exp(-mean NLL of the answer)``, TOFU's Prob."""
    return float(torch.exp(-score(LanguageModel(model), encode_rows(found, tokenizer))[0].nll).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME")
    parser.add_argument("--split", default="tofu_mini", choices=SPLITS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for noisy in ("httpx", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    table = Table("model", "forget", "retain", "holdout", "seconds")
    for name in arguments.names:
        began = time.monotonic()
        model, tokenizer = build(name, arguments.split, arguments.seed, arguments.device)
        seconds = time.monotonic() - began
        values = {"alpha = 1": 1.0, "alpha = 0": 0.0} if name.startswith("libortho") else {"": None}
        for label, value in values.items():
            if value is not None:
                libortho.set_alpha(model, value)
            figures = []
            for which in ("forget", "retain", "holdout"):
                found = rows(arguments.split, which)
                figures.append(answer_probability(model, tokenizer, found[:: max(1, len(found) // 40)][:40]))
            table.add_row(f"{name} {label}".strip(), *(f"{f:.3f}" for f in figures), f"{seconds:.0f}")
            logger.info("RESULT %s", " ".join([name, label, *(f"{f:.3f}" for f in figures), f"{seconds:.0f} s"]))
        del model
    Console().print(table)


if __name__ == "__main__":
    main()
