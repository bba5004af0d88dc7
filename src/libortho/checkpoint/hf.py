"""What writing and reading share about transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from libortho.checkpoint.format import AGAIN, CONFIG, read_json
from libortho.core.errors import CheckpointError

_COUNTS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"})
_REDIRECT = "transformers_weights"
"""Key under which transformers looks for the weights in another file."""
_CODE = re.compile("implementation|kernels?_")
_BUFFERS = 2**27  # causal masks of older models
LOAD_ERRORS = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError,
    MemoryError, ImportError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a directory that it cannot load."""


def causal_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM takes for a config, or None."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def described(root: Path, tensors: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that ``config.json`` describes, without data.

    Args:
        root: A checkpoint directory.
        tensors: How many tensors are stored in it.
        dtype: Of the model; None takes that of the configuration.

    Raises:
        CheckpointError: if it names no causal language model of transformers with a dtype, or one with more layers
            than there are tensors.
    """
    path = root / CONFIG
    stored = read_json(path)
    if _REDIRECT in stored:
        raise CheckpointError(f"{path} names other weights ({_REDIRECT}), which no saved model does; {AGAIN}")
    check_configuration(stored, tensors, path)
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        wanted = dtype or config.dtype
        kind = causal_class(config)
        if kind is None or not isinstance(wanted, torch.dtype):
            raise CheckpointError(f"{path} names no causal language model with a dtype; {AGAIN}")
        with torch.device("meta"):
            model = kind(config)
        return model.to(wanted)
    except LOAD_ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"transformers cannot build the model of {path}: {error}; {AGAIN}") from error


def check_loading(info: Mapping[str, Any]) -> None:
    """Raise CheckpointError if transformers missed a weight, or found one that it does not know."""
    problems = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if problems:
        kind, names = next(iter(problems.items()))
        raise CheckpointError(f"the weights do not fit the model of config.json: {kind} {names[:3]}; {AGAIN}")


def check_configuration(config: Any, tensors: int, where: Any) -> None:
    """Refuse a config.json with more layers than there are tensors, or that names code of the hub to run.

    Raises:
        CheckpointError: then.
    """
    todo = [config]
    while todo:
        part = todo.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                todo.append(value)
            elif isinstance(value, int) and key in _COUNTS and value > tensors:
                raise CheckpointError(f"{where}: {key} is {value}, but only {tensors} tensors are stored; {AGAIN}")
            if _CODE.search(key) and "/" in json.dumps(value):
                raise CheckpointError(
                    f"{where}: {key} is {value!r:.80}, which names a repository whose code would run; expected one of "
                    "transformers' own, such as sdpa"
                )


def check_size(skeleton: Any, stored: int, where: Any) -> None:
    """Refuse a model (on the meta device) that is much larger than its stored tensors, before memory is taken for it.

    Raises:
        CheckpointError: if it has more than twice the stored elements (tied embeddings are stored once), or large
            buffers.
    """
    parameters = sum(p.numel() for p in skeleton.parameters())
    buffers = sum(b.numel() for b in skeleton.buffers())
    if parameters > 2 * stored or buffers > stored + _BUFFERS:
        raise CheckpointError(
            f"{where} describes a model of {parameters} parameters and {buffers} numbers beside them, but {stored} are "
            f"stored; {AGAIN}"
        )


def of_split_layer(key: str, layers: Collection[str]) -> bool:
    """True if a state-dict key lies under a split layer."""
    parts = key.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts)))
