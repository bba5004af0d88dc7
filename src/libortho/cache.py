"""Where the library keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$LIBORTHO_CACHE``, else ``$XDG_CACHE_HOME/libortho``, else ``~/.cache/libortho``."""
    chosen = os.environ.get("LIBORTHO_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "libortho"
