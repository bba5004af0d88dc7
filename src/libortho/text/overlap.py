"""Which records of one set stand in another, whatever their shape."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libortho.text.records import Record


def overlaps(forget: Sequence[Record], others: Sequence[Record]) -> dict[int, int]:
    """Index into ``others``, to that of a forget record that it holds: all that was asked, and the answer after it.

    Texts are compared in Unicode's form NFKC, without case, with single spaces and without a final full stop.
    """
    wanted = [(_asked(r), _norm(r.completion)) for r in forget]
    found = {}
    for i, other in enumerate(others):
        text = _norm(other.text)
        for j, (asked, answer) in enumerate(wanted):
            if answer in text and _holds(text, asked, answer):
                found[i] = j
                break
    return found


def _holds(text: str, asked: Sequence[str], answer: str) -> bool:
    at = 0
    for part in asked:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return answer in text[at:]


def _asked(record: Record) -> list[str]:
    """What people wrote before the answer."""
    if not record.spans:
        return [_norm(record.prompt)]
    return [_norm(record.prompt[a:b]) for a, b in record.spans]


def _norm(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".")
