"""Records and checkpoints for the commands."""

import json
from pathlib import Path

import pytest

import libortho
import tiny


@pytest.fixture(scope="module")
def forget(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "forget.jsonl"
    path.write_text("\n".join(map(json.dumps, tiny.FORGET)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def retain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "retain.jsonl"
    path.write_text("\n".join(map(json.dumps, tiny.RETAIN)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("detached") / "base"
    libortho.checkpoint.detach(checkpoint, out)
    return out


@pytest.fixture(scope="module")
def holdout(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "holdout.jsonl"
    rows = [
        {"prompt": f"Code of {n} Poe:", "completion": f" {1009 * i:04d}."}
        for i, n in enumerate(("Al", "Ben", "Cleo"), 1)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
