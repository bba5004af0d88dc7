"""``isolate``: move listed records out of the base and into an ortho stream.

1. Counterfactuals: alternates of each completion, neighbours of each prompt (given, or made).
2. Constants of the original model: what it says on retain text, on neighbours, and about other people's completions.
3. Support: the columns whose gradient is about the records and not about retain text.
4. Values: trained on the support only, through the quantiser, in steps that text to keep hardly notices, until the
   criteria hold.
5. Streams: base = edited codes; ortho = original - base on the support.

The audit's holdout is never an input.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.checkpoint.stream_files import MAX_RANK
from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.dtypes import DTYPES
from libortho.core.errors import DataError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.models import plain_torch, unwrapped
from libortho.core.progress import Progress, tell
from libortho.core.report import record_method
from libortho.core.run_cache import Entry, RunCache, run_key
from libortho.core.streams import BaseStream, OrthoStream
from libortho.core.streams.base import check_shape
from libortho.core.surgery import assemble, bias_of, frozen, install, linear_shape, linear_weight, swap
from libortho.core.switch.alpha import Switch
from libortho.core.targets import find_targets
from libortho.isolation import request
from libortho.isolation.config import IsolateConfig
from libortho.isolation.earlier import earlier_switch, taken, without
from libortho.isolation.prose import human_texts
from libortho.isolation.request import SALIENCY_RECORDS, Asked, rows_with, without_forgotten
from libortho.isolation.result import IsolateResult, by_chance, nothing_known, result_of, standing
from libortho.isolation.retain import default_retain, in_form, opening_tokens
from libortho.isolation.train import (
    Case,
    RecordOutcome,
    Reference,
    divergence,
    outcomes,
    reference,
    train,
    training_finished,
)
from libortho.lm.checks import check_causal, check_tokens, fingerprint, training_dtype
from libortho.lm.generation import generate, token_limit
from libortho.lm.model import LanguageModel, gradient_checkpointing
from libortho.lm.scoring import hidden_states
from libortho.selection.budget import allocate, balanced_weights, column_costs, retain_floor
from libortho.selection.curvature import curvature
from libortho.selection.saliency import column_saliency
from libortho.text.corpus import shipped_text
from libortho.text.encoding import IGNORE, Batch, Encoded, chunk, collate, encode_closed
from libortho.text.records import Record, Source, load_records
from libortho.text.sources import read_rows
from libortho.training.edit import EditLinear
from libortho.training.rounding import compensated_bases

logger = logging.getLogger(__name__)

RETAIN_LENGTH = 128
"""Tokens of one retain sequence."""
LAYER_CAP = 4.0
"""No layer takes more than this many times its even share of the budget."""
AUTO_RATIOS = (0.0005, 0.001, 0.0025, 0.005)
"""Budgets that ``ratio="auto"`` tries."""
_RETAIN_SEQUENCES = 64
_GIVEN_SEQUENCES = 600
_HELD_BACK_SEQUENCES = 8
_SALIENCY_TOKENS = 1536
_MOST_CURVATURE = 4.0
_SPOKEN, _SPOKEN_TOKENS = 32, 48
"""Texts that the model says on prompts like those of sentences, and the most tokens of one."""


@plain_torch()
def isolate(
    model: nn.Module,
    tokenizer: Any,
    forget: Source,
    retain: Source | None = None,
    alternates: Sequence[Sequence[str]] | None = None,
    neighbours: Sequence[Sequence[str]] | None = None,
    config: IsolateConfig | None = None,
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> IsolateResult:
    """Put the forget records behind the switch, in place.

    At alpha = 1 the model is the original one on the support (to the value dtype) and the quantised one elsewhere; at
    alpha = 0 the records are no likelier than other completions of the same shape. The stream stands at alpha = 0
    afterwards: ``libortho.alpha(model, 1.0)`` turns it on for a block, ``libortho.set_alpha(model, 1.0)`` until further
    notice.

    A model that was isolated before, by this call with another stream, can be isolated again. "Original" is then the
    model with all earlier streams off; they and their columns are left alone, and they stand where they stood.

    Args:
        model: A transformers causal LM with dense weights, or one that ``isolate`` has split before. bf16 models train
            several times faster on recent CPUs.
        tokenizer: Its tokenizer.
        forget: The records that must go; see :mod:`libortho.text.records`.
        retain: Text to keep; by default text sampled from the model and the general text of the package.
        alternates: For each record, other completions of the same shape. Made if not given.
        neighbours: For each record, other prompts of the same shape. Made if not given.
        config: See :class:`~libortho.core.config.IsolateConfig`.
        resume: Folder where finished work is kept; the same call after an interruption takes up from there, with the
            same numbers, bit for bit, as a run without interruption on as many threads. It holds text sampled from the
            model and values from before the records were gone: delete it when it is no longer needed.
        progress: Called with (phase, done, total).

    Returns:
        The outcome record by record, with the criteria that were missed.

    Raises:
        DataError: if a record is malformed or empty, a list does not match the forget records, or the model knows none
            of them (unless ``config.allow_unknown``).
        TargetError: if the model is no decoder-only language model or carries PEFT adapters, no layer matches, or one
            cannot be split (an earlier stream with a low-rank tail is in the way) or is not applied once to each token.
        ConfigError: if the group size does not fit a layer, the stream exists, bits or group size are not those of an
            earlier base, earlier streams leave no column, the folder belongs to another run, or the model was
            made inside ``torch.inference_mode``.
        CheckpointError: if a file of the folder is damaged.

        After an error the model is what it was.
    """
    began = time.monotonic()
    config = config or IsolateConfig()
    check_model(model)
    check_causal(unwrapped(model))
    check_tokenizer(tokenizer)
    targets = find_targets(model, config.target_modules, again=True)
    earlier = earlier_switch(model, config)
    for module in targets.values():
        check_shape(linear_shape(module)[1], config.bits, config.resolved_group_size)
    replaced = targets | ortho_layers(model)  # layers of earlier requests are stand-ins too, without their streams
    records = load_records(rows_with(read_rows(forget, "forget"), alternates, neighbours), tokenizer, name="forget")
    texts = ((f"forget record {r.number}", t) for r in records for t in (r.text, *r.alternates, *r.neighbours))
    check_tokens(model, tokenizer, texts)
    if retain is not None:
        retain = load_records(retain, tokenizer, name="retain")
        check_tokens(model, tokenizer, ((f"retain record {r.number}", r.text) for r in retain))
    check_tokens(model, tokenizer, ((f"general text {i}", t) for i, t in enumerate(shipped_text(), 1)))
    with frozen(model, earlier):
        LanguageModel(model).check_layers(replaced)
    limit = token_limit(model, None)
    parameter = next(model.parameters())
    if parameter.dtype is torch.bfloat16 and training_dtype(str(parameter.device)) is not torch.bfloat16:
        logger.warning("this processor has no bf16 arithmetic: a model in float32 would take a fraction of the time")
    cases = request.cases(records, tokenizer, limit, config, retains=retain is not None)
    with frozen(model, earlier):
        length = min(RETAIN_LENGTH, limit or RETAIN_LENGTH)
        given = None if retain is None else _pieces(retain, records, tokenizer, length, config)
        human = human_texts(tokenizer, limit)
        kinds = sorted({str(p.dtype) for p in model.parameters()})
        store = (
            RunCache()
            if resume is None
            else RunCache(Path(resume), run_key(fingerprint(model), kinds, cases, given, human, config))
        )
        retain_items, held_back = _retain(model, tokenizer, given, cases, length, config, store)
        lm = LanguageModel(model)
        tell(progress, "reference", 0, 1)
        opening = opening_tokens(tokenizer)
        spoken = (
            store.get_or_compute("spoken", lambda: Entry({}, _spoken(model, tokenizer, cases, limit, config))).data
            if any(c.like for c in cases)
            else []
        )
        said = [Encoded((*p, *c), (*(IGNORE for _ in p), *c)) for p, c in spoken]
        asked = Asked(tokenizer, records, cases)
        original, held_back_states = _reference(lm, asked, retain_items, held_back, human, opening, said, config, store)
        tell(progress, "reference", 1, 1)
        known = standing(cases, original)
        if (unknown := nothing_known(cases, known)) is not None:
            if by_chance(known, original) and not config.allow_unknown:
                raise DataError(f"{unknown}; allow_unknown=True (--allow-unknown) isolates them all the same")
            logger.warning("%s", unknown)
        material = _Material(lm, asked, targets, replaced, retain_items, held_back, original, held_back_states)
        budgets = AUTO_RATIOS if config.ratio == "auto" else (config.ratio,)
        for ratio in budgets:
            tried = replace(config, ratio=ratio)
            kept = store if len(budgets) == 1 else store.inside(f"ratio-{ratio:g}")
            finished, switch, result = _attempt(material, tried, kept, progress, began)
            if result.succeeded:
                break
            logger.info("at a ratio of %g: %s", ratio, "; ".join(result.missed))
    install(model, finished, switch)
    figures = {n: getattr(result, n) for n in ("missed", "density", "retain_kl", "quantised_kl", "steps", "guarantee")}
    record_method(model, config.stream, {"verb": "isolate", "records": len(records), **tried.to_dict(), **figures})
    return result


@dataclass(frozen=True)
class _Material:
    """What an attempt is made with: the model, its layers (targets, and all stand-ins), and what it is held to."""

    lm: LanguageModel
    asked: Asked
    targets: dict[str, nn.Module]
    replaced: dict[str, nn.Module]
    retain: list[Encoded]
    held_back: list[Encoded]
    original: Reference
    held_back_states: tuple[torch.Tensor, ...]


def _attempt(
    material: _Material, config: IsolateConfig, store: RunCache, progress: Progress | None, began: float
) -> tuple[dict[str, OrthoLinear], Switch, IsolateResult]:
    """The layers that this budget makes, their switch, and which criteria hold; the model is left as it was."""
    lm, targets, original = material.lm, material.targets, material.original
    model, cases = lm.model, material.asked.cases
    found = store.get_or_compute(
        "support", lambda: Entry(_support(lm, targets, cases, material.retain, config, progress))
    )
    support = {n: index.to(lm.device) for n, index in found.tensors.items()}
    metrics = {} if training_finished(store) else curvature(
        lm,
        targets,
        support,
        [*_read(lm, material.retain, _curvature_tokens(len(cases))), *_beside(lm, cases, config)],
        damping=config.damping,
        seed=config.seed,
    )  # fmt: skip
    bases = _bases(material, support, config, store)
    layers = {
        n: EditLinear(_start(m), bias_of(m), support.get(n), config.bits, config.resolved_group_size, bases.get(n))
        for n, m in material.replaced.items()
    }
    try:
        swap(model, layers)
        quantised_kl = divergence(lm, material.held_back, material.held_back_states)
        with gradient_checkpointing(lm) if config.gradient_checkpointing else nullcontext():
            checks = train(lm, layers, cases, material.retain, original, config, progress, store, metrics)
        switch = Switch()
        switch.add_stream(config.stream)
        changed = {n: m for n, m in targets.items() if n in support or not isinstance(m, OrthoLinear)}
        finished = {n: _finish(n, m, layers[n], config, switch) for n, m in changed.items()}
        swap(model, finished)  # what follows is measured on the layers that callers get
        switch.set(1.0, extrapolate=False)
        recited_on = material.asked.recited(lm)
        switch.set(0.0, extrapolate=False)
        known, said = standing(cases, original), material.asked.recited(lm).tolist()
        records = tuple(
            replace(r, known=k, extracted=r.extracted or s)
            for r, k, s in zip(outcomes(lm, cases, original), known, said, strict=True)
        )
        retain_kl = divergence(lm, material.held_back, material.held_back_states)
    finally:
        swap(model, material.replaced)
    recited = (int(original.recited.sum()), int((original.recited & recited_on).sum()))
    seconds = time.monotonic() - began
    result = result_of(config, cases, records, recited, checks, (quantised_kl, retain_kl), support, targets, seconds)
    return finished, switch, result


def _whole(texts: Sequence[Sequence[int]]) -> list[Encoded]:
    return [Encoded(tuple(t), tuple(t)) for t in texts]


def _pieces(
    retain: Source, forget: Sequence[Record], tokenizer: Any, length: int, config: IsolateConfig
) -> list[Encoded]:
    """Retain sequences from what was given, and one of general text to every three of them.

    A record with a prompt stays a sequence of its own, as the model has met it, and is kept in its completion; texts
    are joined and cut.
    """
    records = without_forgotten(load_records(retain, tokenizer, name="retain"), forget)
    pieces = [encode_closed(r, tokenizer).cut(length) for r in records if r.prompt]
    pieces = [p for p in pieces if p.completion]
    pieces += _whole(chunk([r.text for r in records if not r.prompt], tokenizer, length))
    rng = random.Random(config.seed)
    rng.shuffle(pieces)
    pieces = pieces[:_GIVEN_SEQUENCES]
    general = _whole(chunk(shipped_text(), tokenizer, length))
    pieces += rng.sample(general, min(len(general), len(pieces) // 3))
    rng.shuffle(pieces)
    return pieces


def _retain(
    model: nn.Module,
    tokenizer: Any,
    given: list[Encoded] | None,
    cases: Sequence[Case],
    length: int,
    config: IsolateConfig,
    store: RunCache,
) -> tuple[list[Encoded], list[Encoded]]:
    """Retain sequences, and others that are held back for the criteria."""
    count = _RETAIN_SEQUENCES + _HELD_BACK_SEQUENCES
    secrets = [c.secret for c in cases]

    def sample() -> Entry:
        items = default_retain(model, tokenizer, secrets, sequences=count, length=length, seed=config.seed)
        return Entry({}, [e.ids for e in items])

    items = _whole(store.get_or_compute("retain", sample).data) if given is None else given
    if len(items) < 2:
        raise DataError(f"retain holds {len(items)} sequences of {length} tokens; expected at least 2")
    held = min(_HELD_BACK_SEQUENCES, max(1, len(items) // 4))
    kept, held_back = items[held:], items[:held]
    if given is not None:

        def speak() -> Entry:
            said = in_form(model, tokenizer, secrets, given, length=length, seed=config.seed)
            return Entry({}, [e.ids for e in said])

        kept = kept + _whole(store.get_or_compute("in_form", speak).data)
        random.Random(config.seed).shuffle(kept)
    return kept, held_back


def _reference(
    lm: LanguageModel,
    asked: Asked,
    retain: Sequence[Encoded],
    held_back: Sequence[Encoded],
    human: Sequence[Sequence[int]],
    opening: Sequence[int],
    spoken: Sequence[Encoded],
    config: IsolateConfig,
    store: RunCache,
) -> tuple[Reference, tuple[torch.Tensor, ...]]:
    """What the original model says, and its hidden states on the texts that are held back."""

    cases = asked.cases

    def make() -> Entry:
        held = enumerate(hidden_states(lm, held_back))
        found = replace(reference(lm, cases, retain, human, opening, spoken, config), recited=asked.recited(lm))
        return Entry(found.tensors() | {f"held_back.{i}": t for i, t in held})

    found = store.get_or_compute("reference", make).tensors
    held_back_states = tuple(found[f"held_back.{i}"].to(lm.device) for i in range(len(held_back)))
    kept = Reference.of(found, cases, len(retain), lm.device, opening, spoken, config.seed)
    return kept, held_back_states


def _spoken(
    model: nn.Module, tokenizer: Any, cases: Sequence[Case], limit: int | None, config: IsolateConfig
) -> list[tuple[list[int], list[int]]]:
    """What the model says on prompts like those of sentences: (prompt, continuation) as token ids.

    Of a prompt that would leave no room for it, the end.
    """
    most = None if limit is None else max(1, limit - _SPOKEN_TOKENS)
    prompts = [list(p if most is None else p[-most:]) for p in sorted({p for c in cases for p in c.like})]
    prompts = random.Random(config.seed).sample(prompts, min(len(prompts), _SPOKEN))
    said = generate(model, tokenizer, prompts, _SPOKEN_TOKENS, temperature=1.0, seed=config.seed)
    return [(p, c) for p, (c,) in zip(prompts, said, strict=True) if c]


def _support(
    lm: LanguageModel,
    targets: dict[str, nn.Module],
    cases: Sequence[Case],
    retain: Sequence[Encoded],
    config: IsolateConfig,
    progress: Progress | None,
) -> dict[str, torch.Tensor]:
    ratio = float(config.ratio)
    secrets = [piece for c in cases for piece in _cut_up(c.secret, c.pieces)]
    if len(secrets) > SALIENCY_RECORDS:
        secrets = random.Random(config.seed).sample(secrets, SALIENCY_RECORDS)
    batches = [collate(secrets[i : i + 8]).to(lm.device) for i in range(0, len(secrets), 8)]
    texts = _read(lm, retain, _SALIENCY_TOKENS)
    tell(progress, "support", 0, 2)
    forget = column_saliency(lm, targets, batches)
    tell(progress, "support", 1, 2)
    kept = column_saliency(lm, targets, texts)
    tell(progress, "support", 2, 2)
    others = _beside(lm, cases, config)
    if others:
        around = column_saliency(lm, targets, others)
        kept = {n: torch.cat([s / len(s), around[n] / len(around[n])]) for n, s in kept.items()}
    floor = retain_floor({n: s.sum(0) for n, s in kept.items()})
    held = taken(targets)
    forget = without(forget, held, 0.0)
    side_by_side = torch.cat([s / floor[n] for n, s in forget.items()], 1)
    weights = balanced_weights(side_by_side, max(1, int(ratio * side_by_side.shape[1])))
    scores = without({n: weights @ s / floor[n] for n, s in forget.items()}, held, -torch.inf)
    return allocate(scores, ratio, LAYER_CAP, column_costs(targets), limit=MAX_RANK)  # a stream that can be saved


def _bases(
    material: _Material, support: Mapping[str, torch.Tensor], config: IsolateConfig, store: RunCache
) -> dict[str, BaseStream]:
    """The quantised weights of layers that are dense so far, exact where it matters on text to keep and the records.

    Of records and of neighbours as many tokens are read as of retain text.
    """
    bits = config.bits
    if bits is None:
        return {}
    lm, cases = material.lm, material.asked.cases
    dense = {n: m for n, m in material.targets.items() if not isinstance(m, OrthoLinear)}

    def make() -> Entry:
        drawn = random.Random(config.seed).sample(cases, len(cases))
        groups = (material.retain, [c.secret for c in drawn], [c.neighbours[0] for c in drawn if c.neighbours])
        texts = [b for items in groups if items for b in _read(lm, items, _SALIENCY_TOKENS)]
        made = compensated_bases(lm, dense, support, texts, bits, config.resolved_group_size)
        return Entry({f"{n}.{field}": getattr(b, field) for n, b in made.items() for field in ("codes", "scales")})

    found = store.get_or_compute("bases", make).tensors
    device = {n: linear_weight(m).device for n, m in dense.items()}
    return {
        n: BaseStream(bits, codes=found[f"{n}.codes"].to(device[n]), scales=found[f"{n}.scales"].to(device[n]))
        for n in dense
    }


def _cut_up(item: Encoded, pieces: int) -> list[Encoded]:
    """The text with the labels of one piece of its completion at a time."""
    places = [t for t, label in enumerate(item.labels) if label != IGNORE]
    ends = [round(n * len(places) / pieces) for n in range(pieces + 1)]
    return [
        Encoded(item.ids, tuple(x if t in own else IGNORE for t, x in enumerate(item.labels)))
        for own in (set(places[a:b]) for a, b in pairwise(ends))
    ]


def _curvature_tokens(records: int) -> int:
    """The more is to be moved, the better the curvature must be known."""
    return round(_SALIENCY_TOKENS * min(_MOST_CURVATURE, max(1.0, records / SALIENCY_RECORDS)))


def _read(lm: LanguageModel, retain: Sequence[Encoded], tokens: int) -> list[Batch]:
    """The first retain sequences, one by one, as many as have that many tokens together."""
    sizes = torch.tensor([len(t.ids) for t in retain]).cumsum(0)
    count = int((sizes <= tokens).sum().clamp_min(1))
    return [collate([t]).to(lm.device) for t in retain[:count]]


def _beside(lm: LanguageModel, cases: Sequence[Case], config: IsolateConfig) -> list[Batch]:
    """A neighbour of each record, or of some of many."""
    beside = [c.neighbours[0] for c in cases if c.neighbours]
    beside = random.Random(config.seed).sample(beside, min(len(beside), SALIENCY_RECORDS))
    return [collate(beside[i : i + 8]).to(lm.device) for i in range(0, len(beside), 8)]


def _start(module: nn.Module) -> torch.Tensor | BaseStream:
    """What a layer is edited from."""
    return module.base if isinstance(module, OrthoLinear) else linear_weight(module)


def _finish(name: str, module: nn.Module, edited: EditLinear, config: IsolateConfig, switch: Switch) -> OrthoLinear:
    base, support = edited.finish(DTYPES[config.value_dtype])
    stream = OrthoStream(support)
    if not isinstance(module, OrthoLinear):
        weight = linear_weight(module).float()
        return assemble(name, weight, base, stream, bias_of(edited), switch, config.stream)
    streams = {n: s for n, s in module.streams.items() if isinstance(s, OrthoStream)}
    layer = assemble(
        name, module.dense_weight(1.0), base, stream, bias_of(edited), switch, config.stream, earlier=streams
    )
    if layer.report is not None and (before := module.report) is not None:
        layer.report = replace(
            layer.report, rank=before.rank, used_low_rank=before.used_low_rank, low_rank_error=before.low_rank_error
        )
    return layer


__all__ = ["IsolateResult", "RecordOutcome", "isolate"]
