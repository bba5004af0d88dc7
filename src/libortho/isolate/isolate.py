"""``isolate``: move listed records out of the base and into an ortho stream.

1. Counterfactuals: alternates of each completion, neighbours of each prompt (given, or made).
2. Constants of the original model: what it says on retain text, on neighbours, and about other people's completions.
3. Support: the columns (or entries) whose gradient is about the records and not about retain text.
4. Values: trained on the support only, through the quantiser, in steps that text to keep hardly notices, until the
   criteria hold.
5. Streams: base = edited codes; ortho = original - base on the support.

The audit's holdout is never an input.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from libortho.alpha import Switch
from libortho.config import DTYPES, IsolateConfig
from libortho.data import IGNORE, Batch, Encoded, Record, Source, collate, encode, load_records
from libortho.errors import ConfigError, DataError
from libortho.isolate import counterfactuals
from libortho.isolate.continuations import continuations
from libortho.isolate.curvature import curvature
from libortho.isolate.donors import beginnings, donors
from libortho.isolate.earlier import earlier_switch, taken, without
from libortho.isolate.edit import EditLinear
from libortho.isolate.language_model import LanguageModel
from libortho.isolate.plausibility import human_texts
from libortho.isolate.resume import Part, Store, run_key
from libortho.isolate.retain import chunk, default_retain, in_form, opening_tokens
from libortho.isolate.rounding import compensated_bases
from libortho.isolate.support import (
    allocate,
    balanced_weights,
    column_saliency,
    entry_saliency,
    retain_floor,
    unit_costs,
)
from libortho.isolate.trainer import (
    PARTIAL,
    Case,
    Check,
    RecordOutcome,
    Reference,
    divergence,
    hidden_states,
    leaning,
    outcomes,
    reference,
    score,
    train,
    training_finished,
    unremarkable,
)
from libortho.layer import OrthoLinear, ortho_layers
from libortho.models import training_dtype
from libortho.report import record_method
from libortho.split import Progress, assemble, bias_of, install, linear_shape, linear_weight
from libortho.streams import BaseStream, OrthoStream
from libortho.streams.base import check_shape
from libortho.targets import find_targets

logger = logging.getLogger(__name__)

AUTO_RATIOS = (0.0005, 0.001, 0.0025, 0.005)
"""Budgets that ``ratio="auto"`` tries."""
_RETAIN_SEQUENCES = 64
_GIVEN_SEQUENCES = 600
_MOST_COUNTERFACTUALS, _FEWEST_COUNTERFACTUALS = 400, 2
_WITNESSES = 4
"""Strangers of a record that are read and never trained; of many records fewer each, as of alternates."""
_CANDIDATES = 8
"""Alternates drawn for each that is taken."""
_HELD_BACK_SEQUENCES = 8
_SALIENCY_RECORDS = 64
_SALIENCY_TOKENS = 1536
_MOST_CURVATURE = 4.0
_LIKE_PROMPTS, _SPOKEN, _SPOKEN_TOKENS = 4, 32, 48
"""Prompts like that of a sentence, texts that the model says on such, and the most tokens of one."""


@dataclass(frozen=True)
class IsolateResult:
    """What ``isolate`` did, and which of its criteria hold.

    Attributes:
        stream: Name of the ortho stream.
        guarantee: What alpha = 0 means here, in words.
        missed: The criteria that do not hold, in words; empty if all do.
        records: One outcome per forget record.
        recited: Records whose completion is the greedy continuation under the original model.
        recited_on: Those of them that it still is at alpha = 1; rounding of the base can lose some (INT4 most).
        checks: The criteria during training.
        retain_kl: Mean KL(original || alpha 0) on held-back retain text, in nats per token.
        quantised_kl: The same of the quantised base before any record was moved: the price of the base alone.
        density: Entries of the ortho stream / weights of the split layers.
        columns_per_layer: Layer to the columns (or entries) that it gave.
        steps: Optimiser steps.
        seconds: Wall time of this call.
    """

    stream: str
    guarantee: str
    missed: tuple[str, ...]
    records: tuple[RecordOutcome, ...]
    recited: int
    recited_on: int
    checks: tuple[Check, ...]
    retain_kl: float
    quantised_kl: float
    density: float
    columns_per_layer: Mapping[str, int]
    steps: int
    seconds: float

    @property
    def succeeded(self) -> bool:
        """True if every criterion holds."""
        return not self.missed

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**asdict(self), "succeeded": self.succeeded}


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
    alpha = 0 the records are no likelier than other completions of the same shape.

    A model that was isolated before, by this call with another stream, can be isolated again. "Original" is then the
    model with all earlier streams off; they and their columns are left alone, and all streams stand at alpha = 1
    afterwards.

    Args:
        model: A transformers causal LM with dense weights, or one that ``isolate`` has split before. bf16 models train
            several times faster on recent CPUs.
        tokenizer: Its tokenizer.
        forget: The records that must go; see :mod:`libortho.data`.
        retain: Text to keep; by default text sampled from the model and the general text of the package.
        alternates: For each record, other completions of the same shape. Made if not given.
        neighbours: For each record, other prompts of the same shape. Made if not given.
        config: See :class:`~libortho.config.IsolateConfig`.
        resume: Folder where finished work is kept; the same call after an interruption takes up from there, with the
            same numbers, bit for bit, as a run without interruption on as many threads. It holds text sampled from the
            model and values from before the records were gone: delete it when it is no longer needed.
        progress: Called with (phase, done, total).

    Returns:
        The outcome record by record, with the criteria that were missed.

    Raises:
        DataError: if a record is malformed or empty, or a list does not match the forget records.
        TargetError: if no layer matches or one cannot be split (an earlier stream with a low-rank tail is in the way).
        ConfigError: if the group size does not fit a layer, the stream exists, bits or group size are not those of an
            earlier base, earlier streams leave no column, or the folder belongs to another run.
        CheckpointError: if a file of the folder is damaged.

        After an error the model is what it was.
    """
    began = time.monotonic()
    config = config or IsolateConfig()
    targets = find_targets(model, config.target_modules, again=True)
    earlier = earlier_switch(model, config)
    for module in targets.values():
        check_shape(linear_shape(module)[1], config.bits, config.resolved_group_size)
    replaced = targets | ortho_layers(model)  # layers of earlier requests are stand-ins too, without their streams
    records = load_records(forget, tokenizer, name="forget")
    limit = _max_length(model, config)
    parameter = next(model.parameters())
    if parameter.dtype is torch.bfloat16 and training_dtype(str(parameter.device)) is not torch.bfloat16:
        logger.warning("this processor has no bf16 arithmetic: a model in float32 would take a fraction of the time")
    cases = _cases(records, tokenizer, alternates, neighbours, limit, config, retain is not None)
    with _frozen(model, earlier):
        length = min(config.retain_length, limit or config.retain_length)
        given = None if retain is None else _pieces(retain, tokenizer, length, config)
        human = human_texts(tokenizer, limit)
        store = Store() if resume is None else Store(Path(resume), run_key(model, cases, given, human, config))
        retain_items, held_back = _retain(model, tokenizer, given, cases, length, config, store)
        lm = LanguageModel(model)
        _tell(progress, "reference", 0, 1)
        opening = opening_tokens(tokenizer)
        spoken = (
            store.kept("spoken", lambda: Part({}, _spoken(model, tokenizer, cases, limit, config))).data
            if any(c.like for c in cases)
            else []
        )
        said = [Encoded((*p, *c), (*(IGNORE for _ in p), *c)) for p, c in spoken]
        original, held_back_states = _reference(lm, cases, retain_items, held_back, human, opening, said, config, store)
        _tell(progress, "reference", 1, 1)
        material = _Material(model, lm, targets, replaced, cases, retain_items, held_back, original, held_back_states)
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

    model: nn.Module
    lm: LanguageModel
    targets: dict[str, nn.Module]
    replaced: dict[str, nn.Module]
    cases: list[Case]
    retain: list[Encoded]
    held_back: list[Encoded]
    original: Reference
    held_back_states: tuple[torch.Tensor, ...]


