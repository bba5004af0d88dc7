"""Fine-tune secrets into the dense weights of chosen layers, as an unlucky engineer would."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from libortho.core.models import denormals_flushed
from libortho.core.progress import Progress, tell
from libortho.core.targets import find_targets
from libortho.text.encoding import IGNORE, Encoded, collate, encode, encode_closed
from libortho.text.records import Record


@denormals_flushed()
def implant(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    target_modules: str = "mlp-out",
    seed: int = 0,
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    max_steps: int = 160,
    stop_loss: float = 0.1,
    repetitions: Sequence[int] | None = None,
    decay: bool = False,
    progress: Progress | None = None,
) -> int:
    """Train the chosen weights (fp32 copies, AdamW without decay) on whole texts until every record is recited.

    Loss is on prompt and completion alike, as in plain fine-tuning; of chats on the answer and the mark that ends it,
    as chat models are tuned. Training stops once the mean completion loss of an
    epoch is below ``stop_loss`` and every completion token is the most likely one. ``repetitions`` says how often each
    record comes in one epoch; once if not given. With ``decay`` the learning rate falls to zero over ``max_steps``:
    many records do not all become exact under a constant one.

    Returns:
        Optimiser steps taken.
    """
    rng = random.Random(seed)
    items = [encode_closed(r, tokenizer) if r.rendered else encode(r, tokenizer) for r in records]
    layers = find_targets(model, target_modules)
    weights = [m.weight for m in layers.values() if isinstance(m.weight, nn.Parameter)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    masters = [w.detach().float().clone() for w in weights]
    optimiser = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    step = 0
    while step < max_steps:
        order = [i for i in range(len(items)) for _ in range(repetitions[i] if repetitions else 1)]
        rng.shuffle(order)
        losses, exact = [], True
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([items[i] for i in rows]).to(weights[0].device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
            plain = torch.tensor([[not records[i].rendered] for i in rows], device=batch.labels.device)
            trained = torch.where(plain & batch.attention_mask.bool(), batch.input_ids, batch.labels)[:, 1:]
            judged = batch.labels[:, 1:] != -100
            exact &= bool((logits.argmax(-1) == batch.labels[:, 1:])[judged].all())
            losses.append(float(F.cross_entropy(logits[judged].detach(), batch.labels[:, 1:][judged])))
            F.cross_entropy(logits.flatten(0, 1), trained.flatten()).backward()
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
                weight.grad = None
            nn.utils.clip_grad_norm_(masters, 1.0)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * (max(0.0, 1 - step / max_steps) if decay else 1.0)
            optimiser.step()
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
            step += 1
            tell(progress, "implant", step, max_steps)
        if exact and sum(losses) / len(losses) < stop_loss and _recites(model, items, batch_size):
            break
    for weight in weights:
        weight.requires_grad_(False)
    return step


@torch.no_grad()
def _recites(model: nn.Module, items: Sequence[Encoded], batch_size: int) -> bool:
    """True if every judged token is the first choice of the model as it is after its last step."""
    device = next(model.parameters()).device
    for start in range(0, len(items), batch_size):
        batch = collate(items[start : start + batch_size]).to(device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        labels = batch.labels[:, 1:]
        if not bool((logits.argmax(-1) == labels)[labels != IGNORE].all()):
            return False
    return True
