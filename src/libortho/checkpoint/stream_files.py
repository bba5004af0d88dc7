"""An ortho stream on disk: a folder of its own, which can be shipped, locked away or deleted without touching the base.

Column streams are a standard PEFT LoRA, so that stock PEFT and vLLM serve them:

    lora_A (k + r, in_features)    k one-hot rows (which inputs), then the tail's down factor
    lora_B (out_features, k + r)   the columns' values, then the tail's up factor        alpha = rank, so the scale is 1

Free entries are no LoRA; they are stored under names of our own in ``ortho.safetensors`` and need LibOrtho.
``manifest.json`` says which base the stream belongs to and how to part columns from tail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from libortho.checkpoint.format import (
    AGAIN,
    STREAMS,
    VERSION,
    BaseManifest,
    check_version,
    count,
    expect,
    field,
    file_sha256,
    libraries,
    read_json,
    report_from_json,
    sha256_field,
    write_json,
)
from libortho.config import DTYPES, check_stream_name
from libortho.errors import CheckpointError, ConfigError
from libortho.layer import LayerReport
from libortho.streams import Columns, Entries, Factors, OrthoStream

MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENTRIES_WEIGHTS = "ortho.safetensors"
MAX_RANK = 512
"""Largest LoRA rank that vLLM serves."""
_PREFIX = "base_model.model."
_FLOATS = tuple(DTYPES.values())


@dataclass(frozen=True)
class StreamFile:
    """One stream of a checkpoint.

    Attributes:
        name: Name of the stream and of its folder.
        position: Place among the streams of the model; sums run in this order, so that logits do not depend on names.
        base_sha256: Hash of the base that the stream belongs to.
        layers: Split layer to its part of the stream; layers without any are left out.
        reports: Split layer to its report, for all split layers.
        method: What made the stream, JSON-ready; None if unknown.
    """

    name: str
    position: int
    base_sha256: str
    layers: dict[str, OrthoStream]
    reports: dict[str, LayerReport | None]
    method: dict[str, Any] | None

    @property
    def needs_libortho(self) -> bool:
        """True if the stream has free entries, which no LoRA can hold."""
        return any(isinstance(s.support, Entries) for s in self.layers.values())


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


# -- writing -----------------------------------------------------------------------------------------------------------


def write_stream(directory: Path, stream: StreamFile, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Write the folder of one stream under the checkpoint ``directory``."""
    folder = directory / STREAMS / stream.name
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for layer, part in stream.layers.items():
        tensors |= _encode_entries(layer, part) if stream.needs_libortho else _encode_lora(layer, part, shapes[layer])
    weights = folder / (ENTRIES_WEIGHTS if stream.needs_libortho else ADAPTER_WEIGHTS)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, weights, metadata={"format": "pt"})
    if not stream.needs_libortho:
        write_json(folder / ADAPTER_CONFIG, _adapter_config({n: sum(sizes(s)) for n, s in stream.layers.items()}))
    layers: dict[str, Any] = {}
    for layer in shapes:
        columns, entries, rank = sizes(stream.layers.get(layer, OrthoStream()))
        report = stream.reports.get(layer)
        layers[layer] = {
            "columns": columns,
            "entries": entries,
            "tail_rank": rank,
            "report": None if report is None else report.to_dict(),
        }
    manifest = {
        "libortho_format": VERSION,
        "stream": stream.name,
        "position": stream.position,
        "needs_libortho": stream.needs_libortho,
        "base_sha256": stream.base_sha256,
        "weights_file": weights.name,
        "weights_sha256": file_sha256(weights),
        "method": stream.method,
        "layers": layers,
        "libraries": libraries(),
    }
    write_json(folder / MANIFEST, manifest)


def _adapter_config(ranks: Mapping[str, int]) -> dict[str, Any]:
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


def _encode_lora(layer: str, stream: OrthoStream, shape: tuple[int, int]) -> dict[str, Tensor]:
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


def _encode_entries(layer: str, stream: OrthoStream) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if isinstance(stream.support, Entries):
        part = stream.support
        tensors |= {f"{layer}.rows": part.rows, f"{layer}.columns": part.columns, f"{layer}.values": part.values}
    if stream.tail is not None:
        tensors |= {f"{layer}.down": stream.tail.down, f"{layer}.up": stream.tail.up}
    return tensors


# -- reading -----------------------------------------------------------------------------------------------------------