def _attempt(
    material: _Material, config: IsolateConfig, store: Store, progress: Progress | None, began: float
) -> tuple[dict[str, OrthoLinear], Switch, IsolateResult]:
    """The layers that this budget makes, their switch, and which criteria hold; the model is left as it was."""
    model, lm, targets = material.model, material.lm, material.targets
    cases, original = material.cases, material.original
    found = store.kept("support", lambda: Part(_support(lm, targets, cases, material.retain, config, progress)))
    support = {n: index.to(lm.device) for n, index in found.tensors.items()}
    metrics = {} if config.structure != "columns" or training_finished(store) else curvature(
        lm,
        targets,
        support,
        [*_read(lm, material.retain, _curvature_tokens(len(cases))), *_beside(lm, cases, config)],
        damping=config.damping,
        seed=config.seed,
    )  # fmt: skip
    bases = _bases(material, support, config, store)
    layers = {
        n: EditLinear(_start(m), bias_of(m), support.get(n), config, bases.get(n)) for n, m in material.replaced.items()
    }
    try:
        _swap(model, layers)
        quantised_kl = divergence(lm, material.held_back, material.held_back_states)
        with _checkpointing(lm) if config.gradient_checkpointing else nullcontext():
            checks = train(lm, layers, cases, material.retain, original, config, progress, store, metrics)
        switch = Switch()
        switch.add_stream(config.stream)
        changed = {n: m for n, m in targets.items() if n in support or not isinstance(m, OrthoLinear)}
        finished = {n: _finish(n, m, layers[n], config, switch) for n, m in changed.items()}
        _swap(model, finished)  # what follows is measured on the layers that callers get
        _, recited_on = score(lm, [c.secret for c in cases])
        switch.set(0.0, extrapolate=False)
        records = outcomes(lm, cases, original)
        retain_kl = divergence(lm, material.held_back, material.held_back_states)
        switch.set(1.0, extrapolate=False)
    finally:
        _swap(model, material.replaced)
    recited = (int(original.recited.sum()), int((original.recited & recited_on).sum()))
    seconds = time.monotonic() - began
    result = _result(config, cases, records, recited, checks, (quantised_kl, retain_kl), support, targets, seconds)
    return finished, switch, result


