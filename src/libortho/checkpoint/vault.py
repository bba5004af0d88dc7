"""Lock a stream away: one `age <https://age-encryption.org/v1>`_ file that the ``age`` tool opens as well.

    encrypt   stream folder -> tar in memory (its own files only, no names, times or owners of this machine) -> age
    decrypt   age -> tar in memory, every member checked -> a folder beside the destination -> one rename

The plain values are written to disk by ``decrypt`` alone. Needs ``pyrage`` (extra ``vault``).
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from libortho.checkpoint.directories import check_new_place, publish, staging
from libortho.checkpoint.json_files import Fields, file_sha256, read_json
from libortho.checkpoint.manifest import check_version
from libortho.checkpoint.stream_files import MANIFEST, STREAM_FILES, checked_name, stream_file_names
from libortho.core import keys
from libortho.core.errors import CheckpointError
from libortho.core.extras import require
from libortho.core.files import write_atomically

MAX_BYTES = 2**32
"""Largest plaintext and largest file, in bytes; both are held in memory."""
_MAX_JSON = 2**26
_MAGIC = b"age-encryption.org/v1"


def encrypt(
    stream: str | Path,
    out: str | Path,
    *,
    recipients: Iterable[str] | None = None,
    passphrase: str | None = None,
) -> Path:
    """Encrypt the folder of a stream into one age file. The folder stays; delete it if only the file shall remain.

    Args:
        stream: Folder of a stream, such as ``out/ortho/hr``.
        out: File to write; it must not exist.
        recipients: Public keys: ``age1...``, ``ssh-ed25519 ...`` or ``ssh-rsa ...``. Each owner of one can decrypt.
        passphrase: Instead of recipients.

    Returns:
        ``out``.

    Raises:
        CheckpointError: if the folder is no complete stream, a recipient is not a key, or ``out`` exists.
        OSError: if the disk fails; nothing is left at ``out`` then.
    """
    pyrage = _pyrage()
    keys.check_no_secret(stream=stream, out=out)
    target = check_new_place(out)
    chosen = _keys(recipients, passphrase, "recipients")
    content = _pack(Path(stream))
    try:
        if passphrase is not None:
            locked = pyrage.passphrase.encrypt(content, passphrase)
        else:
            locked = pyrage.encrypt(content, [keys.recipient(pyrage, r) for r in chosen])
    except pyrage.EncryptError as error:
        raise CheckpointError(f"cannot encrypt {stream}: {error}") from error
    write_atomically(target, locked)
    return Path(out)


def decrypt(
    file: str | Path,
    out: str | Path,
    *,
    identities: Iterable[str | Path] | None = None,
    passphrase: str | None = None,
) -> Path:
    """Decrypt an age file into the folder of a stream, which ``attach`` takes.

    Args:
        file: What :func:`encrypt` wrote.
        out: Folder to write; it must not exist. Its files are readable by their owner alone.
        identities: Secret keys (``AGE-SECRET-KEY-1...``), or paths of files that hold age or SSH secret keys. No
            message repeats a key, in whatever writing it is given.
        passphrase: Instead of identities.

    Returns:
        ``out``.

    Raises:
        CheckpointError: if the key or passphrase does not fit, the file is damaged or no age file, or it holds anything
            but a stream. Nothing is left at ``out`` then.
        OSError: if the disk fails; nothing is left at ``out`` then.
    """
    pyrage = _pyrage()
    keys.check_no_secret(file=file, out=out)
    source, target = Path(file), check_new_place(out)
    chosen = _keys(identities, passphrase, "identities")
    locked = _read_locked(source)
    try:
        if passphrase is not None:
            content = pyrage.passphrase.decrypt(locked, passphrase)
        else:
            content = pyrage.decrypt(locked, [k for given in chosen for k in keys.identities(pyrage, given)])
    except pyrage.DecryptError as error:
        kind = "passphrase" if passphrase is not None else "identity"
        raise CheckpointError(
            f"cannot decrypt {source}: {error}; the {kind} is another one than it was encrypted for, or the file is "
            "damaged"
        ) from error
    files = _unpack(content, source)
    with staging(target) as staged:
        staged.chmod(0o700)
        for name, data in files.items():
            handle = os.open(staged / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as plain:
                plain.write(data)
        _check_stream(staged)
        publish(staged, target)
    return Path(out)


def _pyrage() -> Any:
    require("vault", "encryption", CheckpointError)
    import pyrage

    return pyrage


def _keys(given: Iterable[Any] | None, passphrase: str | None, kind: str) -> list[Any]:
    """What to lock or open with; empty for a passphrase."""
    if isinstance(given, str | bytes | Path):
        raise CheckpointError(f"{kind} is one {'path' if isinstance(given, Path) else 'string'}; expected a list")
    if (given is None) == (passphrase is None):
        raise CheckpointError(f"give either {kind} or a passphrase")
    if given is None:
        if not isinstance(passphrase, str):
            raise CheckpointError(f"the passphrase is of type {type(passphrase).__name__}; expected text")
        if not passphrase:
            raise CheckpointError("the passphrase is empty")
        return []
    found = list(given)
    if not found:
        raise CheckpointError(f"{kind} is empty; expected at least one key")
    return found


def _read_locked(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_BYTES} bytes; no stream is")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not content.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not an age file; expected one that libortho encrypt wrote")
    return content


# -- the folder as a tar -----------------------------------------------------------------------------------------------


def _check_stream(folder: Path) -> list[str]:
    """The files of a stream folder, after a check of what can be checked without its base."""
    manifest = Fields(read_json(folder / MANIFEST), folder / MANIFEST)
    check_version(manifest.data, manifest.where)
    checked_name(manifest.value("stream", str))
    manifest.sha256("base_sha256")
    names = stream_file_names(manifest.value("needs_libortho", bool))
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise CheckpointError(f"{folder / missing[0]} is missing; expected the folder of a stream")
    weights = folder / names[1]
    if file_sha256(weights) != manifest.sha256("weights_sha256"):
        raise CheckpointError(f"{weights} does not have the hash that its manifest names; it is damaged")
    return sorted(names)


def _pack(folder: Path) -> bytes:
    """The files of a stream as a tar whose bytes depend on their content alone."""
    names = _check_stream(folder)
    if sum((folder / n).stat().st_size for n in names) > MAX_BYTES // 2:
        raise CheckpointError(f"{folder} is larger than {MAX_BYTES // 2} bytes; encrypt it with another tool")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            data = (folder / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _unpack(content: bytes, source: Path) -> dict[str, bytes]:
    """The members of the tar; anything but the plain files of a stream is refused."""
    known = {name: _MAX_JSON if name.endswith(".json") else MAX_BYTES for name in STREAM_FILES}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if not member.isreg() or member.name not in known or member.name in files:
                    raise CheckpointError(
                        f"{source} holds {member.name!r:.80}; expected the plain files of one stream and nothing else"
                    )
                if member.size > min(known[member.name], len(content)):
                    raise CheckpointError(f"{source}: {member.name} claims {member.size} bytes; the file is damaged")
                file = tar.extractfile(member)
                files[member.name] = b"" if file is None else file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{source} was decrypted, but holds no tar of a stream: {error}") from error
    return files
