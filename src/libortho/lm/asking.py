"""Records put to a model as people put them: what does it answer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from libortho.lm.generation import generate
from libortho.text.records import Record
from libortho.text.tokens import answered, contains, decoded, prompt_ids, text_ids

THOUGHT_TOKENS = 96
"""Room for what a model thinks before its answer, where its template has a place for that."""
_ROOM = 4
"""Tokens beyond those of the true answer."""


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