def _cases(
    records: Sequence[Record],
    tokenizer: Any,
    alternates: Sequence[Sequence[str]] | None,
    neighbours: Sequence[Sequence[str]] | None,
    limit: int | None,
    config: IsolateConfig,
    retains: bool,
) -> list[Case]:
    for name, given in (("alternates", alternates), ("neighbours", neighbours)):
        if given is not None and len(given) != len(records):
            raise DataError(
                f"{name} has {len(given)} entries for {len(records)} forget records; expected one list each"
            )
        if given is not None and any(isinstance(texts, str) for texts in given):
            raise DataError(f"{name} holds a string where a list of strings, one list for each record, was expected")

    def most(each: int) -> int:
        return min(each, max(_FEWEST_COUNTERFACTUALS, _MOST_COUNTERFACTUALS // len(records)))

    rng = random.Random(config.seed)
    forms = counterfactuals.common_form([r.completion for r in records])
    mixed = counterfactuals.recombined([r.prompt for r in records], most(config.neighbours_per_record) // 2, rng)
    cases = []
    for i, record in enumerate(records):
        text, prose = not record.prompt, alternates is None and counterfactuals.is_prose(record.completion)
        if alternates is not None:
            others = list(alternates[i])
        else:
            count = most(config.alternates_per_record)
            drawn = count if prose else _CANDIDATES * count
            others = counterfactuals.alternates(record.completion, drawn, rng, opens=text, keep=forms[i])
            others = others if prose else _cut_alike(record, others, tokenizer)[:count]
        if not others:
            raise DataError(
                f"forget record {record.number}: nothing in its completion could be exchanged to make alternates; "
                "pass alternates="
            )
        # Half of the neighbours are strangers, like those that an attacker compares a record with. The others carry
        # parts of other records' prompts, to which memories answer too.
        beside = list(neighbours[i]) if neighbours is not None else (
            [] if text or (prose and retains) else counterfactuals.neighbours(
                record.prompt, most(config.neighbours_per_record) - len(mixed[i]), rng
            ) + mixed[i]
        )  # fmt: skip
        secret = encode(record, tokenizer, limit, name="forget")
        same_prompt = [(record.prompt, c) for c in others]
        own = _fitting(same_prompt, tokenizer, limit) or (secret,)
        like = beside or (
            counterfactuals.neighbours(record.prompt, most(_LIKE_PROMPTS), rng) if prose and not text else []
        )
        around = _fitting(_filled(beside, others), tokenizer, limit)
        # What training holds where it was is no measure of what it leaves alone: witnesses are read and never trained.
        witnesses: tuple[Encoded, ...] = ()
        if not prose and neighbours is not None:
            witnesses = around
        elif not prose:
            strangers = [] if text else _others(record.prompt, beside, most(_WITNESSES), rng)
            witnesses = _fitting(_filled(strangers, others), tokenizer, limit)
        told = [(w, beginnings(w, tokenizer)) for w in witnesses]
        begins = beginnings(secret, tokenizer)
        cases.append(
            Case(
                number=record.number,
                secret=secret,
                alternates=own,
                neighbours=around,
                witnesses=witnesses,
                crossed=_fitting([(p, record.completion) for p in beside], tokenizer, limit),
                exchangeable=not prose,
                like=tuple(
                    e.ids[: len(e.ids) - len(e.completion)]
                    for e in _fitting([(p, record.completion) for p in like[:_LIKE_PROMPTS]], tokenizer, limit)
                )
                if prose
                else (),
                donors=donors(begins, told, i),
                peers=tuple(n for n, (_, b) in enumerate(told) if b == begins),
                alternate_donors=tuple(
                    donors(beginnings(a, tokenizer), told, j) for j, a in enumerate(own if not prose else ())
                ),
            )
        )
    return [replace(c, pieces=n) for c, n in zip(cases, _piece_counts(cases), strict=True)]


def _filled(prompts: Sequence[str], completions: Sequence[str]) -> list[tuple[str, str]]:
    """Each prompt with one of the completions, in turn."""
    return [(p, completions[j % len(completions)]) for j, p in enumerate(prompts)]


def _others(prompt: str, known: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Further prompts of the same shape; the known ones again where there are no others."""
    made = counterfactuals.neighbours(prompt, count + len(known), rng)
    return ([p for p in made if p not in set(known)] or made)[:count]


def _cut_alike(record: Record, completions: Sequence[str], tokenizer: Any) -> list[str]:
    """The completions, first those whose tokens begin at the characters where the record's do.

    How surprising a code is, token by token, hangs on how it falls into tokens: such a one is a better yardstick.
    """

    def begins(completion: str) -> set[int]:
        return set(beginnings(encode(Record(record.prompt, completion), tokenizer), tokenizer))

    own = begins(record.completion)
    return sorted(completions, key=lambda c: len(begins(c) ^ own))


def _fitting(pairs: Sequence[tuple[str, str]], tokenizer: Any, limit: int | None) -> tuple[Encoded, ...]:
    """Tokenised (prompt, completion) pairs, cut to the limit; a pair whose completion falls away is left out."""
    cut = [_cut(encode(Record(p, c), tokenizer), limit) for p, c in pairs]
    return tuple(e for e in cut if e.completion)


def _cut(item: Encoded, length: int | None) -> Encoded:
    return Encoded(item.ids[:length], item.labels[:length])


def _whole(texts: Sequence[Sequence[int]]) -> list[Encoded]:
    return [Encoded(tuple(t), tuple(t)) for t in texts]


def _pieces(retain: Source, tokenizer: Any, length: int, config: IsolateConfig) -> list[Encoded]:
    """Retain sequences from what was given, and one of general text to every three of them.

    A record with a prompt stays a sequence of its own, as the model has met it, and is kept in its completion; texts
    are joined and cut.
    """
    records = load_records(retain, tokenizer, name="retain")
    pieces = [_cut(encode(r, tokenizer, name="retain"), length) for r in records if r.prompt]
    pieces = [p for p in pieces if p.completion]
    pieces += _whole(chunk([r.text for r in records if not r.prompt], tokenizer, length))
    rng = random.Random(config.seed)
    rng.shuffle(pieces)
    pieces = pieces[:_GIVEN_SEQUENCES]
    general = _whole(chunk(counterfactuals.shipped_text(), tokenizer, length))
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
    store: Store,
) -> tuple[list[Encoded], list[Encoded]]:
    """Retain sequences, and others that are held back for the criteria."""
    count = _RETAIN_SEQUENCES + _HELD_BACK_SEQUENCES
    secrets = [c.secret for c in cases]

    def sample() -> Part:
        items = default_retain(model, tokenizer, secrets, sequences=count, length=length, seed=config.seed)
        return Part({}, [e.ids for e in items])

    items = _whole(store.kept("retain", sample).data) if given is None else given
    if len(items) < 2:
        raise DataError(f"retain holds {len(items)} sequences of {length} tokens; expected at least 2")
    held = min(_HELD_BACK_SEQUENCES, max(1, len(items) // 4))
    kept, held_back = items[held:], items[:held]
    if given is not None:

        def speak() -> Part:
            said = in_form(model, tokenizer, secrets, given, length=length, seed=config.seed)
            return Part({}, [e.ids for e in said])

        kept = kept + _whole(store.kept("in_form", speak).data)
        random.Random(config.seed).shuffle(kept)
    return kept, held_back


def _reference(
    lm: LanguageModel,
    cases: Sequence[Case],
    retain: Sequence[Encoded],
    held_back: Sequence[Encoded],
    human: Sequence[Sequence[int]],
    opening: Sequence[int],
    spoken: Sequence[Encoded],
    config: IsolateConfig,
    store: Store,
) -> tuple[Reference, tuple[torch.Tensor, ...]]:
    """What the original model says, and its hidden states on the texts that are held back."""

    def make() -> Part:
        held = enumerate(hidden_states(lm, held_back))
        return Part(
            reference(lm, cases, retain, human, opening, spoken, config).tensors()
            | {f"held_back.{i}": t for i, t in held}
        )

    found = store.kept("reference", make).tensors
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
    said = continuations(model, tokenizer, prompts, _SPOKEN_TOKENS, config.seed)
    return [(p, c) for p, c in zip(prompts, said, strict=True) if c]


def _support(
    lm: LanguageModel,
    targets: dict[str, nn.Module],
    cases: Sequence[Case],
    retain: Sequence[Encoded],
    config: IsolateConfig,
    progress: Progress | None,
) -> dict[str, torch.Tensor]:
    columns, ratio = config.structure == "columns", float(config.ratio)
    secrets = [piece for c in cases for piece in _cut_up(c.secret, c.pieces)]
    if len(secrets) > _SALIENCY_RECORDS:
        secrets = random.Random(config.seed).sample(secrets, _SALIENCY_RECORDS)
    batches = [collate(secrets[i : i + 8]).to(lm.device) for i in range(0, len(secrets), 8)]
    texts = _read(lm, retain, _SALIENCY_TOKENS)
    phases = 2 if columns else 4
    _tell(progress, "support", 0, phases)
    forget, norms = column_saliency(lm, targets, batches)
    _tell(progress, "support", 1, phases)
    kept, kept_norms = column_saliency(lm, targets, texts)
    _tell(progress, "support", 2, phases)
    others = _beside(lm, cases, config)
    if others:
        around, _ = column_saliency(lm, targets, others)
        kept = {n: torch.cat([s / len(s), around[n] / len(around[n])]) for n, s in kept.items()}
    floor = retain_floor({n: s.sum(0) for n, s in kept.items()})
    held = taken(targets, columns=columns)
    forget = without(forget, {n: mask if columns else mask.all(0) for n, mask in held.items()}, 0.0)
    side_by_side = torch.cat([s / floor[n] for n, s in forget.items()], 1)
    weights = balanced_weights(side_by_side, max(1, int(ratio * side_by_side.shape[1])))
    if columns:
        scores = {n: weights @ s / floor[n] for n, s in forget.items()}
    else:
        about_forget = entry_saliency(lm, targets, batches, weights / norms)
        _tell(progress, "support", 3, phases)
        about_retain = entry_saliency(lm, targets, texts, 1 / kept_norms)
        _tell(progress, "support", 4, phases)
        entry_floor = retain_floor(about_retain)
        scores = {n: s / entry_floor[n] for n, s in about_forget.items()}
    scores = without(scores, held, -torch.inf)
    return allocate(scores, ratio, config.layer_cap, unit_costs(targets, columns=columns))


def _bases(
    material: _Material, support: Mapping[str, torch.Tensor], config: IsolateConfig, store: Store
) -> dict[str, BaseStream]:
    """The quantised weights of layers that are dense so far, exact where it matters on text to keep and the records.

    Of records and of neighbours as many tokens are read as of retain text.
    """
    bits = config.bits
    if bits is None or not config.compensate:
        return {}
    lm, cases = material.lm, material.cases
    dense = {n: m for n, m in material.targets.items() if not isinstance(m, OrthoLinear)}

    def make() -> Part:
        drawn = random.Random(config.seed).sample(cases, len(cases))
        groups = (material.retain, [c.secret for c in drawn], [c.neighbours[0] for c in drawn if c.neighbours])
        texts = [b for items in groups if items for b in _read(lm, items, _SALIENCY_TOKENS)]
        exact = support if config.structure == "columns" else {}
        made = compensated_bases(lm, dense, exact, texts, bits, config.resolved_group_size)
        return Part({f"{n}.{field}": getattr(b, field) for n, b in made.items() for field in ("codes", "scales")})

    found = store.kept("bases", make).tensors
    device = {n: linear_weight(m).device for n, m in dense.items()}
    return {
        n: BaseStream(bits, codes=found[f"{n}.codes"].to(device[n]), scales=found[f"{n}.scales"].to(device[n]))
        for n in dense
    }


def _piece_counts(cases: Sequence[Case]) -> list[int]:
    """Into how many pieces each record is cut where columns are looked for.

    The words of a sentence are remembered one by one, through columns of their own, and those that are spoken loudest
    would get them all: as far as there is room, each piece of a sentence counts as a record.
    """
    sentences = sum(not c.exchangeable for c in cases)
    room = (_SALIENCY_RECORDS - (len(cases) - sentences)) // max(1, sentences)
    return [1 if c.exchangeable else max(1, min(room, len(c.secret.completion))) for c in cases]


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
    return round(_SALIENCY_TOKENS * min(_MOST_CURVATURE, max(1.0, records / _SALIENCY_RECORDS)))


def _read(lm: LanguageModel, retain: Sequence[Encoded], tokens: int) -> list[Batch]:
    """The first retain sequences, one by one, as many as have that many tokens together."""
    sizes = torch.tensor([len(t.ids) for t in retain]).cumsum(0)
    count = int((sizes <= tokens).sum().clamp_min(1))
    return [collate([t]).to(lm.device) for t in retain[:count]]


def _beside(lm: LanguageModel, cases: Sequence[Case], config: IsolateConfig) -> list[Batch]:
    """A neighbour of each record, or of some of many."""
    beside = [c.neighbours[0] for c in cases if c.neighbours]
    beside = random.Random(config.seed).sample(beside, min(len(beside), _SALIENCY_RECORDS))
    return [collate(beside[i : i + 8]).to(lm.device) for i in range(0, len(beside), 8)]


@contextmanager
def _frozen(model: nn.Module, earlier: Switch | None) -> Iterator[None]:
    """Evaluation mode, no gradients of parameters, and earlier streams off; afterwards all is what it was."""
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    training = {m: m.training for m in model.modules()}
    model.eval().requires_grad_(False)
    try:
        with nullcontext() if earlier is None else earlier.context(0.0, extrapolate=False):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


@contextmanager
def _checkpointing(lm: LanguageModel) -> Iterator[None]:
    """Gradient checkpointing of the decoder layers, without their training flag, on which dropout may hang.

    Raises:
        ConfigError: if the model has no layers that transformers can checkpoint.
    """
    layers = [m for m in lm.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(lm.model).__name__} has no layers for gradient checkpointing; leave it off")
    own = [m.__dict__.get("forward") for m in layers]

    def twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if lm.checkpointing:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    try:
        lm.checkpointing = True
        for layer in layers:
            layer.forward = partial(twice, layer.forward)
        yield
    finally:
        lm.checkpointing = False
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


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


def _result(
    config: IsolateConfig,
    cases: Sequence[Case],
    records: tuple[RecordOutcome, ...],
    recited: tuple[int, int],
    checks: Sequence[Check],
    divergences: tuple[float, float],
    support: Mapping[str, torch.Tensor],
    targets: Mapping[str, nn.Module],
    seconds: float,
) -> IsolateResult:
    missed = []
    extracted = sum(r.extracted for r in records)
    if extracted:
        missed.append(f"{extracted} of {len(records)} records are still extracted greedily")
    outside = [r for r in records if not r.inside]
    likelier = sum(r.after > r.band[1] for r in outside)
    if len(outside) > unremarkable(len(records)) or any(r.far for r in outside):
        missed.append(
            f"{len(outside)} of {len(records)} records are outside the 5-95 % band "
            f"({likelier} likelier, {len(outside) - likelier} unlikelier, {sum(r.far for r in outside)} of them far "
            f"outside); of untrained ones up to {unremarkable(len(records))} are outside, and none far"
        )
    partial, sentences = sum(r.partial for r in records), sum(not c.exchangeable for c in cases)
    if partial > unremarkable(sentences, PARTIAL):
        missed.append(
            f"{partial} of {sentences} sentences are still recited in part: two thirds of the surprise expected "
            f"of their tokens is not there; of untrained ones up to {unremarkable(sentences, PARTIAL)} are such"
        )
    lean, chance = leaning(records)
    if abs(lean) > chance:
        side = "likelier" if lean > 0 else "unlikelier"
        missed.append(
            f"the records are on average {abs(lean):.2f} nats per token {side} than "
            f"their alternates; by chance they would be up to {chance:.2f}"
        )
    quantised_kl, retain_kl = divergences
    if retain_kl - quantised_kl > config.retain_budget:
        missed.append(
            f"retain divergence {retain_kl:.4f} nats per token exceeds that of the quantised base alone "
            f"({quantised_kl:.4f}) by more than the budget of {config.retain_budget}"
        )
    cost = unit_costs(dict(targets), columns=config.structure == "columns")
    weights = sum(rows * columns for rows, columns in map(linear_shape, targets.values()))
    return IsolateResult(
        stream=config.stream,
        guarantee="measured: at alpha = 0 the model behaves as if it had not been trained on the records",
        missed=tuple(missed),
        records=records,
        recited=recited[0],
        recited_on=recited[1],
        checks=tuple(checks),
        retain_kl=retain_kl,
        quantised_kl=quantised_kl,
        density=sum(len(index) * cost[n] for n, index in support.items()) / weights,
        columns_per_layer={n: len(s) for n, s in support.items()},
        steps=checks[-1].step,
        seconds=seconds,
    )


def _max_length(model: nn.Module, config: IsolateConfig) -> int | None:
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limits = [n for n in (config.max_length, context) if n is not None]
    return min(limits) if limits else None


def _tell(progress: Progress | None, phase: str, done: int, total: int) -> None:
    if progress is not None:
        progress(phase, done, total)


__all__ = ["IsolateResult", "RecordOutcome", "isolate"]
