"""Measures of memory and of ability: small functions of models and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libortho.core.errors import DataError
from libortho.lm.generation import generate
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.encoding import Encoded, collate
from libortho.text.records import Record
from libortho.text.tokens import contains, decoded, prompt_ids, text_ids

__all__ = ["auc", "general_perplexity", "sampled_extractions", "score", "text_perplexity"]


def auc(members: Tensor, others: Tensor) -> float:
    """Probability that a member's score exceeds a non-member's, ties counting half (the Mann-Whitney U statistic).

    Args:
        members: (m,) scores; higher means more member-like.
        others: (n,) scores.
    """
    ordered = others.sort().values
    below, up_to = torch.searchsorted(ordered, members), torch.searchsorted(ordered, members, right=True)
    return float((below + up_to).double().mean() / (2 * len(others)))


@torch.no_grad()
def text_perplexity(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Perplexity of one text, given its first token."""
    ids = text_ids(text, tokenizer)
    return general_perplexity(LanguageModel(model), [Encoded(tuple(ids), tuple(ids))])


@torch.no_grad()
def general_perplexity(lm: LanguageModel, sequences: Sequence[Encoded]) -> float:
    """``exp`` of the mean negative log-likelihood over all judged tokens of all sequences.

    Raises:
        DataError: if there is no token to judge.
    """
    total, count = 0.0, 0
    for start in range(0, len(sequences), 4):
        batch = collate(sequences[start : start + 4]).to(lm.device)
        labels = batch.labels[:, 1:]
        judged = labels != -100
        log_p = lm.logits(lm.hidden(batch)[:, :-1][judged]).log_softmax(-1)
        total -= float(log_p.gather(-1, labels[judged].unsqueeze(-1)).sum())
        count += int(judged.sum())
    if not count:
        raise DataError("the text holds no token that can be judged; expected at least two tokens")
    return math.exp(total / count)


@torch.no_grad()
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
            [drawn] = generate(
                model, tokenizer, [ids], max(2, len(whole) - len(ids) + 2), temperature=1.0, samples=samples
            )
            hits.append(sum(contains(decoded(s, tokenizer), record.completion, tokenizer) for s in drawn))
    return hits
