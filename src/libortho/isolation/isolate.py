"""``isolate``: move listed records out of the base and into an ortho stream.

1. Counterfactuals: alternates of each completion, neighbours of each prompt (given, or made).
2. Constants of the original model: what it says on retain text, on neighbours, and about other people's completions.
3. Support: the columns whose gradient is about the records and not about retain text.
4. Values: trained on the support only, through the quantiser, in steps that text to keep hardly notices, until the
   criteria hold.
5. Streams: base = edited integers; ortho = original - base on the support.

The audit's holdout is never an input.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.errors import ConfigError, DataError
from libortho.core.layer import ortho_layers
from libortho.core.models import denormals_flushed, plain_torch, unwrapped
from libortho.core.progress import Progress, Stopwatch, expected, in_words
from libortho.core.report import record_method
from libortho.core.run_cache import RunCache, run_key
from libortho.core.streams.base import check_shape
from libortho.core.surgery import frozen, install, linear_shape
from libortho.core.targets import find_targets
from libortho.isolation.attempt import Inputs, attempt
from libortho.isolation.config import IsolateConfig
from libortho.isolation.earlier import earlier_switch
from libortho.isolation.original import kept_original, original_tokens
from libortho.isolation.prose import human_texts
from libortho.isolation.request import Request, forget_records
from libortho.isolation.result import IsolateResult, by_chance, known_before, nothing_known
from libortho.isolation.retain import RETAIN_LENGTH, given_pieces, retain_and_held_back, sampling_tokens, whole
from libortho.isolation.support import RequestReadings, Select, select_columns
from libortho.isolation.train import KEPT_TEXTS, LANDING, READ_BACK, step_tokens
from libortho.isolation.wordings import rows_with, wordings
from libortho.lm.checks import check_causal, check_tokens, fingerprint, training_dtype
from libortho.lm.generation import token_limit
from libortho.lm.model import LanguageModel
from libortho.lm.reading_progress import SLOWER, reading, tokens_per_second
from libortho.text.corpus import shipped_text
from libortho.text.encoding import Encoded
from libortho.text.records import Source, load_records
from libortho.text.sources import read_rows
from libortho.text.tokens import opening_tokens

logger = logging.getLogger(__name__)

AUTO_RATIOS = (0.0005, 0.001, 0.0025, 0.005)
"""Budgets that ``ratio="auto"`` tries."""


@plain_torch()
@denormals_flushed()
def isolate(
    model: nn.Module,
    tokenizer: Any,
    forget: Source,
    retain: Source | None = None,
    alternates: Sequence[Sequence[str]] | None = None,
    neighbours: Sequence[Sequence[str]] | None = None,
    config: IsolateConfig | None = None,
    *,
    select: Select = select_columns,
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

    After an error the model is what it was.

    Args:
        model: A transformers causal LM with dense weights, or one that ``isolate`` has split before. bf16 models train
            several times faster on recent CPUs.
        tokenizer: Its tokenizer.
        forget: The records that must go; see :mod:`libortho.text.records`.
        retain: Text to keep; by default text sampled from the model and the general text of the package.
        alternates: For each record, other completions of the same shape. Made if not given.
        neighbours: For each record, other prompts of the same shape. Made if not given.
        config: See :class:`~libortho.isolation.config.IsolateConfig`.
        select: The score function that chooses the columns; see :data:`~libortho.isolation.support.Select`.
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
            earlier base, earlier streams leave no column, ``select`` names columns that a layer does not have or an
            earlier stream has, ``select`` and ``resume`` are both given, the folder belongs to another run, or the
            model was made inside ``torch.inference_mode``.
        CheckpointError: if a file of the folder is damaged.
    """
    began, watch = time.monotonic(), Stopwatch()
    config = config or IsolateConfig()
    if resume is not None and select is not select_columns:
        raise ConfigError(
            "resume and select are both given; a folder of finished work cannot tell one select from another: give no "
            "resume, or leave select as it is"
        )
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
    worded = wordings(records, tokenizer, config.seed, retains=retain is not None)
    asked = Request(tokenizer, records, forget_records(worded, tokenizer, limit))
    with frozen(model, earlier):
        length = min(RETAIN_LENGTH, limit or RETAIN_LENGTH)
        given = None if retain is None else given_pieces(retain, records, tokenizer, length, config.seed)
        human = human_texts(tokenizer, limit)
        kinds = sorted({str(p.dtype) for p in model.parameters()})
        store = RunCache()
        if resume is not None:
            store = RunCache(Path(resume), run_key(fingerprint(model), kinds, asked.forget, given, human, config))
        lm = LanguageModel(model)
        if expected.isEnabledFor(logging.INFO):
            _say_expected(lm, asked, whole(human), sampling_tokens(given, length), config)
        with watch.phase("texts"), reading(model, progress, "texts", sampling_tokens(given, length)):
            kept, held_back = retain_and_held_back(model, tokenizer, given, asked.forget, length, config, store)
        texts_read = (asked, kept[:KEPT_TEXTS], held_back, human)
        readings = RequestReadings(lm, targets, asked.forget, kept, config.seed)
        with watch.phase("original"), reading(model, progress, "original", original_tokens(*texts_read)):
            original = kept_original(lm, *texts_read, opening_tokens(tokenizer), store)
        known = known_before(original)
        if (unknown := nothing_known(asked.forget, known)) is not None:
            if by_chance(known, original) and not config.allow_unknown:
                raise DataError(f"{unknown}; allow_unknown=True (--allow-unknown) isolates them all the same")
            logger.warning("%s", unknown)
        budgets = AUTO_RATIOS if config.ratio == "auto" else (config.ratio,)
        inputs = Inputs(lm, asked, targets, replaced, kept, held_back, original, readings, len(budgets) == 1)
        for ratio in budgets:
            tried = replace(config, ratio=ratio)
            inside = store if len(budgets) == 1 else store.inside(f"ratio-{ratio:g}")
            finished, switch, result = attempt(inputs, tried, select, inside, progress, watch)
            if result.succeeded:
                break
            logger.info("at a ratio of %g: %s", ratio, "; ".join(result.missed))
    install(model, finished, switch)
    result = replace(result, seconds=time.monotonic() - began, phase_seconds=watch.seconds)
    figures = {n: getattr(result, n) for n in ("missed", "density", "retain_kl", "quantised_kl", "steps", "guarantee")}
    record_method(model, config.stream, {"verb": "isolate", "records": len(records), **tried.to_dict(), **figures})
    return result


def _say_expected(
    lm: LanguageModel, asked: Request, texts: Sequence[Encoded], sampled: int, config: IsolateConfig
) -> None:
    """Say how long all phases take, by how fast the model reads some texts; text to keep is not there yet."""
    kept = [texts[i % len(texts)] for i in range(4 * KEPT_TEXTS)]  # as many tokens as text to keep has
    work = sampled + original_tokens(asked, kept, (), [t.ids for t in texts])
    work += READ_BACK * (sum(len(r.secret.ids) for r in asked.forget) + sum(len(t.ids) for t in kept))
    step = READ_BACK * step_tokens(asked.forget)
    rate = tokens_per_second(lm, texts[:8])
    least, most = (SLOWER * (work + n * step) / rate for n in (LANDING, config.max_steps))
    expected.info("isolating takes about %s, at most %s on this machine", in_words(least), in_words(most))
