"""What all benchmark scripts share: where results go, what made them, and the general text."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
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


def _commit() -> str:
    """The short hash of HEAD, with "+changes" if tracked files other than results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"


COMMIT = _commit()
"""Asked when the script starts: that is the code that runs, whatever is committed while it does."""
FIELDS = ("commit", "machine", "settings")
"""What says of a stored file, and of each of its rows, what made it."""
STAMP = (*FIELDS, "date")
"""With the day, which rows stored before it was recorded lack."""


def provenance(device: str | None = None) -> dict[str, Any]:
    """The commit, the machine, and the command's options with what else decides figures and times.

    ``device`` is what the figures were computed on, where this process did not compute them itself.
    """
    device = device or (torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu")
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "threads": torch.get_num_threads()}
    return {
        "commit": COMMIT,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | ({} if device == "cpu" else {"gpu": device}),
        "settings": {"arguments": sys.argv[1:], **threads, "device": device},
    }


def stamped(row: dict[str, Any]) -> dict[str, Any]:
    """The row with those fields of the stamp that it has not. A row's ``device`` is that of its settings.

    A row that has a commit was stored by an earlier run, and gets no date of this one.
    """
    found, fields = provenance(row.get("device")), FIELDS if "commit" in row else STAMP
    return {**row, **{f: found[f] for f in fields if f not in row}}


def save(name: str, data: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``, with what made it on the file and on every row that does not say so yet.

    Rows are the dicts in the lists of ``data``. Rows of earlier runs keep what they say.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    rows = {
        key: [stamped(r) if isinstance(r, dict) else r for r in value]
        for key, value in data.items()
        if isinstance(value, list)
    }
    path.write_text(json.dumps({**provenance(), **data, **rows}, indent=1, default=str) + "\n")
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
