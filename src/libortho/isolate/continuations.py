"""What the model itself says after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, seed: int
) -> list[list[int]]:
    """One sample at temperature 1 after each prompt: up to so many token ids, without the one that ends the text.

    Args:
        model: A causal LM that can generate.
        tokenizer: Its tokenizer; tells which token ends a text.
        prompts: Token ids; none is empty.
        tokens: The most that are sampled.
        seed: Of the sampling. The state of torch's own generator is not touched.
    """
    device = next(model.parameters()).device
    longest = max(len(p) for p in prompts)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[pad or 0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=pad,
        )
    spoken = output[:, longest:].tolist()
    return [row[: row.index(end)] if end in row else row for row in spoken]
