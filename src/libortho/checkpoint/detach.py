"""Take streams away from a checkpoint, and prove it; put one back.

    detach   copies the base (and the streams that stay) file by file; no model is built
    proof    every copied file has the source's SHA-256, the tensors have the hashes of ``libortho.json``, and no
             tensor, row or column that was copied equals one of the removed streams
    attach   puts a stream folder into a checkpoint, if it was made for that base

The certificate is a record, not a signature: it says what was done, and whoever has the directory can check the hashes.
Whoever can write the directory can write another certificate; sign it with your own tools where that matters.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from libortho.checkpoint.checks import check_new_place, check_room
from libortho.checkpoint.format import (
    AGAIN,
    BASE_MANIFEST,
    STREAMS,
    BaseManifest,
    TensorFiles,
    field,
    file_sha256,
    read_json,
    sha256_field,
    write_json,
)
from libortho.checkpoint.info import StreamInfo, inspect
from libortho.checkpoint.stream_files import (
    ADAPTER_CONFIG,
    MANIFEST,
    StreamFile,
    StreamManifest,
    checked_name,
    read_stream,
    stream_names,
)
from libortho.checkpoint.writing import publish, staging
from libortho.errors import CheckpointError

CERTIFICATE = "certificate.json"
SCHEMA = "libortho-certificate/1"
_AUDIT_SCHEMA = "libortho-audit/1"
_WIDTH = 4  # bytes of a float32
_LATER = frozenset({CERTIFICATE, "README.md", ".gitattributes"})
"""Files that may appear after the certificate: no loader reads them."""


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


@dataclass(frozen=True)
class Certificate:
    """What ``detach`` did, and what it found.

    Attributes:
        libortho: Version of this library.
        when: Time in UTC, ISO 8601.
        base_sha256: Hash of the codes and scales (or dense weights) of the split layers.
        rest_sha256: Hash of all other tensors.
        removed: The streams that are gone.
        kept: Names of the streams that are still there.
        files: File to its SHA-256, for everything in the directory but the certificate.
        compared: Tensors, rows and columns that were compared with the values of the removed streams.
        audit: Verdicts and figures of an audit of this model, and ``base_checked``: its report names this very base
            (reports of earlier versions name none); None if none was given.
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

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        data = asdict(self)
        return {"schema": SCHEMA, **data, "removed": list(data["removed"]), "kept": list(self.kept)}

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """A certificate from its file.

        Raises:
            CheckpointError: if it is missing or malformed.
        """
        data = read_json(path)
        if data.get("schema") != SCHEMA:
            raise CheckpointError(f"{path}: schema is {data.get('schema')!r:.60}, expected {SCHEMA!r}")
        files = field(data, "files", dict, path)
        kept = field(data, "kept", list, path)
        removed = field(data, "removed", list, path)
        audit = None if data.get("audit") is None else field(data, "audit", dict, path)
        try:
            return cls(
                libortho=field(data, "libortho", str, path),
                when=field(data, "when", str, path),
                base_sha256=sha256_field(data, "base_sha256", path),
                rest_sha256=sha256_field(data, "rest_sha256", path),
                removed=tuple(RemovedStream(**r) for r in removed),
                kept=tuple(checked_name(k) for k in kept),
                files={name: sha256_field(files, name, path) for name in files},
                compared=field(data, "compared", int, path),
                audit=audit,
            )
        except TypeError as error:
            raise CheckpointError(f"{path}: 'removed' has other fields: {error}; {AGAIN}") from error


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
    that ``save`` wrote are copied; a README or other files beside them are not.

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
        CheckpointError: if the source is damaged, has not such a stream, the audit speaks of another model, ``out``
            exists or lies inside the source, or a value of a removed stream is found in what was written.
            Nothing is left at ``out`` then.
        OSError: if the disk fails; nothing is left at ``out`` then.
    """
    from libortho import __version__

    root, target = Path(os.path.realpath(directory)), check_new_place(out)
    if Path(os.path.realpath(target)).is_relative_to(root):
        raise CheckpointError(f"{target} lies inside {root}; choose a place outside the checkpoint")
    base = BaseManifest.read(root)
    check_room(target, sum((root / f).stat().st_size for f in base.files if (root / f).is_file()))
    base.check_files(root)
    removed = choose(root, streams)
    kept = [n for n in stream_names(root) if n not in removed]
    infos = {s.name: s for s in inspect(root).streams}
    figures = None if audit is None else _audit_figures(Path(audit), base, removed)
    gone = {name: read_stream(root, name, base) for name in removed}
    for name in kept:
        read_stream(root, name, base)
    names = [*base.files, BASE_MANIFEST, *(f for name in kept for f in files_of_stream(root, name, base))]
    with staging(target) as staged:
        files = {name: _copy(root / name, staged / name) for name in names}
        check_base(staged, base)
        compared = _check_absent(staged, files, gone, {n: infos[n] for n in removed}, root, base)
        result = Certificate(
            libortho=__version__,
            when=(when or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            base_sha256=base.base_sha256,
            rest_sha256=base.rest_sha256,
            removed=tuple(_removed(root, infos[name], base) for name in removed),
            kept=tuple(kept),
            files=files,
            compared=compared,
            audit=figures,
        )
        if certificate:
            write_json(staged / CERTIFICATE, result.to_dict())
        publish(staged, target)
    return result


def verify_certificate(directory: str | Path) -> Certificate:
    """Check a directory against the ``certificate.json`` in it.

    Returns:
        The certificate, if every file has its hash, the tensors have theirs, and nothing that a loader reads was added.

    Raises:
        CheckpointError: otherwise.
    """
    root = Path(directory)
    found = Certificate.read(root / CERTIFICATE)
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}
    present = {p for p in present if p not in _LATER and not p.startswith(".cache/huggingface/")}
    for name in sorted(present ^ set(found.files)):
        what = "is not named by" if name in present else "is missing, but named by"
        raise CheckpointError(f"{root / name} {what} {CERTIFICATE}; the certificate is for another state")
    for name, sha256 in found.files.items():
        if file_sha256(root / name) != sha256:
            raise CheckpointError(f"{root / name} was changed after {CERTIFICATE} was written")
    base = BaseManifest.read(root)
    if (base.base_sha256, base.rest_sha256) != (found.base_sha256, found.rest_sha256):
        raise CheckpointError(f"{CERTIFICATE} speaks of the base {found.base_sha256}, {root} holds {base.base_sha256}")
    check_base(root, base)
    names = stream_names(root)
    if tuple(names) != found.kept or set(names) & {r.name for r in found.removed}:
        raise CheckpointError(f"{root} holds the streams {names}, {CERTIFICATE} names {list(found.kept)}")
    return found


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
        CheckpointError: if the stream was made for another base, is damaged, or its name is taken or impossible.
    """
    root = Path(os.path.realpath(directory))
    base = BaseManifest.read(root)
    source = Path(stream)
    if source.is_file():
        if source.name != MANIFEST:
            raise CheckpointError(
                f"{source} is a file; expected the folder of a stream (if the file is encrypted, decrypt it first)"
            )
        source = source.parent
    manifest = read_json(source / MANIFEST)
    made_for = sha256_field(manifest, "base_sha256", source / MANIFEST)
    if made_for != base.base_sha256:
        raise CheckpointError(
            f"the stream in {source} was made for the base {made_for}, {root} holds {base.base_sha256}; attach it to "
            "its own base"
        )
    name = checked_name(field(manifest, "stream", str, source / MANIFEST) if name is None else name)
    if os.path.lexists(root / STREAMS / name):
        raise CheckpointError(f"{root} has a stream {name!r} already; give another name, or delete that folder first")
    with staging(root) as staged:
        folder = staged / STREAMS / name
        folder.mkdir(parents=True, mode=0o700)
        write_json(folder / MANIFEST, manifest | {"stream": name})
        kind = StreamManifest.read(staged, name, base)
        for file in [kind.weights_file] if kind.needs_libortho else [kind.weights_file, ADAPTER_CONFIG]:
            _copy(source / file, folder / file)
        read_stream(staged, name, base)
        (root / STREAMS).mkdir(exist_ok=True)
        publish(folder, root / STREAMS / name)
    return name


