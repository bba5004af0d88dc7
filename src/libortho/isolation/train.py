"""Move the values on the support until the records are what their alternates are, and nothing else has moved.

    minimise   mean_i [ surprise, entropy and standardised surprise at each token of record i  ->  its donors' ]
               + retain_weight * KL(original || edited) on retain text
               + KL(original || edited) on neighbours

For codes and names a donor is a token of another completion after another prompt of the same shape, which no training
has touched: see :mod:`libortho.isolation.matching`. For sentences see :mod:`libortho.isolation.prose`. Records are
judged on their own prompt and, in turn, on a neighbour's, so that a memory that answers to the whole template is
forgotten for the whole template.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from libortho.core.run_cache import RunCache
from libortho.isolation.config import IsolateConfig
from libortho.isolation.control import calibrate, steer
from libortho.isolation.criteria import Criteria, check_criteria, evaluate_records
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.losses import forget_losses, keep_losses, summed_gradients
from libortho.isolation.state import Training
from libortho.isolation.targets import Reference, current_targets, update_prose_targets, with_sentences
from libortho.lm.model import LanguageModel
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import Encoded
from libortho.training.edit import EditLinear

logger = logging.getLogger(__name__)

_WARM_UP, _STEADY, _LANDING = 5, 30, 10
"""Steps of rising learning rate; steps after which it falls with the square root of their number; last steps, in
which it falls to zero."""
CHECK_EVERY = 5
"""Optimiser steps between two looks at the criteria."""


def training_finished(store: RunCache) -> bool:
    """True if the store holds a training that came to its end, so that only measuring is left."""
    stored = store.get("training")
    return stored is not None and bool(stored.data["finished"])


def train(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    cases: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    original: Reference,
    config: IsolateConfig,
    progress: Callable[[str, int, int], None] | None = None,
    store: RunCache | None = None,
    metrics: Mapping[str, KroneckerPreconditioner] | None = None,
) -> list[Criteria]:
    """Optimise the supports; returns the criteria at every look, the last one describing the final values.

    Donors are read again at every look, what is expected of sentences at the first, second, fourth, eighth and so on.
    Once the criteria hold, the learning rate falls to zero over a few last steps: what is left by then is oscillation
    that all records share, which a membership test would see. The state at every look goes to the store, and a stored
    one is where the training begins.
    """
    store = store or RunCache()
    edited = {n: m.values for n, m in layers.items() if m.values is not None}
    metric = [(metrics or {}).get(n) for n in edited]
    now = Training(list(edited.values()), len(cases), retain, config, metric)
    stored = store.get("training")
    if stored is None:
        start = evaluate_records(lm, [c.secret for c in cases])
        now.checks.append(check_criteria(start, original.target, original.spread, original.expected, 0))
    else:
        now.take_up(stored)
        if now.expected:
            prose = [i for i, c in enumerate(cases) if c.kind == "prose"]
            original = with_sentences(original, {i: now.profiles[i] for i in prose}, now.expected)
    torch.set_flush_denormal(True)
    while now.step < now.last:
        now.step += 1
        rate = min(1.0, now.step / _WARM_UP, (_STEADY / now.step) ** 0.5, (now.last - now.step + 1) / _LANDING)
        step(lm, layers, cases, retain, original, config, now, rate)
        if now.step % CHECK_EVERY == 0 or now.step == now.last:
            seen = evaluate_records(lm, [c.secret for c in cases])
            if (now.step // CHECK_EVERY).bit_count() == 1:  # it changes fast at first, and takes its time
                original = update_prose_targets(lm, cases, original)
                now.expected = original.expected
            steer(lm, cases, original, now, seen.profile.mean(0))
            now.checks.append(check_criteria(seen, *now.targets(original), original.expected, now.step))
            logger.info("%s", now.checks[-1])
            if now.last == config.max_steps and now.checks[-1].holds:
                now.last = min(now.last, now.step + _LANDING)
            store.put("training", now.part())
        if progress is not None:
            progress("isolate", now.step, now.last)
    if not now.finished:
        if not now.checks[-1].extracted:
            original = update_prose_targets(lm, cases, original)
            calibrate(lm, layers, cases, original)
            now.profiles = current_targets(lm, cases, original)
            seen = evaluate_records(lm, [c.secret for c in cases])
            now.checks.append(check_criteria(seen, *now.targets(original), original.expected, now.step))
        now.finished = True
        store.put("training", now.part())
    return now.checks


def step(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    cases: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    original: Reference,
    config: IsolateConfig,
    now: Training,
    rate: float,
) -> None:
    """One optimiser step, at this share of the peak rate, on the next records and the next retain texts."""
    chosen = next(now.records)
    pull = summed_gradients(forget_losses(lm, cases, chosen, original, now), now.values)
    texts = next(now.texts)
    keep = summed_gradients(keep_losses(lm, cases, chosen, retain, texts, original, config, now), now.values)
    now.apply_step([a + b for a, b in zip(pull, keep, strict=True)], rate)
    for layer in layers.values():
        layer.clamp()
