"""API keys and what they allow.

    [[keys]]
    id = "payroll"
    sha256 = "..."                        # of the key, as `libortho serve-key` prints it
    streams = { hr = 1.0, legal = 0.5 }   # the largest alpha of each; every other stream stays off
    requests_per_minute = 60              # no limit without it

A key has 256 random bits, so that a plain hash keeps it: there is no list of likely keys to try.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libortho.core.config import check_stream_name
from libortho.core.errors import ConfigError

logger = logging.getLogger(__name__)

_PREFIX = "lo-"
_FIELDS = frozenset({"id", "sha256", "streams", "requests_per_minute"})


@dataclass(frozen=True)
class Key:
    """A key, without the key itself.

    Attributes:
        id: What audit lines call it.
        sha256: Of the key, in hexadecimal digits.
        streams: Largest alpha of each stream that it may ask for.
        requests_per_minute: Limit of its rate; None for no limit.
    """

    id: str
    sha256: str
    streams: Mapping[str, float] = field(default_factory=dict)
    requests_per_minute: int | None = None


ANONYMOUS = Key("anonymous", "")
"""Who brings no key: no stream."""

NO_KEY = "none"
"""What clients that must send a key send where they have none."""


def new_key() -> tuple[str, str]:
    """A key, and its SHA-256."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, digest(key)


def digest(key: str) -> str:
    """SHA-256 of a key, in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str, sha256: str, streams: Mapping[str, float], rate: int | None) -> str:
    """The lines of a keys file for one key."""
    allowed = ", ".join(f'"{n}" = {float(a)}' for n, a in streams.items())
    lines = ["[[keys]]", f'id = "{name}"', f'sha256 = "{sha256}"', f"streams = {{ {allowed} }}"]
    return "\n".join([*lines, *([f"requests_per_minute = {rate}"] if rate else [])]) + "\n"


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        ConfigError: if it is missing or malformed; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); expected a TOML file of [[keys]] entries") from error
    return parse_keys(text, str(path))


def parse_keys(text: str, path: str) -> list[Key]:
    """The keys of a file's text; errors call it ``path``.

    Raises:
        ConfigError: if it is malformed.
    """
    try:
        data = tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as TOML ({error}); expected [[keys]] entries") from error
    rows = data.get("keys")
    if set(data) - {"keys"} or not isinstance(rows, list):
        raise ConfigError(f"{path} has {sorted(data)}; expected [[keys]] entries alone")
    keys = [_key(row, f"{path}, key {i}") for i, row in enumerate(rows, 1)]
    for what in ("id", "sha256"):
        known = [getattr(k, what) for k in keys]
        if len(set(known)) < len(known):
            raise ConfigError(f"{path} has two keys of one {what}; expected each once")
    return keys


def _key(row: Any, where: str) -> Key:
    if not isinstance(row, dict) or set(row) - _FIELDS or not {"id", "sha256"} <= set(row):
        raise ConfigError(f"{where} has {sorted(row) if isinstance(row, dict) else row!r}; expected {sorted(_FIELDS)}")
    name, sha256, streams, rate = row["id"], row["sha256"], row.get("streams", {}), row.get("requests_per_minute")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name) or name == ANONYMOUS.id:
        raise ConfigError(f"{where}: id is {name!r}; expected letters, digits, dots and dashes, and not {ANONYMOUS.id}")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError(f"{where}: sha256 is {sha256!r}; expected 64 hexadecimal digits, as serve-key prints them")
    if not isinstance(streams, dict):
        raise ConfigError(f"{where}: streams is {streams!r}; expected a table of the largest alpha of each")
    for stream, most in streams.items():
        check_stream_name(stream)
        if isinstance(most, bool) or not isinstance(most, int | float) or not (math.isfinite(most) and 0 <= most <= 1):
            raise ConfigError(f"{where}: the largest alpha of {stream!r} is {most!r}; expected a number in [0, 1]")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or rate < 1):
        raise ConfigError(f"{where}: requests_per_minute is {rate!r}; expected a whole number above 0")
    return Key(name, sha256, {n: float(a) for n, a in streams.items()}, rate)


class KeyRing:
    """The keys of a file, read again when the file changes.

    A file that cannot be read any more leaves the last keys in force, and says so in the log; a file that is gone
    leaves none.

    Args:
        path: The file; None for no keys.

    Raises:
        ConfigError: as :func:`read_keys`, for the file as it is now.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: list[Key] = []
        if path is not None:
            self._stamp = _stamp(path)
            self._keys = read_keys(path)

    def find(self, given: str) -> Key | None:
        """The key whose hash is that of ``given``; all are compared, each in constant time."""
        self._refresh()
        hashed, found = digest(given), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, hashed):
                found = key
        return found

    def _refresh(self) -> None:
        if self._path is None:
            return
        now = _stamp(self._path)
        if now == self._stamp:
            return
        self._stamp = now
        if now is None:
            logger.error("the keys file is gone; no key is valid until it is back")
            self._keys = []
            return
        try:
            self._keys = read_keys(self._path)
            logger.info("%d keys read", len(self._keys))
        except ConfigError as error:
            logger.error("the last keys stay in force: %s", error)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