def stream_names(directory: Path) -> list[str]:
    """Names of the streams that a checkpoint directory holds, sorted; hidden folders are none."""
    folder = directory / STREAMS
    if not folder.is_dir():
        return []
    return sorted(checked_name(p.name) for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def checked_name(name: Any) -> str:
    """``name`` if it names a stream, and never a path out of the directory; CheckpointError otherwise."""
    try:
        return check_stream_name(name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


@dataclass(frozen=True)
class StreamManifest:
    """What ``manifest.json`` of a stream says, checked for form.

    Attributes:
        sizes: Split layer to its columns, free entries and tail directions.
    """

    position: int
    needs_libortho: bool
    base_sha256: str
    weights_sha256: str
    method: dict[str, Any] | None
    sizes: dict[str, tuple[int, int, int]]
    reports: dict[str, LayerReport | None]

    @property
    def weights_file(self) -> str:
        """Name of the file with the values."""
        return ENTRIES_WEIGHTS if self.needs_libortho else ADAPTER_WEIGHTS

    @classmethod
    def read(cls, directory: Path, name: str, base: BaseManifest) -> StreamManifest:
        """The manifest of one stream of a checkpoint.

        Raises:
            CheckpointError: if it is missing, malformed, or speaks of other layers than the base.
        """
        path = directory / STREAMS / checked_name(name) / MANIFEST
        data = read_json(path)
        check_version(data, path)
        if field(data, "stream", str, path) != name:
            raise CheckpointError(f"{path} belongs to stream {data['stream']!r:.80}; name its folder so")
        layers = field(data, "layers", dict, path)
        if list(layers) != list(base.shapes):
            raise CheckpointError(
                f"{path} names other layers than the base; the stream was made for another checkpoint"
            )
        found: dict[str, tuple[int, int, int]] = {}
        reports: dict[str, LayerReport | None] = {}
        for layer in layers:
            entry = field(layers, layer, dict, path)
            found[layer] = (
                count(entry, "columns", path),
                count(entry, "entries", path),
                count(entry, "tail_rank", path),
            )
            reports[layer] = report_from_json(entry.get("report"), layer, base.shapes[layer], path)
        needs_libortho = field(data, "needs_libortho", bool, path)
        kind = "columns" if needs_libortho else "free entries"
        if any(s[0] if needs_libortho else s[1] for s in found.values()):
            raise CheckpointError(f"{path}: needs_libortho is {needs_libortho}, but layers have {kind}; {AGAIN}")
        return cls(
            position=count(data, "position", path),
            needs_libortho=needs_libortho,
            base_sha256=sha256_field(data, "base_sha256", path),
            weights_sha256=sha256_field(data, "weights_sha256", path),
            method=None if data.get("method") is None else field(data, "method", dict, path),
            sizes=found,
            reports=reports,
        )


def read_stream(directory: Path, name: str, base: BaseManifest) -> StreamFile:
    """One stream of a checkpoint, with every value checked.

    Raises:
        CheckpointError: if a file is missing, damaged, changed, or belongs to another base.
    """
    manifest = StreamManifest.read(directory, name, base)
    folder = directory / STREAMS / name
    if manifest.base_sha256 != base.base_sha256:
        raise CheckpointError(
            f"stream {name!r} was made for the base {manifest.base_sha256[:12]}..., this directory holds "
            f"{base.base_sha256[:12]}...; load it with its own base"
        )
    tensors = _read_weights(folder / manifest.weights_file, manifest.weights_sha256)
    layers: dict[str, OrthoStream] = {}
    ranks: dict[str, int] = {}
    for layer, (columns, entries, rank) in manifest.sizes.items():
        if not columns + entries + rank:
            continue
        ranks[layer] = columns + rank
        decode = _decode_entries if manifest.needs_libortho else _decode_lora
        layers[layer] = decode(layer, tensors, base.shapes[layer], entries + columns, rank)
    if tensors:
        raise CheckpointError(
            f"{folder / manifest.weights_file} holds the unknown tensor {min(tensors)!r:.120}; {AGAIN}"
        )
    if not manifest.needs_libortho and read_json(folder / ADAPTER_CONFIG) != _adapter_config(ranks):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not describe the adapter beside it; {AGAIN}")
    return StreamFile(name, manifest.position, manifest.base_sha256, layers, manifest.reports, manifest.method)


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy the whole folder of the stream") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{path} does not have the hash that its manifest names; {AGAIN}")
    try:
        return load_bytes(content)  # each tensor has memory of its own
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {AGAIN}") from error


def _take(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = _FLOATS
) -> Tensor:
    """A checked copy, aligned as torch does it, of a tensor that is not needed any more."""
    tensor = expect(tensors, name, shape, dtypes).clone()
    del tensors[name]
    return tensor


def _decode_lora(
    layer: str, tensors: dict[str, Tensor], shape: tuple[int, int], columns: int, rank: int
) -> OrthoStream:
    name = f"{_PREFIX}{layer}.lora_"
    down = _take(tensors, f"{name}A.weight", (columns + rank, shape[1]))
    up = _take(tensors, f"{name}B.weight", (shape[0], columns + rank), (down.dtype,))
    one_hot = down[:columns]
    if not bool(((one_hot != 0).sum(1) == 1).all()) or not bool((one_hot.sum(1) == 1).all()):
        raise CheckpointError(
            f"{name}A.weight: its first {columns} rows are not one-hot, so they name no columns; {AGAIN}"
        )
    support = Columns(one_hot.argmax(1), up[:, :columns].T.contiguous()) if columns else None
    return OrthoStream(support, Factors(down[columns:].clone(), up[:, columns:].clone()) if rank else None)


def _decode_entries(
    layer: str, tensors: dict[str, Tensor], shape: tuple[int, int], entries: int, rank: int
) -> OrthoStream:
    support = tail = None
    if entries:
        rows = _take(tensors, f"{layer}.rows", (shape[0] + 1,), (torch.int32,)).long()
        columns = _take(tensors, f"{layer}.columns", (entries,), (torch.int32,)).long()
        values = _take(tensors, f"{layer}.values", (entries,))
        counts = rows.diff()
        valid = int(rows[0]) == 0 and int(rows[-1]) == entries and bool((counts >= 0).all())
        if not valid or not bool(((columns >= 0) & (columns < shape[1])).all()):
            raise CheckpointError(f"the entries of {layer} lie outside its {shape[0]} x {shape[1]} weights; {AGAIN}")
        position = torch.repeat_interleave(torch.arange(shape[0]), counts) * shape[1] + columns
        if not bool((position.diff() > 0).all()):
            raise CheckpointError(f"the entries of {layer} are repeated or out of order; {AGAIN}")
        support = Entries(rows, columns, values)
    if rank:
        down = _take(tensors, f"{layer}.down", (rank, shape[1]))
        tail = Factors(down, _take(tensors, f"{layer}.up", (shape[0], rank), (down.dtype,)))
    return OrthoStream(support, tail)
