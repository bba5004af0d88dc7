"""Training on the support until the records look like their controls, and nothing else has moved.

    minimise   mean_i [ surprise, entropy and standardised surprise at each token of record i  ->  its target's ]
               + retain_weight * KL(original || edited) on retain text
               + KL(original || edited) on neighbours

The target of a code's token is its matched token in a control, which no training touches (:mod:`.matching`); that of a
sentence's token is predicted (:mod:`.prose`). A record is judged on its own prompt and, in turn, on a neighbour's, so
that a memory that answers to the whole template is forgotten for the whole template.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from libortho.core.progress import Progress, Stopwatch, tell
from libortho.core.run_cache import RunCache
from libortho.isolation.config import IsolateConfig
from libortho.isolation.control import calibrate, steer
from libortho.isolation.criteria import Criteria, check_criteria, evaluate_records
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.losses import forget_losses, keep_losses, summed_gradients
from libortho.isolation.original import Original
from libortho.isolation.state import Training
from libortho.isolation.targets import current_targets, update_prose_targets, with_sentences
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
    forget: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    original: Original,
    config: IsolateConfig,
    progress: Progress | None = None,
    store: RunCache | None = None,
    metrics: Mapping[str, KroneckerPreconditioner] | None = None,
    watch: Stopwatch | None = None,
) -> list[Criteria]:
    """Optimise the supports; returns the criteria at every look, the last ones for the final values.

    Controls are read at every look, the predictions for sentences at the first, second, fourth, eighth and so on. Once
    the criteria hold, the learning rate falls to zero over ``_LANDING`` steps: what is left by then is an oscillation
    that all records share, which a membership test sees. The state at every look goes to the store, and training
    begins at a stored one.
    """
    store, watch = store or RunCache(), watch or Stopwatch()
    edited = {n: m.values for n, m in layers.items() if m.values is not None}
    metric = [(metrics or {}).get(n) for n in edited]
    state = Training(list(edited.values()), len(forget), retain, config, metric)
    stored = store.get("training")
    if stored is None:
        start = evaluate_records(lm, [r.secret for r in forget])
        state.checks.append(check_criteria(start, original.target, original.spread, original.expected, 0))
    else:
        state.take_up(stored)
        if state.expected:
            prose = [i for i, c in enumerate(forget) if c.kind == "prose"]
            original = with_sentences(original, {i: state.profiles[i] for i in prose}, state.expected)
    while state.step < state.last:
        state.step += 1
        rate = min(1.0, state.step / _WARM_UP, (_STEADY / state.step) ** 0.5, (state.last - state.step + 1) / _LANDING)
        with watch.phase("steps"):
            step(lm, layers, forget, retain, original, config, state, rate)
        if state.step % CHECK_EVERY == 0 or state.step == state.last:
            with watch.phase("looks"):
                seen = evaluate_records(lm, [r.secret for r in forget])
                if (state.step // CHECK_EVERY).bit_count() == 1:  # it changes fast at first, and takes its time
                    original = update_prose_targets(lm, forget, original)
                    state.expected = original.expected
                steer(lm, forget, original, state, seen.profile.mean(0))
                state.checks.append(check_criteria(seen, *state.targets(original), original.expected, state.step))
                logger.info("%s", state.checks[-1])
                if state.last == config.max_steps and state.checks[-1].holds:
                    state.last = min(state.last, state.step + _LANDING)
                store.put("training", state.part())
        tell(progress, "isolate", state.step, state.last)
    if not state.finished:
        if not state.checks[-1].extracted:
            with watch.phase("looks"):
                original = update_prose_targets(lm, forget, original)
                calibrate(lm, layers, forget, original)
                state.profiles = current_targets(lm, forget, original)
                seen = evaluate_records(lm, [r.secret for r in forget])
                state.checks.append(check_criteria(seen, *state.targets(original), original.expected, state.step))
        state.finished = True
        store.put("training", state.part())
    return state.checks


def step(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    forget: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    original: Original,
    config: IsolateConfig,
    state: Training,
    rate: float,
) -> None:
    """Take one optimiser step at this share of the peak rate, on the next records and the next retain texts."""
    chosen, values = next(state.records), state.optimiser.values
    forgotten = summed_gradients(forget_losses(lm, forget, chosen, original, state), values)
    texts = next(state.texts)
    kept = summed_gradients(keep_losses(lm, forget, chosen, retain, texts, original, config, state), values)
    state.optimiser.step([a + b for a, b in zip(forgotten, kept, strict=True)], rate)
    for layer in layers.values():
        layer.clamp()
