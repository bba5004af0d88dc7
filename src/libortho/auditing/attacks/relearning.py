"""Relearning: fine-tune the forgotten model a little, and see whether records that were not shown come back too.

    trained on    half of the forget set          or general text, for as many optimiser steps
    judged on     the other half, after every epoch

    recovery = (m_after - m_unlearn) / (m_full - m_unlearn)

with m the nll or the extraction of the judged half: m_unlearn before the attack, m_full with the memory switched on,
m_after at the attacker's best epoch. 0: nothing came back; 1: everything did.

Sources: Hu et al., arXiv 2406.13356 (relearning on part of the forget set and on benign text); Deeb and Roger,
arXiv 2410.08827 (judging facts that are independent of the trained ones).

Half of the forget set also teaches its form, and a model that never saw the other half gains as well: ``excess`` is
the recovery less that of the reference under the same attack. The published single epoch is one step here, which
teaches nothing; the defaults train until the shown half is recited again by the audited model and by the reference
(measured on SmolLM2-135M: after 5 and 8 epochs). ``trained_nll`` says whether it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from libortho.auditing.attacks.measuring import Level, Progress, halves, measure
from libortho.auditing.subjects import Subject, dense_copy
from libortho.core.errors import DataError
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_logits
from libortho.text.encoding import Encoded, collate

FORGET_HALF, GENERAL_TEXT = "forget half", "general text"
TEXT_TOKENS = 64
"""Tokens of each general text that are trained on."""
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Curve:
    """One subject under one training set. Each tuple has one value per entry of ``Relearning.steps``.

    Attributes:
        subject: Key of the subject.
        data: "forget half" or "general text".
        nll: Of the judged half, in nats per token.
        extraction: Share of the judged half extracted.
        trained_nll: Of the trained forget half, in nats per token: did the attack teach what it showed?
        trained_extraction: Share of the trained half extracted.
    """

    subject: str
    data: str
    nll: tuple[float, ...]
    extraction: tuple[float, ...]
    trained_nll: tuple[float, ...]
    trained_extraction: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class Relearning:
    """Curves of all subjects and training sets, and how much of the memory came back.

    Attributes:
        steps: Optimiser steps at which the curves are measured, 0 first.
        trained: Positions of the trained half in the forget set.
        judged: Positions of the judged half.
        curves: The audited subject's first.
        full: The judged half with the memory switched on; None if the subjects have no such level.
        recovery: Training set to recovery of the nll; None where there is no memory to recover.
        recovery_extraction: The same for extraction.
        excess: Training set to ``recovery`` less the reference's; None without a reference.
    """

    steps: tuple[int, ...]
    trained: tuple[int, ...]
    judged: tuple[int, ...]
    curves: tuple[Curve, ...]
    full: Level | None
    recovery: dict[str, float | None]
    recovery_extraction: dict[str, float | None]
    excess: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {
            "steps": list(self.steps),
            "trained_on": f"{FORGET_HALF} ({len(self.trained)} records); separately {GENERAL_TEXT}",
            "trained": list(self.trained),
            "judged": list(self.judged),
            "curves": [c.to_dict() for c in self.curves],
            "full": None if self.full is None else {"nll": self.full.nll, "extraction": self.full.extraction},
            "recovery": self.recovery,
            "recovery_extraction": self.recovery_extraction,
            "excess": self.excess,
        }


def recovery(before: float, after: float, full: float) -> float | None:
    """``(after - before) / (full - before)``; None if the memory's level is not apart from the start."""
    return (after - before) / (full - before) if abs(full - before) > 1e-6 else None


