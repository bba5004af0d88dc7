"""Models with ortho streams, what is in a directory, and what changes it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import libortho
from libortho import SplitConfig
from libortho.core.layer import ortho_layers
from libortho.core.streams import Columns, Entries, OrthoStream

BASES: dict[str, dict[str, Any]] = {
    "int8-channel": {"bits": 8},
    "int8-g32": {"bits": 8, "group_size": 32},
    "int4-g32": {"bits": 4},
    "int4-channel": {"bits": 4, "group_size": -1},
    "dense": {"bits": None},
}
COLUMNS = {"structure": "columns", "ratio": 0.05, "use_low_rank": False}
COLUMNS_TAIL = {"structure": "columns", "ratio": 0.05, "rank_ratio": 0.8}
ENTRIES_TAIL = {"structure": "unstructured", "ratio": 0.05, "rank_ratio": 0.8}
STREAMS = {"columns": COLUMNS, "columns-tail": COLUMNS_TAIL, "entries-tail": ENTRIES_TAIL}
TOKENS = torch.arange(1, 9)[None]


def make(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """The model, split; by default INT8 per channel, columns and a tail."""
    return libortho.split(model, SplitConfig(**{"max_low_rank_error": 1.0, **COLUMNS_TAIL, **options}))


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As loading in ``dtype`` does it: ``model.to`` alone would round the rotary frequencies, which no file holds."""
    frequencies = {n: b.clone() for n, b in model.named_buffers()}
    model.to(dtype)
    for name, buffer in model.named_buffers():
        buffer.data = frequencies[name]
    return model


def two_streams(value_dtype: str = "float32") -> PreTrainedModel:
    """INT8 base; columns with a tail in one stream, free entries in another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = make(LlamaForCausalLM(config).eval(), value_dtype=value_dtype)
    layer = next(iter(ortho_layers(model).values()))
    mask = torch.rand(32, 64) < 0.05
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    layer.add_stream("hr", OrthoStream(Entries(rows, mask.nonzero()[:, 1], torch.randn(int(mask.sum())))))
    layer.switch.add_stream("hr")
    return model


def add_stream(model: nn.Module, name: str, seed: int) -> None:
    """A second stream, in the first split layer only."""
    generator = torch.Generator().manual_seed(seed)
    layer = next(iter(ortho_layers(model).values()))
    index = torch.randperm(layer.in_features, generator=generator)[:3]
    values = torch.randn(3, layer.out_features, generator=generator)
    layer.add_stream(name, OrthoStream(Columns(index, values)))
    layer.switch.add_stream(name)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}.{b}": t for n, layer in ortho_layers(model).items() for b, t in layer.named_buffers()}


def logits(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def base_logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with libortho.alpha(model, 0.0):
        return logits(model, tokens)


def rounding_apart(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if two bf16 results differ by no more than a few roundings."""
    return float((found - expected).float().norm()) < 0.02 * float(expected.float().norm())


# -- files -------------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, and write it as the library does."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2) + "\n")


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)
