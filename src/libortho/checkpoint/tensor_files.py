"""The tensors of a model directory by name, and safetensors files that hold nothing besides tensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from libortho.checkpoint.json_files import DAMAGE, Fields, open_regular, read_json
from libortho.core.errors import CheckpointError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors")
_MAX_HEADER = 10**8  # of the safetensors library
_PADDING = 7
_STORED = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Names of dtypes in a safetensors header."""


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor are."""

    file: BinaryIO
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def holds_tensors(name: str) -> bool:
    """True for the name of a file of tensors, or of an index of such files; their hashes are those of the tensors."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


class TensorFiles:
    """The tensors of a model directory by name, in one file or in shards.

    They are read, not mapped: mapped pages count as memory of the process beside the copy that is made of them, and a
    file that is truncated under a mapping kills the process.

    Attributes:
        files: Names of the files: ``model.safetensors``, or the index and its shards.

    Raises:
        CheckpointError: if a file is missing, truncated, named outside the directory or holds more than tensors, or if
            there are two sets of weights, of which stock tools would read another than this library.
    """

    def __init__(self, directory: Path) -> None:
        index = directory / WEIGHTS_INDEX
        found: dict[str, str] | None = None
        shards = [WEIGHTS]
        if index.exists():
            found = _weight_map(index)
            shards = sorted(set(found.values()))
            if (directory / WEIGHTS).exists():
                raise CheckpointError(
                    f"{directory} holds {WEIGHTS} beside {WEIGHTS_INDEX}: two sets of weights, of which transformers "
                    "reads the first and others the second; delete the one that does not belong there"
                )
        if sys.byteorder != "little":
            raise CheckpointError("this machine is big-endian; checkpoints are read on little-endian machines only")
        self.files = [*shards, *([] if found is None else [WEIGHTS_INDEX])]
        self._places: dict[str, _Place] = {}
        with ExitStack() as stack:
            for shard in shards:
                places = _open(directory / shard, stack)
                wrong = [n for n in places if n in self._places or (found is not None and found.get(n) != shard)]
                if wrong:
                    raise CheckpointError(
                        f"{index} and its shards disagree about the tensor {min(wrong)!r:.120}; {DAMAGE}"
                    )
                self._places.update(places)
            if found is not None and set(found) != set(self._places):
                name = min(set(found) ^ set(self._places))
                raise CheckpointError(f"{index} and its shards disagree about the tensor {name!r:.120}; {DAMAGE}")
            weakref.finalize(self, stack.pop_all().close)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._places)

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of one tensor, from the header."""
        return self._places[name].dtype, self._places[name].shape

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor."""
        place = self._places[name]
        return math.prod(place.shape) * place.dtype.itemsize

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            place.file.seek(place.start)
            size = place.file.readinto(content)  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"cannot read the tensor {name}: {error}; {DAMAGE}") from error
        if size != len(content):
            raise CheckpointError(f"cannot read the tensor {name}: the file ends before it does; {DAMAGE}")
        return tensor

    def sha256(self, names: Iterable[str]) -> str:
        """Hash of the named tensors, one in memory at a time."""
        return sha256_of((name, self.get(name)) for name in sorted(names))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to shard, from an index that says nothing else."""
    fields = Fields.of(read_json(index), index, ("weight_map",), ("metadata",))
    metadata = Fields.of(fields.data.get("metadata", {}), index, (), ("total_size", "total_parameters"), "metadata")
    for key in metadata.data:
        metadata.count(key)
    found = fields.value("weight_map", dict)
    if not found or not all(isinstance(f, str) for f in found.values()):
        raise CheckpointError(f"{index}: weight_map does not map names to files; {DAMAGE}")
    bad = [f for f in found.values() if not _SHARD.fullmatch(f)]
    if bad:
        raise CheckpointError(
            f"{index} names the file {bad[0]!r:.80}; expected a file name in the same directory, such as "
            "model-00001-of-00002.safetensors"
        )
    return dict(found)


def _open(path: Path, stack: ExitStack) -> dict[str, _Place]:
    """Where the tensors of one file are; ``stack`` closes it.

    The library checks the header: every tensor lies within the file, without gaps, and is as long as its shape says.
    """
    try:
        file = stack.enter_context(open_regular(path))
    except CheckpointError as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a complete safetensors file") from error
    try:
        with safe_open(path, framework="pt") as checked:
            names = set(checked.keys())
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        header = tensor_header(prefix + file.read(min(length, _MAX_HEADER)), path)
        places = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            place = _Place(file, 8 + length + begin, _STORED[entry["dtype"]], tuple(entry["shape"]))
            if name not in names or end - begin != math.prod(place.shape) * place.dtype.itemsize:
                raise ValueError(f"the header changed while it was read, see {name!r:.120}")
            places[name] = place
    except KeyError as error:
        raise CheckpointError(f"{path} holds tensors of a dtype that is not supported: {error}") from error
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a complete safetensors file, {DAMAGE}") from error
    return places


def tensor_header(content: bytes, path: Path) -> dict[str, Any]:
    """The header of a safetensors file, which the library found valid: tensors, and nothing besides them.

    Args:
        content: The file, or at least its header.
        path: Its name, for messages.

    Returns:
        Tensor to its entry; the metadata, ``{"format": "pt"}`` or none, is left out.

    Raises:
        CheckpointError: if the metadata says more, or the header is written with blanks, keys or escapes that the
            library does not write.
    """
    length = int.from_bytes(content[:8], "little")
    raw = content[8 : 8 + length]
    try:
        text = raw.decode("utf-8").rstrip(" ")
        header = json.loads(text)
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a complete safetensors file, {DAMAGE}") from error
    if len(raw) != length or not isinstance(header, dict):
        raise CheckpointError(f"cannot read {path}: it has no header; expected a complete safetensors file, {DAMAGE}")
    metadata = header.pop("__metadata__", None)
    if metadata not in (None, {"format": "pt"}):
        raise CheckpointError(
            f"{path}: its __metadata__ is {metadata!r:.60}, expected {{'format': 'pt'}}: nothing but tensors; {DAMAGE}"
        )
    entries = header.values()
    plain = all(isinstance(e, dict) and list(e) == ["dtype", "shape", "data_offsets"] for e in entries)
    if written != text or not plain or length - len(text.encode()) > _PADDING:
        raise CheckpointError(
            f"{path}: its header is in another form than the safetensors library writes (blanks, keys, escapes), "
            f"which could carry something; {DAMAGE}"
        )
    return header


def sha256_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash over names, dtypes, shapes and bytes; pass the tensors sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
