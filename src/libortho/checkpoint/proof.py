"""What a base directory must hold to be certified: the tensors of its manifest, of its model, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from libortho.checkpoint.files import STREAMS
from libortho.checkpoint.hf import LOAD_ERRORS, kept_in_fp32, stored_skeleton
from libortho.checkpoint.json_files import DAMAGE, read_written_json
from libortho.checkpoint.manifest import BASE_MANIFEST, CONFIG, BaseManifest
from libortho.checkpoint.packing import decode_base
from libortho.checkpoint.tensor_files import WEIGHTS_INDEX, TensorFiles
from libortho.core.errors import CheckpointError


def check_base(root: Path, base: BaseManifest) -> TensorFiles:
    """Recompute the hashes of a base that ``libortho.json`` names, and return its tensors.

    Raises:
        CheckpointError: if a tensor is missing or was changed, or other files of tensors are read than are listed.
    """
    files = base.open_tensors(root)
    found = base.scheme.hashes(base.shapes, files)
    for sha256, wanted in zip(found, (base.base_sha256, base.rest_sha256), strict=True):
        if sha256 != wanted:
            raise CheckpointError(f"the base of {root} has the hash {sha256}, {BASE_MANIFEST} names {wanted}; {DAMAGE}")
    return files


def check_contents(root: Path, base: BaseManifest, names: Iterable[str]) -> None:
    """Refuse a directory whose tensors or manifests hold anything besides the model and its split layers.

    Args:
        root: The directory.
        base: Its manifest.
        names: Relative paths of all its files.

    Raises:
        CheckpointError: as :func:`check_base`; if a tensor is none of the model that ``config.json`` describes and of
            its split layers (by name, shape and dtype), a tied tensor is stored twice, a value is NaN, or the bits that
            fill up a row of packed codes are not zero; if a JSON file of ours holds blanks, digits or escapes that no
            writer needs.
    """
    _check_tensors(root, base, check_base(root, base))
    for name in names:
        if name in (BASE_MANIFEST, WEIGHTS_INDEX) or (name.startswith(f"{STREAMS}/") and name.endswith(".json")):
            read_written_json(root / name)


def _check_tensors(root: Path, base: BaseManifest, files: TensorFiles) -> None:
    ours = base.tensor_names()
    model = stored_skeleton(root, len(files.names()))
    for name, shape in base.shapes.items():
        tensors = {n: files.get(n) for n in base.scheme.tensor_names(name)}
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dtype != model.dtype:
                raise CheckpointError(f"{key} is {tensor.dtype}, the model of {root / CONFIG} {model.dtype}; {DAMAGE}")
        decode_base(name, tensors, shape, base.scheme)
    expected = _expected(model)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in sorted(set(files.names()) - set(ours)):
        dtype, stored = files.form(name)
        wanted = expected.get(name)
        if wanted is None or tuple(wanted.shape) != stored:
            raise CheckpointError(
                f"{root} holds the tensor {name!r:.120} of shape {stored}, the model of {CONFIG} has "
                f"{'none of that name' if wanted is None else tuple(wanted.shape)}; {DAMAGE}"
            )
        if name in tied and tied[name] in files:
            raise CheckpointError(f"{root} holds {name} beside {tied[name]}, to which {CONFIG} ties it; {DAMAGE}")
        _check_dtype(name, dtype, wanted, model, root)
        if bool(files.get(name).isnan().any()):
            raise CheckpointError(f"{name} holds NaN; {DAMAGE}")


def _expected(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors by the names under which a file may hold them: the model's own, and those that transformers writes."""
    from transformers.core_model_loading import revert_weight_conversion

    held = dict(model.state_dict())
    try:
        return held | dict(revert_weight_conversion(model, dict(held)))
    except LOAD_ERRORS:  # an operation that needs values: the names are the model's own then
        return held


def _check_dtype(name: str, dtype: torch.dtype, wanted: Tensor, model: PreTrainedModel, root: Path) -> None:
    fits = dtype == model.dtype if wanted.is_floating_point() else dtype == wanted.dtype
    if not fits and not (dtype is torch.float32 and any(part in name for part in kept_in_fp32(model))):
        raise CheckpointError(f"{name} is {dtype}, the model of {root / CONFIG} is in {model.dtype}; {DAMAGE}")
