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
and the seed. Training of aligned_controls and adapters resumes at the last finished epoch.

Rows come from ``$LIBORTHO_DATA/{tofu,tofu_mini}``, ready adapters from ``$LIBORTHO_MODELS/tofu_mini/{full,retain}``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import libortho
from _common import DATA, MODELS
from libortho import IsolateConfig
from libortho.checkpoint.dense import load_model
from libortho.core.cache import cache_directory
from libortho.core.surgery import linear_weight
from libortho.demo.model import GGUF, move_off_grid, packaged_model
from libortho.isolation.support import select_columns
from libortho.lm.checks import training_dtype
from libortho.lm.logits import Scores
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.encoding import Encoded, collate, encode
from libortho.text.records import Record, load_records
from objectives import altpo, npo, simnpo

logger = logging.getLogger("tofu_models")

SPLITS = {"tofu_mini": None, "forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
HOLDOUT = slice(3200, 3600)
"""Rows of the original ``full`` that no model here is trained on, for membership tests; TOFU has no holdout."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The model's own without the default system message, which the fine-tuned models have not seen."""
TURN_END = "<|im_end|>"


@dataclass(frozen=True)
class Adapter:
    """LoRA fine-tuning on all linear layers, loss on answers and the end of turn."""

    rank: int = 16
    lora_alpha: int = 32
    learning_rate: float = 1e-3
    floor: float = 0.05
    weight_decay: float = 0.0
    warm_up: int = 30
    batch_size: int = 16
    epochs: int = 6


@dataclass(frozen=True)
class Peer:
    """All-weight unlearning: ``gamma * forget loss + alpha * NLL on as many retain rows``.

    Learning rates and weights are the best of the published grid (Llama-3.2-1B, forget10, batch 32: 10 epochs = 125
    steps; grad_diff 5 epochs = 62). Here a batch of 4 gives about as many steps (150; altpo and grad_diff 100) in fewer
    passes, and AdamW's step does not depend on the batch.
    """

    objective: str
    learning_rate: float
    alpha: float
    gamma: float = 1.0
    beta: float = 0.1
    delta: float = 0.0
    epochs: int = 3
    batch_size: int = 4
    weight_decay: float = 0.01
    warm_up: float = 0.1
    alternates: int = 0


PEERS = {
    # At the leaderboard's 2e-5 and alpha 5, two epochs left the forget answers at .579 of full's .610: adjusted
    # once. As it stands it overshoots (forget .008, retain .302 of .563), which is what unbounded ascent is known for.
    "grad_diff": Peer("grad_diff", 5e-5, alpha=1.0, epochs=3),
    "npo": Peer("npo", 5e-5, alpha=5.0),
    "simnpo": Peer("simnpo", 5e-5, alpha=1.0, gamma=0.125, beta=3.5, delta=1.0),
    "altpo": Peer("altpo", 5e-5, alpha=2.0, epochs=2, alternates=5),
}
NAMES = ("start", "full", "retain", *PEERS, "libortho", "libortho_random")
ALTERNATE_TOKENS, NEAR_COPY = 64, 0.8
"""Longest sampled alternate; similarity to the answer from which a sample is no alternate."""


def rows(split: str, which: str) -> list[dict[str, Any]]:
    """Rows of ``split`` with "question", "answer" and, if perturbed, TOFU's further fields.

    ``which``: forget, retain, holdout, forget_perturbed, retain_perturbed, real_authors_perturbed,
    world_facts_perturbed. For the original splits, retain (and what ``full`` is trained on) lacks the holdout.
    """
    if split not in SPLITS:
        raise SystemExit(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    mini = split == "tofu_mini"
    if which in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        return _read(DATA / "tofu" / f"{which}.jsonl")
    if which == "forget_perturbed":
        return _read(DATA / "tofu_mini" / f"{which}.jsonl" if mini else DATA / "tofu" / f"{split}_perturbed.jsonl")
    if which not in ("forget", "retain", "holdout"):
        raise SystemExit(f"which is {which!r}; expected forget, retain, holdout or one of the perturbed sets")
    if mini:
        return _read(DATA / "tofu_mini" / f"{which}.jsonl")
    holdout = _read(DATA / "tofu" / "full.jsonl")[HOLDOUT]
    if which == "holdout":
        return holdout
    found = _read(DATA / "tofu" / f"{split if which == 'forget' else SPLITS[split]}.jsonl")
    return [row for row in found if row not in holdout]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: set LIBORTHO_DATA to a directory that holds tofu/ and tofu_mini/")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


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
    items = _encode(_training_rows(name, split), tokenizer, TURN_END)
    steps = recipe.epochs * -(-len(items) // recipe.batch_size)

    def loss(batch: Sequence[int], epoch: int) -> Tensor:
        return _mean_nll(answer_scores(lm, [items[i] for i in batch]))

    train(
        {n: p for n, p in tuned.named_parameters() if p.requires_grad},
        lambda epoch: _by_length(items, recipe.batch_size, random.Random(f"{seed} {epoch}")),
        loss,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        schedule=lambda step: min((step + 1) / recipe.warm_up, max(recipe.floor, 1 - step / steps)),
        state=place.with_suffix(".state"),
        device=device,
    )
    _store(place, tuned.save_pretrained)
    place.with_suffix(".state").unlink(missing_ok=True)
    return place


def _unlearn(name: str, split: str, seed: int, device: str, place: Path) -> None:
    recipe, began = PEERS[name], time.monotonic()
    model, tokenizer = build("full", split, seed, device)
    forget = _encode(rows(split, "forget"), tokenizer)
    # A model that is taught answers without their end forgets to stop; the records to forget need no such lesson.
    retain = _encode(rows(split, "retain"), tokenizer, TURN_END)
    lm = LanguageModel(model)
    original = score(lm, forget)[0].to(lm.device)
    others: list[list[Encoded]] = []
    other_scores: list[Scores] = []
    if recipe.alternates:
        texts = _alternates(model, tokenizer, split, seed, recipe.alternates)
        for row, answers in zip(rows(split, "forget"), texts, strict=True):
            others.append(_encode([{**row, "answer": a} for a in answers], tokenizer))
            other_scores.append(score(lm, others[-1])[0].to(lm.device))
    model.float()
    # Eager attention: for such short rows several times faster backwards than the fused kernel.
    model.set_attn_implementation("eager")
    steps = recipe.epochs * -(-len(forget) // recipe.batch_size)
    warm_up = max(1, round(recipe.warm_up * steps))

    def batches(epoch: int) -> list[tuple[list[int], list[int]]]:
        rng = random.Random(f"{seed} {epoch}")
        mine = _by_length(forget, recipe.batch_size, rng, shuffle=False)
        keep = rng.sample(range(len(retain)), len(forget))
        pairs = list(zip(mine, _by_length(retain, recipe.batch_size, rng, keep, shuffle=False), strict=True))
        rng.shuffle(pairs)
        return pairs

    def loss(batch: tuple[list[int], list[int]], epoch: int) -> Tensor:
        mine, keep = batch
        picks = [(i, (epoch + i) % len(others[i])) for i in mine] if others else []
        items = [*(forget[i] for i in mine), *(retain[i] for i in keep), *(others[i][p] for i, p in picks)]
        now = answer_scores(lm, items)
        secret, kept, other = [_part(now, s, n) for s, n in _spans(len(mine), len(keep), len(picks))]
        before = _pick(original, mine)
        if recipe.objective == "grad_diff":
            forgetting = -_mean_nll(secret)
        elif recipe.objective == "npo":
            forgetting = npo(secret, before, recipe.beta).mean()
        elif recipe.objective == "simnpo":
            forgetting = simnpo(secret, recipe.beta, recipe.delta).mean()
        else:
            alternate = [_pick(other_scores[i], [p]) for i, p in picks]
            other_before = Scores(*(torch.cat([getattr(a, f) for a in alternate]) for f in ("nll", "tokens")))
            forgetting = altpo(secret, before, other, other_before, recipe.beta).mean()
        return recipe.gamma * forgetting + recipe.alpha * _mean_nll(kept)

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

    _store(place, write)
    state.unlink(missing_ok=True)


def isolation(seed: int) -> IsolateConfig:
    """Defaults, but retain text counts five times (as it does for NPO), and there is no
    decay: 200 answers need all that the budget can hold."""
    return IsolateConfig(seed=seed, retain_weight=5.0, max_steps=60, damping=0.003, decay=0.0)


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


def random_columns(seed: int, lm: LanguageModel, targets: dict[str, nn.Module], *others: Any) -> dict[str, Tensor]:
    """As many columns of each layer as ``isolate`` would take, drawn."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randperm(linear_weight(targets[layer]).shape[1], generator=generator)[: len(s)].sort()[0].to(s)
        for layer, s in select_columns(lm, targets, *others).items()
    }


def train(
    parameters: dict[str, Tensor],
    batches: Callable[[int], list[Any]],
    loss: Callable[[Any, int], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    schedule: Callable[[int], float],
    state: Path,
    device: str,
) -> None:
    """AdamW on fp32 parameters, gradients clipped to 1, under bf16 autocast where that is faster.

    Resumes after the last epoch in ``state``.

    Args:
        parameters: What is trained, by name.
        batches: Epoch to its batches; a pure function, so that a resumed run sees the same ones.
        loss: Of (batch, epoch).
        epochs: Passes over the data.
        learning_rate: Peak.
        weight_decay: Of AdamW.
        schedule: Step, from 0, to the share of the peak.
        state: File of parameters and moments.
        device: Where the parameters are.
    """
    torch.set_flush_denormal(True)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(list(parameters.values()), lr=learning_rate, weight_decay=weight_decay, fused=True)
    step = first = 0
    if state.is_file():
        first, step = _resume(state, parameters, optimiser)
        logger.info("resumed after epoch %d", first)
    began, dtype = time.monotonic(), training_dtype(device)
    for epoch in range(first, epochs):
        losses = []
        for batch in batches(epoch):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * schedule(step)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                value = loss(batch, epoch)
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
            optimiser.step()
            step += 1
            losses.append(float(value.detach()))
            if step % 5 == 0:
                mean = sum(losses[-5:]) / len(losses[-5:])
                logger.info("epoch %d step %d loss %.3f, %.0f s", epoch + 1, step, mean, time.monotonic() - began)
        if epoch + 1 < epochs:
            _keep(state, parameters, optimiser, epoch + 1, step)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None


def _keep(state: Path, parameters: dict[str, Tensor], optimiser: Any, epoch: int, step: int) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        moments = optimiser.state[parameter]
        tensors[name] = parameter.detach()
        tensors[f"{name}:m"], tensors[f"{name}:v"] = moments["exp_avg"], moments["exp_avg_sq"]
    state.parent.mkdir(parents=True, exist_ok=True)
    fresh = state.with_suffix(".tmp")
    save_file(tensors, fresh, metadata={"epoch": str(epoch), "step": str(step)})
    fresh.replace(state)


def _resume(state: Path, parameters: dict[str, Tensor], optimiser: Any) -> tuple[int, int]:
    with safe_open(state, "pt") as stored, torch.no_grad():
        epoch, step = (int(stored.metadata()[k]) for k in ("epoch", "step"))
        for name, parameter in parameters.items():
            parameter.copy_(stored.get_tensor(name))
            moments = {k: stored.get_tensor(f"{name}:{s}").to(parameter) for k, s in _MOMENTS.items()}
            optimiser.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
    return epoch, step


_MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}


def answer_scores(lm: LanguageModel, items: Sequence[Encoded]) -> Scores:
    """Scores of the answers, with gradients; logits only where they are judged."""
    batch = collate(items).to(lm.device)
    labels = batch.labels[:, 1:]
    judged = labels != -100
    nll = F.cross_entropy(lm.logits(lm.hidden(batch)[:, :-1][judged]), labels[judged], reduction="none")
    record = judged.nonzero()[:, 0]
    tokens = judged.sum(1).float()
    mean = torch.zeros(len(items), device=nll.device).index_add(0, record, nll) / tokens
    return Scores(mean, tokens)


def _mean_nll(scores: Scores) -> Tensor:
    return (scores.nll * scores.tokens).sum() / scores.tokens.sum()


def _pick(scores: Scores, index: Sequence[int]) -> Scores:
    chosen = list(index)
    return Scores(scores.nll[chosen], scores.tokens[chosen])


def _part(scores: Scores, start: int, length: int) -> Scores:
    return _pick(scores, range(start, start + length))


def _spans(*lengths: int) -> list[tuple[int, int]]:
    return [(sum(lengths[:i]), n) for i, n in enumerate(lengths)]


def _by_length(
    items: Sequence[Encoded], size: int, rng: random.Random, chosen: Sequence[int] | None = None, shuffle: bool = True
) -> list[list[int]]:
    """Batches of rows of similar length, which wastes little on padding."""
    order = sorted(range(len(items)) if chosen is None else chosen, key=lambda i: len(items[i].ids) + 12 * rng.random())
    found = [order[i : i + size] for i in range(0, len(order), size)]
    if shuffle:
        rng.shuffle(found)
    return found


def _encode(found: Sequence[dict[str, Any]], tokenizer: Any, end: str = "") -> list[Encoded]:
    records = load_records([{"question": r["question"], "answer": r["answer"]} for r in found], tokenizer)
    return [encode(Record(r.prompt, r.completion + end, r.number), tokenizer) for r in records]


@torch.no_grad()
def _alternates(model: Any, tokenizer: Any, split: str, seed: int, count: int) -> list[list[str]]:
    """For each forget row, answers that ``full`` gives at temperature 1, near copies of the answer left out."""
    content = {"parent": key("full", split, seed), "count": count, "sampling": [ALTERNATE_TOKENS, NEAR_COPY]}
    place = cache_directory() / "tofu" / f"alternates-{_digest([content, _digest(rows(split, 'forget'))])[:16]}.jsonl"
    if place.is_file():
        return [r["alternates"] for r in _read(place)]
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
    chosen = [_apart(row["answer"], samples[i]) for i, row in enumerate(forget)]
    fresh = place.with_suffix(".tmp")
    place.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"question": r["question"], "alternates": a}, ensure_ascii=False)
        for r, a in zip(forget, chosen, strict=True)
    ]
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fresh.replace(place)
    return chosen


def _apart(answer: str, samples: Sequence[str]) -> list[str]:
    """The samples that are no near copies of the answer, or the one that is furthest from it."""
    if not any(samples):
        raise SystemExit(f"every sampled alternate of {answer!r} is empty; sample with another seed")
    similar = {s: SequenceMatcher(None, answer, s, autojunk=False).ratio() for s in samples if s}
    return [s for s, r in similar.items() if r < NEAR_COPY] or [min(similar, key=lambda s: similar[s])]


def _store(place: Path, write: Callable[[Path], Any]) -> None:
    fresh = place.with_suffix(".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    fresh.rename(place)


def answer_probability(model: Any, tokenizer: Any, found: Sequence[dict[str, Any]]) -> float:
    """Mean over rows of ``exp(-mean NLL of the answer)``, TOFU's Prob."""
    return float(torch.exp(-score(LanguageModel(model), _encode(found, tokenizer))[0].nll).mean())


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
