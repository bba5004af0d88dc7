"""What a base directory must hold to be certified: the tensors of its manifest, of its model, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from libortho.checkpoint.format import (
    AGAIN,
    BASE_MANIFEST,
    CONFIG,
    WEIGHTS_INDEX,
    BaseManifest,
    TensorFiles,
    decode_base,
)
from libortho.checkpoint.hf import LOAD_ERRORS, described
from libortho.checkpoint.json_files import read_written_json
from libortho.core.errors import CheckpointError


def check_base(root: Path, base: BaseManifest) -> None:
    """Recompute the hashes of a base that ``libortho.json`` names.

    Raises:
        CheckpointError: if a tensor is missing or was changed, or other files of tensors are read than are listed.
    """
    files = TensorFiles(root)
    base.check_weights(files, root)
    hashed, ours = base.scheme.hashed_names(base.shapes), set(base.tensor_names())
    missing = [n for n in ours if n not in files]
    if missing:
        raise CheckpointError(f"the tensor {min(missing)} is missing from {root}; {AGAIN}")
    for names, wanted in ((hashed, base.base_sha256), (set(files.names()) - ours, base.rest_sha256)):
        if (found := files.sha256(names)) != wanted:
            raise CheckpointError(f"the base of {root} has the hash {found}, {BASE_MANIFEST} names {wanted}; {AGAIN}")


def check_held(root: Path, base: BaseManifest, streams: Mapping[str, list[str]]) -> None:
    """Refuse a directory whose tensors or manifests hold anything besides the model and its split layers.

    Args:
        root: The directory.
        base: Its manifest.
        streams: Stream to the relative paths of its files.

    Raises:
        CheckpointError: as :func:`check_base`, :func:`check_tensors` and :func:`check_written`.
    """
    check_base(root, base)
    check_tensors(root, base)
    check_written(root, base, streams)


def check_tensors(root: Path, base: BaseManifest) -> None:
    """Refuse tensors that the model of ``config.json`` has not, beside those of the split layers.

    Raises:
        CheckpointError: if a name, shape or dtype is another one, a tied tensor is stored twice, a value is NaN, or the
            bits that fill up a row of packed codes are not zero.
    """
    files = TensorFiles(root)
    ours = base.tensor_names()
    model = described(root, len(files.names()))
    for name, shape in base.shapes.items():
        tensors = {n: files.get(n) for n in base.scheme.tensor_names(name)}
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dtype != model.dtype:
                raise CheckpointError(f"{key} is {tensor.dtype}, the model of {root / CONFIG} {model.dtype}; {AGAIN}")
        decode_base(name, tensors, shape, base.scheme)
    expected = _expected(model)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in sorted(set(files.names()) - set(ours)):
        dtype, stored = files.form(name)
        wanted = expected.get(name)
        if wanted is None or tuple(wanted.shape) != stored:
            raise CheckpointError(
                f"{root} holds the tensor {name!r:.120} of shape {stored}, the model of {CONFIG} has "
                f"{'none of that name' if wanted is None else tuple(wanted.shape)}; {AGAIN}"
            )
        if name in tied and tied[name] in files:
            raise CheckpointError(f"{root} holds {name} beside {tied[name]}, to which {CONFIG} ties it; {AGAIN}")
        _check_dtype(name, dtype, wanted, model, root)
        if bool(files.get(name).isnan().any()):
            raise CheckpointError(f"{name} holds NaN; {AGAIN}")


def check_written(root: Path, base: BaseManifest, streams: Mapping[str, list[str]]) -> None:
    """Refuse JSON files of ours that are in another form than they were written in.

    Args:
        root: The directory.
        base: Its manifest.
        streams: Stream to the relative paths of its files.

    Raises:
        CheckpointError: if one holds blanks, digits or escapes that no writer needs.
    """
    ours = [BASE_MANIFEST, *(f for f in base.files if f == WEIGHTS_INDEX)]
    for name in (*ours, *(f for files in streams.values() for f in files if f.endswith(".json"))):
        read_written_json(root / name)


def _expected(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors by the names under which a file may hold them: the model's own, and those that transformers writes."""
    from transformers.core_model_loading import revert_weight_conversion

    held = dict(model.state_dict())
    try:
        return held | dict(revert_weight_conversion(model, dict(held)))
    except LOAD_ERRORS:  # an operation that needs values: the names are the model's own then
        return held


def _check_dtype(name: str, dtype: torch.dtype, wanted: Tensor, model: PreTrainedModel, root: Path) -> None:
    kept = {*_names(model, "_keep_in_fp32_modules"), *_names(model, "_keep_in_fp32_modules_strict")}
    fits = dtype == model.dtype if wanted.is_floating_point() else dtype == wanted.dtype
    if not fits and not (dtype is torch.float32 and any(part in name for part in kept)):
        raise CheckpointError(f"{name} is {dtype}, the model of {root / CONFIG} is in {model.dtype}; {AGAIN}")


def _names(model: PreTrainedModel, attribute: str) -> tuple[str, ...]:
    return tuple(getattr(model, attribute, None) or ())
