"""What writing and reading share about transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from libortho.checkpoint.format import AGAIN
from libortho.errors import CheckpointError

LOAD_ERRORS = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a directory that it cannot load."""


def causal_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM takes for a config, or None."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def check_loading(info: Mapping[str, Any]) -> None:
    """Raise CheckpointError if transformers missed a weight, or found one that it does not know."""
    problems = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if problems:
        kind, names = next(iter(problems.items()))
        raise CheckpointError(f"the weights do not fit the model of config.json: {kind} {names[:3]}; {AGAIN}")


def of_split_layer(key: str, layers: Collection[str]) -> bool:
    """True if a state-dict key lies under a split layer."""
    parts = key.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts)))
