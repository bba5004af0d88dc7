"""The base stream on disk: compressed-tensors ``pack-quantized`` files that stock transformers and vLLM read.

    X.weight_packed   int32 (out_features, ceil(in_features * bits / 32))   code + 2^(bits - 1), low bits first
    X.weight_scale    model dtype (out_features, groups)                    w = code * scale
    X.weight_shape    int64 (2,)                                            (out_features, in_features)

On little-endian machines the lanes of an int32 are the bytes that :class:`~libortho.core.streams.BaseStream` holds
(INT8: sign bit flipped; INT4: as they are), so that writing and reading move bytes and never touch a code. With
``bits=None`` a layer is a plain ``X.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from libortho.checkpoint.files import STREAMS, is_known
from libortho.checkpoint.json_files import (
    AGAIN,
    check_keys,
    count,
    field,
    file_sha256,
    number,
    read_json,
    sha256_field,
    text_field,
    write_json,
)
from libortho.checkpoint.tensor_files import WEIGHTS, WEIGHTS_INDEX, TensorFiles, sha256_of
from libortho.core.dtypes import DTYPES
from libortho.core.errors import CheckpointError
from libortho.core.layer import LayerReport, OrthoLinear
from libortho.core.streams import BaseStream

VERSION = 1
"""Version of the layout; a reader refuses a newer one."""

BASE_MANIFEST = "libortho.json"
CONFIG = "config.json"
VERSION_TEXT = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")
_LAYER_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LIBRARIES = ("torch", "transformers", "safetensors", "peft", "compressed-tensors")
_MOST = 2**31


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
    if bool(packed.view(torch.uint8)[:, columns * scheme.bits // 8 :].any()):
        raise CheckpointError(f"{name}.weight_packed holds bits behind the last column of a row; {AGAIN}")
    codes = packed.view(torch.uint8)[:, : columns * scheme.bits // 8]
    codes = codes.bitwise_xor_(0x80).view(torch.int8) if scheme.bits == 8 else codes
    return BaseStream(scheme.bits, codes=codes.contiguous(), scales=scales)


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


# -- manifests ---------------------------------------------------------------------------------------------------------


def check_version(data: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError if a newer library wrote the manifest."""
    version = count(data, "libortho_format", where)
    if version != VERSION:
        raise CheckpointError(f"{where} has format version {version}, this library reads {VERSION}; update libortho")


def libraries() -> dict[str, str]:
    """Versions of what a checkpoint was written with."""
    from libortho.core.version import __version__

    return {"libortho": __version__, **{name: metadata.version(name) for name in _LIBRARIES}}


