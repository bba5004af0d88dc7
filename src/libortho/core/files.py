"""Writing a file whole or not at all, and asking first whether it can be written."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from libortho.core.errors import ConfigError, LibOrthoError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write bytes, or UTF-8 text, to a temporary name beside ``path``, sync it, and rename; for its owner alone.

    Reports and samples of a model can hold what it memorised. Missing folders are made, for their owner alone as well.

    Raises:
        OSError: if the file cannot be written; what stood at ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_new_entry(path: Path, error: type[LibOrthoError] = ConfigError) -> None:
    """Make and remove an empty folder where something of this name is to be written; nothing is left behind.

    Args:
        path: What is to be written. Missing folders above it are not made.
        error: What is raised.

    Raises:
        LibOrthoError: of the kind ``error``, if a folder above it is a file or cannot be written, or the name is
            impossible.
        OSError: if the disk is full.
    """
    place = next((p for p in path.absolute().parents if os.path.lexists(p)), Path(path.anchor or "."))
    probe = place / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.mkdir()
    except (OSError, ValueError) as reason:
        if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
            raise
        text = reason.strerror if isinstance(reason, OSError) else reason
        raise error(f"cannot write {path}: {place} takes no new entry ({text}); choose another place") from reason
    with suppress(OSError):
        probe.rmdir()


def check_report(path: Path | None, name: str) -> None:
    """Refuse a file that :func:`write_atomically` could not write; None is nothing to check.

    Args:
        path: The file; what is there will be replaced.
        name: What the caller calls it, such as "--out".

    Raises:
        ConfigError: if a directory, a device or the like is there, or nothing can be written there.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no ordinary file"
        raise ConfigError(f"{name} is {path}, which is {kind}; expected a file to write")
    check_new_entry(path)


def check_resume(path: Path | None, name: str, out: Path | None = None) -> None:
    """Refuse a folder in which finished work could not be kept; None is nothing to check.

    Args:
        path: The folder, which may be missing.
        name: What the caller calls it, such as "--resume".
        out: A directory that will be replaced whole, so that the folder must not lie in it.

    Raises:
        ConfigError: if it is a file, cannot be written, or lies in ``out``.
    """
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{name} is {path}, a file; expected a folder, new, empty, or of this run")
    check_new_entry(path / "part" if path.is_dir() else path)
    if out is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
        raise ConfigError(f"{name} is {path}, which lies in --out {out}; expected a folder outside of it")
