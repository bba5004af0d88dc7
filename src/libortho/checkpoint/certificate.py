"""The certificate of ``detach``: what was taken away, which hashes the rest has, and what was and was not checked.

It is a record, not a signature: it says what was done, and whoever has the directory can check the hashes. Whoever can
write the directory can write another certificate; sign it with your own tools where that matters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from libortho.checkpoint.audit_figures import check_figures
from libortho.checkpoint.files import HUB_CACHE, LATER, STREAMS, is_known
from libortho.checkpoint.json_files import DAMAGE, Fields, read_written_json
from libortho.checkpoint.manifest import BASE_MANIFEST, VERSION_TEXT
from libortho.checkpoint.stream_files import STREAM_FILES, checked_name
from libortho.checkpoint.tensor_files import holds_tensors
from libortho.core.errors import CheckpointError

SCHEMA = "libortho-certificate/2"
_EARLIER = "libortho-certificate/1"
_WHEN = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_DENSEST = 1e3

CHECKED = (
    "each file under `files` equals its source byte for byte and has the SHA-256 that is stated there",
    "the directory holds these files and this certificate, and no other file, folder or link",
    "each file has a name that transformers writes for a model or a tokenizer, or that libortho writes",
    "libortho.json, the index of the shards and the manifests of kept streams hold no key that is not written there by "
    "this library, none twice, and each is in the form in which it was written (no blanks, digits or escapes more)",
    "the files of tensors hold tensors alone: no metadata, and a header as the safetensors library writes it",
    "the tensors outside of the split layers have names, shapes and dtypes of the model that config.json describes, "
    "the split layers hold their codes and scales (or dense weights) alone, the bits that fill up their rows are zero, "
    "and no value is NaN",
    "the tensors have the hashes base_sha256 and rest_sha256",
    "no file equals a file of a removed stream",
    "no floating-point tensor holds 16 values of a removed stream in a row, along its rows or its columns, zeros left "
    "out; as they are, negated, scaled by a power of two, or rounded to bf16 or fp16 (runs in which most values are "
    "the same are not counted)",
    "no file holds 31 bytes of the values of a removed stream in a row; files that hold no tensors do not hold them in "
    "hexadecimal, in base64 or as a list of bytes in decimal either, nor 16 values in a row as decimal numbers",
)
"""What ``detach`` checks before it writes a certificate."""

_NOT_CHECKED = (
    "words and numbers of libortho.json (the reports of the split layers), of the manifests of kept streams, and of "
    "this certificate (the figures of an audit), beyond the same search",
    "values that were encoded in another way: summed over several tensors, permuted, scattered one by one, shorter "
    "runs, quantised, scaled by another factor, in the low bits of other values, in integer codes, in the order of "
    "names, compressed, encrypted, or in another text form",
    "times, modes, and extended attributes of files",
    "that the base has forgotten: an audit measures that, within what it tried",
    "that the base was not prepared before the streams were split from it",
    "that the source directory, other copies, backups, and a hub repository with its history are gone",
    f"{', '.join(LATER)} and {HUB_CACHE}/, which may be added later",
    "who wrote this certificate (it is not signed), and that its author compared anything: `libortho verify` repeats "
    "all checks but those against the source and the removed streams, which it does not have",
)


def not_checked(files: Iterable[str]) -> tuple[str, ...]:
    """What a certificate of these files leaves open, in words."""
    texts = sorted(f for f in files if is_known(f) and not holds_tensors(f))
    return (
        f"what these files say and how they are called, beyond the search for bytes and numbers: {', '.join(texts)}",
        *_NOT_CHECKED,
    )


@dataclass(frozen=True)
class RemovedStream:
    """What a certificate says about a stream that was taken away; nothing of its values.

    Attributes:
        name: Name of the stream.
        manifest_sha256: Hash of its ``manifest.json``.
        weights_sha256: Hash of the file with its values.
        density: Entries that its columns or free entries cover / weights of all split layers.
        tail_density: Stored values of its tail / weights of all split layers.
        layers: Split layers that it touches.
        bytes: Size of its folder.
    """

    name: str
    manifest_sha256: str
    weights_sha256: str
    density: float
    tail_density: float
    layers: int
    bytes: int

    @classmethod
    def from_dict(cls, data: Any, where: Path) -> RemovedStream:
        """One entry of a certificate.

        Raises:
            CheckpointError: if it has other fields, or a value has another type or range.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(names):
            raise CheckpointError(f"{where}: 'removed' has other fields than {names}: {data!r:.80}; {DAMAGE}")
        found = Fields(data, where)
        return cls(
            name=checked_name(data["name"]),
            manifest_sha256=found.sha256("manifest_sha256"),
            weights_sha256=found.sha256("weights_sha256"),
            density=found.number("density", 0.0, _DENSEST),
            tail_density=found.number("tail_density", 0.0, _DENSEST),
            layers=found.count("layers"),
            bytes=found.count("bytes"),
        )


