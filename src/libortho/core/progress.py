"""How work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def tell(progress: Progress | None, phase: str, done: int, total: int) -> None:
    """Call ``progress``, if there is one."""
    if progress is not None:
        progress(phase, done, total)
