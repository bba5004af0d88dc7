"""Streams that come into the served directory, and go, while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import nn

from libortho.checkpoint.files import STREAMS
from libortho.checkpoint.live import add_stream, remove_stream
from libortho.checkpoint.stream_files import MANIFEST
from libortho.core.errors import LibOrthoError
from libortho.core.surgery import stream_names
from libortho.serving.local import LocalEngine

logger = logging.getLogger(__name__)

SECONDS = 1.0
"""From one look at the directory to the next."""

Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, size, time and inode of every file of a folder."""


class Watch:
    """Follows the stream folders of a checkpoint: a folder that is gone takes its stream out of memory.

    A folder that cannot be read is told in the log, and tried again when one of its files changes, or what lies beside
    it. Nothing that lies there keeps a stream whose folder is gone.

    Args:
        directory: The checkpoint.
        engine: What serves it.
    """

    def __init__(self, directory: Path, engine: LocalEngine) -> None:
        self._directory, self._engine = directory, engine
        self._held: dict[str, Stamp | None] | None = None
        self._failed: dict[str, Stamp] = {}
        self._beside: list[str] = []

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            there = await asyncio.to_thread(folders, self._directory)
            beside = sorted(p.name for p in (self._directory / STREAMS).glob("*"))
            if beside != self._beside:
                self._failed, self._beside = {}, beside
            if self._changed(there):
                try:
                    await self._engine.change(partial(self._follow, there=there))
                except LibOrthoError as error:
                    logger.error("streams were not changed: %s", error)
            await asyncio.sleep(SECONDS)

    def _changed(self, there: Mapping[str, Stamp]) -> bool:
        return self._held is None or {**self._held, **self._failed} != there

    def _follow(self, model: nn.Module, there: Mapping[str, Stamp]) -> None:
        """Take streams out whose folders have changed or gone, and those in that are there."""
        if self._held is None:  # a folder that went while the server started is gone, too
            self._held = {n: there.get(n) for n in stream_names(model)}
        self._failed = {n: s for n, s in self._failed.items() if there.get(n) == s}
        for name in [n for n, stamp in self._held.items() if stamp is None or there.get(n) != stamp]:
            remove_stream(model, name)
            del self._held[name]
            logger.info("stream %s: taken out", name)
        for name in sorted(there.keys() - self._held.keys() - self._failed.keys()):
            try:
                add_stream(model, self._directory, name)
                self._held[name] = there[name]
                logger.info("stream %s: taken in", name)
            except LibOrthoError as error:
                self._failed[name] = there[name]
                logger.error("stream %s: %s", name, error)


def folders(directory: Path) -> dict[str, Stamp]:
    """The folders of streams that have a manifest, with what their files look like."""
    found: dict[str, Stamp] = {}
    for manifest in (directory / STREAMS).glob(f"*/{MANIFEST}"):
        folder = manifest.parent
        if folder.is_symlink() or folder.name.startswith("."):
            continue
        try:
            files = [(p.relative_to(folder).as_posix(), p.stat()) for p in sorted(folder.rglob("*"))]
        except OSError:  # it changes at the moment
            continue
        found[folder.name] = tuple((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in files)
    return found
