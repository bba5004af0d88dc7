"""What a checkpoint holds, read from its manifests and headers; no model is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from libortho.checkpoint.files import STREAMS
from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.stream_files import StreamManifest, stream_names


@dataclass(frozen=True)
class StreamInfo:
    """One ortho stream of a checkpoint.

    Attributes:
        name: Name of the stream.
        kinds: What it consists of: "columns", "entries", "tail".
        layers: Split layers that it touches.
        density: Entries that its columns or free entries cover / weights of all split layers.
        tail_density: Stored values of the tail / weights of all split layers.
        bytes_on_disk: All files of its folder.
        needs_libortho: False if it is a PEFT adapter.
        alpha: Alpha at which it is loaded.
        base_matches: True if it belongs to the base beside it, as that base is now: the split layers and all other
            tensors (in checkpoints whose streams name the split layers alone: those).
        method: What made it; None if unknown.
        missed: Criteria that its isolation did not meet, in words; None if nothing is said of criteria.
    """

    name: str
    kinds: tuple[str, ...]
    layers: int
    density: float
    tail_density: float
    bytes_on_disk: int
    needs_libortho: bool
    alpha: float
    base_matches: bool
    method: dict[str, Any] | None
    missed: tuple[str, ...] | None


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint on disk.

    Attributes:
        bits: Integer width of the base; None if it is dense.
        group_size: Inputs per scale; -1 for one scale per output channel.
        layers: Split layers.
        weights: Weights of the split layers.
        base_bytes: Bytes of their integers and scales (or dense weights).
        bits_per_weight: Of the split layers' base, scales included.
        streams: The ortho streams, by name.
    """

    bits: int | None
    group_size: int
    layers: int
    weights: int
    base_bytes: int
    bits_per_weight: float
    streams: tuple[StreamInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        data = asdict(self)
        data["streams"] = [
            {**s, "kinds": list(s["kinds"]), "missed": None if s["missed"] is None else list(s["missed"])}
            for s in data["streams"]
        ]
        return data


def inspect(directory: str | Path) -> CheckpointInfo:
    """Describe a checkpoint without loading it. The base is read once, to compare its hashes.

    Raises:
        CheckpointError: if the directory is no checkpoint, or a manifest or the base cannot be read.
    """
    root = Path(directory)
    base = BaseManifest.read(root)
    files = base.open_tensors(root)
    hashes = base.scheme.hashes(base.shapes, files)
    weights = base.weights
    base_bytes = sum(files.nbytes(n) for n in base.scheme.hashed_names(base.shapes))
    return CheckpointInfo(
        bits=base.scheme.bits,
        group_size=base.scheme.group_size,
        layers=len(base.shapes),
        weights=weights,
        base_bytes=base_bytes,
        bits_per_weight=8 * base_bytes / weights,
        streams=tuple(
            stream_info(root, StreamManifest.read(root, name, base), base, hashes) for name in stream_names(root)
        ),
    )


def stream_info(root: Path, manifest: StreamManifest, base: BaseManifest, hashes: tuple[str, str]) -> StreamInfo:
    """Describe one stream of a checkpoint beside a base with these hashes (of the split layers, of all others)."""
    columns = entries = support = tail = 0
    for layer, (layer_columns, layer_entries, rank) in manifest.sizes.items():
        rows, inputs = base.shapes[layer]
        columns += layer_columns
        entries += layer_entries
        support += layer_columns * rows + layer_entries
        tail += rank * (rows + inputs)
    kinds = (("columns", columns), ("entries", entries), ("tail", tail))
    return StreamInfo(
        name=manifest.name,
        kinds=tuple(kind for kind, size in kinds if size),
        layers=sum(any(s) for s in manifest.sizes.values()),
        density=support / base.weights,
        tail_density=tail / base.weights,
        bytes_on_disk=sum(p.stat().st_size for p in (root / STREAMS / manifest.name).rglob("*") if p.is_file()),
        needs_libortho=manifest.needs_libortho,
        alpha=manifest.alpha,
        base_matches=manifest.base_sha256 == hashes[0] and manifest.rest_sha256 in (None, hashes[1]),
        method=manifest.method,
        missed=_missed(manifest.method),
    )


def _missed(method: dict[str, Any] | None) -> tuple[str, ...] | None:
    found = (method or {}).get("missed")
    return tuple(map(str, found)) if isinstance(found, list | tuple) else None
