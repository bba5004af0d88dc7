"""Take streams away from a checkpoint, and prove it; put one back.

detach   copies the base (and the streams that stay) file by file; no model is built
proof    every copied file has the source's SHA-256 and is one that libortho or transformers writes, the tensors are
         those of the model with the hashes of ``libortho.json``, and no run of values or bytes of a removed stream
         is in what was copied
attach   puts a stream folder into a checkpoint, if it was made for that base
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from safetensors import safe_open

from libortho.checkpoint.absence import Traces
from libortho.checkpoint.audit_figures import figures_of
from libortho.checkpoint.certificate import CHECKED, Certificate, RemovedStream, not_checked
from libortho.checkpoint.directories import check_new_place, check_room, publish, staging
from libortho.checkpoint.files import CERTIFICATE, HUB_CACHE, LATER, STREAMS, unlisted
from libortho.checkpoint.info import stream_info
from libortho.checkpoint.json_files import Fields, file_sha256, read_json, write_json
from libortho.checkpoint.manifest import BASE_MANIFEST, BaseManifest
from libortho.checkpoint.proof import check_contents
from libortho.checkpoint.stream_files import (
    ADAPTER_CONFIG,
    MANIFEST,
    StreamManifest,
    checked_name,
    choose_streams,
    read_stream,
    stream_names,
)
from libortho.core.errors import CheckpointError


def detach(
    directory: str | Path,
    out: str | Path,
    *,
    streams: str | Iterable[str] = "all",
    audit: str | Path | None = None,
    certificate: bool = True,
    when: datetime | None = None,
) -> Certificate:
    """Write a checkpoint without some of its streams, and prove that nothing of them is in it.

    The source is not changed: delete it, or the folders of its streams, if the streams must be gone. Only the files
    that ``save`` wrote are copied; a README beside them is not.

    Args:
        directory: What :func:`~libortho.save` wrote.
        out: Directory to write; it must not exist.
        streams: Streams to take away: ``"all"`` or a list of names.
        audit: JSON of an audit of this checkpoint, whose verdicts and figures the certificate repeats.
        certificate: Write ``certificate.json``.
        when: Time that the certificate states; None for now.

    Returns:
        The certificate.

    Raises:
        CheckpointError: if the source is damaged, has not such a stream, holds something that ``save`` did not write
            and a loader could read, or tensors, keys or files that no checkpoint has; if the audit speaks of another
            model, ``out`` exists or lies inside the source, or something of a removed stream is found in what was
            written. Nothing is left at ``out`` then.
        OSError: if the disk fails; nothing is left at ``out`` then.
    """
    from libortho.core.version import __version__

    root, target = Path(os.path.realpath(directory)), check_new_place(out)
    if Path(os.path.realpath(target)).is_relative_to(root):
        raise CheckpointError(f"{target} lies inside {root}; choose a place outside the checkpoint")
    base = BaseManifest.read(root)
    check_room(target, sum((root / f).stat().st_size for f in base.files if (root / f).is_file()))
    base.check_directory(root)
    base.check_files(root)
    removed = choose_streams(root, streams)
    manifests = {name: StreamManifest.read(root, name, base) for name in stream_names(root)}
    if not removed:
        raise CheckpointError(f"{root} has no stream to detach; it has {list(manifests)}")
    kept = [n for n in manifests if n not in removed]
    figures = None if audit is None else figures_of(Path(audit), base, removed)
    gone = {name: read_stream(root, name, base) for name in removed}
    for name in kept:
        read_stream(root, name, base)
    names = [*base.file_names, *(path for name in kept for path in manifests[name].paths)]
    check_contents(root, base, names)
    with staging(target) as staged:
        files = {name: _copy(root / name, staged / name) for name in names}
        check_contents(staged, base, names)
        traces = Traces(gone)
        _check_no_copy(files, {path: name for name in removed for path in manifests[name].paths}, root)
        compared = _check_absent(staged, files, traces)
        result = Certificate(
            libortho=__version__,
            when=(when or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            base_sha256=base.base_sha256,
            rest_sha256=base.rest_sha256,
            removed=tuple(_removed(root, manifests[name], base) for name in removed),
            kept=tuple(kept),
            files=files,
            compared=compared,
            audit=figures,
            checked=CHECKED,
            not_checked=not_checked(files),
        )
        if certificate:
            write_json(staged / CERTIFICATE, result.to_dict())
            _check_absent(staged, (CERTIFICATE,), traces)
        publish(staged, target)
    return result


def verify_certificate(directory: str | Path) -> Certificate:
    """Check a directory against the ``certificate.json`` in it.

    Every check of :func:`detach` is made again but those that need the source and the removed streams.

    Returns:
        The certificate, if the directory holds exactly its files, each with its hash and in its form. A ``README.md``,
        a ``.gitattributes`` and the hub's own ``.cache/huggingface`` may be there; they are named in ``not_checked``.

    Raises:
        CheckpointError: otherwise.
    """
    root = Path(directory)
    if (root / BASE_MANIFEST).is_file() and not (root / CERTIFICATE).exists():
        streams = stream_names(root)
        why = f"it holds the streams {streams}, so it was never detached, or" if streams else "it was detached"
        raise CheckpointError(
            f"{root} has no {CERTIFICATE}: {why} without one; libortho detach {root if streams else 'SOURCE'} --out "
            "DIR writes a base with its certificate, which libortho verify DIR checks"
        )
    found = Certificate.read(root / CERTIFICATE)
    beside = _beside(root, found)
    for name, sha256 in found.files.items():
        if file_sha256(root / name) != sha256:
            raise CheckpointError(f"{root / name} was changed after {CERTIFICATE} was written")
    base = BaseManifest.read(root)
    if (base.base_sha256, base.rest_sha256) != (found.base_sha256, found.rest_sha256):
        raise CheckpointError(f"{CERTIFICATE} speaks of the base {found.base_sha256}, {root} holds {base.base_sha256}")
    names = stream_names(root)
    if tuple(names) != found.kept:
        raise CheckpointError(f"{root} holds the streams {names}, {CERTIFICATE} names {list(found.kept)}")
    belong = {*base.file_names, *(path for n in names for path in StreamManifest.read(root, n, base).paths)}
    if belong != set(found.files):
        name = min(belong ^ set(found.files))
        raise CheckpointError(f"{BASE_MANIFEST} and {CERTIFICATE} of {root} disagree about the file {name}")
    base.check_files(root)
    check_contents(root, base, sorted(belong))
    for name in names:
        read_stream(root, name, base)
    return found.beside(beside)


def _beside(root: Path, certificate: Certificate) -> list[str]:
    """Names of what may lie beside the files of a certificate; refuses anything else."""
    beside = [HUB_CACHE + "/"] if (root / HUB_CACHE).is_dir() else []
    present = {*certificate.files, CERTIFICATE}
    for found in unlisted(root, present, unread=(HUB_CACHE,)):
        if found.kind != "file" or found.name not in LATER:
            inside = _first_file(root / found.name) if found.kind == "folder" else None
            place, kind = (root / found.name, found.kind) if inside is None else (inside, "file")
            raise CheckpointError(
                f"{str(place)!r}, a {kind}, is not named by {CERTIFICATE}; the certificate is for another state"
            )
        beside.append(found.name)
    for name in certificate.files:
        if not (root / name).is_file():
            raise CheckpointError(
                f"{root / name} is missing, but named by {CERTIFICATE}; the certificate is for another state"
            )
    return beside


def _first_file(folder: Path) -> Path | None:
    """A file inside a folder, to name in a message."""
    for place, _, names in os.walk(folder):
        if names:
            return Path(place, min(names))
    return None


def attach(directory: str | Path, stream: str | Path, *, name: str | None = None) -> str:
    """Put a stream into a checkpoint, in one rename.

    Args:
        directory: A checkpoint.
        stream: Folder of the stream, such as ``ortho/<name>`` of another copy or what ``decrypt`` wrote, or its
            ``manifest.json``.
        name: What it is called from now on; None keeps its name.

    Returns:
        The name.

    Raises:
        CheckpointError: if the stream was made for another base (its split layers or any other tensor), is damaged, or
            its name is taken or impossible, or if the checkpoint holds files that ``save`` did not write and a loader
            could read.
    """
    root = Path(os.path.realpath(directory))
    base = BaseManifest.read(root)
    base.check_directory(root)
    stream_names(root)
    source = Path(stream)
    if source.is_file():
        if source.name != MANIFEST:
            raise CheckpointError(
                f"{source} is a file; expected the folder of a stream (if the file is encrypted, decrypt it first)"
            )
        source = source.parent
    manifest = Fields(read_json(source / MANIFEST), source / MANIFEST)
    made_for = manifest.sha256("base_sha256")
    if made_for != base.base_sha256:
        raise CheckpointError(
            f"the stream in {source} was made for the base {made_for}, {root} holds {base.base_sha256}; attach it to "
            "its own base"
        )
    name = checked_name(manifest.value("stream", str) if name is None else name)
    if os.path.lexists(root / STREAMS / name):
        raise CheckpointError(f"{root} has a stream {name!r} already; give another name, or delete that folder first")
    with staging(root) as staged:
        folder = staged / STREAMS / name
        folder.mkdir(parents=True, mode=0o700)
        write_json(folder / MANIFEST, {**manifest.data, "stream": name})
        kind = StreamManifest.read(staged, name, base)
        for file in kind.files:
            if file != MANIFEST:
                _copy(source / file, folder / file)
        read_stream(staged, name, base)
        (root / STREAMS).mkdir(exist_ok=True)
        publish(folder, root / STREAMS / name)
    return name


def _copy(source: Path, target: Path) -> str:
    """Copy one file, read both sides, and return their common hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        raise CheckpointError(f"{source} is missing; expected a directory written by libortho.save")
    shutil.copyfile(source, target)
    shutil.copymode(source, target)
    before, after = file_sha256(source), file_sha256(target)
    if before != after:
        raise CheckpointError(f"{source} changed while it was copied; try again")
    return after