def check_libraries(data: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError if the entry ``libraries`` of a manifest holds more than versions."""
    versions = data.get("libraries", {})
    check_keys(versions, (), where, optional=("libortho", *_LIBRARIES), what="libraries")
    for name in versions:
        text_field(versions, name, VERSION_TEXT, where)


def report_from_json(data: Any, name: str, shape: tuple[int, int], where: Path) -> LayerReport | None:
    """A layer's report from a manifest, or CheckpointError."""
    if data is None:
        return None
    if not isinstance(data, dict) or data.get("name") != name or data.get("shape") != list(shape):
        raise CheckpointError(f"{where}: the report of {name} belongs to another layer; {AGAIN}")
    numbers = (v for k, v in data.items() if k not in ("name", "shape"))
    if not all(v is None or isinstance(v, int | float) for v in numbers):
        raise CheckpointError(f"{where}: the report of {name} holds values that are not numbers; {AGAIN}")
    kinds = {f.name: str(f.type) for f in fields(LayerReport)}
    unsaid = ("output_error",)  # in reports of earlier versions
    check_keys(data, [n for n in kinds if n not in unsaid], where, optional=unsaid, what=f"the report of {name}")
    for key, kind in kinds.items():
        if key in ("name", "shape") or (kind.endswith("None") and data.get(key) is None):
            continue
        if kind == "bool":
            field(data, key, bool, where)
        elif kind == "int":
            count(data, key, where)
        else:
            number(data, key, where)
    return LayerReport(**{**data, "shape": shape})


def base_report(report: LayerReport | None) -> LayerReport | None:
    """The report of the base alone: a base without its streams does not tell how large they were."""
    if report is None:
        return None
    return replace(
        report, final_error=report.base_error, ortho_density=0.0, tail_rank=0, tail_density=0.0, ortho_bytes=0,
        output_error=None,
    )  # fmt: skip


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
        check_keys(
            data, ("libortho_format", "bits", "group_size", "base_sha256", "rest_sha256", "layers", "files"), path,
            optional=("libraries",),
        )  # fmt: skip
        check_libraries(data, path)
        bits, group = data["bits"], field(data, "group_size", int, path)
        known = bits is None or (type(bits) is int and bits in (4, 8))
        if not known or (group != -1 and (group < 1 or bits is None)):
            raise CheckpointError(f"{path}: bits {bits!r:.60} and group_size {group} do not describe a base; {AGAIN}")
        shapes: dict[str, tuple[int, int]] = {}
        reports: dict[str, LayerReport | None] = {}
        for name, layer in field(data, "layers", dict, path).items():
            if not _LAYER_NAME.fullmatch(name):
                raise CheckpointError(f"{path} names the layer {name!r:.80}; expected a dotted path; {AGAIN}")
            shapes[name] = _shape(layer, name, Scheme(bits, group), path)
            reports[name] = report_from_json(layer.get("report"), name, shapes[name], path)
            if reports[name] != base_report(reports[name]):
                raise CheckpointError(f"{path}: the report of {name} speaks of a stream; {AGAIN}")
        if not shapes:
            raise CheckpointError(f"{path} names no split layer; {AGAIN}")
        return cls(
            scheme=Scheme(bits, group),
            shapes=shapes,
            reports=reports,
            base_sha256=sha256_field(data, "base_sha256", path),
            rest_sha256=sha256_field(data, "rest_sha256", path),
            files=_files(data, path),
        )

    def tensor_names(self) -> list[str]:
        """Names of the tensors that hold the split layers."""
        return [n for layer in self.shapes for n in self.scheme.tensor_names(layer)]

    def check_weights(self, tensors: TensorFiles, directory: Path) -> None:
        """Compare the files of tensors that are read with those that are listed.

        Raises:
            CheckpointError: if another one is listed, which other tools could read in their place.
        """
        listed = {f for f in self.files if f.endswith((".safetensors", ".safetensors.index.json"))}
        if listed != set(tensors.files):
            name = min(listed ^ set(tensors.files))
            raise CheckpointError(
                f"{directory}: {name} is {'listed but not read' if name in listed else 'read but not listed'}: the "
                f"weights are {sorted(tensors.files)}, {BASE_MANIFEST} names {sorted(listed)}; {AGAIN}"
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


def _shape(layer: Any, name: str, scheme: Scheme, path: Path) -> tuple[int, int]:
    sizes = layer.get("shape") if isinstance(layer, dict) else None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(s) is int and 0 < s <= _MOST for s in sizes):
        raise CheckpointError(f"{path}: the shape of {name} is {sizes!r:.60}, expected two numbers; {AGAIN}")
    check_keys(layer, ("shape",), path, optional=("report",), what=name)
    if (scheme.group_size != -1 and sizes[1] % scheme.group_size) or (scheme.bits == 4 and sizes[1] % 2):
        raise CheckpointError(f"{path}: {name} with {sizes[1]} inputs does not fit its scheme; {AGAIN}")
    return sizes[0], sizes[1]


def _files(data: Mapping[str, Any], path: Path) -> dict[str, str | None]:
    """The listed files, each with its hash; none for files of tensors, and where a list names them alone."""
    files = data["files"]
    unhashed = isinstance(files, list)
    if unhashed and all(isinstance(f, str) for f in files) and len(set(files)) == len(files):
        files = dict.fromkeys(files)
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: 'files' is {files!r:.60}, expected names and their hashes; {AGAIN}")
    for name in files:
        if name.startswith((".", "/")) or ".." in name.split("/") or name.split("/")[0] == STREAMS:
            raise CheckpointError(f"{path} names the file {name!r:.80}; expected a path inside the directory")
        if not is_known(name):
            raise CheckpointError(
                f"{path} names the file {name!r:.80}, which neither a model nor a tokenizer of transformers writes; "
                "delete the file and its entry, or save the model again"
            )
        of_tensors = name.endswith((".safetensors", ".safetensors.index.json"))
        if files[name] is not None or not (of_tensors or unhashed):
            sha256_field(files, name, path)
    return dict(files)


__all__ = [
    "AGAIN", "BASE_MANIFEST", "CONFIG", "STREAMS", "VERSION", "WEIGHTS", "WEIGHTS_INDEX", "BaseManifest", "Scheme",
    "TensorFiles", "check_libraries", "check_version", "count", "decode_base", "encode_base", "expect", "field",
    "file_sha256", "libraries", "read_json", "report_from_json", "scheme_of", "sha256_field", "sha256_of", "write_json",
]  # fmt: skip
