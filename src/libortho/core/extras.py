"""Optional dependencies: imported where they are used, and a missing one is named before long work begins."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from libortho.core.errors import LibOrthoError

MODULES = {
    "audit": ("rapidfuzz", "rouge_score", "scipy"),
    "demo": ("gguf",),
    "dp": ("opacus",),
    "eval": ("lm_eval",),
    "serve": ("fastapi", "uvicorn", "pydantic_settings", "prometheus_client"),
    "vault": ("pyrage",),
}
"""Extra of ``pyproject.toml`` to the modules that it brings."""


def require(extra: str, what: str, error: type[LibOrthoError] = LibOrthoError) -> None:
    """Find the modules of an extra, without importing them.

    Args:
        extra: Name of the extra.
        what: What needs it, as the message begins.
        error: What is raised.

    Raises:
        LibOrthoError: of the kind ``error``, if a module is not installed; the message says how to install the extra.
    """
    missing = [name for name in MODULES[extra] if not _found(name)]
    if missing:
        raise error(f"{what} needs {', '.join(missing)}; install the extra: pip install 'libortho[{extra}]'")


def module(extra: str, name: str) -> Any:
    """A module that comes with an extra.

    Raises:
        LibOrthoError: if it cannot be imported; the message says how to install the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LibOrthoError(
            f"{name} cannot be imported ({error}); install the extra: pip install 'libortho[{extra}]'"
        ) from error


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # something keeps it from being imported
        return False
