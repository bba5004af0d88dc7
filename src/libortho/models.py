"""Loading a causal LM the way this library needs it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.errors import LibOrthoError


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Dense model and tokenizer from a hub id or a path, in evaluation mode.

    Parameters are copied out of the memory-mapped file: a small machine evicts mapped pages, and then every forward
    pass reads the disk again.

    Raises:
        LibOrthoError: if transformers cannot load the model; the message repeats its reason.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
        model: Any = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
    except (OSError, ValueError) as error:
        raise LibOrthoError(f"cannot load the model {str(name)!r}: {error}") from error
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.to(device).eval(), tokenizer


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
