"""Calls under an alpha that the tests of the switch share."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
)

import libortho

GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, value: Any = None, **inputs: Any) -> torch.Tensor:
    if value is None:
        return model(tokens, **inputs).logits
    with libortho.alpha(model, value):
        return model(tokens, **inputs).logits


def generate(model: Any, tokens: torch.Tensor, value: Any, **options: Any) -> torch.Tensor:
    with libortho.alpha(model, value):
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **GENERATE, **options)


def in_thread(target: Callable[[], Any]) -> tuple[threading.Thread, dict[str, Any]]:
    """A running thread whose result or exception ends up in the returned dictionary."""
    outcome: dict[str, Any] = {}

    def body() -> None:
        try:
            outcome["value"] = target()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=body)
    thread.start()
    return thread, outcome


def finish(thread: threading.Thread) -> None:
    thread.join(timeout=30)
    assert not thread.is_alive()


def outcome_in_thread(target: Callable[[], Any]) -> dict[str, Any]:
    thread, outcome = in_thread(target)
    finish(thread)
    return outcome


def void(_: Any) -> None:
    """A hook that returns something would replace the output."""


def prefill(model: nn.Module, tokens: torch.Tensor, value: Any) -> DynamicCache:
    cache = DynamicCache()
    logits(model, tokens[:, :4], value, past_key_values=cache)
    return cache


SPLIT = libortho.SplitConfig(
    bits=4, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.1, structure="columns", value_dtype="float32"
)


def assert_separate(model: nn.Module, tokens: torch.Tensor, values: list[float], **inputs: Any) -> None:
    mixed = logits(model, tokens, values, **inputs)
    for row, value in enumerate(values):
        torch.testing.assert_close(mixed[row], logits(model, tokens, value, **inputs)[row], atol=1e-4, rtol=1e-4)