# -- absence -----------------------------------------------------------------------------------------------------------


def _check_no_copy(files: Mapping[str, str], gone: Mapping[str, str], root: Path) -> None:
    """Refuse a file that is, byte for byte, one of a removed stream; ``gone`` names the stream of each."""
    hashes = {file_sha256(root / f): name for f, name in gone.items() if not f.endswith(ADAPTER_CONFIG)}
    for file, sha256 in files.items():
        if sha256 in hashes:
            raise CheckpointError(f"{file} is a copy of a file of stream {hashes[sha256]!r}, which was to be removed")


def _check_absent(staged: Path, files: Iterable[str], traces: Traces) -> int:
    """Search the written files for the removed streams; return how many tensors, rows and columns were searched."""
    compared = 0
    for file in files:
        found = None
        if file.endswith(".safetensors"):
            with safe_open(staged / file, framework="pt") as tensors:
                for key in sorted(tensors.keys()):
                    tensor = tensors.get_tensor(key)
                    if found is None and tensor.is_floating_point():
                        compared += 1 + (sum(tensor.shape) if tensor.dim() == 2 else 0)
                        found = _finding(f"the tensor {key} of {file} holds values", traces.in_tensor(tensor))
        else:
            found = _finding(f"{file} holds values", traces.in_text((staged / file).read_bytes()))
        found = found or _finding(f"{file} holds bytes", traces.in_file(staged / file))
        if found is not None:
            raise CheckpointError(
                f"{found}, which was to be removed; remove the stream that shares them too, or ask how they came into "
                "the base"
            )
    return compared


def _finding(what: str, owner: str | None) -> str | None:
    return None if owner is None else f"{what} of stream {owner!r}"


def _removed(root: Path, manifest: StreamManifest, base: BaseManifest) -> RemovedStream:
    info = stream_info(root, manifest, base, (base.base_sha256, base.rest_sha256))
    return RemovedStream(
        name=info.name,
        manifest_sha256=file_sha256(root / STREAMS / info.name / MANIFEST),
        weights_sha256=manifest.weights_sha256,
        density=info.density,
        tail_density=info.tail_density,
        layers=info.layers,
        bytes=info.bytes_on_disk,
    )
