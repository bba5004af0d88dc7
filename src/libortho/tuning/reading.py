"""What ``tune`` reads before it trains: records, texts to keep, and the columns that both choose."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from libortho.core.errors import DataError
from libortho.core.run_cache import Entry, RunCache
from libortho.isolation.retain import RETAIN_LENGTH, default_retain, whole
from libortho.lm.checks import check_tokens
from libortho.lm.model import LanguageModel
from libortho.selection.readings import Readings, drawn_labels, read_layers
from libortho.text import counterfactuals
from libortho.text.encoding import Encoded, encode, encode_closed
from libortho.text.records import Record, Source, load_records
from libortho.tuning.columns import choose_columns
from libortho.tuning.config import TuneConfig

_RETAIN_SEQUENCES, _HELD_BACK_SEQUENCES, CURVATURE_TEXTS, CURVATURE_BESIDE = 32, 8, 20, 40
"""Texts to keep, those of them that only the result is measured on, and the most of which the curvature is read, and of
prompts about others."""


OTHERS = 2
"""Prompts about somebody else to each record."""


def retain_length(limit: int | None) -> int:
    """Tokens of a text to keep, where the model reads at most ``limit``."""
    return min(RETAIN_LENGTH, limit or RETAIN_LENGTH)


def held_apart(texts: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Texts that only the result is measured on, and those that work is done with."""
    held = min(_HELD_BACK_SEQUENCES, max(1, len(texts) // 4))
    return list(texts[:held]), list(texts[held:])


def encoded(
    source: Source, model: nn.Module, tokenizer: Any, limit: int | None, name: str
) -> tuple[list[Record], list[Encoded]]:
    """Records and their tokens; of a chat with the mark that ends an answer, as fine-tuning has it.

    Raises:
        DataError: if a record is malformed, empty or longer than ``limit``; the message calls the data ``name``.
    """
    records = load_records(source, tokenizer, name=name)
    check_tokens(model, tokenizer, ((f"{name} record {r.number}", r.text) for r in records))
    items = [encode_closed(r, tokenizer) if r.rendered else encode(r, tokenizer) for r in records]
    for record, item in zip(records, items, strict=True):
        if limit is not None and len(item.ids) > limit:
            raise DataError(
                f"{name} record {record.number} has {len(item.ids)} tokens and the model reads {limit}; cut it into "
                "several records"
            )
    return records, items


def about_others(records: Sequence[Record], tokenizer: Any, limit: int | None, config: TuneConfig) -> list[Encoded]:
    """Prompts of the same shape about somebody else, with the record's completion and with another record's.

    What a stream learns of one person, it must not say of another, or streams of several owners speak for each other's.
    """
    rng, asked = random.Random(config.seed), {r.prompt for r in records}
    found = []
    for number, record in enumerate(records):
        made = record.neighbours or counterfactuals.neighbours(record.prompt, OTHERS, rng, record.spans)
        answers = (record.completion, records[number - 1].completion)
        beside = [record.beside(p, c) for p, c in zip(made, answers, strict=False) if p not in asked]
        closed = encode_closed if record.rendered else encode
        found += [e for e in (closed(r, tokenizer).cut(limit) for r in beside) if e.completion]
    return found


def texts_to_keep(
    model: nn.Module,
    tokenizer: Any,
    data: Sequence[Encoded],
    given: list[Encoded] | None,
    length: int,
    config: TuneConfig,
    store: RunCache,
) -> list[Encoded]:
    """Texts to keep: those that were given, or what the model says and general text.

    Raises:
        DataError: if there are less than two.
    """

    def sample() -> Entry:
        found = default_retain(model, tokenizer, data, sequences=_RETAIN_SEQUENCES, length=length, seed=config.seed)
        return Entry({}, [e.ids for e in found])

    texts = whole(store.get_or_compute("retain", sample).data) if given is None else given
    if len(texts) < 2:
        raise DataError(f"retain holds {len(texts)} sequences of {length} tokens; expected at least 2")
    return texts


def chosen_columns(
    lm: LanguageModel,
    layers: Mapping[str, nn.Module],
    data: Sequence[Encoded],
    kept: Sequence[Encoded],
    beside: Sequence[Encoded],
    config: TuneConfig,
    store: RunCache,
) -> tuple[dict[str, Tensor], list[Readings]]:
    """The columns of the stream, ascending (k,) by layer, and what the layers do on text to keep and beside it.

    Raises:
        ConfigError: if no column is free.
    """
    some = random.Random(config.seed).sample(beside, min(len(beside), CURVATURE_BESIDE))
    readings = [
        read_layers(lm, layers, texts, drawn_labels(config.seed)) for texts in (kept[:CURVATURE_TEXTS], some) if texts
    ]
    chosen = store.get_or_compute("columns", lambda: Entry(choose_columns(lm, layers, data, readings, config))).tensors
    return {n: i.to(lm.device) for n, i in chosen.items()}, readings
