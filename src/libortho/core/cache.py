"""Where the library keeps what it can make again, and whether somebody else could have put something there.

What is kept is believed: compiled kernels are run, models are loaded, samples are trained on. So a place counts only if
nobody but its owner, this user or root, can write to it or exchange a folder above it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from libortho.core.errors import ConfigError


def cache_directory() -> Path:
    """``$LIBORTHO_CACHE``, else ``$XDG_CACHE_HOME/libortho``, else ``~/.cache/libortho``.

    A relative ``$XDG_CACHE_HOME`` is ignored, as its specification says.

    Raises:
        ConfigError: if ``$LIBORTHO_CACHE`` or the home directory is relative, or there is no home directory.
    """
    chosen = os.environ.get("LIBORTHO_CACHE")
    if chosen:
        if not os.path.isabs(chosen):
            raise ConfigError(
                f"LIBORTHO_CACHE is {chosen!r}, which depends on the working directory; expected an absolute path"
            )
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):
        return Path(shared) / "libortho"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise ConfigError(f"the home directory is {home!r}; expected an absolute path: set HOME, or LIBORTHO_CACHE")
    return Path(home) / ".cache" / "libortho"


def private_path(path: Path) -> Path:
    """The real path of a file or folder that this user or root alone can have written.

    Everything from it up to the root must belong to one of them, and be writable for no other group than this user's
    own and for no others. Above it, folders whose entries only their owners can exchange, such as ``/tmp``, may be.
    What does not exist is nobody's yet: its nearest folder counts. Systems without such owners are not asked.

    Raises:
        ConfigError: if somebody else could have written it.
        OSError: if it cannot be looked at.
    """
    real = Path(os.path.realpath(path))
    if not hasattr(os, "geteuid"):
        return real
    for place in (real, *real.parents):
        try:
            status = place.lstat()
        except FileNotFoundError:
            continue
        if (reason := _foreign(status, above=place != real)) is not None:
            raise ConfigError(
                f"{str(place)!r} {reason}, so that {str(path)!r} may be somebody else's; make it yours alone (chown, "
                "chmod go-w), or name another place by LIBORTHO_CACHE"
            )
    return real


def make_private(folder: Path) -> Path:
    """Make a folder and those missing above it, for this user alone, and return its real path.

    Raises:
        ConfigError: if somebody else can write there; see :func:`private_path`.
        OSError: if it cannot be made.
    """
    private_path(folder)
    for place in reversed((folder, *folder.parents)):
        try:
            place.mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError:
            if not place.is_dir():  # where nothing can be made, all may be there
                raise
    return private_path(folder)


def _foreign(status: os.stat_result, above: bool) -> str | None:
    """Why somebody else may have been there; None if nobody can."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to the user {status.st_uid}"
    if stat.S_ISLNK(status.st_mode):  # none is left in a real path, unless it was exchanged meanwhile
        return "is a link"
    if above and status.st_mode & stat.S_ISVTX:
        return None
    if status.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (os.getegid(), *((0,) if status.st_uid == 0 else ())):
        return f"can be written by the group {status.st_gid}"
    return None


__all__ = ["cache_directory", "make_private", "private_path"]
