"""``libortho.json``: what the base of a checkpoint consists of; and what every manifest says of its writer."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from libortho.checkpoint.files import STREAMS, check_directory, is_known
from libortho.checkpoint.json_files import DAMAGE, Fields, file_sha256, read_json
from libortho.checkpoint.packing import Scheme
from libortho.checkpoint.tensor_files import TensorFiles, holds_tensors
from libortho.core.errors import CheckpointError
from libortho.core.layer import LayerReport

VERSION = 1
"""Version of the layout; a reader refuses a newer one."""

BASE_MANIFEST = "libortho.json"
CONFIG = "config.json"
VERSION_TEXT = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")
_LAYER_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LIBRARIES = ("torch", "transformers", "safetensors", "peft", "compressed-tensors")
_MOST = 2**31


def check_version(data: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError if a newer library wrote the manifest."""
    version = Fields(data, where).count("libortho_format")
    if version != VERSION:
        raise CheckpointError(f"{where} has format version {version}, this library reads {VERSION}; update libortho")


@functools.cache
def libraries() -> Mapping[str, str]:
    """Versions of the libraries that write a checkpoint; looked up once, since that is slow."""
    from libortho.core.version import __version__

    return {"libortho": __version__, **{name: metadata.version(name) for name in _LIBRARIES}}


def read_manifest(path: Path, required: Collection[str], optional: Collection[str] = ()) -> Fields:
    """A manifest with these keys and those that every manifest has: format version, and versions of its writer.

    Raises:
        CheckpointError: if it is missing or no JSON object, a newer library wrote it, a key is missing or unknown, or
            ``libraries`` holds more than versions.
    """
    data = read_json(path)
    check_version(data, path)
    found = Fields.of(data, path, ("libortho_format", *required), ("libraries", *optional))
    versions = Fields.of(data.get("libraries", {}), path, (), ("libortho", *_LIBRARIES), "libraries")
    for name in versions.data:
        versions.text(name, VERSION_TEXT)
    return found


def report_from_json(data: Any, name: str, shape: tuple[int, int], where: Path) -> LayerReport | None:
    """A layer's report from a manifest, or CheckpointError."""
    if data is None:
        return None
    if not isinstance(data, dict) or data.get("name") != name or data.get("shape") != list(shape):
        raise CheckpointError(f"{where}: the report of {name} belongs to another layer; {DAMAGE}")
    kinds = {f.name: str(f.type) for f in fields(LayerReport)}
    unsaid = ("output_error",)  # in reports of earlier versions
    found = Fields.of(data, where, [n for n in kinds if n not in unsaid], unsaid, f"the report of {name}")
    for key, kind in kinds.items():
        if key in ("name", "shape") or (kind.endswith("None") and data.get(key) is None):
            continue
        if kind == "bool":
            found.value(key, bool)
        elif kind == "int":
            found.count(key)
        else:
            found.number(key)
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
        base_sha256: Hash of the split layers' integers and scales (or dense weights).
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
        found = read_manifest(path, ("bits", "group_size", "base_sha256", "rest_sha256", "layers", "files"))
        bits, group = found.data["bits"], found.value("group_size", int)
        known = bits is None or (type(bits) is int and bits in (4, 8))
        if not known or (group != -1 and (group < 1 or bits is None)):
            raise CheckpointError(f"{path}: bits {bits!r:.60} and group_size {group} do not describe a base; {DAMAGE}")
        shapes: dict[str, tuple[int, int]] = {}
        reports: dict[str, LayerReport | None] = {}
        for name, layer in found.value("layers", dict).items():
            if not _LAYER_NAME.fullmatch(name):
                raise CheckpointError(f"{path} names the layer {name!r:.80}; expected a dotted path; {DAMAGE}")
            shapes[name] = _shape(layer, name, Scheme(bits, group), path)
            reports[name] = report_from_json(layer.get("report"), name, shapes[name], path)
            if reports[name] != base_report(reports[name]):
                raise CheckpointError(f"{path}: the report of {name} speaks of a stream; {DAMAGE}")
        if not shapes:
            raise CheckpointError(f"{path} names no split layer; {DAMAGE}")
        return cls(
            scheme=Scheme(bits, group),
            shapes=shapes,
            reports=reports,
            base_sha256=found.sha256("base_sha256"),
            rest_sha256=found.sha256("rest_sha256"),
            files=_files(found.data["files"], path),
        )

    def tensor_names(self) -> list[str]:
        """Names of the tensors that hold the split layers."""
        return [n for layer in self.shapes for n in self.scheme.tensor_names(layer)]

    @property
    def weights(self) -> int:
        """Weights of all split layers."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def file_names(self) -> list[str]:
        """Relative paths of all files outside the directory of streams, the manifest among them."""
        return [*self.files, BASE_MANIFEST]

    def open_tensors(self, directory: Path) -> TensorFiles:
        """The tensors of the directory: those of the split layers, and others.

        Raises:
            CheckpointError: if one of a split layer is missing, or a file is listed that is not read, which other tools
                could read in their place.
        """
        tensors = TensorFiles(directory)
        listed = {f for f in self.files if holds_tensors(f)}
        if listed != set(tensors.files):
            name = min(listed ^ set(tensors.files))
            raise CheckpointError(
                f"{directory}: {name} is {'listed but not read' if name in listed else 'read but not listed'}: the "
                f"weights are {sorted(tensors.files)}, {BASE_MANIFEST} names {sorted(listed)}; {DAMAGE}"
            )
        missing = [n for n in self.tensor_names() if n not in tensors]
        if missing:
            raise CheckpointError(f"the tensor {missing[0]} is missing from {directory}; {DAMAGE}")
        return tensors

    def check_directory(self, directory: Path) -> None:
        """Refuse a directory in which a loader could find something that is not listed.

        Raises:
            CheckpointError: as :func:`libortho.checkpoint.files.check_directory`.
        """
        check_directory(directory, self.file_names, BASE_MANIFEST)

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
        raise CheckpointError(f"{path}: the shape of {name} is {sizes!r:.60}, expected two numbers; {DAMAGE}")
    Fields.of(layer, path, ("shape",), ("report",), name)
    if (scheme.group_size != -1 and sizes[1] % scheme.group_size) or (scheme.bits == 4 and sizes[1] % 2):
        raise CheckpointError(f"{path}: {name} with {sizes[1]} inputs does not fit its scheme; {DAMAGE}")
    return sizes[0], sizes[1]


def _files(files: Any, path: Path) -> dict[str, str | None]:
    """The listed files, each with its hash; none for files of tensors, and where a list names them alone."""
    unhashed = isinstance(files, list)
    if unhashed and all(isinstance(f, str) for f in files) and len(set(files)) == len(files):
        files = dict.fromkeys(files)
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: 'files' is {files!r:.60}, expected names and their hashes; {DAMAGE}")
    for name in files:
        if name.startswith((".", "/")) or ".." in name.split("/") or name.split("/")[0] == STREAMS:
            raise CheckpointError(f"{path} names the file {name!r:.80}; expected a path inside the directory")
        if not is_known(name):
            raise CheckpointError(
                f"{path} names the file {name!r:.80}, which neither a model nor a tokenizer of transformers writes; "
                "delete the file and its entry, or save the model again"
            )
        if files[name] is not None or not (holds_tensors(name) or unhashed):
            Fields(files, path).sha256(name)
    return dict(files)
