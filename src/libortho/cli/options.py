"""What several commands take, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from libortho.core.dtypes import DTYPES
from libortho.core.errors import ConfigError

Model = Annotated[str, typer.Argument(help="Hub id or path of a dense causal language model.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; an earlier checkpoint there is replaced.")]
Device = Annotated[str, typer.Option(help="Where to run, for example cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Targets = Annotated[
    list[str] | None, typer.Option("--target-modules", help="Suffix, re:<pattern>, mlp-out or all-linear; repeatable.")
]
Ratio = Annotated[float, typer.Option(help="Budget of the ortho stream as a fraction of the split weights.")]
Bits = Annotated[int, typer.Option(help="Integer width of the base: 8, 4, or 0 to keep it dense.")]
GroupSize = Annotated[int | None, typer.Option(help="Inputs per scale; -1 for one scale per output channel.")]
Checkpoint = Annotated[Path, typer.Argument(help="Directory that split, isolate or detach wrote.")]
PassphraseEnv = Annotated[
    str | None,
    typer.Option(
        "--passphrase-env", metavar="NAME", help="Environment variable with the passphrase; else it is asked for."
    ),
]
Stream = Annotated[str, typer.Option(help="Name of the ortho stream.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def dtype_of(name: str) -> torch.dtype | str:
    """The dtype of that name; ``auto`` stays a word."""
    if name != "auto" and name not in DTYPES:
        raise ConfigError(f"--dtype is {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES.get(name, name)


def device_of(name: str) -> str:
    """The name of a device, after a look whether torch finds it."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device is {name!r}; expected cpu, or a device that torch finds here ({reason})"
        ) from error
    return name


def targets_of(names: list[str] | None) -> dict[str, Any]:
    """``target_modules`` of a config, where any are named."""
    return {} if not names else {"target_modules": names[0] if len(names) == 1 else tuple(names)}


def share(option: str, text: str) -> float | str:
    """A number, or the word ``auto``."""
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; expected a number in (0, 1] or auto") from error


def bits_of(bits: int) -> int | None:
    """Bits of a base, None for a dense one (0)."""
    return bits or None