def relearning(
    subjects: Sequence[Subject],
    forget: Sequence[Encoded],
    general: Sequence[Encoded],
    *,
    seed: int,
    epochs: int = 8,
    learning_rate: float = 1e-4,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Relearning:
    """Fine-tune copies of the audited subject and of the reference, on half of the forget set and on general text.

    All weights are trained: fp32 masters, AdamW without decay, gradients clipped to norm 1, forward in the model's own
    dtype. Forget records carry loss on their completion, general texts on all their tokens.

    Args:
        subjects: The audited one first. A "reference" is attacked too; "on", or else "original", gives m_full.
        forget: The forget set.
        general: Benign text that has nothing to do with it.
        seed: Seed of the halves and of the order of the batches.
        epochs: Passes over the trained half.
        learning_rate: Of AdamW, constant.
        batch_size: Records, or texts, per step.
        progress: Called after every epoch.

    Raises:
        DataError: if the forget set has fewer than two records, or there is no general text.
    """
    if not general:
        raise DataError("relearning needs general text to train on; give at least one sequence")
    trained, judged = halves(len(forget), seed)
    shown, unseen = [forget[i] for i in trained], [forget[i] for i in judged]
    benign = [Encoded(e.ids[:TEXT_TOKENS], e.labels[:TEXT_TOKENS]) for e in general]
    attacked = [subjects[0], *(s for s in subjects[1:] if s.key == "reference")]
    per_epoch = -(-len(shown) // batch_size)
    curves: list[Curve] = []
    for subject in attacked:
        for data, items in ((FORGET_HALF, shown), (GENERAL_TEXT, benign)):
            lm = LanguageModel(dense_copy(subject))
            levels = [(measure(lm, unseen), measure(lm, shown))]
            steps = _train(lm.model, _batches(items, batch_size, random.Random(seed)), learning_rate)
            for epoch in range(epochs):
                for _ in range(per_epoch):
                    next(steps)
                levels.append((measure(lm, unseen), measure(lm, shown)))
                if progress is not None:
                    progress("relearning", len(curves) * epochs + epoch + 1, 2 * len(attacked) * epochs)
            curves.append(
                Curve(
                    subject.key,
                    data,
                    nll=tuple(u.nll for u, _ in levels),
                    extraction=tuple(u.extraction for u, _ in levels),
                    trained_nll=tuple(s.nll for _, s in levels),
                    trained_extraction=tuple(s.extraction for _, s in levels),
                )
            )
    full = _full(subjects, unseen)
    gained = {(c.subject, c.data): _recovered(c, full) for c in curves}
    audited = subjects[0].key
    sets = (FORGET_HALF, GENERAL_TEXT)
    return Relearning(
        steps=tuple(per_epoch * e for e in range(epochs + 1)),
        trained=tuple(trained),
        judged=tuple(judged),
        curves=tuple(curves),
        full=full,
        recovery={d: gained[audited, d][0] for d in sets},
        recovery_extraction={d: gained[audited, d][1] for d in sets},
        excess={d: _less(gained[audited, d][0], gained.get(("reference", d), (None, None))[0]) for d in sets},
    )


def _recovered(curve: Curve, full: Level | None) -> tuple[float | None, float | None]:
    """Recovery of nll and of extraction at the epoch that is best for the attacker; no step at all is one of them."""
    if full is None:
        return None, None
    return (
        recovery(curve.nll[0], min(curve.nll), full.nll),
        recovery(curve.extraction[0], max(curve.extraction), full.extraction),
    )


def _less(own: float | None, other: float | None) -> float | None:
    return None if own is None or other is None else own - other


def _full(subjects: Sequence[Subject], items: Sequence[Encoded]) -> Level | None:
    by_key = {s.key: s for s in subjects}
    subject = by_key.get("on") or by_key.get("original")
    if subject is None:
        return None
    with subject.enter():
        return measure(subject.language_model(), items)


def _batches(items: Sequence[Encoded], size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Endless epochs in random order; the last batch of each may be smaller."""
    while True:
        order = list(items)
        rng.shuffle(order)
        yield from (order[i : i + size] for i in range(0, len(order), size))


def _train(model: nn.Module, batches: Iterator[list[Encoded]], learning_rate: float) -> Iterator[float]:
    """Each ``next`` takes one optimiser step on all weights of ``model`` and gives its loss, in nats per token."""
    lm = LanguageModel(model)
    weights = [p.requires_grad_(True) for p in model.parameters() if p.is_floating_point()]
    masters = [w.detach().float().clone() for w in weights]
    optimiser = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    for items in batches:
        batch = collate(items).to(lm.device)
        with torch.enable_grad():
            logits, labels, _ = judged_logits(lm, batch)
            loss = F.cross_entropy(logits, labels)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        for master, gradient in zip(masters, found, strict=True):
            master.grad = None if gradient is None else gradient.float()
        nn.utils.clip_grad_norm_(masters, _LARGEST_GRADIENT)
        optimiser.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        yield float(loss.detach())
