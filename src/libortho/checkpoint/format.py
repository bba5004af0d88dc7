"""The base stream on disk: compressed-tensors ``pack-quantized`` files that stock transformers and vLLM read.

    X.weight_packed   int32 (out_features, ceil(in_features * bits / 32))   code + 2^(bits - 1), low bits first
    X.weight_scale    model dtype (out_features, groups)                    w = code * scale
    X.weight_shape    int64 (2,)                                            (out_features, in_features)

On little-endian machines the lanes of an int32 are the bytes that :class:`~libortho.streams.BaseStream` holds (INT8:
sign bit flipped; INT4: as they are), so that writing and reading move bytes and never touch a code. With ``bits=None``
a layer is a plain ``X.weight``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from libortho.config import DTYPES
from libortho.errors import CheckpointError
from libortho.layer import LayerReport, OrthoLinear
from libortho.streams import BaseStream

VERSION = 1
"""Version of the layout; a reader refuses a newer one."""

BASE_MANIFEST = "libortho.json"
STREAMS = "ortho"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_FILE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]*(/[A-Za-z0-9_][A-Za-z0-9._ -]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STORED = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Names of dtypes in a safetensors header."""


@dataclass(frozen=True)
class Scheme:
    """How the base of every split layer is stored; stock loaders know one scheme per checkpoint.

    Attributes:
        bits: 8, 4, or None for dense weights.
        group_size: Inputs per scale; -1 for one scale per output channel (and for dense weights).
    """

    bits: int | None
    group_size: int

    def quantization_config(self, targets: list[str]) -> dict[str, Any]:
        """The entry of ``config.json`` under which transformers and vLLM load the base."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": True}
        if self.group_size == -1:
            weights["strategy"] = "channel"
        else:
            weights |= {"strategy": "group", "group_size": self.group_size}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "dequantize": True,  # without it PEFT meets packed layers that have no weight
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": targets, "weights": weights}},
        }

    def tensor_names(self, layer: str) -> list[str]:
        """Names of the tensors that hold one layer's base."""
        kinds = ("weight",) if self.bits is None else ("weight_packed", "weight_scale", "weight_shape")
        return [f"{layer}.{kind}" for kind in kinds]

    def hashed_names(self, layers: Iterable[str]) -> list[str]:
        """Names of the tensors that identify the base: codes and scales, or dense weights."""
        return [n for layer in layers for n in self.tensor_names(layer) if not n.endswith(".weight_shape")]


def scheme_of(layers: Mapping[str, OrthoLinear]) -> Scheme:
    """The one scheme of all layers.

    Raises:
        CheckpointError: if they differ.
    """
    widths = {layer.base.bits for layer in layers.values()}
    if len(widths) > 1:
        raise CheckpointError(
            f"the layers have bits {sorted(map(str, widths))}; stock loaders take one scheme per checkpoint: split all "
            "layers with the same bits to save them"
        )
    bits = widths.pop()
    if bits is None or all(layer.base.scales.shape[1] == 1 for layer in layers.values()):
        return Scheme(bits, -1)
    sizes = {layer.base.group_size for layer in layers.values()}
    if len(sizes) > 1:
        raise CheckpointError(
            f"the layers have group sizes {sorted(sizes)}; stock loaders take one scheme per checkpoint: split all "
            "layers with the same group_size to save them"
        )
    return Scheme(bits, sizes.pop())


def encode_base(name: str, base: BaseStream) -> dict[str, Tensor]:
    """The tensors of one layer's base, as written."""
    if base.bits is None:
        return {f"{name}.weight": base.weight}
    rows = base.codes.view(torch.uint8) ^ 0x80 if base.bits == 8 else base.codes
    rows = F.pad(rows, (0, -rows.shape[1] % 4)).contiguous()
    return {
        f"{name}.weight_packed": rows.view(torch.int32),
        f"{name}.weight_scale": base.scales,
        f"{name}.weight_shape": torch.tensor([base.out_features, base.in_features], dtype=torch.int64),
    }


