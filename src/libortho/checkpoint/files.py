"""Which files belong to a checkpoint, which may lie beside them, and what else is there.

transformers, tokenizers and PEFT read any file of a known name in a directory, whoever put it there. So the files of a
checkpoint have known names, ``libortho.json`` lists them, and everything else is refused, but for a few names that no
loader reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from libortho.core.errors import CheckpointError

STREAMS = "ortho"
CERTIFICATE = "certificate.json"
README = "README.md"
HUB_CACHE = ".cache/huggingface"
LATER = (README, ".gitattributes")
"""Files that may appear after a certificate: no loader reads them, and no certificate covers them."""

_KNOWN = re.compile(
    r"config\.json|generation_config\.json|model(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|additional_chat_templates/[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\.jinja"
    r"|(vocab|entity_vocab|target_vocab|vocab-src|vocab-tgt|word_shape|word_pronunciation|byte_maps|emoji|normalizer"
    r"|tekken)\.json"
    r"|(vocab|merges|dict)\.txt|bpe\.codes|prophetnet\.tokenizer"
    r"|(tokenizer|spiece|spm|spm_char|source|target|sentencepiece|sentencepiece\.bpe|vocab)\.(model|spm)"
)
"""What ``save_pretrained`` of models and tokenizers writes."""
_BESIDE = re.compile(
    r"certificate\.json|audit[A-Za-z0-9_.-]*\.json|\.git(attributes|ignore)?"
    r"|LICEN[CS]E[A-Za-z0-9_.-]*|[^/]+\.(md|html|png|svg|jpe?g|jsonl)"
)
"""What people may put beside them: no loader reads a file of this name."""
_UNFINISHED = re.compile(r"\.[A-Za-z0-9_-]+\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Unlisted:
    """Something in a directory that its manifest does not list as a file.

    Attributes:
        name: Path relative to the directory.
        kind: What it is, in words: "file", "folder", "link to a folder", or "pipe, device or dangling link".
    """

    name: str
    kind: str


def is_known(name: str) -> bool:
    """True for the name of a file that a checkpoint can have outside its streams."""
    return _KNOWN.fullmatch(name) is not None


def unlisted(root: Path, files: Collection[str], *, unread: Collection[str] = ()) -> Iterator[Unlisted]:
    """What is in a directory besides the listed files; no link is followed to a folder.

    Args:
        root: The directory.
        files: Relative paths of its files. A listed name that is no file, or a link to no file, is a stranger too.
        unread: Folders that are not looked into.

    Raises:
        CheckpointError: if a folder cannot be read.
    """
    folders = {"/".join(f.split("/")[:i]) for f in (*files, *unread) for i in range(1, f.count("/") + 1)}
    waiting = [""]
    while waiting:
        place = waiting.pop()
        try:
            entries = sorted(os.scandir(root / place), key=lambda e: e.name)
        except OSError as error:
            raise CheckpointError(f"cannot read the folder {root / place}: {error}") from error
        for entry in entries:
            name = f"{place}/{entry.name}" if place else entry.name
            kind = _kind(entry)
            if kind == "folder" and name in unread:
                continue
            if kind == "folder" and name in folders:
                waiting.append(name)
            elif kind != "file" or name not in files:
                yield Unlisted(name, kind)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "link to a folder" if entry.is_symlink() else "folder"
    except OSError:  # a loop of links
        pass
    return "pipe, device or dangling link"


def check_directory(root: Path, files: Collection[str], manifest: str) -> None:
    """Refuse a checkpoint directory in which a loader could find something that ``save`` did not write.

    Args:
        root: The directory; the folder of its streams is not looked into.
        files: What ``save`` wrote outside of that folder.
        manifest: Name of the file that lists them, for the message.

    Raises:
        CheckpointError: if there is a file that is neither listed nor of a name that no loader reads, a folder without
            a listed file, a link to a folder, a pipe or a device.
    """
    for found in unlisted(root, files, unread=(STREAMS, ".git", HUB_CACHE)):
        if found.kind != "file" or not _BESIDE.fullmatch(found.name):
            raise CheckpointError(
                f"{root} holds {found.name!r:.120}, a {found.kind} that {manifest} does not list; a loader could read "
                "it. Delete it or move it elsewhere (README.md and other *.md, LICENSE, audit*.json, *.jsonl, *.html "
                "and pictures may stay)"
            )


def check_stream_folder(folder: Path, files: Collection[str]) -> None:
    """Raise CheckpointError if the folder of a stream holds more than its files, ``*.md`` and ``.gitattributes``."""
    for found in unlisted(folder, files):
        if found.kind != "file" or not re.fullmatch(r"[^/]+\.md|\.gitattributes", found.name):
            raise CheckpointError(
                f"{folder} holds {found.name!r:.120}, a {found.kind} that is no part of the stream; a loader could "
                "read it. Delete it or move it elsewhere"
            )


def stream_folders(root: Path) -> list[str]:
    """Names of the folders of streams, sorted; unfinished folders of a killed process are left out.

    Raises:
        CheckpointError: if the folder of streams is a link, or holds anything but folders and ``*.md``.
    """
    place = root / STREAMS
    if not os.path.lexists(place):
        return []
    if place.is_symlink() or not place.is_dir():
        raise CheckpointError(f"{place} is no folder; expected one with a folder for each stream")
    names = []
    for found in unlisted(place, ()):
        if found.kind == "folder" and not _UNFINISHED.fullmatch(found.name):
            names.append(found.name)
        elif found.kind != "folder" and (found.kind != "file" or not found.name.endswith(".md")):
            raise CheckpointError(
                f"{place} holds {found.name!r:.120}, a {found.kind}; expected a folder for each stream. Delete it or "
                "move it elsewhere"
            )
    return names
