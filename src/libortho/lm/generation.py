"""What a model says after a prompt, under a generation config of our own.

A model brings a ``generation_config`` (repetition penalties, beams, top-k, ...), and ``generate`` fills whatever a
caller leaves open from it, even where another config is passed. An attack that says "greedy" or "temperature 1" must
mean it: while text is generated here, every such config of the model is exchanged for one that holds nothing but what
was asked for and the tokens that end a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from libortho.core.errors import DataError
from libortho.lm.logits import drawn


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int | None = None,
    streamer: Any = None,
) -> list[list[list[int]]]:
    """Continuations of every prompt, in one left-padded batch, as token ids.

    Args:
        model: A causal LM that can generate.
        tokenizer: Its tokenizer; tells what pads and, where the model does not, what ends a text.
        prompts: Token ids; none is empty.
        tokens: The most that are generated after each.
        temperature: 0 is greedy; otherwise the whole distribution is sampled at this temperature.
        samples: Continuations of each prompt.
        seed: Of the sampling; torch's own generator is then left as it was. None draws from torch's own.
        streamer: As in ``model.generate``.

    Returns:
        For each prompt its samples, each cut before the token that ended it and where the model's context ends.

    Raises:
        DataError: if a prompt leaves no room in the context.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    context = context_length(model)
    if context is not None and longest >= context:
        raise DataError(f"a prompt has {longest} tokens and the model reads {context}; nothing can be said after it")
    tokens = tokens if context is None else min(tokens, context - longest)
    ends, pad = end_tokens(model, tokenizer), pad_token(tokenizer)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        do_sample=False,
    )
    drawing = LogitsProcessorList([_Drawn(temperature)] if temperature > 0 else [])
    with own_config(model, config), whole_states(model), torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        read = _read_once(model, ids, mask, samples)
        shared = {} if read is None else {cache_name(model): read}
        output = model.generate(  # type: ignore[operator]
            ids.repeat_interleave(samples, 0), attention_mask=mask.repeat_interleave(samples, 0),
            generation_config=config, logits_processor=drawing, streamer=streamer, **shared,
        )  # fmt: skip
    said = [_until_end(row, ends) for row in output[:, longest:].tolist()]
    return [said[i : i + samples] for i in range(0, len(said), samples)]


def _read_once(model: nn.Module, ids: Tensor, mask: Tensor, samples: int) -> Any:
    """What the model keeps of all prompts but their last tokens, for every sample, where it can be shared.

    A prompt is then read once, and not once for each of its samples. None where there is nothing to share, or the model
    keeps what cannot be repeated row by row, or is not told where padded tokens stand.
    """
    takes = inspect.signature(model.forward).parameters
    if samples == 1 or ids.shape[1] == 1 or "position_ids" not in takes:
        return None
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # nobody asks what the prompts are followed by
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, :-1]
    output = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, use_cache=True, **last)
    kept = output.get(cache_name(model))
    if type(kept) is not DynamicCache:
        return None
    kept.batch_repeat_interleave(samples)
    return kept


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls its key/value cache; older releases of transformers use the longer name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _Drawn(LogitsProcessor):
    """Leaves one token of each row, drawn from the whole distribution at this temperature; see ``drawn`` for why."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, drawn(scores / self.temperature)[:, None], 0.0)


@contextmanager
def whole_states(model: nn.Module) -> Iterator[None]:
    """Within, the head is given states that lie side by side.

    transformers hands it a view of the last position of each row, and for such a view torch's CPU matmul copies the
    head's weight once for each row: 0.9 GB for 16 rows of a model of 135M.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: tuple(a.contiguous() for a in args))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def own_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Within, the model and all that it wraps have this generation config."""
    kept = {m: m.__dict__["generation_config"] for m in model.modules() if "generation_config" in m.__dict__}
    try:
        for module in kept:
            module.generation_config = config  # type: ignore[assignment]
        yield
    finally:
        for module, own in kept.items():
            module.generation_config = own


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model reads at a time; None where its config names no limit."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def token_limit(model: nn.Module, most: int | None) -> int | None:
    """Tokens of the longest record: ``most``, or what the model reads if that is less; None without either."""
    return min((n for n in (most, context_length(model)) if n is not None), default=None)


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those that the model stops at, else the tokenizer's."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = own if own is not None else getattr(tokenizer, "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]


def pad_token(tokenizer: Any) -> int:
    """A token to pad with; its value does not matter, padding is masked."""
    known = (getattr(tokenizer, n, None) for n in ("pad_token_id", "eos_token_id"))
    return next((int(t) for t in known if t is not None), 0)


def _until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:at])
