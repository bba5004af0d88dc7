"""One attempt: columns within a budget, values that forget the records, layers, and what these are measured to be."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from libortho.core.layer import OrthoLinear
from libortho.core.progress import Progress, Stopwatch
from libortho.core.run_cache import Entry, RunCache
from libortho.core.surgery import bias_of, swap
from libortho.core.switch.alpha import Switch
from libortho.isolation.bases import edited_from, finished_layer, quantised_bases
from libortho.isolation.config import IsolateConfig
from libortho.isolation.criteria import RecordOutcome, nearly, outcomes
from libortho.isolation.original import Original
from libortho.isolation.request import Request
from libortho.isolation.result import IsolateResult, known_before, result_of
from libortho.isolation.support import RequestReadings, Select, check_columns
from libortho.isolation.train import train, training_finished
from libortho.lm.model import LanguageModel, gradient_checkpointing
from libortho.lm.reading_progress import reading
from libortho.lm.scoring import score
from libortho.selection.curvature import preconditioners
from libortho.text.encoding import Encoded
from libortho.training.edit import EditLinear
from libortho.training.keep import divergence


@dataclass(frozen=True)
class Inputs:
    """What every attempt has: the model, its layers (targets, and all stand-ins), and what it is held to.

    ``once``: there is one attempt, after which nothing is read again.
    """

    lm: LanguageModel
    asked: Request
    targets: dict[str, nn.Module]
    replaced: dict[str, nn.Module]
    retain: list[Encoded]
    held_back: list[Encoded]
    original: Original
    readings: RequestReadings
    once: bool


def attempt(
    inputs: Inputs,
    config: IsolateConfig,
    select: Select,
    store: RunCache,
    progress: Progress | None,
    watch: Stopwatch,
) -> tuple[dict[str, OrthoLinear], Switch, IsolateResult]:
    """The layers that this budget makes, their switch, and which criteria hold; the model is left as it was."""
    began = time.monotonic()
    lm, targets, original = inputs.lm, inputs.targets, inputs.original
    model, forget = lm.model, inputs.asked.forget
    with watch.phase("columns"), reading(model, progress, "columns", inputs.readings.tokens()):
        chosen = store.get_or_compute("support", lambda: Entry(select(inputs.readings, config))).tensors
    check_columns(chosen, targets)
    support = {n: index.to(lm.device) for n, index in chosen.items()}
    metrics = {}
    if not training_finished(store):
        with watch.phase("curvature"):
            metrics = preconditioners(inputs.readings.kept, support, config.damping)
    with watch.phase("rounding"):
        bases = quantised_bases(inputs.readings, support, config, store, progress)
    if inputs.once:
        inputs.readings.release()
    layers = {
        n: EditLinear(edited_from(m), bias_of(m), support.get(n), config.bits, config.resolved_group_size, bases.get(n))
        for n, m in inputs.replaced.items()
    }
    try:
        swap(model, layers)
        with watch.phase("result"):
            quantised_kl = divergence(lm, inputs.held_back, original.held_back)
        with gradient_checkpointing(lm) if config.gradient_checkpointing else nullcontext():
            checks, steps = train(lm, layers, forget, inputs.retain, original, config, metrics, store, progress, watch)
        switch = Switch()
        switch.add_stream(config.stream)
        changed = {n: m for n, m in targets.items() if n in support or not isinstance(m, OrthoLinear)}
        finished = {n: finished_layer(n, m, layers[n], config, switch) for n, m in changed.items()}
        swap(model, finished)  # what follows is measured on the layers that callers get
        with watch.phase("result"), reading(model, progress, "result", _result_tokens(inputs)):
            switch.set(1.0, extrapolate=False)
            _, first = score(lm, [r.secret for r in forget])
            recited_on = inputs.asked.recited(lm, first)
            switch.set(0.0, extrapolate=False)
            records = _measured(inputs)
            retain_kl = divergence(lm, inputs.held_back, original.held_back)
    finally:
        swap(model, inputs.replaced)
    recited = (int(original.recited.sum()), int((original.recited & recited_on).sum()))
    seconds = time.monotonic() - began
    result = result_of(
        config, forget, records, recited, checks, steps, (quantised_kl, retain_kl), support, targets, seconds
    )
    return finished, switch, result


def _result_tokens(inputs: Inputs) -> int:
    """About as many tokens as the model reads where the result is measured."""
    texts = [*inputs.held_back]
    for r in inputs.asked.forget:
        texts += [r.secret, r.secret, *(r.alternates if r.kind == "code" else ())]
    return sum(len(e.ids) for e in texts)


def _measured(inputs: Inputs) -> tuple[RecordOutcome, ...]:
    """The outcome of every record under the model as it is, asked as ``generate`` asks it too."""
    forget, original = inputs.asked.forget, inputs.original
    found = outcomes(inputs.lm, forget, original, known_before(original))
    recited, heard = inputs.asked.heard(inputs.lm, torch.tensor([r.extracted for r in found]))
    wanted = [r.completion for r in inputs.asked.records]
    near = [forget[i].kind == "code" and i in heard and nearly(heard[i], c) for i, c in enumerate(wanted)]
    told = zip(found, recited.tolist(), near, strict=True)
    return tuple(replace(r, extracted=said, nearly=close and not said) for r, said, close in told)
