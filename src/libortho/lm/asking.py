"""Records put to a model as people put them: what does it answer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libortho.lm.generation import generate
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded
from libortho.text.records import Record
from libortho.text.tokens import answered, contains, decoded, prompt_ids, says, text_ids

THOUGHT_TOKENS = 96
"""Room for what a model thinks before its answer, where its template has a place for that."""
_ROOM = 4
"""Tokens beyond those of the true answer."""
_SPOKEN_AT_MOST, _SPOKEN_AT_ONCE = 48, 16
"""Tokens of the longest answer that is asked for, and records asked at a time."""


def answers(model: nn.Module, tokenizer: Any, records: Sequence[Record], tokens: int) -> list[str]:
    """Greedy answers to the records' questions, in one batch, without thoughts and marks of a template.

    Args:
        model: A causal LM that can generate.
        tokenizer: Its tokenizer.
        records: The records; their completions are not looked at.
        tokens: Most tokens of an answer, with what the template opens it with.
    """
    ids = [prompt_ids(r.question, tokenizer, rendered=r.rendered) for r in records]
    said = generate(model, tokenizer, ids, tokens)
    return [answered(s, r.opening, tokenizer) for r, (s,) in zip(records, said, strict=True)]


def heard(
    lm: LanguageModel, tokenizer: Any, records: Sequence[Record], items: Sequence[Encoded], first: Tensor
) -> tuple[Tensor, dict[int, str]]:
    """Which records the model says greedily, (records,) bool: those of which every token is the ``first`` choice,
    (records,) bool, and those with a question and a short answer that it says when asked as ``generate`` asks. And what
    it answered to each that was asked so, by the record's place.
    """
    found, texts = first.clone(), dict[int, str]()
    sizes = [len(e.completion) for e in items]
    short = [i for i, r in enumerate(records) if r.question and sizes[i] <= _SPOKEN_AT_MOST and not found[i]]
    short.sort(key=lambda i: sizes[i])  # the longest answer of a batch says how long all of it takes
    for start in range(0, len(short), _SPOKEN_AT_ONCE):
        rows = short[start : start + _SPOKEN_AT_ONCE]
        asked = [records[i] for i in rows]
        most = max(room(r, sizes[i], None, tokenizer) for i, r in zip(rows, asked, strict=True))
        for i, record, text in zip(rows, asked, answers(lm.model, tokenizer, asked, most), strict=True):
            found[i], texts[i] = says(text, record.completion, tokenizer), text
    return found, texts


def sample(
    model: nn.Module, tokenizer: Any, records: Sequence[Record], tokens: int, samples: int, seed: int
) -> list[list[str]]:
    """``samples`` continuations of every question at temperature 1, in one batch and without special tokens."""
    ids = [prompt_ids(r.question, tokenizer, rendered=r.rendered) for r in records]
    drawn = generate(model, tokenizer, ids, tokens, temperature=1.0, samples=samples, seed=seed)
    return [[decoded(s, tokenizer) for s in group] for group in drawn]


def sampled_extractions(
    model: nn.Module, tokenizer: Any, records: Sequence[Record], samples: int, *, seed: int = 0
) -> list[int]:
    """For each record, how many of ``samples`` continuations at temperature 1 contain its completion.

    Surrounding white space and the final full stop are not required. Without a prompt, text begins from nothing.
    """
    hits = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for record in records:
            ids = prompt_ids(record.question, tokenizer, rendered=record.rendered)
            whole = text_ids(record.prompt + record.completion, tokenizer, rendered=record.rendered)
            most = max(2, len(whole) - len(ids) + 2)
            [drawn] = generate(model, tokenizer, [ids], most, temperature=1.0, samples=samples)
            hits.append(sum(contains(decoded(s, tokenizer), record.completion, tokenizer) for s in drawn))
    return hits


def room(record: Record, tokens: int, most: int | None, tokenizer: Any) -> int:
    """Tokens to generate for an answer of so many: ``most`` of them, and what comes before an answer.

    Args:
        record: The record that is asked for.
        tokens: Of its true answer.
        most: The longest answer; None for no limit.
        tokenizer: The model's.
    """
    own = tokens + _ROOM if most is None else min(tokens + _ROOM, most)
    before = len(text_ids(record.opening, tokenizer, rendered=True)) + _ROOM if record.opening else 0
    return own + before + (THOUGHT_TOKENS if record.thinks else 0)
