"""Load a dense model; refuse a checkpoint of this library where one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from libortho.core.errors import CheckpointError, LibOrthoError
from libortho.core.extras import require


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Dense model and tokenizer from a hub id, a path or a GGUF file, in evaluation mode.

    Parameters are copied out of the memory-mapped file: a small machine evicts mapped pages, and then every forward
    pass reads the disk again.

    Raises:
        LibOrthoError: if transformers cannot load the model (the message repeats its reason), or a GGUF file needs an
            extra that is not installed.
        CheckpointError: if it is a checkpoint of this library.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    refuse_checkpoint(name)
    source, options = str(name), {}
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        require("demo", f"reading the GGUF file {name}")
        source, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        where = "" if Path(name).exists() else " (there is no such directory here, so that it is taken for a hub id)"
        raise LibOrthoError(f"cannot load the model {str(name)!r}{where}: {error}") from error
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    if options:
        forget_quantisation(model)
    return model.to(device).eval(), tokenizer


def forget_quantisation(model: Any) -> None:
    """Remove the marks of quantisation from a model that its loader has dequantised: it is an ordinary dense one."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)


def refuse_checkpoint(name: str | Path, what: str = "the model") -> None:
    """Refuse a checkpoint of this library where a dense model is asked for: an ordinary loader drops its streams.

    Args:
        name: Hub id or path.
        what: What the caller calls the model.

    Raises:
        CheckpointError: if it is one; the message names the streams.
    """
    from libortho.checkpoint import is_checkpoint, stream_names

    if is_checkpoint(name):
        streams = stream_names(Path(name))
        held = f"with the streams {streams}, which an ordinary loader drops" if streams else "without streams"
        raise CheckpointError(
            f"{what} {str(name)!r} is a checkpoint of libortho {held}; expected a dense model: name the original one. "
            "In Python libortho.load reads a checkpoint; of the commands isolate (with a --stream of another name), "
            "audit, eval and generate take one as their model"
        )
