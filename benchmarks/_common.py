"""What all benchmark scripts share: where results go, what machine made them, and the general text."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
_SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(os.environ.get("LIBORTHO_DATA", _SHARED / "data"))
MODELS = Path(os.environ.get("LIBORTHO_MODELS", _SHARED / "models"))
WIKITEXT = DATA / "wikitext2" / "wiki.test.raw.txt"


def machine() -> dict[str, Any]:
    """Processor, threads and versions; speeds depend on them, and bf16 rounding may."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(name: str, data: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` with the machine beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **data}, indent=1, default=str) + "\n")
    return path


def spread(values: list[float]) -> str:
    """Mean, and the range in brackets."""
    return f"{statistics.mean(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


def wikitext() -> Path:
    """WikiText-2 raw test file; its location is ``$LIBORTHO_DATA/wikitext2/wiki.test.raw.txt``."""
    if not WIKITEXT.is_file():
        raise SystemExit(
            f"{WIKITEXT} is missing: set LIBORTHO_DATA to a directory that holds wikitext2/wiki.test.raw.txt"
        )
    return WIKITEXT
