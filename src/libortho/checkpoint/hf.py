"""What writing and reading share about transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from libortho.checkpoint.json_files import DAMAGE, read_json
from libortho.checkpoint.manifest import CONFIG
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


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers builds it from its configuration, without data."""
    with torch.device("meta"):
        return type(model)(model.config)


def stored_skeleton(root: Path, tensors: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that the ``config.json`` of a checkpoint describes, without data.

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
        raise CheckpointError(f"{path} names other weights ({_REDIRECT}), which no saved model does; {DAMAGE}")
    check_configuration(stored, tensors, path)
    with building(path):
        config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        wanted = dtype or config.dtype
        kind = causal_class(config)
        if kind is None or not isinstance(wanted, torch.dtype):
            raise CheckpointError(f"{path} names no causal language model with a dtype; {DAMAGE}")
        with torch.device("meta"):
            model = kind(config)
        return model.to(wanted)


@contextmanager
def building(config: Path) -> Iterator[None]:
    """Raise what transformers raises while it builds the model of a configuration as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except LOAD_ERRORS as error:
        raise CheckpointError(f"transformers cannot build the model of {config}: {error}; {DAMAGE}") from error


def check_loading(info: Mapping[str, Any]) -> None:
    """Raise CheckpointError if transformers missed a weight, or found one that it does not know."""
    problems = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if problems:
        kind, names = next(iter(problems.items()))
        raise CheckpointError(f"the weights do not fit the model of config.json: {kind} {names[:3]}; {DAMAGE}")


def check_configuration(config: Any, tensors: int, where: Any) -> None:
    """Raise CheckpointError if config.json has more layers than there are tensors, or names code of the hub to run."""
    todo = [config]
    while todo:
        part = todo.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                todo.append(value)
            elif isinstance(value, int) and key in _COUNTS and value > tensors:
                raise CheckpointError(f"{where}: {key} is {value}, but only {tensors} tensors are stored; {DAMAGE}")
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
            f"stored; {DAMAGE}"
        )


def of_split_layer(key: str, layers: Collection[str]) -> bool:
    """True if a state-dict key lies under a split layer."""
    parts = key.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts)))


def outside_split_layers(tensors: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """What transformers holds beside the base of the split layers: all other tensors, and the layers' biases."""
    return {k: v for k, v in tensors.items() if not of_split_layer(k, layers) or k.endswith(".bias")}


def kept_in_fp32(model: PreTrainedModel) -> frozenset[str]:
    """Parts of names of the tensors that transformers keeps in fp32 in a model of another dtype."""
    kinds = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return frozenset(name for kind in kinds for name in getattr(model, kind, None) or ())


def refuse_renamed(names: Iterable[str]) -> None:
    """Raise CheckpointError if there is a layer or tensor that transformers stores under another name than it has."""
    for name in names:
        raise CheckpointError(f"transformers stores {name} of this model family under another name; not supported")
