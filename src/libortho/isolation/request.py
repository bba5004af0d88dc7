"""The second pass over a request: every record with its counterfactuals, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.matching import beginnings, matched_tokens, tokens_alike
from libortho.isolation.wordings import Wording
from libortho.lm.asking import heard
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded, encode, encode_closed
from libortho.text.records import Record

SALIENCY_RECORDS = 64
"""Records, or pieces of sentences, whose gradients choose the columns."""


@dataclass(frozen=True)
class Request:
    """The records of a request as they are asked for, with their counterfactuals."""

    tokenizer: Any
    records: list[Record]
    forget: list[ForgetRecord]

    def recited(self, lm: LanguageModel, first: Tensor) -> Tensor:
        """Which records the model says greedily, (records,) bool; ``first`` as :func:`~libortho.lm.asking.heard`."""
        return self.heard(lm, first)[0]

    def heard(self, lm: LanguageModel, first: Tensor) -> tuple[Tensor, dict[int, str]]:
        """As :func:`libortho.lm.asking.heard`, of these records."""
        return heard(lm, self.tokenizer, self.records, [c.secret for c in self.forget], first)


def forget_records(wordings: Sequence[Wording], tokenizer: Any, limit: int | None) -> list[ForgetRecord]:
    """Every record with its counterfactuals, tokenised.

    Args:
        wordings: The records and their counterfactuals as text.
        tokenizer: The model's.
        limit: Most tokens of one text; None for no limit.

    Raises:
        DataError: if nothing of a completion fits the limit.
    """
    found = [_forget_record(i, w, tokenizer, limit) for i, w in enumerate(wordings)]
    return [replace(r, pieces=n) for r, n in zip(found, _piece_counts(found), strict=True)]


def _forget_record(number: int, wording: Wording, tokenizer: Any, limit: int | None) -> ForgetRecord:
    record = wording.record
    secret = encode(record, tokenizer, limit, name="forget")
    alternates = _fitting([record.answered(c) for c in wording.alternates], tokenizer, limit) or (secret,)
    beside = wording.filled(wording.neighbours)
    neighbours = _fitting(beside, tokenizer, limit)
    strangers = wording.strangers
    controls = neighbours if strangers is None else _fitting(wording.filled(strangers), tokenizer, limit)
    told = [beginnings(c, tokenizer) for c in controls]
    begins, code = beginnings(secret, tokenizer), wording.kind == "code"
    cuts = [beginnings(a, tokenizer) for a in alternates] if code else []
    return ForgetRecord(
        number=record.number,
        secret=secret,
        alternates=alternates,
        cut_alike=tuple(a for a, cut in zip(alternates, cuts, strict=False) if a != secret and cut == begins),
        neighbours=neighbours,
        held=_fitting(beside, tokenizer, limit, closed=True),
        controls=controls,
        swapped_prompt=_fitting([record.beside(p, record.completion) for p in wording.neighbours], tokenizer, limit),
        kind=wording.kind,
        matched_tokens=matched_tokens(begins, told, number),
        alike=tokens_alike(begins, (*alternates, *controls), (*cuts, *told)) if code else (),
    )


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
    sentences = sum(r.kind == "prose" for r in found)
    room = (SALIENCY_RECORDS - (len(found) - sentences)) // max(1, sentences)
    return [1 if r.kind == "code" else max(1, min(room, len(r.secret.completion))) for r in found]
