"""Loading a causal LM the way this library needs it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from libortho.core.errors import ConfigError, DataError, TargetError


def training_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 where the processor multiplies it in hardware, else fp32: emulated, it is several times slower than fp32.

    Where torch cannot tell (before ``torch.cpu.get_capabilities``), bf16.
    """
    if not device.startswith("cpu") or not hasattr(torch.cpu, "get_capabilities"):
        return torch.bfloat16
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(has and name.endswith("bf16") for name, has in found.items()) else torch.float32


def fingerprint(model: nn.Module) -> str:
    """Hash of a spread of the values of every parameter and buffer; models that differ in training differ in it."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().flatten()
        # An odd step meets all columns: widths are multiples of powers of two, and edits are whole columns.
        picked = flat[:: max(1, flat.numel() // 1024) | 1].float().cpu().contiguous()
        digest.update(name.encode() + picked.numpy().tobytes())
    return digest.hexdigest()


def check_causal(model: nn.Module) -> None:
    """Refuse what is no decoder-only language model with data that gradients can be taken of.

    Raises:
        TargetError: for an encoder-decoder, or without an output embedding.
        ConfigError: for a model that was made inside ``torch.inference_mode``.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(
            f"{kind} is an encoder-decoder, whose completions follow an encoded input; expected a decoder-only causal "
            "language model (a transformers AutoModelForCausalLM)"
        )
    get = getattr(model, "get_output_embeddings", None)
    if get is None or get() is None or decoder_of(model) is model:
        raise TargetError(
            f"{kind} is not a causal language model with a decoder and an output embedding; expected a transformers "
            "AutoModelForCausalLM"
        )
    if any(t.is_inference() for t in [*model.parameters(), *model.buffers()]):
        raise ConfigError(
            f"this {kind} was made inside torch.inference_mode, so that no gradient can be taken through it; make or "
            "load it outside"
        )


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a transformers causal LM that makes hidden states; the model itself where there is none."""
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        return base
    embedding = _input_embedding(model)  # Llama 4 names a base that it has not
    return next((m for m in model.children() if m is not embedding and embedding in set(m.modules())), model)


def check_tokens(model: nn.Module, tokenizer: Any, texts: Iterable[tuple[str, str | Sequence[int]]]) -> None:
    """Refuse a text with a token that the model has no embedding for.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        texts: What the model will be given, as text or token ids, each after what errors call it ("forget record 3").

    Raises:
        DataError: then; the message names the text and the token.
    """
    rows = embedding_rows(model)
    if rows is None or max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    for name, text in texts:
        ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text
        unknown = next((t for t in ids if t >= rows), None)
        if unknown is not None:
            raise DataError(
                f"{name} holds the token {tokenizer.convert_ids_to_tokens(unknown)!r} (id {unknown}), but the model "
                f"has embeddings for {rows} tokens only; take the tokenizer that belongs to the model, or call "
                "model.resize_token_embeddings(len(tokenizer)) and train the new ones"
            )


def embedding_rows(model: nn.Module) -> int | None:
    """Tokens that the model has embeddings for; None if it does not say."""
    weight = getattr(_input_embedding(model), "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) else None


def _input_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if get is not None else None
    except NotImplementedError:  # transformers' word for a model that does not say
        return None
