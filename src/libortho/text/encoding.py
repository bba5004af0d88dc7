"""Records as token ids, and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from libortho.core.errors import DataError
from libortho.text.records import Record
from libortho.text.tokens import opening_tokens, opens, template_tokens, text_ids

logger = logging.getLogger(__name__)

IGNORE = -100
SHARED_TOKENS = 8
"""Tokens of the shortest piece that ``chunk`` keeps."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record; labels are -100 where there is no loss."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def completion(self) -> tuple[int, ...]:
        """Ids that carry loss."""
        return tuple(i for i in self.labels if i != IGNORE)

    def cut(self, length: int | None) -> Encoded:
        """The first so many tokens; all of them for None."""
        return Encoded(self.ids[:length], self.labels[:length])


def encode(record: Record, tokenizer: Any, max_length: int | None = None, *, name: str = "data") -> Encoded:
    """Tokenise a record as one text and mask all but the completion.

    A token that straddles a border belongs to the completion, as it does when the model reads the text. The closing is
    read, so that the completion falls into the same tokens as in the whole chat, and then left out. A record longer
    than ``max_length`` loses the end of its completion, with a warning that names it.

    Raises:
        DataError: if nothing of the completion is left to judge.
    """
    ids, judged = _tokenised(record, tokenizer)
    labels = [i if own else IGNORE for i, own in zip(ids, judged, strict=True)]
    if max_length is not None and len(ids) > max_length:
        logger.warning(
            "%s record %d has %d tokens, the limit is %d; its end is cut off", name, record.number, len(ids), max_length
        )
        ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE for label in labels[1:]):
        raise DataError(
            f"{name} record {record.number}: no token of the completion can be judged (the prompt fills the limit of "
            f"{max_length} tokens, or the text is a single token)"
        )
    return Encoded(tuple(ids), tuple(labels))


def encode_closed(record: Record, tokenizer: Any) -> Encoded:
    """As ``encode``, with the mark that closes a chat's answer judged too, as fine-tuning does."""
    item = encode(record, tokenizer)
    marks = [t for t in template_tokens(tokenizer) if t in record.closing]
    if not marks:
        return item
    first = min(marks, key=record.closing.index)
    end = record.closing[: record.closing.index(first) + len(first)]
    whole = _tokenised(replace(record, completion=record.completion + end, closing=""), tokenizer)[0]
    return Encoded(tuple(whole), (*item.labels, *whole[len(item.ids) :]))


def _tokenised(record: Record, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids up to the end of the completion, and which of them are the completion's."""
    begin, end = len(record.prompt), len(record.prompt) + len(record.completion)
    if not getattr(tokenizer, "is_fast", False):
        ids = text_ids(record.text[:end], tokenizer, rendered=record.rendered)
        given = text_ids(record.prompt, tokenizer, rendered=record.rendered)
        common = next(
            (n for n, (a, b) in enumerate(zip(ids, given, strict=False)) if a != b), min(len(ids), len(given))
        )
        return ids, [n >= common for n in range(len(ids))]
    opening = opens(record.text, tokenizer, rendered=record.rendered)
    found = tokenizer(record.text, return_offsets_mapping=True, add_special_tokens=False)
    # Some tokenizers trim blanks from offsets: a blank token then ends early.
    offsets = found["offset_mapping"]
    judged = [max(a, b) > begin and a < end for a, b in offsets]
    last = max((n for n, own in enumerate(judged) if own), default=len(judged) - 1) + 1
    return [*opening, *found["input_ids"][:last]], [*(False for _ in opening), *judged[:last]]


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors, each (sequences, tokens); labels are -100 where there is no loss."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def collate(items: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Pad to the longest; the value of ``pad_id`` does not matter, padding is masked."""
    length = max(len(e.ids) for e in items)
    ids = torch.full((len(items), length), pad_id)
    labels = torch.full((len(items), length), IGNORE)
    mask = torch.zeros((len(items), length), dtype=torch.long)
    for row, item in enumerate(items):
        size = len(item.ids)
        ids[row, :size] = torch.tensor(item.ids)
        labels[row, :size] = torch.tensor(item.labels)
        mask[row, :size] = 1
    labels[:, 0] = IGNORE  # nothing predicts the first token
    return Batch(ids, mask, labels)


def batches(items: Sequence[Encoded], limit: int) -> Iterator[list[int]]:
    """Indices of the items by length, in batches of at most ``limit`` padded tokens or of one longer item."""
    rows: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: len(items[i].ids)):
        if rows and (len(rows) + 1) * len(items[i].ids) > limit:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def chunk(texts: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Join texts and cut them into sequences of ``length`` tokens; a last piece of under 8 tokens is dropped.

    A tokenizer that begins every text with a special token begins every piece with it, and no piece holds it inside:
    some models (Gemma) are lost without.
    """
    opening = opening_tokens(tokenizer)
    joined = [i for t in texts for i in tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]]
    inside = max(1, length - len(opening))
    pieces = [opening + joined[start : start + inside] for start in range(0, len(joined), inside)]
    return [p for p in pieces if len(p) >= SHARED_TOKENS]


def predicting(item: Encoded) -> tuple[int, ...]:
    """Positions of the hidden states that predict judged tokens."""
    return tuple(i - 1 for i, label in enumerate(item.labels) if i and label != IGNORE)
