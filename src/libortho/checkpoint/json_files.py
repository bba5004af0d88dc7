"""JSON files of a checkpoint: one object, no key twice, nothing unknown, numbers and strings within bounds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from libortho.core.errors import CheckpointError

DAMAGE = "the file is damaged or was changed; copy the checkpoint again or save it again"
MAX_JSON = 2**28
"""Largest JSON file that is read, in bytes."""
MAX_COUNT = 2**53
"""Largest whole number that a manifest may name."""
_MAX_DIGITS = 40
_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; a link to a file is followed.

    Raises:
        CheckpointError: if it is missing, cannot be read, or is a folder, a pipe, a device or the like.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; expected a directory written by libortho.save") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {DAMAGE}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"cannot read {path}: it is no ordinary file; {DAMAGE}")
    return os.fdopen(handle, "rb")


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; {DAMAGE}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if it is missing, no JSON object, names a key twice, or holds a number of more than 40 digits.
    """
    return _parsed(_content(path), path)


def read_written_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file whose bytes say nothing beyond it: as ``json.dumps`` writes it, and ASCII.

    Raises:
        CheckpointError: as :func:`read_json`, or if blanks, digits or escapes stand in it that no writer needs.
    """
    content = _content(path)
    data = _parsed(content, path)
    try:
        forms = {json.dumps(data, indent=indent, allow_nan=False).encode() for indent in (2, None)}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds a number that JSON does not know: {error}; {DAMAGE}") from error
    if content.removesuffix(b"\n") not in forms:
        raise CheckpointError(
            f"{path} holds the same object in another form than save writes (blanks, digits, escapes), which could "
            f"carry something; {DAMAGE}"
        )
    return data


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; {DAMAGE}") from error
    if len(content) > MAX_JSON:
        raise CheckpointError(f"{path} is longer than {MAX_JSON} bytes; {DAMAGE}")
    return content


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {DAMAGE}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object; {DAMAGE}")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r:.80} stands twice in one object")
    return data


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object; values that JSON does not know are an error, not a string."""
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", "utf-8")


# -- fields ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """An object of a JSON file, whose values are checked when they are asked for.

    Every method raises CheckpointError for a value that is missing, or of another type, range or pattern.

    Attributes:
        data: The object.
        where: Its file.
    """

    data: Mapping[str, Any]
    where: Path

    @classmethod
    def of(
        cls, data: Any, where: Path, required: Collection[str], optional: Collection[str] = (), what: str = ""
    ) -> Fields:
        """An object with the required keys, and none besides them and the optional ones.

        Args:
            data: What was read.
            where: Its file.
            required: Keys that must be there.
            optional: Keys that may be there.
            what: What of the file it is, for the message.
        """
        place = f"{where}{what and f', {what}'}"
        if not isinstance(data, dict):
            raise CheckpointError(f"{place} is {data!r:.60}, expected a dict; {DAMAGE}")
        missing = [k for k in required if k not in data]
        if missing:
            raise CheckpointError(f"{place}: {missing[0]!r} is missing; {DAMAGE}")
        unknown = [k for k in data if k not in required and k not in optional]
        if unknown:
            raise CheckpointError(f"{place}: {unknown[0]!r:.80} is unknown; {DAMAGE}")
        return cls(data, where)

    def value(self, key: str, kind: type) -> Any:
        """A value of this type; a bool is no int."""
        value = self.data.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where}: {key!r:.80} is {value!r:.60}, expected a {kind.__name__}; {DAMAGE}")
        return value

    def count(self, key: str, most: int = MAX_COUNT) -> int:
        """A whole number of at least 0 and at most ``most``."""
        value = self.value(key, int)
        if not 0 <= value <= most:
            raise CheckpointError(
                f"{self.where}: {key!r} is {value}, expected a number of at least 0, at most {most}; {DAMAGE}"
            )
        return int(value)

    def number(self, key: str, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in [``low``, ``high``]."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(
                f"{self.where}: {key!r} is {value!r:.60}, expected a number in [{low:g}, {high:g}]; {DAMAGE}"
            )
        return value

    def text(self, key: str, pattern: re.Pattern[str], expected: str | None = None) -> str:
        """A string that the pattern matches whole; ``expected`` says in words what that is."""
        value = str(self.value(key, str))
        if not pattern.fullmatch(value):
            wanted = expected or pattern.pattern
            raise CheckpointError(f"{self.where}: {key!r:.80} is {value!r:.80}, expected {wanted}; {DAMAGE}")
        return value

    def sha256(self, key: str) -> str:
        """A SHA-256 in lower-case hexadecimal."""
        return self.text(key, _SHA256, "64 hexadecimal digits")


def check_free_form(value: Any, where: Path, *, key: str, size: int) -> None:
    """Refuse a part of a manifest without a form of its own, unless it is small and can be written again.

    Raises:
        CheckpointError: if it takes more than ``size`` bytes as JSON, is nested too deeply, or holds a number that is
            not finite.
    """
    try:
        length = len(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {key!r} cannot be written as JSON: {error}; {DAMAGE}") from error
    if length > size:
        raise CheckpointError(f"{where}: {key!r} takes {length} bytes, expected at most {size}; {DAMAGE}")