def decode_base(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], scheme: Scheme) -> BaseStream:
    """The base of one layer from its tensors, which it takes over: their memory becomes the base's.

    Raises:
        CheckpointError: if a tensor is missing, or has another dtype, shape or a value that cannot be right.
    """
    rows, columns = shape
    if scheme.bits is None:
        weight = expect(tensors, f"{name}.weight", shape, tuple(DTYPES.values()))
        return BaseStream(None, weight=weight)
    stored = expect(tensors, f"{name}.weight_shape", (2,), (torch.int64,)).tolist()
    if stored != [rows, columns]:
        raise CheckpointError(f"{name}.weight_shape says {stored}, expected {[rows, columns]}; {AGAIN}")
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    packed = expect(tensors, f"{name}.weight_packed", (rows, -(-columns * scheme.bits // 32)), (torch.int32,))
    scales = expect(tensors, f"{name}.weight_scale", (rows, groups), tuple(DTYPES.values()))
    if not bool((scales > 0).all()):
        raise CheckpointError(f"{name}.weight_scale holds values that are not positive; {AGAIN}")
    codes = packed.view(torch.uint8)[:, : columns * scheme.bits // 8]
    codes = codes.bitwise_xor_(0x80).view(torch.int8) if scheme.bits == 8 else codes
    return BaseStream(scheme.bits, codes=codes.contiguous(), scales=scales)


AGAIN = "the file is damaged or was changed; copy the checkpoint again or save it again"


def expect(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The tensor ``name``, checked.

    Raises:
        CheckpointError: if it is missing, has another shape or dtype, or holds NaN or infinite values.
    """
    if name not in tensors:
        raise CheckpointError(f"the tensor {name} is missing; {AGAIN}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise CheckpointError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted} {shape}; {AGAIN}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinite values; {AGAIN}")
    return tensor


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor are."""

    file: BinaryIO
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a model directory by name, in one file or in shards.

    They are read, not mapped: mapped pages count as memory of the process beside the copy that is made of them, and a
    file that is truncated under a mapping kills the process.

    Raises:
        CheckpointError: if a file is missing, truncated, or named outside the directory.
    """

    def __init__(self, directory: Path) -> None:
        index = directory / WEIGHTS_INDEX
        found: dict[str, str] | None = None
        shards = [WEIGHTS]
        if index.is_file():
            found = field(read_json(index), "weight_map", dict, index)
            if not all(isinstance(f, str) for f in found.values()):
                raise CheckpointError(f"{index}: weight_map does not map names to files; {AGAIN}")
            bad = [f for f in found.values() if not _FILE_NAME.fullmatch(f)]
            if bad:
                raise CheckpointError(f"{index} names the file {bad[0]!r}; expected a file name in the same directory")
            shards = sorted(set(found.values()))
        if sys.byteorder != "little":
            raise CheckpointError("this machine is big-endian; checkpoints are read on little-endian machines only")
        self._places: dict[str, _Place] = {}
        with ExitStack() as stack:
            for shard in shards:
                self._places.update(_open(directory / shard, stack))
            if found is not None and set(found) != set(self._places):
                name = min(set(found) ^ set(self._places))
                raise CheckpointError(f"{index} and its shards disagree about the tensor {name}; {AGAIN}")
            weakref.finalize(self, stack.pop_all().close)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._places)

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            place.file.seek(place.start)
            size = place.file.readinto(content)  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"cannot read the tensor {name}: {error}; {AGAIN}") from error
        if size != len(content):
            raise CheckpointError(f"cannot read the tensor {name}: the file ends before it does; {AGAIN}")
        return tensor

    def sha256(self, names: Iterable[str]) -> str:
        """Hash of the named tensors, one in memory at a time."""
        return sha256_of((name, self.get(name)) for name in sorted(names))


def _open(path: Path, stack: ExitStack) -> dict[str, _Place]:
    """Where the tensors of one file are; ``stack`` closes it.

    The library checks the header: every tensor lies within the file, without gaps, and is as long as its shape says.
    """
    try:
        with safe_open(path, framework="pt") as checked:
            names = set(checked.keys())
        file = stack.enter_context(path.open("rb"))
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            place = _Place(file, 8 + length + begin, _STORED[entry["dtype"]], tuple(entry["shape"]))
            if name not in names or end - begin != math.prod(place.shape) * place.dtype.itemsize:
                raise ValueError(f"the header changed while it was read, see {name!r:.120}")
            places[name] = place
    except KeyError as error:
        raise CheckpointError(f"{path} holds tensors of a dtype that is not supported: {error}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a complete safetensors file, {AGAIN}") from error
    return places


def sha256_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash over names, dtypes, shapes and bytes; pass the tensors sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; expected a directory written by libortho.save") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; {AGAIN}") from error


# -- JSON --------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; expected a directory written by libortho.save") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {AGAIN}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object; {AGAIN}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object; values that JSON does not know are an error, not a string."""
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", "utf-8")


def field(data: Mapping[str, Any], key: str, kind: type, where: Path) -> Any:
    """``data[key]`` if it has the expected type, or CheckpointError."""
    value = data.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{where}: {key!r} is {value!r:.60}, expected a {kind.__name__}; {AGAIN}")
    return value


def count(data: Mapping[str, Any], key: str, where: Path) -> int:
    """A whole number of at least 0."""
    value = field(data, key, int, where)
    if value < 0:
        raise CheckpointError(f"{where}: {key!r} is {value}, expected a number of at least 0; {AGAIN}")
    return int(value)


def sha256_field(data: Mapping[str, Any], key: str, where: Path) -> str:
    """A SHA-256 in lower-case hexadecimal."""
    value = str(field(data, key, str, where))
    if not _SHA256.fullmatch(value):
        raise CheckpointError(f"{where}: {key!r} is {value!r:.80}, expected 64 hexadecimal digits; {AGAIN}")
    return value


def check_version(data: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError if a newer library wrote the manifest."""
    version = count(data, "libortho_format", where)
    if version != VERSION:
        raise CheckpointError(f"{where} has format version {version}, this library reads {VERSION}; update libortho")


def libraries() -> dict[str, str]:
    """Versions of what a checkpoint was written with."""
    from libortho import __version__

    names = ("torch", "transformers", "safetensors", "peft", "compressed-tensors")
    return {"libortho": __version__, **{name: metadata.version(name) for name in names}}


def report_from_json(data: Any, name: str, shape: tuple[int, int], where: Path) -> LayerReport | None:
    """A layer's report from a manifest."""
    if data is None:
        return None
    if not isinstance(data, dict) or data.get("name") != name or data.get("shape") != list(shape):
        raise CheckpointError(f"{where}: the report of {name} belongs to another layer; {AGAIN}")
    numbers = {k: v for k, v in data.items() if k not in ("name", "shape")}
    if not all(v is None or isinstance(v, int | float) for v in numbers.values()):
        raise CheckpointError(f"{where}: the report of {name} holds values that are not numbers; {AGAIN}")
    try:
        return LayerReport(name=name, shape=shape, **numbers)
    except TypeError as error:
        raise CheckpointError(f"{where}: the report of {name} has other fields: {error}; {AGAIN}") from error


@dataclass(frozen=True)
class BaseManifest:
    """What ``libortho.json`` says about the base; it holds nothing about ortho streams.

    Attributes:
        scheme: Storage of the split layers.
        shapes: Split layer to (out_features, in_features), in the model's order.
        reports: Split layer to its report, ortho fields zeroed.
        base_sha256: Hash of the split layers' codes and scales (or dense weights).
        rest_sha256: Hash of all other tensors.
        files: Files of the checkpoint outside the directory of streams, each with its SHA-256; None for files of
            tensors, which the two hashes above cover, and for checkpoints written before files were hashed.
    """

    scheme: Scheme
    shapes: dict[str, tuple[int, int]]
    reports: dict[str, LayerReport | None]
    base_sha256: str
    rest_sha256: str
    files: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON-ready values."""
        layers = {}
        for name, shape in self.shapes.items():
            report = self.reports[name]
            layers[name] = {"shape": list(shape), "report": None if report is None else report.to_dict()}
        return {
            "libortho_format": VERSION,
            "bits": self.scheme.bits,
            "group_size": self.scheme.group_size,
            "base_sha256": self.base_sha256,
            "rest_sha256": self.rest_sha256,
            "layers": layers,
            "files": self.files,
            "libraries": libraries(),
        }

    @classmethod
    def read(cls, directory: Path) -> BaseManifest:
        """The manifest of a checkpoint directory, checked.

        Raises:
            CheckpointError: if it is missing or malformed.
        """
        path = directory / BASE_MANIFEST
        data = read_json(path)
        check_version(data, path)
        bits, group = data.get("bits"), field(data, "group_size", int, path)
        if bits not in (None, 4, 8) or isinstance(bits, bool) or (group != -1 and (group < 1 or bits is None)):
            raise CheckpointError(f"{path}: bits {bits!r} and group_size {group} do not describe a base; {AGAIN}")
        shapes: dict[str, tuple[int, int]] = {}
        reports: dict[str, LayerReport | None] = {}
        for name, layer in field(data, "layers", dict, path).items():
            sizes = layer.get("shape") if isinstance(layer, dict) else None
            if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(s) is int and s > 0 for s in sizes):
                raise CheckpointError(f"{path}: the shape of {name} is {sizes!r:.60}, expected two numbers; {AGAIN}")
            if (group != -1 and sizes[1] % group) or (bits == 4 and sizes[1] % 2):
                raise CheckpointError(f"{path}: {name} with {sizes[1]} inputs does not fit its scheme; {AGAIN}")
            shapes[name] = (sizes[0], sizes[1])
            reports[name] = report_from_json(layer.get("report"), name, shapes[name], path)
        if not shapes:
            raise CheckpointError(f"{path} names no split layer; {AGAIN}")
        files = data.get("files")
        if isinstance(files, list) and all(isinstance(f, str) for f in files):
            files = dict.fromkeys(files)
        if not isinstance(files, dict):
            raise CheckpointError(f"{path}: 'files' is {files!r:.60}, expected names and their hashes; {AGAIN}")
        for name, sha256 in files.items():
            if not _FILE_PATH.fullmatch(name) or ".." in name.split("/") or name.split("/")[0] == STREAMS:
                raise CheckpointError(f"{path} names the file {name!r:.80}; expected a path inside the directory")
            if sha256 is not None:
                sha256_field(files, name, path)
        return cls(
            scheme=Scheme(bits, group),
            shapes=shapes,
            reports=reports,
            base_sha256=sha256_field(data, "base_sha256", path),
            rest_sha256=sha256_field(data, "rest_sha256", path),
            files=dict(files),
        )

    def check_files(self, directory: Path) -> None:
        """Compare the files that hold no tensors (configuration, tokenizer) with their hashes.

        Raises:
            CheckpointError: if one is missing or was changed.
        """
        for name, sha256 in self.files.items():
            if sha256 is not None and file_sha256(directory / name) != sha256:
                raise CheckpointError(
                    f"{directory / name} does not have the hash that {BASE_MANIFEST} names; copy it again, or load "
                    "and save the model to change it"
                )