@dataclass(frozen=True)
class Certificate:
    """What ``detach`` did, and what it found.

    Attributes:
        libortho: Version of this library.
        when: Time in UTC, ISO 8601.
        base_sha256: Hash of the integers and scales (or dense weights) of the split layers.
        rest_sha256: Hash of all other tensors.
        removed: The streams that are gone.
        kept: Names of the streams that are still there.
        files: File to its SHA-256, for everything in the directory but the certificate.
        compared: Tensors, rows and columns that were searched for values of the removed streams.
        audit: Verdicts and figures of an audit of this model, and ``base_checked``: its report names this very base
            (reports of earlier versions name none); None if none was given.
        checked: What was checked before it was written, in words.
        not_checked: What nobody checked, in words.
    """

    libortho: str
    when: str
    base_sha256: str
    rest_sha256: str
    removed: tuple[RemovedStream, ...]
    kept: tuple[str, ...]
    files: dict[str, str]
    compared: int
    audit: dict[str, Any] | None
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        data = {"schema": SCHEMA, **asdict(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """A certificate from its file.

        Raises:
            CheckpointError: if it is missing, malformed, or of an earlier version.
        """
        data = read_written_json(path)
        if data.get("schema") == _EARLIER:
            raise CheckpointError(
                f"{path} is of an earlier version ({_EARLIER}), which checked less; detach the streams again from the "
                "source for a new one"
            )
        if data.get("schema") != SCHEMA:
            raise CheckpointError(f"{path}: schema is {data.get('schema')!r:.60}, expected {SCHEMA!r}")
        told = Fields.of(data, path, ("schema", *(f.name for f in fields(cls))))
        files = Fields(told.value("files", dict), path)
        for name in files.data:
            _check_file(name, path)
        if data["audit"] is not None:
            check_figures(data["audit"], path, optional=("base_checked",))
        found = cls(
            libortho=told.text("libortho", VERSION_TEXT),
            when=_time(told),
            base_sha256=told.sha256("base_sha256"),
            rest_sha256=told.sha256("rest_sha256"),
            removed=tuple(RemovedStream.from_dict(r, path) for r in told.value("removed", list)),
            kept=tuple(checked_name(k) for k in told.value("kept", list)),
            files={name: files.sha256(name) for name in files.data},
            compared=told.count("compared"),
            audit=data["audit"],
            checked=CHECKED,
            not_checked=not_checked(files.data),
        )
        names = [*(r.name for r in found.removed), *found.kept]
        if not found.removed or len(set(names)) < len(names):
            raise CheckpointError(
                f"{path}: 'removed' and 'kept' name no stream, or one twice: {names!r:.200}; {DAMAGE}"
            )
        for key, words in (("checked", found.checked), ("not_checked", found.not_checked)):
            if data[key] != list(words):
                raise CheckpointError(
                    f"{path}: {key!r} says something else than this version of libortho checks; detach the streams "
                    "again from the source for a new certificate"
                )
        return found

    def beside(self, present: Collection[str]) -> Certificate:
        """The same, with what is in the directory and not covered named in ``not_checked``."""
        if not present:
            return self
        also = f"in the directory, and not covered: {', '.join(sorted(present))}"
        return replace(self, not_checked=(*self.not_checked, also))


def _check_file(name: str, path: Path) -> None:
    """Refuse a name that no file of a detached checkpoint has."""
    parts = name.split("/")
    of_stream = len(parts) == 3 and parts[0] == STREAMS and parts[2] in STREAM_FILES
    if of_stream:
        checked_name(parts[1])
    elif name != BASE_MANIFEST and not is_known(name):
        raise CheckpointError(f"{path} names the file {name!r:.80}, which no checkpoint has; {DAMAGE}")


def _time(told: Fields) -> str:
    when = told.text("when", _WHEN)
    try:
        datetime.fromisoformat(when)
    except ValueError as error:
        raise CheckpointError(f"{told.where}: 'when' is {when}, which is no time: {error}; {DAMAGE}") from error
    return when
