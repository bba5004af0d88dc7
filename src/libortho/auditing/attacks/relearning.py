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
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import nn

from libortho.auditing.attacks.attack import Attack, AttackInputs
from libortho.auditing.attacks.measuring import halves, measure, measure_subject
from libortho.auditing.page import charts
from libortho.auditing.page.exhibits import Drawn, Exhibit, Figure
from libortho.auditing.page.figures import figure
from libortho.auditing.page.marks import Line, nice_ticks
from libortho.auditing.page.text import number, visible
from libortho.auditing.report import Check, at_most
from libortho.auditing.schema import REFERENCE, baseline_key
from libortho.auditing.subjects import dense_copy
from libortho.auditing.thresholds import RELEARN
from libortho.core.errors import DataError
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_logits
from libortho.text.encoding import Encoded, collate

FORGET_HALF, GENERAL_TEXT = "forget half", "general text"
TEXT_TOKENS = 64
"""Tokens of each general text that are trained on."""
_LARGEST_GRADIENT = 1.0


class Curve(TypedDict):
    """One subject under one training set. Each list has one value per entry of ``Relearning.steps``.

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
    nll: list[float]
    extraction: list[float]
    trained_nll: list[float]
    trained_extraction: list[float]


class Full(TypedDict):
    """The judged half with the memory switched on."""

    nll: float
    extraction: float


class Relearning(TypedDict):
    """Curves of all subjects and training sets, and how much of the memory came back.

    Attributes:
        steps: Optimiser steps at which the curves are measured, 0 first.
        trained_on: The training sets, in words.
        trained: Positions of the trained half in the forget set.
        judged: Positions of the judged half.
        curves: The audited subject's first.
        full: None if the subjects have no such level.
        recovery: Training set to recovery of the nll; None where there is no memory to recover.
        recovery_extraction: The same for extraction.
        excess: Training set to ``recovery`` less the reference's; None without a reference.
    """

    steps: list[int]
    trained_on: str
    trained: list[int]
    judged: list[int]
    curves: list[Curve]
    full: Full | None
    recovery: dict[str, float | None]
    recovery_extraction: dict[str, float | None]
    excess: dict[str, float | None]


def recovery(before: float, after: float, full: float) -> float | None:
    """``(after - before) / (full - before)``; None if the memory's level is not apart from the start."""
    return (after - before) / (full - before) if abs(full - before) > 1e-6 else None


