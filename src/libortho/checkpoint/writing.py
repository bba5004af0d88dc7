"""Write a checkpoint: plan, write beside the destination, load back, compare, rename."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from libortho.checkpoint.checks import check_destination, check_saveable, files_of, skeleton
from libortho.checkpoint.format import (
    BASE_MANIFEST,
    CONFIG,
    BaseManifest,
    Scheme,
    TensorFiles,
    base_report,
    encode_base,
    file_sha256,
    read_json,
    scheme_of,
    sha256_of,
    write_json,
)
from libortho.checkpoint.hf import LOAD_ERRORS, check_loading, of_split_layer
from libortho.checkpoint.stream_files import (
    StreamFile,
    alpha_of,
    check_stream,
    checked_name,
    read_stream,
    sizes,
    write_stream,
)
from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.errors import CheckpointError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.models import plain_torch
from libortho.core.report import methods
from libortho.core.streams import OrthoStream

logger = logging.getLogger(__name__)
_AT_CWD, _EXCHANGE = -100, 2  # AT_FDCWD of fcntl.h and RENAME_EXCHANGE of linux/fs.h


@plain_torch()
def save(model: nn.Module, tokenizer: Any, directory: str | Path, *, max_shard_size: int | str = "5GB") -> Path:
    """Write a split model so that nothing of ours is needed to load it.

    The new directory replaces an earlier checkpoint of the same place in one rename; after an error the earlier one is
    intact. The alpha of the moment is not stored: a stream of ``split`` stands at 1 when it is loaded, as it is part of
    the weights, and any other at 0.

    Args:
        model: A transformers causal language model after ``split``, ``isolate``, ``tune`` or ``load``.
        tokenizer: Its tokenizer; None if there is none to keep.
        directory: Where to; new, empty, or an earlier checkpoint.
        max_shard_size: Largest size of one file of the base, as in ``save_pretrained``.

    Returns:
        ``directory``.

    Raises:
        CheckpointError: if the model is not split, if stock tools could not load what would be written (mixed bits or
            group sizes, a Conv1D, ranks over 512), if something else is in the directory, or if what was written does
            not load back equal. :func:`~libortho.checkpoint.check_saveable` and
            :func:`~libortho.checkpoint.check_destination` ask the same before a model is split.
        TargetError: if ``model`` is no model in memory.
    """
    plan = _plan(model, tokenizer)
    target = check_destination(directory, [s.name for s in plan.streams], needed=plan.needed)
    with staging(target) as staged:
        try:
            base = _write_base(plan, tokenizer, staged, max_shard_size)
            for stream in plan.streams:
                own = replace(stream, base_sha256=base.base_sha256, rest_sha256=base.rest_sha256)
                write_stream(staged, own, plan.shapes)
        except SafetensorError as error:  # also what the disk refuses
            raise CheckpointError(f"cannot write {target}: {error}; is there room on the disk?") from error
        _verify(plan, staged)
        sync(staged)
        _exchange(staged, target)
    return Path(directory)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, to be renamed to it; gone afterwards if it was not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish(staged: Path, target: Path) -> None:
    """Force ``staged`` to the disk and give it its final name, which must be free.

    Raises:
        CheckpointError: if something is there by now.
    """
    sync(staged)
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists; choose another place")
    os.rename(staged, target)
    sync_folder(target.parent)


@dataclass(frozen=True)
class _Plan:
    """What will be written, decided before the first byte is."""

    model: PreTrainedModel
    layers: dict[str, OrthoLinear]
    shapes: dict[str, tuple[int, int]]
    scheme: Scheme
    targets: list[str]
    streams: list[StreamFile]
    needed: int


def _plan(model: nn.Module, tokenizer: Any) -> _Plan:
    check_model(model)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    layers = ortho_layers(model)
    if not layers:
        raise CheckpointError("no layer of this model is split; call libortho.split, isolate or tune before save")
    scheme = scheme_of(layers)
    needed = check_saveable(model, layers, scheme.bits)
    assert isinstance(model, PreTrainedModel)
    present = dict.fromkeys(checked_name(s) for layer in layers.values() for s in layer.streams)
    made = [s for layer in layers.values() for s in layer.switch.streams if s in present]  # a layer may lack the first
    names = dict.fromkeys([*made, *present])
    streams = []
    for position, stream_name in enumerate(names):
        parts: dict[str, OrthoStream] = {}
        for name, layer in layers.items():
            part = dict(layer.streams.items()).get(stream_name)
            if isinstance(part, OrthoStream) and any(sizes(part)):
                parts[name] = part
        check_stream(stream_name, parts)
        reports = {n: layer.report for n, layer in layers.items()}
        method = methods(model).get(stream_name)
        alpha = alpha_of(method)
        streams.append(StreamFile(stream_name, position, "", parts, reports, method, alpha=alpha))
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in layers.items()}
    needed += sum(s.nbytes for stream in streams for s in stream.layers.values())
    return _Plan(model, layers, shapes, scheme, _targets(model, layers), streams, needed)


def _targets(model: PreTrainedModel, layers: Mapping[str, OrthoLinear]) -> list[str]:
    """One regular expression that matches exactly the split layers, or else their full names."""
    modules = dict(skeleton(model).named_modules())
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    if {n for n in modules if "." in n and n.rpartition(".")[2] in leaves} == set(layers):
        return [rf"re:.*\.({'|'.join(leaves)})$" if len(leaves) > 1 else rf"re:.*\.{leaves[0]}$"]
    return list(layers)


def _write_base(plan: _Plan, tokenizer: Any, staged: Path, max_shard_size: int | str) -> BaseManifest:
    model = plan.model
    state = {k: v for k, v in model.state_dict().items() if not of_split_layer(k, plan.shapes) or k.endswith(".bias")}
    for name, layer in plan.layers.items():
        state |= encode_base(name, layer.base)
    type(model).save_pretrained(model, staged, state_dict=state, max_shard_size=max_shard_size)
    if plan.scheme.bits is not None:
        config = read_json(staged / CONFIG)
        write_json(staged / CONFIG, config | {"quantization_config": plan.scheme.quantization_config(plan.targets)})
    if tokenizer is not None:
        tokenizer.save_pretrained(staged)
    files = TensorFiles(staged)
    ours = [n for layer in plan.layers for n in plan.scheme.tensor_names(layer)]
    renamed = [n for n in ours if n not in files]
    if renamed:
        raise CheckpointError(
            f"transformers stores {renamed[0]} of this model family under another name; not supported"
        )
    manifest = BaseManifest(
        scheme=plan.scheme,
        shapes=plan.shapes,
        reports={n: base_report(layer.report) for n, layer in plan.layers.items()},
        base_sha256=files.sha256(plan.scheme.hashed_names(plan.layers)),
        rest_sha256=files.sha256(set(files.names()) - set(ours)),
        files={
            f: None if f.endswith((".safetensors", ".index.json")) else file_sha256(staged / f)
            for f in files_of(staged)
        },
    )
    write_json(staged / BASE_MANIFEST, manifest.to_dict())
    return manifest


def _verify(plan: _Plan, staged: Path) -> None:
    """Load what was written, base with stock transformers, and compare; a wrong file must never get its final name."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            staged, output_loading_info=True, trust_remote_code=False, local_files_only=True
        )
        check_loading(loaded[1])
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"stock transformers cannot load this {type(plan.model).__name__} with a packed base, so nothing was saved "
            f"(families whose weights it converts while loading, such as fused experts, are not supported): {error}"
        ) from error
    stock = loaded[0]
    expected, written = plan.model.state_dict(), TensorFiles(staged)
    for name, found in stock.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in plan.layers and kind == "weight":
            wanted = plan.layers[layer].base.dense(found.dtype)
        else:
            # transformers before 5.23 keep the stored scales beside the weights that they decode
            wanted = expected[name] if name in expected else written.get(name)
        if wanted.dtype != found.dtype or not torch.equal(wanted.cpu(), found):
            raise CheckpointError(
                f"stock transformers reads {name} back with other values ({wanted.dtype} became {found.dtype}); the "
                f"whole model must be finite and in one dtype, {plan.model.dtype}"
            )
    base = BaseManifest.read(staged)
    for stream in plan.streams:
        again = read_stream(staged, stream.name, base)
        if _fingerprint(again) != _fingerprint(stream):
            raise CheckpointError(f"stream {stream.name!r} reads back with other values; not saved")


def _fingerprint(stream: StreamFile) -> str:
    buffers = {f"{n}.{b}": t for n, s in stream.layers.items() for b, t in s.named_buffers()}
    return sha256_of(sorted(buffers.items()))


def sync(directory: Path) -> None:
    """Force files and directories to the disk."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir() and os.name != "posix":
            continue
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(handle)
        os.close(handle)


def swap(first: Path, second: Path) -> bool:
    """Exchange two names in one step, so that neither is ever missing; False where the system cannot (not Linux)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_AT_CWD, os.fsencode(first), _AT_CWD, os.fsencode(second), _EXCHANGE) == 0


def _exchange(staged: Path, target: Path) -> None:
    """Rename ``staged`` to ``target``; an earlier directory changes places with it, or else steps aside first."""
    old: Path | None = None
    if target.exists():
        if swap(staged, target):
            old = staged
        else:
            old = staged.with_suffix(".old")
            os.rename(target, old)
    if old is not staged:
        try:
            os.replace(staged, target)
        except BaseException:
            if old is not None:
                os.rename(old, target)
            raise
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning("the earlier checkpoint could not be deleted and lies at %s", old)
