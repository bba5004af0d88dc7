"""The command line as tests call it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

import tiny
from libortho import cli
from libortho.core.errors import LibOrthoError

QUICK = ["--ratio", "0.1", "--set", "max_steps=1"]


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def refused(*arguments: Any) -> str:
    """The message of a LibOrthoError, which ``main`` turns into one line."""
    result = call(*arguments)
    assert isinstance(result.exception, LibOrthoError), result.output
    return str(result.exception)


def process(cache: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    code = "from libortho.cli import main; main()"
    environment = {**os.environ, "LIBORTHO_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def said(checkpoint: Path, *options: Any, number: int = 0) -> str:
    """How ``generate`` goes on from the prompt of a record of ``tiny.FORGET``."""
    result = call("generate", checkpoint, tiny.FORGET[number]["prompt"], "--max-new-tokens", "6", *options)
    assert result.exit_code == 0, result.output
    return result.stdout
