"""An ortho stream on disk: a folder of its own, which can be shipped, locked away or deleted without touching the base.

Column streams are a standard PEFT LoRA, so that stock PEFT and vLLM serve them:

    lora_A (k + r, in_features)    k one-hot rows (which inputs), then the tail's down factor
    lora_B (out_features, k + r)   the columns' values, then the tail's up factor        alpha = rank, so the scale is 1

Free entries are no LoRA; they are stored under names of our own in ``ortho.safetensors`` and need LibOrtho.
``manifest.json`` says which base the stream belongs to and how to part columns from tail.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from libortho.checkpoint.files import STREAMS, check_stream_folder, stream_folders
from libortho.checkpoint.json_files import (
    DAMAGE,
    Fields,
    check_free_form,
    file_sha256,
    open_regular,
    read_json,
    write_json,
)
from libortho.checkpoint.manifest import (
    VERSION,
    BaseManifest,
    libraries,
    read_manifest,
    report_from_json,
)
from libortho.checkpoint.stream_tensors import (
    adapter_config,
    decode_entries,
    decode_lora,
    encode_entries,
    encode_lora,
    sizes,
)
from libortho.checkpoint.tensor_files import tensor_header
from libortho.core.config import check_stream_name
from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.layer import LayerReport
from libortho.core.streams import Entries, OrthoStream

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENTRIES_WEIGHTS = "ortho.safetensors"
STREAM_FILES = (MANIFEST, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ENTRIES_WEIGHTS)
"""Names that a file of a stream can have."""
_METHOD_BYTES = 2**20
_REQUIRED = (
    "stream", "position", "needs_libortho", "base_sha256", "weights_file", "weights_sha256", "method", "layers",
)  # fmt: skip
_SIZES = ("columns", "entries", "tail_rank")


@dataclass(frozen=True)
class StreamFile:
    """One stream of a checkpoint.

    Attributes:
        name: Name of the stream and of its folder.
        position: Place among the streams of the model; sums run in this order, so that logits do not depend on names.
        layers: Split layer to its part of the stream; layers without any are left out.
        reports: Split layer to its report, for all split layers.
        method: What made the stream, JSON-ready; None if unknown.
        alpha: Alpha at which it is loaded.
    """

    name: str
    position: int
    layers: dict[str, OrthoStream]
    reports: dict[str, LayerReport | None]
    method: dict[str, Any] | None
    alpha: float

    @property
    def needs_libortho(self) -> bool:
        """True if the stream has free entries, which no LoRA can hold."""
        return any(isinstance(s.support, Entries) for s in self.layers.values())


def alpha_of(method: Mapping[str, Any] | None) -> float:
    """Alpha of a stream when it is loaded: a stream of ``split`` is part of the weights and on, any other is off."""
    return 1.0 if (method or {}).get("verb") == "split" else 0.0


# -- writing -----------------------------------------------------------------------------------------------------------


def write_stream(directory: Path, stream: StreamFile, base: BaseManifest) -> None:
    """Write the folder of one stream under the checkpoint ``directory``, for the base that is there."""
    folder = directory / STREAMS / stream.name
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for layer, part in stream.layers.items():
        free = stream.needs_libortho
        tensors |= encode_entries(layer, part) if free else encode_lora(layer, part, base.shapes[layer])
    weights = folder / _weights_file(stream.needs_libortho)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, weights, metadata={"format": "pt"})
    if not stream.needs_libortho:
        write_json(folder / ADAPTER_CONFIG, adapter_config({n: sum(sizes(s)) for n, s in stream.layers.items()}))
    layers: dict[str, Any] = {}
    for layer in base.shapes:
        report = stream.reports.get(layer)
        held = dict(zip(_SIZES, sizes(stream.layers.get(layer, OrthoStream())), strict=True))
        layers[layer] = held | {"report": None if report is None else report.to_dict()}
    manifest = {
        "libortho_format": VERSION,
        "stream": stream.name,
        "position": stream.position,
        "needs_libortho": stream.needs_libortho,
        "alpha": stream.alpha,
        "base_sha256": base.base_sha256,
        "rest_sha256": base.rest_sha256,
        "weights_file": weights.name,
        "weights_sha256": file_sha256(weights),
        "method": stream.method,
        "layers": layers,
        "libraries": libraries(),
    }
    write_json(folder / MANIFEST, manifest)


# -- reading -----------------------------------------------------------------------------------------------------------


def stream_names(directory: Path) -> list[str]:
    """Names of the streams that a checkpoint directory holds, sorted.

    Raises:
        CheckpointError: if a folder has a name that no stream can have, or something else lies among them.
    """
    return [checked_name(name) for name in stream_folders(directory)]


def checked_name(name: Any) -> str:
    """``name`` if it names a stream, and never a path out of the directory; CheckpointError otherwise."""
    try:
        return check_stream_name(name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def choose_streams(directory: Path, streams: str | Iterable[str]) -> list[str]:
    """Names of the wanted streams of a checkpoint directory, each once: ``"all"``, or a list of names.

    Raises:
        CheckpointError: if a name is impossible or no stream has it, or a single name is given in place of a list.
    """
    present = stream_names(directory)
    if isinstance(streams, str):
        if streams != "all":
            raise CheckpointError(f"streams is {streams!r}; expected 'all', or a list such as [{streams!r}]")
        return present
    names = list(dict.fromkeys(checked_name(s) for s in streams))
    missing = [n for n in names if n not in present]
    if missing:
        raise CheckpointError(f"{directory} has no stream {missing[0]!r}; it has {present}")
    return names


def stream_file_names(needs_libortho: bool) -> list[str]:
    """Names of the files of a stream in its folder: its manifest, its values, and what PEFT reads."""
    return [MANIFEST, _weights_file(needs_libortho), *([] if needs_libortho else [ADAPTER_CONFIG])]


@dataclass(frozen=True)
class StreamManifest:
    """What ``manifest.json`` of a stream says, checked for form.

    Attributes:
        sizes: Split layer to its columns, free entries and tail directions.
        rest_sha256: Hash of the other tensors of its base; None if it does not say.
        alpha: Alpha at which it is loaded.
    """

    name: str
    position: int
    needs_libortho: bool
    base_sha256: str
    weights_sha256: str
    method: dict[str, Any] | None
    sizes: dict[str, tuple[int, int, int]]
    reports: dict[str, LayerReport | None]
    rest_sha256: str | None
    alpha: float

    @property
    def weights_file(self) -> str:
        """Name of the file with the values."""
        return _weights_file(self.needs_libortho)

    @property
    def files(self) -> list[str]:
        """Names of the files of the stream in its folder; what else lies there is no part of it."""
        return stream_file_names(self.needs_libortho)

    @property
    def paths(self) -> list[str]:
        """The files of the stream, relative to the checkpoint."""
        return [f"{STREAMS}/{self.name}/{file}" for file in self.files]

    def check_base(self, base: BaseManifest) -> None:
        """Compare the base that the stream was made for with the base beside it.

        Raises:
            CheckpointError: if the split layers or any other tensor differ.
        """
        if self.base_sha256 != base.base_sha256:
            raise CheckpointError(
                f"stream {self.name!r} was made for the base {self.base_sha256[:12]}..., this directory holds "
                f"{base.base_sha256[:12]}...; load it with its own base"
            )
        if self.rest_sha256 is None:
            logger.warning(
                "the manifest of stream %r names the split layers of its base alone (of an earlier version), so the "
                "other tensors were not compared; save the checkpoint again to name them",
                self.name,
            )
        elif self.rest_sha256 != base.rest_sha256:
            raise CheckpointError(
                f"stream {self.name!r} was made for a base with other embeddings or other tensors beside the split "
                f"layers ({self.rest_sha256[:12]}..., this directory holds {base.rest_sha256[:12]}...); load it with "
                "its own base"
            )

    @classmethod
    def read(cls, directory: Path, name: str, base: BaseManifest) -> StreamManifest:
        """The manifest of one stream of a checkpoint.

        Raises:
            CheckpointError: if it is missing, malformed, or speaks of other layers than the base.
        """
        path = directory / STREAMS / checked_name(name) / MANIFEST
        found = read_manifest(path, _REQUIRED, ("alpha", "rest_sha256"))
        if found.value("stream", str) != name:
            raise CheckpointError(f"{path} belongs to stream {found.data['stream']!r:.80}; name its folder so")
        layers = found.value("layers", dict)
        if list(layers) != list(base.shapes):
            raise CheckpointError(
                f"{path} names other layers than the base; the stream was made for another checkpoint"
            )
        parts: dict[str, tuple[int, int, int]] = {}
        reports: dict[str, LayerReport | None] = {}
        for layer, entry in layers.items():
            held = Fields.of(entry, path, (*_SIZES, "report"), what=layer)
            columns, entries, tail_rank = (held.count(key) for key in _SIZES)
            parts[layer] = columns, entries, tail_rank
            reports[layer] = report_from_json(entry["report"], layer, base.shapes[layer], path)
        needs_libortho = found.value("needs_libortho", bool)
        kind = "columns" if needs_libortho else "free entries"
        if any(s[0] if needs_libortho else s[1] for s in parts.values()):
            raise CheckpointError(f"{path}: needs_libortho is {needs_libortho}, but layers have {kind}; {DAMAGE}")
        if found.data["weights_file"] != _weights_file(needs_libortho):
            raise CheckpointError(
                f"{path}: weights_file is {found.data['weights_file']!r:.80}, which no stream has; {DAMAGE}"
            )
        method = None if found.data["method"] is None else found.value("method", dict)
        check_free_form(method, path, key="method", size=_METHOD_BYTES)
        return cls(
            name=name,
            position=found.count("position"),
            needs_libortho=needs_libortho,
            base_sha256=found.sha256("base_sha256"),
            weights_sha256=found.sha256("weights_sha256"),
            method=method,
            sizes=parts,
            reports=reports,
            rest_sha256=found.sha256("rest_sha256") if "rest_sha256" in found.data else None,
            alpha=float(found.number("alpha", 0.0, 1.0)) if "alpha" in found.data else alpha_of(method),
        )


def _weights_file(needs_libortho: bool) -> str:
    return ENTRIES_WEIGHTS if needs_libortho else ADAPTER_WEIGHTS


def read_stream(directory: Path, name: str, base: BaseManifest) -> StreamFile:
    """One stream of a checkpoint, with every value checked.

    Raises:
        CheckpointError: if a file is missing, damaged, changed, or belongs to another base.
    """
    manifest = StreamManifest.read(directory, name, base)
    folder = directory / STREAMS / name
    check_stream_folder(folder, manifest.files)
    manifest.check_base(base)
    tensors = _read_weights(folder / manifest.weights_file, manifest.weights_sha256)
    layers: dict[str, OrthoStream] = {}
    ranks: dict[str, int] = {}
    for layer, (columns, entries, rank) in manifest.sizes.items():
        if not columns + entries + rank:
            continue
        ranks[layer] = columns + rank
        decode = decode_entries if manifest.needs_libortho else decode_lora
        layers[layer] = decode(layer, tensors, base.shapes[layer], entries + columns, rank)
    if tensors:
        raise CheckpointError(
            f"{folder / manifest.weights_file} holds the unknown tensor {min(tensors)!r:.120}; {DAMAGE}"
        )
    if not manifest.needs_libortho and read_json(folder / ADAPTER_CONFIG) != adapter_config(ranks):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not describe the adapter beside it; {DAMAGE}")
    return StreamFile(name, manifest.position, layers, manifest.reports, manifest.method, manifest.alpha)


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy the whole folder of the stream") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{path} does not have the hash that its manifest names; {DAMAGE}")
    try:
        tensors = load_bytes(content)  # each tensor has memory of its own
    except (SafetensorError, ValueError, LookupError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {DAMAGE}") from error
    tensor_header(content, path)
    return tensors