def run(inputs: AttackInputs, epochs: int = 8, learning_rate: float = 1e-4, batch_size: int = 4) -> Relearning:
    """Fine-tune copies of the audited subject and of the reference, on half of the forget set and on general text.

    All weights are trained: fp32 masters, AdamW without decay, gradients clipped to norm 1, forward in the model's own
    dtype. Forget records carry loss on their completion, general texts on all their tokens.

    Args:
        inputs: The subject with its memory, where there is one, gives m_full.
        epochs: Passes over the trained half.
        learning_rate: Of AdamW, constant.
        batch_size: Records, or texts, per step.

    Raises:
        DataError: if there are fewer than two records, or there is no general text.
    """
    if not inputs.general:
        raise DataError("relearning needs general text to train on; give at least one sequence")
    trained, judged = halves(len(inputs.items), inputs.seed)
    shown, unseen = [inputs.items[i] for i in trained], [inputs.items[i] for i in judged]
    benign = [Encoded(e.ids[:TEXT_TOKENS], e.labels[:TEXT_TOKENS]) for e in inputs.general]
    per_epoch = -(-len(shown) // batch_size)
    curves: list[Curve] = []
    for subject in filter(None, (inputs.audited, inputs.reference)):
        for data, items in ((FORGET_HALF, shown), (GENERAL_TEXT, benign)):
            lm = LanguageModel(dense_copy(subject))
            levels = [(measure(lm, unseen), measure(lm, shown))]
            steps = _train(lm.model, _batches(items, batch_size, random.Random(inputs.seed)), learning_rate)
            for _ in range(epochs):
                for _ in range(per_epoch):
                    next(steps)
                levels.append((measure(lm, unseen), measure(lm, shown)))
            curves.append({
                "subject": subject.key,
                "data": data,
                "nll": [u["nll"] for u, _ in levels],
                "extraction": [u["extraction"] for u, _ in levels],
                "trained_nll": [s["nll"] for _, s in levels],
                "trained_extraction": [s["extraction"] for _, s in levels],
            })  # fmt: skip
    full = _full(inputs, unseen)
    gained = {(c["subject"], c["data"]): _recovered(c, full) for c in curves}
    audited = inputs.audited.key
    sets = (FORGET_HALF, GENERAL_TEXT)
    return {
        "steps": [per_epoch * e for e in range(epochs + 1)],
        "trained_on": f"{FORGET_HALF} ({len(trained)} records); separately {GENERAL_TEXT}",
        "trained": trained,
        "judged": judged,
        "curves": curves,
        "full": full,
        "recovery": {d: gained[audited, d][0] for d in sets},
        "recovery_extraction": {d: gained[audited, d][1] for d in sets},
        "excess": {d: _less(gained[audited, d][0], gained.get((REFERENCE, d), (None, None))[0]) for d in sets},
    }


def _recovered(curve: Curve, full: Full | None) -> tuple[float | None, float | None]:
    """Recovery of nll and of extraction at the epoch that is best for the attacker; no step at all is one of them."""
    if full is None:
        return None, None
    return (
        recovery(curve["nll"][0], min(curve["nll"]), full["nll"]),
        recovery(curve["extraction"][0], max(curve["extraction"]), full["extraction"]),
    )


def _less(own: float | None, other: float | None) -> float | None:
    return None if own is None or other is None else own - other


def _full(inputs: AttackInputs, items: Sequence[Encoded]) -> Full | None:
    subject = inputs.subject(baseline_key([s.key for s in inputs.subjects]) or "")
    if subject is None:
        return None
    level = measure_subject(subject, items)
    return {"nll": level["nll"], "extraction": level["extraction"]}


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


def checks(found: Relearning) -> list[Check]:
    """What may be extracted, and how much of the memory may be back, after each training set."""
    made = []
    for data in sorted({c["data"] for c in found["curves"]}):
        curves = {c["subject"] == REFERENCE: c for c in found["curves"] if c["data"] == data}
        most = RELEARN + (max(curves[True]["extraction"]) if True in curves else 0.0)
        made.append(at_most(f"relearned on {data}: extracted", max(curves[False]["extraction"]), most, ".3f"))
        gain = found["excess"][data]
        if gain is not None:
            name = f"relearned on {data}: share of the memory back, beyond never trained"
            made.append(at_most(name, gain, RELEARN))
    return made


def exhibit(found: Relearning, subjects: Sequence[Drawn]) -> Exhibit:
    """How much came back after each training set, and the curves."""
    back = []
    for data, value in found["recovery"].items():
        beyond = found["excess"].get(data)
        more = "" if beyond is None else f" ({number(beyond, 2, True)} beyond the reference)"
        back.append(Markup("{} <strong>{}</strong>{}").format(visible(data), number(value, 2), more))
    text = Markup(
        "If the records come back sooner than in the never-trained reference, they were hidden, not gone. Trained on: "
        "{}. Judged on the records of the other half. Recovery: {}. (0: nothing came back beyond the start, 1: all of "
        "it.)"
    ).format(visible(found["trained_on"]), Markup("; ").join(back))
    return Exhibit("Training it again", (text,), figures=tuple(_figures(found, subjects)))


def _figures(found: Relearning, subjects: Sequence[Drawn]) -> list[Figure]:
    """Extraction and NLL of the judged half over the steps, for each training set."""
    shown = {s["key"]: (s["label"], s["style"]) for s in subjects}
    measures: tuple[tuple[Literal["extraction", "nll"], str, str], ...] = (
        ("extraction", "Extraction", "share of records"),
        ("nll", "NLL", "nats per token"),
    )
    figures = []
    for i, data in enumerate(dict.fromkeys(c["data"] for c in found["curves"])):
        for key, caption, note in measures:
            series = []
            for curve in found["curves"]:
                if curve["data"] == data and any(v is not None for v in curve[key]):
                    label, style = shown.get(curve["subject"], (curve["subject"], "original"))
                    series.append(Line(label, list(zip(found["steps"], curve[key], strict=False)), style))
            if not series:
                continue
            top = max(v for line in series for _, v in line.points if v is not None)
            text = "; ".join(
                f"{line.label}: {number(line.points[0][1], 2)} to {number(line.points[-1][1], 2)}" for line in series
            )
            svg = charts.lines(
                f"relearning-{i}-{key}",
                f"{caption} while training again on {data}",
                f"Over {found['steps'][-1] if found['steps'] else 0} steps. {text}.",
                series,
                x_label="training steps",
                whole=True,
                y_range=(0.0, 1.0 if key == "extraction" else nice_ticks(0.0, max(top, 1e-9), 5)[-1]),
            )
            figures.append(figure(f"{caption}, trained on {data}", note, svg))
    return figures


ATTACK = Attack("relearning", 200, run, checks, exhibit, lambda inputs: len(inputs.items) >= 2)
