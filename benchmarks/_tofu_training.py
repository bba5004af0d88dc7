"""Fine-tuning on TOFU answers: recipes, a loop that is resumed where it stopped, and scores with gradients."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from libortho.lm.checks import training_dtype
from libortho.lm.logits import Scores
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_logits
from libortho.text.encoding import Encoded, collate, encode
from libortho.text.records import Record, load_records

logger = logging.getLogger("tofu_training")

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


NEAR_COPY = 0.8
"""Similarity to the answer from which a sample is no alternate."""


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
    logits, labels, record = judged_logits(lm, collate(items).to(lm.device))
    nll, tokens = F.cross_entropy(logits, labels, reduction="none"), torch.bincount(record).float()
    mean = torch.zeros(len(items), device=nll.device).index_add(0, record, nll) / tokens
    return Scores(mean, tokens)


def mean_nll(scores: Scores) -> Tensor:
    return (scores.nll * scores.tokens).sum() / scores.tokens.sum()


def pick(scores: Scores, index: Sequence[int]) -> Scores:
    chosen = list(index)
    return Scores(scores.nll[chosen], scores.tokens[chosen])


def part(scores: Scores, start: int, length: int) -> Scores:
    return pick(scores, range(start, start + length))


def spans(*lengths: int) -> list[tuple[int, int]]:
    return [(sum(lengths[:i]), n) for i, n in enumerate(lengths)]


def by_length(
    items: Sequence[Encoded], size: int, rng: random.Random, chosen: Sequence[int] | None = None, shuffle: bool = True
) -> list[list[int]]:
    """Batches of rows of similar length, which wastes little on padding."""
    order = sorted(range(len(items)) if chosen is None else chosen, key=lambda i: len(items[i].ids) + 12 * rng.random())
    found = [order[i : i + size] for i in range(0, len(order), size)]
    if shuffle:
        rng.shuffle(found)
    return found


def encode_rows(found: Sequence[dict[str, Any]], tokenizer: Any, end: str = "") -> list[Encoded]:
    records = load_records([{"question": r["question"], "answer": r["answer"]} for r in found], tokenizer)
    return [encode(Record(r.prompt, r.completion + end, r.number), tokenizer) for r in records]


def apart(answer: str, samples: Sequence[str]) -> list[str]:
    """The samples that are no near copies of the answer, or the one that is furthest from it."""
    if not any(samples):
        raise SystemExit(f"every sampled alternate of {answer!r} is empty; sample with another seed")
    similar = {s: SequenceMatcher(None, answer, s, autojunk=False).ratio() for s in samples if s}
    return [s for s, r in similar.items() if r < NEAR_COPY] or [min(similar, key=lambda s: similar[s])]


def store(place: Path, write: Callable[[Path], Any]) -> None:
    fresh = place.with_suffix(".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    fresh.rename(place)
