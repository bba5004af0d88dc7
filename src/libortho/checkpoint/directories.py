"""A directory appears under its name whole or not at all: it is made beside it, forced to the disk, and renamed."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from libortho.core.errors import CheckpointError
from libortho.core.files import check_new_entry

logger = logging.getLogger(__name__)
_AT_CWD, _EXCHANGE = -100, 2  # AT_FDCWD of fcntl.h and RENAME_EXCHANGE of linux/fs.h


def check_new_place(path: str | Path) -> Path:
    """Refuse a place that is taken, or where nothing can be written.

    Returns:
        The absolute path.

    Raises:
        CheckpointError: if something is there, or its parent cannot be written.
    """
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists; choose another name")
    check_new_entry(target, CheckpointError)
    return target


def check_room(target: Path, needed: int) -> None:
    """Raise CheckpointError if the disk of ``target`` has fewer than ``needed`` bytes left."""
    place = next(p for p in (target, *target.parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{target} needs at least {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left; make room, or "
            "choose another disk"
        )


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, to be renamed to it; gone afterwards if it was not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish(staged: Path, target: Path) -> None:
    """Force ``staged`` to the disk and give it its final name, which must be free.

    Raises:
        CheckpointError: if something is there by now.
    """
    _sync(staged)
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists; choose another place")
    os.rename(staged, target)
    _sync_folder(target.parent)


def _sync(directory: Path) -> None:
    """Force files and directories to the disk."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir() and os.name != "posix":
            continue
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(handle)
        os.close(handle)


def swap(first: Path, second: Path) -> bool:
    """Exchange two names in one step, so that neither is ever missing; False where the system cannot (not Linux)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_AT_CWD, os.fsencode(first), _AT_CWD, os.fsencode(second), _EXCHANGE) == 0


def replace(staged: Path, target: Path) -> None:
    """Force ``staged`` to the disk and rename it to ``target``.

    An earlier directory changes places with it, or else steps aside first.
    """
    _sync(staged)
    old: Path | None = None
    if target.exists():
        if swap(staged, target):
            old = staged
        else:
            old = staged.with_suffix(".old")
            os.rename(target, old)
    if old is not staged:
        try:
            os.replace(staged, target)
        except BaseException:
            if old is not None:
                os.rename(old, target)
            raise
    _sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning("the earlier checkpoint could not be deleted and lies at %s", old)
