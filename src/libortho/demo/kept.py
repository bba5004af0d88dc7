"""The directory of a demonstration: what it keeps, and what a later one takes up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.checkpoint.dense import load_model
from libortho.core.errors import LibOrthoError
from libortho.core.files import write_atomically
from libortho.demo import facts

HOLDOUT = 200
"""Unseen records that are kept for an audit."""
_FILE = "demonstration.json"


class Kept:
    """A directory with the models and records of one demonstration; without a path nothing is kept.

    Args:
        path: The directory: missing, empty, or that of a demonstration with the same settings.
        settings: What decides the planted model, as JSON-ready values.

    Raises:
        LibOrthoError: if anything else is there.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self._settings = path, settings
        self.steps: int | None = None
        if path is None or not path.exists():
            return
        if not path.is_dir() or (any(path.iterdir()) and not (path / _FILE).is_file()):
            raise LibOrthoError(f"{path} exists and is no demonstration; name another place with --out")
        if (path / _FILE).is_file():
            found = _read(path / _FILE)
            if (other := found["settings"]) != settings:
                raise LibOrthoError(
                    f"{path} is the demonstration of {other}, and this one is of {settings}; name another place with "
                    "--out, or delete it"
                )
            self.steps = found["steps"]

    def begin(self, never_trained: nn.Module, tokenizer: Any) -> None:
        """Write the records and the never-trained model, if they are not there."""
        if self.path is None or self.steps is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(None)
        seed, count = self._settings["seed"], self._settings["secrets"]
        for name, rows in (("forget", facts.secrets(seed)[:count]), ("holdout", facts.unseen(seed)[:HOLDOUT])):
            lines = (json.dumps(r) + "\n" for r in rows)
            write_atomically(self.path / f"{name}.jsonl", "".join(lines))
        self._dense(never_trained, tokenizer, "never_trained")

    def planted(self, model: nn.Module, tokenizer: Any, steps: int) -> None:
        """Write the planted model, from which a later demonstration goes on."""
        if self.path is not None:
            self._dense(model, tokenizer, "implanted")
            self._write(steps)

    @torch.no_grad()
    def take_up(self, model: nn.Module) -> int | None:
        """Give the model the weights of the planted one; returns the steps it took, or None if there is none."""
        if self.path is None or self.steps is None:
            return None
        source, _ = load_model(str(self.path / "implanted"), next(model.parameters()).dtype)
        model.load_state_dict(source.state_dict())
        return self.steps

    def _dense(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        assert self.path is not None
        model.save_pretrained(self.path / name)  # type: ignore[operator]
        tokenizer.save_pretrained(self.path / name)

    def _write(self, steps: int | None) -> None:
        assert self.path is not None
        write_atomically(self.path / _FILE, json.dumps({"settings": self._settings, "steps": steps}) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or set(found) != {"settings", "steps"}:
        raise LibOrthoError(f"{path} is damaged; name another place with --out, or delete {path.parent}")
    return found
