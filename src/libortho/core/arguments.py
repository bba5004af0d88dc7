"""Arguments that every verb takes, checked before anything is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from libortho.core.errors import ConfigError, TargetError


def check_model(model: Any, name: str = "model") -> None:
    """Refuse what is no model in memory: a path above all.

    Args:
        model: What was given.
        name: What the caller calls it.

    Raises:
        TargetError: if it is not a torch module.
    """
    if isinstance(model, nn.Module):
        return
    load_first = (
        "load it first, a checkpoint of libortho with libortho.load(directory), any other model with "
        "AutoModelForCausalLM.from_pretrained of transformers"
    )
    if isinstance(model, str | Path):
        raise TargetError(f"{name} is the path or name {str(model)!r}; expected a model in memory: {load_first}")
    if isinstance(model, tuple):
        raise TargetError(f"{name} is a tuple; expected a model: libortho.load returns (model, tokenizer)")
    raise TargetError(f"{name} is a {type(model).__name__}; expected a model in memory: {load_first}")


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what cannot turn text into tokens.

    Raises:
        ConfigError: if it cannot be called.
    """
    if not callable(tokenizer):
        given = f"the path or name {str(tokenizer)!r}" if isinstance(tokenizer, str | Path) else repr(tokenizer)[:80]
        raise ConfigError(
            f"tokenizer is {given}; expected the model's tokenizer: load it first, with libortho.load(directory) or "
            "AutoTokenizer.from_pretrained of transformers"
        )
