"""A disk that is full at any call that writes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import contents, write

from libortho.checkpoint import stream_files


class Disk:
    """Counts the calls that write, and fails one of them as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.fail_at = 0, -1
        places = [
            (os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "replace"), (Path, "write_text"), (shutil, "copyfile"),
            (stream_files, "save_file"),
        ]  # fmt: skip
        for where, name in places:
            monkeypatch.setattr(where, name, self._counted(getattr(where, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **named)

        return counted


def fails_cleanly_everywhere(act: Callable[[], Any], place: Path, disk: Disk, step: int = 1) -> int:
    """Run ``act`` with the disk full at each call, or each ``step``-th, until none is left; how often it failed."""
    before = contents(place)
    failures = position = 0
    while True:
        disk.calls, disk.fail_at, failed = 0, position, None
        try:
            act()
        except OSError as error:
            failed = error
        if failed is None:
            if disk.calls <= position:
                disk.fail_at = -1
                return failures
            restore(place, before)  # a call whose failure does no harm, such as making a folder that is there
        else:
            failures += 1
            assert failed.errno == errno.ENOSPC
            assert contents(place) == before, position
            assert not [p for p in place.rglob("*") if p.name.startswith(".")]
        position += step


def restore(place: Path, before: dict[str, bytes]) -> None:
    shutil.rmtree(place)
    write(place, before)
