"""``tune``: train private data into a named stream over a frozen base.

1. Base: layers that are dense get the base that will be deployed; layers that are split keep theirs.
2. Columns: those that the data uses and text to keep does not.
3. Values: trained on these columns only, over that base, until the data is said.

Nothing of the base moves, so that removal is exact by construction: at alpha = 0, or without the file, the model is its
base, bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.dtypes import DTYPES
from libortho.core.errors import ConfigError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.models import denormals_flushed, plain_torch, unwrapped
from libortho.core.progress import Progress, Stopwatch
from libortho.core.report import record_method
from libortho.core.run_cache import RunCache, run_key
from libortho.core.streams import BaseStream, OrthoStream
from libortho.core.streams.base import check_shape
from libortho.core.surgery import (
    bias_of,
    earlier_switch,
    frozen,
    install,
    linear_shape,
    linear_weight,
    stream_names,
    swap,
    with_stream,
)
from libortho.core.switch.alpha import Switch, alpha
from libortho.core.targets import find_targets
from libortho.isolation.retain import given_pieces
from libortho.lm.asking import heard
from libortho.lm.checks import check_causal, check_tokens, fingerprint
from libortho.lm.generation import token_limit
from libortho.lm.model import LanguageModel, gradient_checkpointing
from libortho.lm.reading_progress import reading
from libortho.lm.scoring import judged_states, score
from libortho.selection.curvature import preconditioners
from libortho.text.corpus import shipped_text
from libortho.text.encoding import Encoded
from libortho.text.records import Record, Source
from libortho.training.keep import divergence
from libortho.tuning.config import TuneConfig
from libortho.tuning.layers import TunedLinear
from libortho.tuning.private import check_private, train_privately
from libortho.tuning.reading import about_others, chosen_columns, encoded, held_apart, retain_length, texts_to_keep
from libortho.tuning.result import TuneResult, missed_criteria
from libortho.tuning.train import Context, Training, train

logger = logging.getLogger(__name__)


@plain_torch()
@denormals_flushed()
def tune(
    model: nn.Module,
    tokenizer: Any,
    data: Source,
    stream: str | None = None,
    config: TuneConfig | None = None,
    *,
    retain: Source | None = None,
    validation: Source | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Train private data into a stream over the frozen base, in place.

    At alpha = 1 the model says the data; at alpha = 0 it is its base, bit for bit. The stream stands at alpha = 0
    afterwards. After an error the model is what it was.

    Args:
        model: A transformers causal LM with dense weights, or one that has streams already (``load``, ``isolate``,
            ``split``, ``tune``); those are off while this one is trained, but for those that ``config.over`` names.
        tokenizer: Its tokenizer.
        data: What is to be known; see :mod:`libortho.text.records`.
        stream: Name of the stream, such as "hr"; replaces ``config.stream``.
        config: See :class:`~libortho.tuning.config.TuneConfig`.
        retain: Text on which the model must stay what it is; by default text sampled from the model and the general
            text of the package.
        validation: Records that ask for the data in other words, never trained on. Training ends when their recall gets
            no better, and keeps the best values.
        resume: Folder where finished work is kept; the same call after an interruption goes on from there, with the
            same numbers, bit for bit, on as many threads. It holds values of the stream: delete it with the stream.
        progress: Called with (phase, done, total).

    Returns:
        Which records are said, what moved elsewhere, and the criteria that were missed.

    Raises:
        DataError: if a record is malformed, empty or longer than the model reads.
        TargetError: if the model is no decoder-only language model or carries PEFT adapters, no layer matches, or one
            cannot be split or is not applied once to each token.
        ConfigError: if the group size does not fit a layer, the stream exists, ``over`` names one that does not, no
            column is free, the folder belongs to another run, or ``epsilon`` is given with ``validation`` or
            ``resume``.
        LibOrthoError: if ``epsilon`` is given and the extra ``dp`` is not installed.
        CheckpointError: if a file of the folder is damaged.
    """
    began, watch = time.monotonic(), Stopwatch()
    config = config or TuneConfig()
    if stream is not None:
        config = replace(config, stream=stream)
    check_model(model)
    check_causal(unwrapped(model))
    check_tokenizer(tokenizer)
    targets = find_targets(model, config.target_modules, again=True, tails=True)
    earlier = _earlier_switch(model, config)
    for module in targets.values():
        if not isinstance(module, OrthoLinear):
            check_shape(linear_shape(module)[1], config.bits, config.resolved_group_size)
    limit = token_limit(model, None)
    records, items = encoded(data, model, tokenizer, limit, "data")
    if config.epsilon is not None:
        if validation is not None or resume is not None:
            raise ConfigError(
                "epsilon is given with validation or resume; expected neither: stopping by private records would tell "
                "of them, and noise that a folder keeps is no noise"
            )
        budget = check_private(config, len(records))
    asked = None if validation is None else encoded(validation, model, tokenizer, limit, "validation")
    check_tokens(model, tokenizer, ((f"general text {i}", t) for i, t in enumerate(shipped_text(), 1)))
    with frozen(model, None), nullcontext() if earlier is None else alpha(model, _alphas(earlier, config)):
        lm = LanguageModel(model)
        lm.check_layers(targets)
        length = retain_length(limit)
        unlike = records if config.epsilon is None else []  # what is kept out tells of the data
        given = None if retain is None else given_pieces(retain, unlike, tokenizer, length, config.seed)
        store = RunCache()
        if resume is not None:
            kinds = sorted({str(p.dtype) for p in model.parameters()})
            store = RunCache(Path(resume), run_key(fingerprint(model), kinds, items, asked, given, config))
        with watch.phase("texts"), reading(model, progress, "texts", 16 * 64):
            texts = texts_to_keep(model, tokenizer, items if unlike else [], given, length, config, store)
        held_back, kept = held_apart(texts)
        beside = about_others(unlike, tokenizer, limit, config)
        bases, switches = _based(targets, config, earlier or Switch()), dict[OrthoLinear, Switch]()
        current: dict[str, nn.Module] = {**targets, **bases}
        try:
            swap(model, bases)
            with watch.phase("base"), reading(model, progress, "base", _size([*texts, *beside, *items])):
                before = judged_states(lm, held_back)
                contexts = [_context(lm, values, [*kept, *beside]) for values in _contexts(earlier, config)]
                known = _said(lm, tokenizer, records, items)
            with watch.phase("columns"), reading(model, progress, "columns", _size([*kept, *beside, *items])):
                columns, readings = chosen_columns(lm, current, items, kept, beside, config, store)
                metrics = preconditioners(readings, columns, config.damping)
                del readings  # the largest thing in memory
            tuned = {n: TunedLinear(current[n], i, linear_shape(targets[n])[0]) for n, i in columns.items()}
            swap(model, tuned)
            training = Training(lm, tuned, items, kept, beside, contexts, metrics, config)

            def recall() -> float:
                assert asked is not None
                with contexts[0].enter():
                    return float(score(lm, asked[1])[1].float().mean())

            with (
                watch.phase("steps"),
                gradient_checkpointing(lm) if config.gradient_checkpointing else nullcontext(),
            ):
                if config.epsilon is None:
                    state = train(training, None if asked is None else recall, store, progress)
                else:
                    state = train_privately(training, budget, progress)
            measuring = Switch()
            for name, value in {**(_alphas(earlier, config) if earlier else {}), config.stream: 1.0}.items():
                measuring.add_stream(name, value)
            finished = {n: _finished(n, current[n], tuned.get(n), config, measuring) for n in (*bases, *tuned)}
            swap(model, finished)  # what follows is measured on the layers that callers get
            switches = {m: m.switch for m in ortho_layers(model).values()}
            for layer in switches:
                layer.switch = measuring
            with watch.phase("result"), reading(model, progress, "result", _size([*items, *held_back])):
                said = _said(lm, tokenizer, records, items)
                kept_kl = divergence(lm, held_back, before)
                validated = None if asked is None else sum(_said(lm, tokenizer, *asked)) / len(asked[0])
                beside_others = None
                if len(contexts) > 1:
                    measuring.set(1.0, extrapolate=False)
                    beside_others = _said(lm, tokenizer, records, items)
        finally:
            swap(model, targets)
            for layer, own in switches.items():
                layer.switch = own
    switch = Switch()
    switch.add_stream(config.stream)
    for layer in finished.values():
        layer.switch = switch
    install(model, finished, switch)
    recited = _numbers(records, said)
    together = None if beside_others is None else _numbers(records, beside_others)
    missing = [r.number for r in records if r.number not in recited]
    apart = [] if together is None else [n for n in recited if n not in together]
    missed = missed_criteria(missing, apart, len(records), kept_kl, state.stopped, config)
    weights = sum(a * b for a, b in map(linear_shape, targets.values()))
    result = TuneResult(
        stream=config.stream,
        records=len(records),
        recited=recited,
        known=_numbers(records, known),
        together=together,
        validation=validated,
        missed=tuple(m for m, _ in missed),
        advice=tuple(a for _, a in missed),
        kept_kl=kept_kl,
        loss=state.loss,
        density=sum(len(i) * linear_shape(targets[n])[0] for n, i in columns.items()) / weights,
        columns_per_layer={n: len(i) for n, i in columns.items()},
        epochs=-(-state.step // training.steps_each),
        steps=state.step,
        seconds=time.monotonic() - began,
        phase_seconds=watch.seconds,
    )
    if result.known:
        logger.warning(
            "the base says %d of %d records already (%s): they stay where the stream is off",
            len(result.known), len(records), ", ".join(map(str, result.known[:10])),
        )  # fmt: skip
    told = result.to_dict()
    figures = {n: told[n] for n in ("missed", "density", "kept_kl", "steps", "validation")}
    if config.epsilon is not None:
        del figures["missed"]  # it counts records without noise, and a stream's manifest goes where the stream goes
    settings = {**config.to_dict(), "bits": config.bits if bases else None}
    record_method(model, config.stream, {"verb": "tune", "records": len(records), **settings, **figures})
    return result


def _earlier_switch(model: nn.Module, config: TuneConfig) -> Switch | None:
    """The switch of a model that is split already, after a look whether the streams fit; None for a dense model."""
    switch = earlier_switch(model, config.stream)
    existing = stream_names(model)
    if unknown := [n for n in config.over if n not in existing]:
        raise ConfigError(f"over names the stream {unknown[0]!r}; the model has {existing or 'no streams'}")
    return switch


def _contexts(switch: Switch | None, config: TuneConfig) -> list[dict[str, float]]:
    """The alphas of other streams with which the new one must work: those it is over alone, and all of them."""
    if switch is None:
        return [{}]
    first, everything = _alphas(switch, config), dict.fromkeys(switch.streams, 1.0)
    return [first] if config.epsilon is not None or first == everything else [first, everything]


def _context(lm: LanguageModel, values: dict[str, float], texts: Sequence[Encoded]) -> Context:
    def enter() -> AbstractContextManager[Any]:
        return alpha(lm.model, values) if values else nullcontext()

    with enter():
        return Context(enter, judged_states(lm, texts))


def _alphas(switch: Switch, config: TuneConfig) -> dict[str, float]:
    return {n: float(n in config.over) for n in switch.streams}


def _based(targets: Mapping[str, nn.Module], config: TuneConfig, switch: Switch) -> dict[str, OrthoLinear]:
    """Dense layers over the base that will be deployed, without streams; none where they stay dense."""
    if config.bits is None:
        return {}
    found = {}
    for name, module in targets.items():
        if not isinstance(module, OrthoLinear):
            base = BaseStream.from_weight(linear_weight(module).contiguous(), config.bits, config.resolved_group_size)
            found[name] = OrthoLinear(base, bias_of(module), switch)
    return found


def _finished(
    name: str, module: nn.Module, tuned: TunedLinear | None, config: TuneConfig, switch: Switch
) -> OrthoLinear:
    """The layer that callers get: its base, the streams that it had, and the new one, empty where it took no column."""
    stream = OrthoStream() if tuned is None else tuned.stream(DTYPES[config.value_dtype])
    base = module.base if isinstance(module, OrthoLinear) else BaseStream(None, weight=linear_weight(module))
    return with_stream(name, module, base, stream, switch, config.stream)


def _said(lm: LanguageModel, tokenizer: Any, records: Sequence[Record], items: Sequence[Encoded]) -> list[bool]:
    """Which records the model says, greedily."""
    _, first = score(lm, items)
    found, _ = heard(lm, tokenizer, records, items, first)
    said: list[bool] = found.tolist()
    return said


def _numbers(records: Sequence[Record], which: Sequence[bool]) -> tuple[int, ...]:
    return tuple(r.number for r, yes in zip(records, which, strict=True) if yes)


def _size(items: Sequence[Encoded]) -> int:
    return sum(len(e.ids) for e in items)
