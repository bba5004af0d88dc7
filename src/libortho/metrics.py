"""Measures of memory and of ability: small functions of models and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libortho.data import Encoded, Record, adds_special_tokens, collate
from libortho.errors import DataError
from libortho.isolate.language_model import LanguageModel
from libortho.isolate.trainer import score

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
    ids = tokenizer(text)["input_ids"]
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
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    hits = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for record in records:
            special = adds_special_tokens(record.prompt, tokenizer)
            ids = tokenizer(record.prompt, add_special_tokens=special)["input_ids"] or [start]
            prompt = torch.tensor([ids], device=device)
            wanted = record.completion.strip().rstrip(".")
            output = model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=len(tokenizer(record.completion)["input_ids"]) + 2,
                num_return_sequences=samples,
                pad_token_id=pad,
            )
            texts = tokenizer.batch_decode(output[:, len(ids) :], skip_special_tokens=True)
            hits.append(sum(wanted in text for text in texts))
    return hits