def files_of_stream(root: Path, name: str, base: BaseManifest) -> list[str]:
    """The files that make up a stream, relative to the checkpoint; what else lies in its folder is no part of it."""
    manifest = StreamManifest.read(root, name, base)
    files = [MANIFEST, manifest.weights_file, *([] if manifest.needs_libortho else [ADAPTER_CONFIG])]
    return [f"{STREAMS}/{name}/{file}" for file in files]


def choose(root: Path, streams: str | Iterable[str]) -> list[str]:
    """Names of the wanted streams, which must be there and at least one."""
    present = stream_names(root)
    if isinstance(streams, str):
        if streams != "all":
            raise CheckpointError(f"streams is {streams!r}; expected 'all', or a list such as [{streams!r}]")
        names = present
    else:
        names = list(dict.fromkeys(checked_name(s) for s in streams))
    missing = [n for n in names if n not in present]
    if missing or not names:
        what = f"no stream {missing[0]!r}" if missing else "no stream to detach"
        raise CheckpointError(f"{root} has {what}; it has {present}")
    return names


def _copy(source: Path, target: Path) -> str:
    """Copy one file; its hash, after both sides were read and found equal."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        raise CheckpointError(f"{source} is missing; expected a directory written by libortho.save")
    shutil.copyfile(source, target)
    shutil.copymode(source, target)
    before, after = file_sha256(source), file_sha256(target)
    if before != after:
        raise CheckpointError(f"{source} changed while it was copied; try again")
    return after


def check_base(root: Path, base: BaseManifest) -> None:
    """Recompute the hashes of a base that ``libortho.json`` names."""
    files = TensorFiles(root)
    hashed = base.scheme.hashed_names(base.shapes)
    ours = {n for layer in base.shapes for n in base.scheme.tensor_names(layer)}
    missing = [n for n in ours if n not in files]
    if missing:
        raise CheckpointError(f"the tensor {min(missing)} is missing from {root}; {AGAIN}")
    for names, wanted in ((hashed, base.base_sha256), (set(files.names()) - ours, base.rest_sha256)):
        if (found := files.sha256(names)) != wanted:
            raise CheckpointError(f"the base of {root} has the hash {found}, {BASE_MANIFEST} names {wanted}; {AGAIN}")


# -- the tensor diff ---------------------------------------------------------------------------------------------------


def _check_absent(
    staged: Path,
    files: Mapping[str, str],
    gone: Mapping[str, StreamFile],
    infos: Mapping[str, StreamInfo],
    root: Path,
    base: BaseManifest,
) -> int:
    """Search what was written for anything of the removed streams; the number of comparisons."""
    present = {p.relative_to(staged).as_posix() for p in staged.rglob("*") if not p.is_dir()}
    if present != set(files):
        raise CheckpointError(f"{min(present ^ set(files))} was not to be written")
    hashes = {
        file_sha256(root / f): n for n in infos for f in files_of_stream(root, n, base) if ADAPTER_CONFIG not in f
    }
    for file, sha256 in files.items():
        if sha256 in hashes:
            raise CheckpointError(f"{file} is a copy of a file of stream {hashes[sha256]!r}, which was to be removed")
    values = {key: name for name, stream in gone.items() for key in _values(stream)}
    lengths = {len(v) // _WIDTH for v in values}
    compared = 0
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        for key, tensor in _tensors(staged / file):
            for piece in _pieces(tensor, lengths):
                compared += 1
                if piece in values:
                    raise CheckpointError(
                        f"the tensor {key} of {file} holds values of stream {values[piece]!r}, which was to be removed"
                        "; remove the stream that shares them too, or ask how they came into the base"
                    )
    return compared


def _values(stream: StreamFile) -> Iterator[bytes]:
    """What carries the information of a stream, as bytes: its tensors, and each column and direction of them."""
    for part in stream.layers.values():
        tensors = [] if part.support is None else [part.support.values]
        if part.tail is not None:
            tensors += [part.tail.down, part.tail.up.T]
        for tensor in tensors:
            for piece in [tensor.flatten()] if tensor.dim() == 1 else [tensor.flatten(), tensor.T.flatten(), *tensor]:
                nonzero = piece[piece != 0]
                if len(nonzero) and bool((nonzero != nonzero[0]).any()):  # zeros and ones are everywhere
                    yield _bytes(piece)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            yield key, file.get_tensor(key)


def _pieces(tensor: Tensor, lengths: set[int]) -> Iterator[bytes]:
    """A tensor as bytes, whole, by rows and by columns, as far as the length is among ``lengths``."""
    if not tensor.is_floating_point():
        return  # packed codes are no values
    if tensor.numel() in lengths:
        yield _bytes(tensor)
    if tensor.dim() == 2:
        for matrix in (tensor, tensor.T):
            if matrix.shape[1] in lengths:
                for rows in matrix.split(1024):
                    yield from map(_bytes, rows.float())


def _bytes(tensor: Tensor) -> bytes:
    """Values in float32, so that the same numbers are found in another dtype; both zeros are one."""
    return (tensor.detach().float() + 0.0).contiguous().numpy().tobytes()


# -- the certificate ---------------------------------------------------------------------------------------------------


def _removed(root: Path, info: StreamInfo, base: BaseManifest) -> RemovedStream:
    return RemovedStream(
        name=info.name,
        manifest_sha256=file_sha256(root / STREAMS / info.name / MANIFEST),
        weights_sha256=StreamManifest.read(root, info.name, base).weights_sha256,
        density=info.density,
        tail_density=info.tail_density,
        layers=info.layers,
        bytes=info.bytes_on_disk,
    )


def read_audit(path: Path) -> dict[str, Any]:
    """An audit report, reduced to its verdicts and key figures: no record, prompt or completion.

    Raises:
        CheckpointError: if it is none.
    """
    data = read_json(path)
    if data.get("schema") != _AUDIT_SCHEMA:
        raise CheckpointError(f"{path}: schema is {data.get('schema')!r:.60}, expected {_AUDIT_SCHEMA!r}")
    try:
        off = next(s for s in data["subjects"] if s["key"] == "off")
        privacy = off["privacy"] or {"attacks": {}}
        utility = off["utility"] or {}
        return {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "libortho": data["libortho"],
            "profile": data["profile"],
            "seed": data["seed"],
            "model": {
                **{k: data["model"][k] for k in ("streams", "layers", "bits", "density")},
                "base_sha256": data["model"].get("base_sha256"),
            },
            "records": data["counts"]["forget"],
            "verdicts": [
                {
                    "key": v["key"],
                    "status": v["status"],
                    "checks": [{k: c[k] for k in ("name", "value", "target", "ok")} for c in v["checks"]],
                }
                for v in data["verdicts"]
            ],
            "memory": {k: _estimate(off["memory"][k]) for k in ("greedy_extraction", "sampled_extraction", "nll")},
            "membership_auc": {k: _estimate(a["auc"]) for k, a in privacy["attacks"].items()},
            "utility": {"perplexity": _estimate(utility.get("perplexity")), "kl": utility.get("kl")},
        }
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{path} is not a complete audit report: {error!r:.80}; run libortho audit again"
        ) from error


def _estimate(estimate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if estimate is None else {k: estimate[k] for k in ("value", "low", "high", "n")}


def _audit_figures(path: Path, base: BaseManifest, removed: list[str]) -> dict[str, Any]:
    """The figures of an audit of this base; ``base_checked``: its report names the base (earlier versions did not)."""
    figures = read_audit(path)
    model = figures["model"]
    found = (model["layers"], model["bits"])
    if found != (len(base.shapes), base.scheme.bits) or not set(removed) <= set(model["streams"]):
        raise CheckpointError(
            f"{path} is the audit of a model with {found[0]} split layers, bits {found[1]} and streams "
            f"{model['streams']}; this checkpoint has {len(base.shapes)}, {base.scheme.bits} and removes {removed}"
        )
    audited = model["base_sha256"]
    if audited is not None and audited != base.base_sha256:
        raise CheckpointError(
            f"{path} is the audit of a model with the base {audited}, this checkpoint has {base.base_sha256}; audit "
            "this one"
        )
    return {**figures, "base_checked": audited is not None}
