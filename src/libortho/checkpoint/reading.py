"""Read a checkpoint: check everything, then build."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from libortho.checkpoint.hf import building, check_loading, check_size, outside_split_layers, stored_skeleton
from libortho.checkpoint.json_files import DAMAGE, read_json
from libortho.checkpoint.manifest import BASE_MANIFEST, CONFIG, BaseManifest
from libortho.checkpoint.packing import Scheme, decode_base
from libortho.checkpoint.stream_files import choose_streams, read_stream
from libortho.checkpoint.tensor_files import sha256_of
from libortho.core.errors import CheckpointError
from libortho.core.layer import OrthoLinear
from libortho.core.models import plain_torch
from libortho.core.report import record_method
from libortho.core.surgery import install
from libortho.core.switch.alpha import AlphaSpec, Switch


def is_checkpoint(path: str | Path) -> bool:
    """True if ``path`` is a directory that :func:`save` wrote, whatever its state."""
    return (Path(path) / BASE_MANIFEST).is_file()


@plain_torch()
def load(
    directory: str | Path,
    *,
    streams: str | list[str] | None = "all",
    alpha: AlphaSpec | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Read a checkpoint into split layers.

    Each stream gets the alpha of its manifest: 1 if ``split`` made it, as it is part of the weights, and 0 if
    ``isolate`` or ``tune`` did, or if nothing is known of it.

    Args:
        directory: What :func:`save` wrote.
        streams: ``"all"``, a list of names, or None for the base alone.
        alpha: As in :func:`~libortho.set_alpha`; a mapping leaves the streams that it does not name as their manifests
            say. None takes the manifests' for all.
        device: Where the model goes.
        dtype: Of the dense tensors; None takes the checkpoint's. Integers, scales and ortho values stay as stored.

    Returns:
        The model in evaluation mode, and its tokenizer (None if none was saved).

    Raises:
        CheckpointError: if anything is missing, damaged, changed, of another base, or unknown, or if a file lies beside
            what ``save`` wrote that a loader could read. Nothing is built then.
        AlphaError: if ``alpha`` is out of range or names a stream that is not loaded. Nothing is built then.
    """
    root = Path(directory)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory; expected one written by libortho.save")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"dtype is {dtype!r}; expected a floating-point torch.dtype or None")
    base = BaseManifest.read(root)
    base.check_directory(root)
    base.check_files(root)
    _check_quantization(root, base.scheme)
    wanted = [read_stream(root, name, base) for name in ([] if streams is None else choose_streams(root, streams))]
    wanted.sort(key=lambda s: (s.position, s.name))
    switch = Switch()
    for stream in wanted:
        switch.add_stream(stream.name, stream.alpha)
    if alpha is not None:
        switch.set(alpha, extrapolate=False)
    tensors = _read_tensors(root, base)
    tokenizer = _load_tokenizer(root)
    parts = {}
    for name, shape in base.shapes.items():
        stored = {n: tensors.pop(n) for n in base.scheme.tensor_names(name)}
        parts[name] = decode_base(name, stored, shape, base.scheme)
    rest = outside_split_layers(tensors, base.shapes)
    del tensors
    if dtype is not None:  # one by one; transformers would hold all of them twice
        for name, tensor in rest.items():
            if tensor.is_floating_point() and torch.promote_types(tensor.dtype, dtype) is dtype:  # loses nothing
                rest[name] = tensor.to(dtype)
    model = _build(root, rest, base.shapes, dtype)
    layers: dict[str, OrthoLinear] = {}
    for name, part in parts.items():
        if base.scheme.bits is None:
            part.weight = part.weight.to(model.dtype)
        bias = model.get_submodule(name).bias
        report = wanted[0].reports[name] if wanted else base.reports[name]
        layers[name] = OrthoLinear(part, bias if isinstance(bias, nn.Parameter) else None, switch, report)
    for stream in wanted:
        for name, ortho in stream.layers.items():
            layers[name].add_stream(stream.name, ortho)
        if stream.method is not None:
            record_method(model, stream.name, stream.method)
    install(model, layers, switch)
    model.to(device)  # type: ignore[arg-type]
    return model, tokenizer


def _check_quantization(root: Path, scheme: Scheme) -> None:
    found = read_json(root / CONFIG).get("quantization_config")
    wanted = None if scheme.bits is None else scheme.quantization_config([])
    if isinstance(found, dict) and wanted is not None:
        groups = found.get("config_groups")
        group = groups.get("group_0") if isinstance(groups, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        wanted = scheme.quantization_config(targets if isinstance(targets, list) else [])
    if found != wanted:
        raise CheckpointError(f"{root / CONFIG}: quantization_config does not describe the base beside it; {DAMAGE}")


def _read_tensors(root: Path, base: BaseManifest) -> dict[str, Tensor]:
    """All tensors of the base directory, checked against the hashes of the manifest."""
    files = base.open_tensors(root)
    tensors = {name: files.get(name) for name in files.names()}
    hashed = sorted(base.scheme.hashed_names(base.shapes)), sorted(set(tensors) - set(base.tensor_names()))
    with ThreadPoolExecutor(len(hashed)) as pool:  # hashlib lets other threads run
        hashes = list(pool.map(lambda names: sha256_of((n, tensors[n]) for n in names), hashed))
    expected = ("split layers", base.base_sha256), ("other tensors", base.rest_sha256)
    for found, (what, wanted) in zip(hashes, expected, strict=True):
        if found != wanted:
            raise CheckpointError(
                f"the {what} of {root} have the hash {found[:12]}..., {BASE_MANIFEST} and the streams expect "
                f"{wanted[:12]}...; {DAMAGE}"
            )
    return tensors


def _build(
    root: Path, rest: dict[str, Tensor], shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype | None
) -> PreTrainedModel:
    """The dense model around the split layers, whose weights are a stand-in of one number until they are replaced."""
    skeleton = stored_skeleton(root, len(rest) + len(shapes), dtype)
    kind: Any = type(skeleton)
    config, wanted = skeleton.config, skeleton.dtype
    stored = sum(t.numel() for t in rest.values()) + sum(rows * columns for rows, columns in shapes.values())
    check_size(skeleton, stored, root / CONFIG)
    modules = dict(skeleton.named_modules())
    for name, shape in shapes.items():
        found = modules.get(name)
        if type(found) is not nn.Linear or (found.out_features, found.in_features) != shape:
            raise CheckpointError(f"{root / CONFIG} describes no linear layer {name} of shape {shape}; {DAMAGE}")
    stand_ins = {f"{n}.weight": torch.zeros((), dtype=wanted).expand(s) for n, s in shapes.items()}
    with building(root / CONFIG):
        model, info = kind.from_pretrained(
            None, config=config, state_dict=rest | stand_ins, dtype=wanted, output_loading_info=True
        )
        if (root / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(root, local_files_only=True)
    check_loading(info)
    return model


def _load_tokenizer(root: Path) -> Any:
    if not (root / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise CheckpointError(f"transformers cannot read the tokenizer of {root}: {error}; {DAMAGE}") from error
