"""The tensors of an ortho stream as a PEFT LoRA, or as free entries under names of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from libortho.checkpoint.json_files import DAMAGE
from libortho.checkpoint.packing import expect
from libortho.core.dtypes import DTYPES
from libortho.core.errors import CheckpointError
from libortho.core.streams import Columns, Entries, Factors, OrthoStream
from libortho.core.streams.ortho import MAX_RANK

_PREFIX = "base_model.model."
_FLOATS = tuple(DTYPES.values())


def check_stream(name: str, layers: Mapping[str, OrthoStream]) -> None:
    """Refuse what the format cannot hold.

    Raises:
        CheckpointError: if it is empty, mixes dtypes or columns with free entries, or exceeds the largest rank.
    """
    if not layers:
        raise CheckpointError(f"stream {name!r} holds no value in any layer; there is nothing to save under that name")
    if len({type(s.support) for s in layers.values() if s.support is not None}) > 1:
        raise CheckpointError(
            f"stream {name!r} has columns in some layers and free entries in others; expected one kind"
        )
    columns_only = not any(isinstance(s.support, Entries) for s in layers.values())
    for layer, stream in layers.items():
        kinds = {b.dtype for b in stream.buffers() if b.is_floating_point()}
        if len(kinds) > 1 or not kinds <= set(_FLOATS):
            raise CheckpointError(
                f"stream {name!r} of {layer} has values in {sorted(map(str, kinds))}; expected one dtype"
            )
        columns, _, rank = sizes(stream)
        if columns_only:
            check_rank(f"stream {name!r} of {layer}", columns, rank)


def check_rank(where: str, columns: int, rank: int) -> None:
    """Refuse columns and tail directions that are more than a LoRA may hold.

    Raises:
        CheckpointError: if they exceed the largest rank; the message begins with ``where``.
    """
    if columns + rank > MAX_RANK:
        raise CheckpointError(
            f"{where} has {columns} columns and {rank} tail directions, as a LoRA rank {columns + rank}; vLLM serves "
            f"at most {MAX_RANK}. Use a smaller ratio, a larger rank_ratio, keep_tail=False, or "
            "structure='unstructured'"
        )


def sizes(stream: OrthoStream) -> tuple[int, int, int]:
    """Columns, free entries and tail directions of one layer's part."""
    support = stream.support
    columns = len(support.index) if isinstance(support, Columns) else 0
    entries = len(support.values) if isinstance(support, Entries) else 0
    return columns, entries, 0 if stream.tail is None else stream.tail.rank


def adapter_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of a LoRA that adds its factors as they are; ``ranks`` holds each layer's rank."""
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(ranks),
        "use_rslora": False,
        "use_dora": False,
    }


def encode_lora(layer: str, stream: OrthoStream, shape: tuple[int, int]) -> dict[str, Tensor]:
    """One layer's columns and tail as the two factors of a LoRA; ``shape`` is (out_features, in_features)."""
    down, up = [], []
    if isinstance(stream.support, Columns):
        values, index = stream.support.values, stream.support.index.long()
        one_hot = values.new_zeros(len(index), shape[1])
        one_hot[torch.arange(len(index), device=index.device), index] = 1
        down.append(one_hot)
        up.append(values.T)
    if stream.tail is not None:
        down.append(stream.tail.down)
        up.append(stream.tail.up)
    return {f"{_PREFIX}{layer}.lora_A.weight": torch.cat(down), f"{_PREFIX}{layer}.lora_B.weight": torch.cat(up, 1)}


def encode_entries(layer: str, stream: OrthoStream) -> dict[str, Tensor]:
    """One layer's free entries and tail under names of our own."""
    tensors: dict[str, Tensor] = {}
    if isinstance(stream.support, Entries):
        part = stream.support
        tensors |= {f"{layer}.rows": part.rows, f"{layer}.columns": part.columns, f"{layer}.values": part.values}
    if stream.tail is not None:
        tensors |= {f"{layer}.down": stream.tail.down, f"{layer}.up": stream.tail.up}
    return tensors


def _take(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = _FLOATS
) -> Tensor:
    """A checked copy, aligned as torch does it, of a tensor that is not needed any more."""
    tensor = expect(tensors, name, shape, dtypes).clone()
    del tensors[name]
    return tensor


def decode_lora(layer: str, tensors: dict[str, Tensor], shape: tuple[int, int], columns: int, rank: int) -> OrthoStream:
    """One layer's columns and tail, taken out of ``tensors``.

    Raises:
        CheckpointError: if a factor is missing, has another shape or dtype, or its first rows are not one-hot.
    """
    name = f"{_PREFIX}{layer}.lora_"
    down = _take(tensors, f"{name}A.weight", (columns + rank, shape[1]))
    up = _take(tensors, f"{name}B.weight", (shape[0], columns + rank), (down.dtype,))
    one_hot = down[:columns]
    if not bool(((one_hot != 0).sum(1) == 1).all()) or not bool((one_hot.sum(1) == 1).all()):
        raise CheckpointError(
            f"{name}A.weight: its first {columns} rows are not one-hot, so they name no columns; {DAMAGE}"
        )
    support = Columns(one_hot.argmax(1), up[:, :columns].T.contiguous()) if columns else None
    return OrthoStream(support, Factors(down[columns:].clone(), up[:, columns:].clone()) if rank else None)


def decode_entries(
    layer: str, tensors: dict[str, Tensor], shape: tuple[int, int], entries: int, rank: int
) -> OrthoStream:
    """One layer's free entries and tail, taken out of ``tensors``.

    Raises:
        CheckpointError: if a tensor is missing, has another shape or dtype, or an entry lies outside of the layer.
    """
    support = tail = None
    if entries:
        rows = _take(tensors, f"{layer}.rows", (shape[0] + 1,), (torch.int32,)).long()
        columns = _take(tensors, f"{layer}.columns", (entries,), (torch.int32,)).long()
        values = _take(tensors, f"{layer}.values", (entries,))
        counts = rows.diff()
        valid = int(rows[0]) == 0 and int(rows[-1]) == entries and bool((counts >= 0).all())
        if not valid or not bool(((columns >= 0) & (columns < shape[1])).all()):
            raise CheckpointError(f"the entries of {layer} lie outside its {shape[0]} x {shape[1]} weights; {DAMAGE}")
        position = torch.repeat_interleave(torch.arange(shape[0]), counts) * shape[1] + columns
        if not bool((position.diff() > 0).all()):
            raise CheckpointError(f"the entries of {layer} are repeated or out of order; {DAMAGE}")
        support = Entries(rows, columns, values)
    if rank:
        down = _take(tensors, f"{layer}.down", (rank, shape[1]))
        tail = Factors(down, _take(tensors, f"{layer}.up", (shape[0], rank), (down.dtype,)))
    return OrthoStream(support, tail)
