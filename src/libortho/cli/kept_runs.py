"""Finished parts of a long command, kept while it runs, so that the same command goes on after an interruption."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from libortho.cli.terminal import INTERRUPTED, say
from libortho.core.cache import cache_directory, make_private
from libortho.core.errors import ConfigError
from libortho.core.version import __version__

_ROOM = 3
"""Times the size of the model that must be free where its parts are kept."""

Keep = Annotated[
    bool,
    typer.Option(
        "--keep/--no-keep",
        help="Keep finished parts in the cache until the command ends, so that it can be taken up. They hold secrets.",
    ),
]


@contextmanager
def kept_run(verb: str, resume: Path | None, keep: bool, size: int, *inputs: Any) -> Iterator[Path | None]:
    """The folder in which this run keeps its finished parts; None where nothing is kept.

    A folder that the caller names stays. One in the cache goes as the command ends, and stays after an interrupt or an
    error, for the same command to take up. What is said of it goes to standard error.

    Args:
        verb: The command.
        resume: The folder that the caller names.
        keep: Whether to keep parts where the caller names none.
        size: Bytes of the model.
        inputs: What decides the run: options, and paths, which stand for their content.
    """
    folder = resume or (_cached(verb, size, inputs) if keep else None)
    if folder is None:
        yield None
        return
    if parts := _parts(folder):
        say(f"going on from {folder}: {parts} finished parts lie there")
    elif resume is None:
        say(f"finished parts are kept in {folder} until the command ends; they hold secrets (--no-keep: none is kept)")
    keep_folder = resume is not None
    try:
        yield folder
    except BaseException as error:
        if parts := _parts(folder):
            say(f"{parts} finished parts lie in {folder}; delete it if you do not go on, as they hold secrets")
            keep_folder = True
        if not isinstance(error, KeyboardInterrupt):
            raise
        if not parts:
            say("no part was finished yet: the same command begins anew")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if not keep_folder:
            shutil.rmtree(folder, ignore_errors=True)


def _cached(verb: str, size: int, inputs: tuple[Any, ...]) -> Path | None:
    digest = hashlib.sha256(repr((__version__, verb, [_content(i) for i in inputs])).encode()).hexdigest()
    try:
        place = make_private(cache_directory() / "runs")
    except (ConfigError, OSError) as error:
        say(f"nothing is kept in case of an interruption: {error}")
        return None
    if (free := shutil.disk_usage(place).free) < _ROOM * size:
        say(f"nothing is kept in case of an interruption: {place} has {free / 1e9:.1f} GB left; name a --resume DIR")
        return None
    return place / f"{verb}-{digest[:16]}"


def _content(given: Any) -> Any:
    """What stands for an input: of a file its bytes, of a folder its files' names, sizes and times."""
    if isinstance(given, str | Path) and Path(given).is_file():
        return hashlib.sha256(Path(given).read_bytes()).hexdigest()
    if isinstance(given, str | Path) and Path(given).is_dir():
        files = sorted(p for p in Path(given).rglob("*") if p.is_file())
        return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return repr(given)


def _parts(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors"))) if folder.is_dir() else 0
