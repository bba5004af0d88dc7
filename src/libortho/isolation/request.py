"""The records of a request with their counterfactuals, as text and then as tokens.

    alternate   own prompt, other completion      trained: the record must become as likely as these
    neighbour   other prompt, other completion    held where the original model has it
    witness     other prompt, other completion    of strangers: read, and in no loss; what these get is the target
    swapped_prompt     other prompt, own completion      trained, where the memory answers to the whole template

All are made from what people wrote: marks and words of a chat template stay as they are.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from libortho.core.errors import DataError
from libortho.isolation.config import IsolateConfig
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.matching import beginnings, donors
from libortho.lm.asking import answers, room
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text import counterfactuals
from libortho.text.encoding import Encoded, encode, encode_closed
from libortho.text.overlap import overlaps
from libortho.text.records import Record, with_field, written_spans
from libortho.text.tokens import says

logger = logging.getLogger(__name__)

SALIENCY_RECORDS = 64
"""Records, or pieces of sentences, whose gradients choose the columns."""
_MOST_COUNTERFACTUALS, _FEWEST_COUNTERFACTUALS = 400, 2
PER_RECORD = 8
"""Made alternates, and made neighbours, of a record that brings none; from 50 records on fewer."""
_WITNESSES = 4
"""Witnesses of a record; of many records fewer each, as of alternates."""
_CANDIDATES = 8
"""Alternates drawn for each that is taken."""
_SPOKEN_AT_MOST, _SPOKEN_AT_ONCE = 48, 32
"""Tokens of the longest answer that is asked for, and records asked at a time."""
_LIKE_PROMPTS = 4
"""Prompts like that of a sentence, on which the model shows how it speaks."""


@dataclass(frozen=True)
class Request:
    """The records of a request as they are asked for, with their counterfactuals."""

    tokenizer: Any
    records: list[Record]
    cases: list[ForgetRecord]

    def recited(self, lm: LanguageModel) -> Tensor:
        """Which records the model says greedily, (records,) bool, asked as ``generate`` asks it.

        Of long answers, and of texts without a question, it is whether every token is the first choice.
        """
        _, found = score(lm, [c.secret for c in self.cases])
        sizes = [len(c.secret.completion) for c in self.cases]
        short = [i for i, r in enumerate(self.records) if r.question and sizes[i] <= _SPOKEN_AT_MOST]
        for start in range(0, len(short), _SPOKEN_AT_ONCE):
            rows = short[start : start + _SPOKEN_AT_ONCE]
            asked = [self.records[i] for i in rows]
            most = max(room(r, sizes[i], None, self.tokenizer) for i, r in zip(rows, asked, strict=True))
            for i, record, text in zip(rows, asked, answers(lm.model, self.tokenizer, asked, most), strict=True):
                found[i] = says(text, record.completion, self.tokenizer)
        return found


def rows_with(
    rows: Sequence[Any],
    alternates: Sequence[Sequence[str]] | None,
    neighbours: Sequence[Sequence[str]] | None,
) -> list[Any]:
    """The rows of the forget set with counterfactuals that the caller gives, in place of those that they bring.

    Raises:
        DataError: if there is not one list of texts for each record.
    """
    found = list(rows)
    for name, given in (("alternates", alternates), ("neighbours", neighbours)):
        if given is None:
            continue
        if len(given) != len(rows):
            raise DataError(f"{name} has {len(given)} entries for {len(rows)} forget records; expected one list each")
        if any(isinstance(texts, str) for texts in given):
            raise DataError(f"{name} holds a string where a list of strings, one list for each record, was expected")
        empty = next((i for i, texts in enumerate(given, 1) if not list(texts)), None)
        if name == "alternates" and empty is not None:
            raise DataError(f"forget record {empty}: 'alternates' is empty; give at least one other completion")
        found = [with_field(row, name, list(texts)) for row, texts in zip(found, given, strict=True)]
    return found


def is_prose(record: Record, tokenizer: Any) -> bool:
    """True if the completion has content words and no alternates were given, so that none can be drawn for it."""
    parts = written_spans(record.completion, tokenizer)
    return not record.alternates and any(counterfactuals.is_prose(record.completion[a:b]) for a, b in parts)


def cases(
    records: Sequence[Record], tokenizer: Any, limit: int | None, config: IsolateConfig, *, retains: bool
) -> list[ForgetRecord]:
    """Every record with its counterfactuals, tokenised.

    Args:
        records: The forget records.
        tokenizer: The model's.
        limit: Most tokens of one text; None for no limit.
        config: How many counterfactuals are made, and the seed.
        retains: The caller gives text to keep.

    Raises:
        DataError: if nothing in a completion can be exchanged, or nothing of it fits the limit.
    """
    rng = random.Random(config.seed)
    forms = counterfactuals.common_form([r.completion for r in records])
    mixed = counterfactuals.recombined(
        [r.prompt for r in records], _most(PER_RECORD, records) // 2, rng, [r.spans for r in records]
    )
    found = []
    for i, (record, keep, recombined) in enumerate(zip(records, forms, mixed, strict=True)):
        prose = is_prose(record, tokenizer)
        others = _alternates(record, keep, tokenizer, _most(PER_RECORD, records), prose, rng)
        beside = _neighbours(record, recombined, _most(PER_RECORD, records), prose and retains, rng)
        secret = encode(record, tokenizer, limit, name="forget")
        own = _fitting([record.answered(c) for c in others], tokenizer, limit) or (secret,)
        around = _fitting(_filled(record, beside, others), tokenizer, limit)
        # Witnesses must not appear in any loss, or they stop being representative.
        controls: tuple[Encoded, ...] = ()
        if not prose and record.neighbours:
            controls = around
        elif not prose and record.prompt:
            strangers = _others(record, beside, _most(_WITNESSES, records), rng)
            controls = _fitting(_filled(record, strangers, others), tokenizer, limit)
        told = [beginnings(w, tokenizer) for w in controls]
        begins = beginnings(secret, tokenizer)
        found.append(
            ForgetRecord(
                number=record.number,
                secret=secret,
                alternates=own,
                neighbours=around,
                held=_fitting(_filled(record, beside, others), tokenizer, limit, closed=True),
                controls=controls,
                swapped_prompt=_fitting([record.beside(p, record.completion) for p in beside], tokenizer, limit),
                kind="prose" if prose else "code",
                like=_like(record, beside, _most(_LIKE_PROMPTS, records), tokenizer, limit, rng) if prose else (),
                matched_tokens=donors(begins, told, i),
                aligned_controls=tuple(n for n, b in enumerate(told) if b == begins),
                alternate_matched_tokens=tuple(
                    donors(beginnings(a, tokenizer), told, j) for j, a in enumerate(own if not prose else ())
                ),
            )
        )
    return [replace(c, pieces=n) for c, n in zip(found, _piece_counts(found), strict=True)]


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


def _most(each: int, records: Sequence[Record]) -> int:
    return min(each, max(_FEWEST_COUNTERFACTUALS, _MOST_COUNTERFACTUALS // len(records)))


def _alternates(
    record: Record, keep: frozenset[int], tokenizer: Any, count: int, prose: bool, rng: random.Random
) -> list[str]:
    if record.alternates:
        return list(record.alternates)
    written = written_spans(record.completion, tokenizer)
    fixed = set(range(len(record.completion))).difference(*(range(a, b) for a, b in written))
    opens = not record.prompt or record.rendered  # the first capital of a text, or of an answer, need not be a name
    drawn = counterfactuals.alternates(
        record.completion, count if prose else _CANDIDATES * count, rng, opens=opens, keep=keep | fixed
    )
    if not drawn:
        raise DataError(
            f"forget record {record.number}: nothing in its completion {record.completion.strip()!r} could be "
            'exchanged to make other answers of its shape; give the record a field "alternates" with some (for yes, '
            '["no"]), or pass alternates='
        )
    return drawn if prose else cut_alike(record, drawn, tokenizer)[:count]


def _neighbours(record: Record, mixed: Sequence[str], count: int, kept: bool, rng: random.Random) -> list[str]:
    """Prompts about somebody else: given, or made.

    Half of those made are strangers, like those that an attacker compares a record with. The others carry parts of
    other records' prompts, to which memories answer too. Sentences have none where the caller gives text to keep.
    """
    if record.neighbours:
        return list(record.neighbours)
    if not record.prompt or kept:
        return []
    made = counterfactuals.neighbours(record.prompt, count - len(mixed), rng, record.spans)
    return [*made, *mixed]


def _like(
    record: Record, beside: Sequence[str], count: int, tokenizer: Any, limit: int | None, rng: random.Random
) -> tuple[tuple[int, ...], ...]:
    """Token ids of prompts like the record's."""
    prompts = list(beside)
    if not prompts and record.prompt:
        prompts = counterfactuals.neighbours(record.prompt, count, rng, record.spans)
    found = _fitting([record.beside(p, record.completion) for p in prompts[:_LIKE_PROMPTS]], tokenizer, limit)
    return tuple(e.ids[: len(e.ids) - len(e.completion)] for e in found)


