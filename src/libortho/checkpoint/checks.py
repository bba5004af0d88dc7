"""What ``save`` refuses, asked before hours of work: the place, and the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from libortho.checkpoint.directories import check_room
from libortho.checkpoint.files import STREAMS, unlisted
from libortho.checkpoint.hf import LOAD_ERRORS, causal_class, kept_in_fp32, of_split_layer, refuse_renamed, skeleton
from libortho.checkpoint.manifest import BASE_MANIFEST, BaseManifest
from libortho.checkpoint.stream_files import stream_names
from libortho.core.arguments import check_model
from libortho.core.dtypes import DTYPES
from libortho.core.errors import CheckpointError
from libortho.core.files import check_new_entry


def check_destination(directory: str | Path, streams: Collection[str], *, needed: int = 0) -> Path:
    """Refuse a place that :func:`~libortho.save` would refuse.

    Args:
        directory: Where a checkpoint is to be written: new, empty, or an earlier checkpoint.
        streams: Names of the streams that it will hold.
        needed: Bytes that it takes at least.

    Returns:
        The absolute path, symbolic links followed.

    Raises:
        CheckpointError: if something else is there, a stream or a file that only it holds would be lost, its parent
            cannot be written, or the disk has not enough room.
    """
    target = Path(os.path.realpath(directory))
    check_new_entry(target, CheckpointError)
    if target.exists():
        _check_earlier(target, streams)
    check_room(target, needed)
    return target


def check_saveable(model: nn.Module, layers: Collection[str], bits: int | None) -> int:
    """Refuse a model that :func:`~libortho.save` could not write once ``layers`` are split.

    Args:
        model: A model, split or not yet.
        layers: Dotted paths of all layers that are split, or will be.
        bits: Integer width of their base; None for dense weights.

    Returns:
        Bytes that the base takes at least.

    Raises:
        CheckpointError: if stock transformers could not load what would be written: a wrapped model or a class of
            somebody else, foreign quantisation, PEFT adapters, tensors without data, a layer that is no ``nn.Linear``
            (a Conv1D), tensors in several dtypes or with NaN, a family whose weights are assembled while loading
            (fused experts), or a configuration that transformers refuses to write.
    """
    check_model(model)
    if not isinstance(model, PreTrainedModel) or causal_class(model.config) is not type(model):
        raise CheckpointError(
            f"this is a {type(model).__name__}; expected a causal language model of transformers itself, not wrapped, "
            "since stock transformers builds the model from config.json"
        )
    foreign = getattr(model.config, "quantization_config", None) is not None
    if foreign or getattr(model, "_hf_peft_config_loaded", False):
        what = "is quantised by another library" if foreign else "has PEFT adapters"
        raise CheckpointError(f"this model {what}, which one checkpoint cannot hold too; start from the plain model")
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        raise CheckpointError("some tensors have no data (meta device); load the whole model before saving it")
    original = skeleton(model)
    modules = dict(original.named_modules())
    for name in layers:
        kind = type(modules[name]).__name__ if name in modules else "missing module"
        if name not in modules or type(modules[name]) is not nn.Linear:
            raise CheckpointError(
                f"{name} is a {kind} in the original model; stock loaders read packed weights into nn.Linear only. "
                "This model can be used in memory, but not saved"
            )
    _check_names(model, original, layers, bits)
    _check_configuration(model)
    return _check_tensors(model, layers, bits)


def _check_earlier(target: Path, streams: Collection[str]) -> None:
    """Refuse to replace what is not an earlier checkpoint, or to lose a stream or a file that only it holds."""
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a directory, new, empty, or an earlier checkpoint")
    if not any(target.iterdir()):
        return
    if not (target / BASE_MANIFEST).is_file():
        raise CheckpointError(f"{target} is not empty and no checkpoint of libortho; choose another directory")
    lost = sorted(set(stream_names(target)) - set(streams))
    if lost:
        raise CheckpointError(
            f"{target} holds the streams {lost}, which this model has not, and which would be lost; choose another "
            "directory, or delete their folders first"
        )
    foreign = next(unlisted(target, BaseManifest.read(target).file_names, unread=(STREAMS,)), None)
    if foreign is not None:
        raise CheckpointError(
            f"{target} holds {foreign.name}, which save did not write, and which would be lost; move it, or choose "
            "another directory"
        )


def _check_names(model: PreTrainedModel, original: PreTrainedModel, layers: Collection[str], bits: int | None) -> None:
    """Refuse families that transformers stores in another form than it holds, as far as that stops a packed base."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REBUILT

    held = original.state_dict()
    if hasattr(model, "_weight_conversions"):
        original._weight_conversions = model._weight_conversions  # what this very model was read with
    try:
        stored: Mapping[str, Tensor] = revert_weight_conversion(original, held)
    except LOAD_ERRORS:  # an operation that needs values; what was written is compared in the end
        return
    refuse_renamed(n for n in layers if f"{n}.weight" not in stored)
    rebuilt = [n for n, m in original.named_modules() if type(m).__name__ in REBUILT]
    assembled = len(stored) > len(held)  # one tensor of the model from several of the file
    if bits is not None and (rebuilt or assembled):
        shapes = {tuple(t.shape) for t in stored.values()}
        what = [*rebuilt, *(n for n, t in held.items() if n not in stored and tuple(t.shape) not in shapes), "weights"]
        raise CheckpointError(
            f"transformers assembles {what[0]} of this {type(model).__name__} while loading, which it cannot do beside "
            "a packed base (families whose weights it converts, such as fused experts); keep the base dense "
            "(bits=None, on the command line --bits 0), or use the model in memory"
        )


def _check_configuration(model: PreTrainedModel) -> None:
    """Write the configuration to a temporary folder, to find out whether transformers refuses to."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        except LOAD_ERRORS as error:
            raise CheckpointError(
                f"transformers refuses to write the configuration of this model: {error}; correct model.config or "
                "model.generation_config first"
            ) from error


def _check_tensors(model: PreTrainedModel, layers: Collection[str], bits: int | None) -> int:
    """Check that the model is in one dtype and holds no NaN; return the bytes of the base."""
    if model.dtype not in DTYPES.values():
        raise CheckpointError(
            f"the model is in {model.dtype}; expected one of {', '.join(DTYPES)}: convert it with .to() first"
        )
    fixed = kept_in_fp32(model)
    seen: set[tuple[int, int]] = set()  # tied tensors are stored once
    size = 0
    for key, tensor in model.state_dict().items():
        owner, _, kind = key.rpartition(".")
        if of_split_layer(key, layers) and owner.removesuffix(".base") not in layers:
            continue  # a stream, in a dtype of its own
        place = (tensor.data_ptr(), tensor.numel())
        if place not in seen:
            to_come = bits is not None and owner in layers and kind == "weight"
            size += tensor.numel() * (bits or 0) // 8 if to_come else tensor.nbytes
        seen.add(place)
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != model.dtype and not any(name in key for name in fixed):
            raise CheckpointError(
                f"{key} is kept in {tensor.dtype}, the model in {model.dtype}; stock loaders would round it. Load the "
                "model in one dtype, that in which it will be saved"
            )
        if bool(tensor.isnan().any()):
            raise CheckpointError(f"{key} holds NaN, which no check of a saved file can tell from damage; repair it")
    return size
