"""Text on which the model must keep its behaviour: all of it for callers who bring none, a part for those who do.

By default, half is what the model itself says when it is given nothing (its own distribution, whatever it was trained
on), half is the general English text that ships with the package. Samples that share eight tokens in a row with a
forget record are dropped. Samples are cached by a fingerprint of weights and forget set, readable by the user alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from libortho.core.cache import cache_directory, make_private
from libortho.core.errors import ConfigError, DataError
from libortho.core.files import write_atomically
from libortho.core.run_cache import Entry, RunCache
from libortho.isolation.config import IsolateConfig
from libortho.isolation.forget_record import ForgetRecord
from libortho.lm.checks import fingerprint
from libortho.lm.generation import generate
from libortho.text.corpus import shipped_text
from libortho.text.encoding import SHARED_TOKENS, Encoded, chunk, encode_closed
from libortho.text.overlap import overlaps
from libortho.text.records import Record, Source, load_records
from libortho.text.tokens import opening_tokens

logger = logging.getLogger(__name__)

RETAIN_LENGTH = 128
"""Tokens of one retain sequence."""
_RETAIN_SEQUENCES, _GIVEN_SEQUENCES, _HELD_BACK_SEQUENCES = 24, 600, 8
"""Retain sequences by default, the most of what callers give, and those of them that only the criteria see."""
_IN_FORM = 96
"""Sequences that the model says where a chat begins."""
_MOST_SAMPLED, _SAMPLED_LENGTH = 16, 64
"""Sampling takes longer than reading: from here on what is shipped must do. A batch of texts takes as long as one: more
are better than longer ones."""


def default_retain(
    model: nn.Module, tokenizer: Any, forget: Sequence[Encoded], *, sequences: int, length: int, seed: int
) -> list[Encoded]:
    """Sampled and shipped text, in equal parts if there is little of it, as sequences of at most ``length`` tokens."""
    count, longest = min(sequences // 2, _MOST_SAMPLED), min(length, _SAMPLED_LENGTH)
    sampled = cached_samples(model, tokenizer, forget, count, longest, seed)
    paragraphs = list(shipped_text())
    random.Random(seed).shuffle(paragraphs)
    shipped = chunk(paragraphs, tokenizer, length)
    shipped = _unlike(shipped, forget)[: sequences - len(sampled)]
    mixed = [*sampled, *shipped]
    random.Random(seed + 1).shuffle(mixed)
    return [Encoded(tuple(ids), tuple(ids)) for ids in mixed]


def in_form(
    model: nn.Module, tokenizer: Any, forget: Sequence[Encoded], known: Sequence[Encoded], *, length: int, seed: int
) -> list[Encoded]:
    """What the model says where a chat begins, if all prompts are a chat's: up to ``_IN_FORM`` sequences.

    A retain set speaks of one domain, and the forget set asks for it in the form of a chat. What else is asked in that
    form, nothing else holds. Samples with names (capitalised words) that the forget set alone has are dropped.

    Args:
        forget: The forget records.
        known: Retain sequences, with prompts or without; names in them are no secrets.
        length: Of a sequence, in tokens, its opening included.
        seed: Of the sampling.
    """
    prompts = {e.ids[: len(e.ids) - len(e.completion)] for e in (*forget, *known)} - {()}
    if len(prompts) < 2:  # what a single one begins with would be all of it
        return []
    first, last = min(prompts), max(prompts)
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    opening = list(first[:same])
    chat = set(opening[len(opening_tokens(tokenizer)) :]) & set(tokenizer.all_special_ids)
    if not chat or length - same < SHARED_TOKENS:
        return []
    spoken = continued(model, tokenizer, [opening] * _IN_FORM, length - same, seed)

    def names(ids: Sequence[int]) -> set[str]:
        return {w for w in re.findall(r"\w+", tokenizer.decode(list(ids))) if w[0].isupper()}

    secret: set[str] = set().union(*(names(e.ids) for e in forget)).difference(*(names(e.ids) for e in known))
    kept = [s for s in _unlike(spoken, forget) if len(s) >= SHARED_TOKENS and not names(s) & secret]
    return [Encoded((*opening, *s), (*opening, *s)) for s in kept]


def continued(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, seed: int
) -> list[list[int]]:
    """One sample at temperature 1 after each prompt."""
    return [s for (s,) in generate(model, tokenizer, prompts, tokens, temperature=1.0, seed=seed)]


def _unlike(texts: Sequence[Sequence[int]], forget: Sequence[Encoded]) -> list[list[int]]:
    """Texts that share no run of ``SHARED_TOKENS`` tokens with a forget record."""
    banned = {e.ids[i : i + SHARED_TOKENS] for e in forget for i in range(max(1, len(e.ids) - SHARED_TOKENS + 1))}

    def clean(ids: Sequence[int]) -> bool:
        return not any(tuple(ids[i : i + SHARED_TOKENS]) in banned for i in range(len(ids) - SHARED_TOKENS + 1))

    return [list(t) for t in texts if clean(t)]


def cached_samples(
    model: nn.Module, tokenizer: Any, forget: Sequence[Encoded], count: int, length: int, seed: int
) -> list[list[int]]:
    """Texts sampled from the model, from the cache if they are there."""
    key = hashlib.sha256(f"{fingerprint(model)} {[e.ids for e in forget]} {count} {length} {seed}".encode()).hexdigest()
    path = _private_file(f"{key[:32]}.json")
    if path is not None and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    opening = (0 if start is None else start,)
    spoken = continued(model, tokenizer, [opening] * count, length - 1, seed)
    samples = _unlike([[*opening, *ids] for ids in spoken if len(ids) >= SHARED_TOKENS], forget)
    if path is not None:
        write_atomically(path, json.dumps(samples))
    return samples


def _private_file(name: str) -> Path | None:
    """Where samples are kept, which can hold what the model memorised; None, with a warning, where others can write."""
    try:
        return make_private(cache_directory() / "samples") / name
    except (ConfigError, OSError) as error:
        logger.warning("samples of the model are drawn anew, and not kept: %s", error)
        return None


def without_forgotten(retain: Sequence[Record], forget: Sequence[Record]) -> list[Record]:
    """Retain records that hold no forget record; a warning says which do.

    Raises:
        DataError: if none is left.
    """
    both = overlaps(forget, retain)
    if not both:
        return list(retain)
    pairs = [f"retain {retain[i].number} = forget {forget[j].number}" for i, j in both.items()]
    shown = ", ".join(pairs[:5]) + (", ..." if len(pairs) > 5 else "")
    kept = [r for i, r in enumerate(retain) if i not in both]
    if not kept:
        raise DataError(f"every retain record holds a forget record ({shown}); give other text to keep, or none")
    logger.warning("%d retain records hold forget records (%s); they are dropped from retain", len(both), shown)
    return kept


def whole(texts: Sequence[Sequence[int]]) -> list[Encoded]:
    """Texts of token ids, each token of which is judged."""
    return [Encoded(tuple(t), tuple(t)) for t in texts]


def given_pieces(retain: Source, forget: Sequence[Record], tokenizer: Any, length: int, seed: int) -> list[Encoded]:
    """Retain sequences from what was given, and one of general text to every three of them.

    A record with a prompt stays a sequence of its own, as the model has met it, and is kept in its completion; texts
    are joined and cut.
    """
    records = without_forgotten(load_records(retain, tokenizer, name="retain"), forget)
    pieces = [encode_closed(r, tokenizer).cut(length) for r in records if r.prompt]
    pieces = [p for p in pieces if p.completion]
    pieces += whole(chunk([r.text for r in records if not r.prompt], tokenizer, length))
    rng = random.Random(seed)
    rng.shuffle(pieces)
    pieces = pieces[:_GIVEN_SEQUENCES]
    general = whole(chunk(shipped_text(), tokenizer, length))
    pieces += rng.sample(general, min(len(general), len(pieces) // 3))
    rng.shuffle(pieces)
    return pieces


def sampling_tokens(given: Sequence[Encoded] | None, length: int) -> int:
    """About as many tokens as ``retain_and_held_back`` lets the model say."""
    if given is None:
        return _MOST_SAMPLED * min(length, _SAMPLED_LENGTH)
    return _IN_FORM * length


def retain_and_held_back(
    model: nn.Module,
    tokenizer: Any,
    given: list[Encoded] | None,
    forget: Sequence[ForgetRecord],
    length: int,
    config: IsolateConfig,
    store: RunCache,
) -> tuple[list[Encoded], list[Encoded]]:
    """Retain sequences, and others that are held back for the criteria."""
    count = _RETAIN_SEQUENCES + _HELD_BACK_SEQUENCES
    secrets = [r.secret for r in forget]

    def sample() -> Entry:
        items = default_retain(model, tokenizer, secrets, sequences=count, length=length, seed=config.seed)
        return Entry({}, [e.ids for e in items])

    items = whole(store.get_or_compute("retain", sample).data) if given is None else given
    if len(items) < 2:
        raise DataError(f"retain holds {len(items)} sequences of {length} tokens; expected at least 2")
    held = min(_HELD_BACK_SEQUENCES, max(1, len(items) // 4))
    kept, held_back = items[held:], items[:held]
    if given is not None:

        def speak() -> Entry:
            said = in_form(model, tokenizer, secrets, given, length=length, seed=config.seed)
            return Entry({}, [e.ids for e in said])

        kept = kept + whole(store.get_or_compute("in_form", speak).data)
        random.Random(config.seed).shuffle(kept)
    return kept, held_back