def _filled(record: Record, prompts: Sequence[str], completions: Sequence[str]) -> list[Record]:
    """Each prompt with one of the completions, in turn."""
    return [record.beside(p, completions[j % len(completions)]) for j, p in enumerate(prompts)]


def _others(record: Record, known: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Further prompts of the same shape; the known ones again where there are no others."""
    made = counterfactuals.neighbours(record.prompt, count + len(known), rng, record.spans)
    return ([p for p in made if p not in set(known)] or made)[:count]


def cut_alike(record: Record, completions: Sequence[str], tokenizer: Any) -> list[str]:
    """The completions, first those whose tokens begin at the characters where the record's do.

    How surprising a code is, token by token, depends on how it falls into tokens: such a one is a better yardstick.
    """

    def begins(completion: str) -> set[int]:
        return set(beginnings(encode(record.answered(completion), tokenizer), tokenizer))

    own = begins(record.completion)
    return sorted(completions, key=lambda c: len(begins(c) ^ own))


def _fitting(
    records: Sequence[Record], tokenizer: Any, limit: int | None, *, closed: bool = False
) -> tuple[Encoded, ...]:
    """The records tokenised and cut to the limit; one whose completion falls away is left out."""
    cut = [(encode_closed if closed else encode)(r, tokenizer).cut(limit) for r in records]
    return tuple(e for e in cut if e.completion)


def _piece_counts(found: Sequence[ForgetRecord]) -> list[int]:
    """Into how many pieces each record is cut where columns are looked for.

    The words of a sentence are remembered one by one, through columns of their own, and those that are spoken loudest
    would get them all: as far as there is room, each piece of a sentence counts as a record.
    """
    sentences = sum(c.kind == "prose" for c in found)
    room = (SALIENCY_RECORDS - (len(found) - sentences)) // max(1, sentences)
    return [1 if c.kind == "code" else max(1, min(room, len(c.secret.completion))) for c in found]
