"""Write a checkpoint: plan, write beside the destination, load back, compare, rename."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from libortho.checkpoint.checks import check_destination, check_saveable
from libortho.checkpoint.directories import replace, staging
from libortho.checkpoint.hf import LOAD_ERRORS, check_loading, outside_split_layers, refuse_renamed, skeleton
from libortho.checkpoint.json_files import file_sha256, read_json, write_json
from libortho.checkpoint.manifest import BASE_MANIFEST, CONFIG, BaseManifest, base_report
from libortho.checkpoint.packing import Scheme, encode_base, scheme_of
from libortho.checkpoint.stream_files import StreamFile, alpha_of, checked_name, read_stream, write_stream
from libortho.checkpoint.stream_tensors import check_stream, sizes
from libortho.checkpoint.tensor_files import TensorFiles, holds_tensors, sha256_of
from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.errors import CheckpointError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.models import plain_torch
from libortho.core.report import methods
from libortho.core.streams import OrthoStream


@plain_torch()
def save(model: nn.Module, tokenizer: Any, directory: str | Path, *, max_shard_size: int | str = "5GB") -> Path:
    """Write a split model so that nothing of ours is needed to load it.

    The new directory replaces an earlier checkpoint of the same place in one rename; after an error the earlier one is
    intact. The current alpha is not stored: a stream of ``split`` is loaded at 1, as it is part of the weights, and any
    other at 0.

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
                write_stream(staged, stream, base)
        except SafetensorError as error:  # also what the disk refuses
            raise CheckpointError(f"cannot write {target}: {error}; is there room on the disk?") from error
        _verify(plan, staged)
        replace(staged, target)
    return Path(directory)


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
        streams.append(StreamFile(stream_name, position, parts, reports, method, alpha_of(method)))
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
    state = outside_split_layers(model.state_dict(), plan.shapes)
    for name, layer in plan.layers.items():
        state |= encode_base(name, layer.base)
    type(model).save_pretrained(model, staged, state_dict=state, max_shard_size=max_shard_size)
    if plan.scheme.bits is not None:
        config = read_json(staged / CONFIG)
        write_json(staged / CONFIG, config | {"quantization_config": plan.scheme.quantization_config(plan.targets)})
    if tokenizer is not None:
        tokenizer.save_pretrained(staged)
    files = TensorFiles(staged)
    refuse_renamed(n for layer in plan.layers for n in plan.scheme.tensor_names(layer) if n not in files)
    base_sha256, rest_sha256 = plan.scheme.hashes(plan.layers, files)
    written = sorted(p.relative_to(staged).as_posix() for p in staged.rglob("*") if not p.is_dir())
    manifest = BaseManifest(
        scheme=plan.scheme,
        shapes=plan.shapes,
        reports={n: base_report(layer.report) for n, layer in plan.layers.items()},
        base_sha256=base_sha256,
        rest_sha256=rest_sha256,
        files={f: None if holds_tensors(f) else file_sha256(staged / f) for f in written},
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
