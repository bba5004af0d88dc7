"""The first pass over a request: every record with its counterfactuals, as text.

    counterfactual    prompt    completion    role
    alternate         own       other         trained: the record must become as likely as these
    neighbour         other     other         held where the original model has it
    control           other     other         of strangers: read, and in no loss; what these get is the target
    swapped prompt    other     own           trained, where the memory answers to the whole template

All are made from what people wrote: marks and words of a chat template stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from libortho.core.errors import DataError
from libortho.isolation.forget_record import Kind
from libortho.isolation.matching import beginnings
from libortho.text import counterfactuals
from libortho.text.encoding import encode
from libortho.text.records import Record, with_field, written_spans

_MOST_COUNTERFACTUALS, _FEWEST_COUNTERFACTUALS = 400, 2
"""Alternates, or neighbours, of all records together, and of one record at least."""
PER_RECORD = 4
"""Made alternates, and made neighbours, of a record that brings none; from 50 records on fewer."""
_CONTROLS = 4
"""Controls of a record; of many records fewer each, as of alternates."""
_CANDIDATES = 8
"""Alternates drawn for each that is taken."""


@dataclass(frozen=True)
class Wording:
    """A record with the texts of its counterfactuals.

    Attributes:
        record: The record.
        kind: "code" or "prose"; see :class:`~libortho.isolation.forget_record.ForgetRecord`.
        alternates: Other completions.
        neighbours: Other prompts.
        strangers: Further other prompts, of controls; None where the neighbours are the controls.
    """

    record: Record
    kind: Kind
    alternates: tuple[str, ...]
    neighbours: tuple[str, ...]
    strangers: tuple[str, ...] | None

    def filled(self, prompts: Sequence[str]) -> list[Record]:
        """Each prompt with one of the alternates, in turn."""
        count = len(self.alternates)
        return [self.record.beside(p, self.alternates[j % count]) for j, p in enumerate(prompts)]


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


def wordings(records: Sequence[Record], tokenizer: Any, seed: int, *, retains: bool) -> list[Wording]:
    """Every record with the texts of its counterfactuals, given or made.

    Args:
        records: The forget records.
        tokenizer: The model's.
        seed: Of the counterfactuals that are made.
        retains: The caller gives text to keep.

    Raises:
        DataError: if nothing in a completion can be exchanged.
    """
    rng = random.Random(seed)
    forms = counterfactuals.common_form([r.completion for r in records])
    most, controls = (_most(each, records) for each in (PER_RECORD, _CONTROLS))
    mixed = counterfactuals.recombined([r.prompt for r in records], most // 2, rng, [r.spans for r in records])
    found = []
    for record, keep, recombined in zip(records, forms, mixed, strict=True):
        prose = is_prose(record, tokenizer)
        others = _alternates(record, keep, tokenizer, most, prose, rng)
        beside = _neighbours(record, recombined, most, prose and retains, rng)
        strangers: list[str] | None = []
        if not prose and record.neighbours:
            strangers = None
        elif not prose and record.prompt:
            strangers = _others(record, beside, controls, rng)
        found.append(
            Wording(
                record=record,
                kind="prose" if prose else "code",
                alternates=tuple(others),
                neighbours=tuple(beside),
                strangers=None if strangers is None else tuple(strangers),
            )
        )
    return found


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
