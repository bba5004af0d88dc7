"""Streams that come into the served directory, and go, while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path

from torch import nn

from libortho.checkpoint import is_checkpoint
from libortho.checkpoint.files import STREAMS, stream_folders
from libortho.checkpoint.live import add_stream, remove_stream
from libortho.checkpoint.stream_files import MANIFEST
from libortho.core.errors import LibOrthoError
from libortho.core.surgery import stream_names
from libortho.serving.local import LocalEngine

logger = logging.getLogger(__name__)

SECONDS = 1.0
"""From one look at the directory to the next."""

Seen = dict[str, tuple[int, int]]


async def watch(directory: Path, engine: LocalEngine) -> None:
    """Follow the stream folders of a checkpoint until cancelled: a folder that is gone takes its stream out of memory.

    A folder that cannot be read is told in the log, and looked at again when it changes.
    """
    if not is_checkpoint(str(directory)):
        return
    seen = _look(directory)
    while True:
        await asyncio.sleep(SECONDS)
        try:
            now = await asyncio.to_thread(_look, directory)
            changed = {n for n in now.keys() | seen.keys() if now.get(n) != seen.get(n)}
            seen = now
            if changed:
                await engine.change(partial(follow, directory=directory, changed=changed, there=set(now)))
        except LibOrthoError as error:
            logger.error("streams were not changed: %s", error)


def follow(model: nn.Module, directory: Path, changed: Collection[str], there: Collection[str]) -> None:
    """Take streams out whose folders have changed, and those in that are there.

    Raises:
        LibOrthoError: if one cannot be read; it stays out, and others are taken in all the same.
    """
    failed: list[LibOrthoError] = []
    for name in sorted(changed):
        if name in stream_names(model):
            remove_stream(model, name)
            logger.info("stream %s: taken out", name)
        if name in there:
            try:
                add_stream(model, directory, name)
                logger.info("stream %s: taken in", name)
            except LibOrthoError as error:
                failed.append(error)
    if failed:
        raise failed[0]


def _look(directory: Path) -> Seen:
    """When the manifest of each stream was written, and its size."""
    found: Seen = {}
    for name in stream_folders(directory):
        try:
            stat = (directory / STREAMS / name / MANIFEST).stat()
        except OSError:  # not whole yet, or no more
            continue
        found[name] = (stat.st_mtime_ns, stat.st_ino)
    return found
