"""Finished work of a run in a folder, so that an interrupted run goes on with the same numbers.

    run.json              the key of the run that the folder belongs to
    <name>.safetensors    one entry: its tensors, and its other data as JSON in the metadata of the same file

An entry is written whole or not at all, so that a process may die at any moment. Entries can hold text that was sampled
from the model and values from before records were gone: folder and files are for their owner alone, and must be
deleted when the stream must.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.files import write_atomically
from libortho.core.version import __version__

_RUN = "run.json"
_LEFTOVER = "tmp"
"""Prefix of the temporary names of ``write_atomically``, which stay behind if the process dies."""


@dataclass(frozen=True)
class Entry:
    """One finished piece of work.

    Attributes:
        tensors: By name; the order is kept.
        data: Everything else, JSON-ready.
    """

    tensors: Mapping[str, Tensor]
    data: Any = None


def run_key(*inputs: Any) -> str:
    """Hash of the library's version and of everything that goes into a run, by its ``repr``."""
    return hashlib.sha256(repr((__version__, *inputs)).encode()).hexdigest()


class RunCache:
    """Entries of one run in a folder; without a folder nothing is kept.

    Raises:
        ConfigError: if the folder belongs to another run, or holds other files.
        OSError: if it cannot be made or written.
    """

    def __init__(self, directory: Path | None = None, key: str = "") -> None:
        self.directory, self.key = directory, key
        if directory is None:
            return
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"resume is {str(directory)!r}, a file; expected a folder, new, empty, or of this run")
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        run = directory / _RUN
        foreign = sorted(p.name for p in directory.iterdir() if not p.name.startswith(_LEFTOVER))
        if run.is_file():  # looked for last: another process of this run may just have made it
            try:
                found = json.loads(run.read_text(encoding="utf-8")).get("key")
            except (OSError, ValueError, AttributeError) as error:
                raise CheckpointError(f"cannot read {run}: {error}; delete {directory} to start again") from error
            if found != key:
                raise ConfigError(
                    f"{directory} belongs to another run (other model, records, retain text, configuration or version "
                    "of libortho); give another folder, or delete it if that run is no longer needed"
                )
            return
        if foreign:
            raise ConfigError(f"{directory} holds {foreign[0]}, and no {_RUN}; give a new or an empty folder")
        write_atomically(run, json.dumps({"key": key}))

    def inside(self, name: str) -> RunCache:
        """A cache in a folder within this one, for entries of the same run that would have the same names."""
        return RunCache(None if self.directory is None else self.directory / name, self.key)

    def get(self, name: str) -> Entry | None:
        """An entry, its tensors on the CPU; None if it is not there.

        Raises:
            CheckpointError: if it is damaged.
        """
        path = None if self.directory is None else self.directory / f"{name}.safetensors"
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["entry"])
                # A copy lies where torch would have put it: products of unaligned tensors can differ in the last bit.
                return Entry({n: file.get_tensor(n).clone() for n in told["names"]}, told["data"])
        except (SafetensorError, OSError, ValueError, LookupError) as error:
            raise CheckpointError(
                f"cannot read {path}: {error}; the file was changed, delete {self.directory} to start again"
            ) from error

    def put(self, name: str, entry: Entry) -> None:
        """Keep an entry in place of an earlier one of that name."""
        if self.directory is None:
            return
        told = json.dumps({"names": list(entry.tensors), "data": entry.data})
        tensors = {n: t.detach().cpu().contiguous() for n, t in entry.tensors.items()}
        content = safetensors.torch.save(tensors, {"entry": told})
        write_atomically(self.directory / f"{name}.safetensors", content)

    def get_or_compute(self, name: str, make: Callable[[], Entry]) -> Entry:
        """The entry from the folder, or made and put there."""
        entry = self.get(name)
        if entry is None:
            entry = make()
            self.put(name, entry)
        return entry
