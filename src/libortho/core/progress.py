"""How work reports its progress, and how long its phases take."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def tell(progress: Progress | None, phase: str, done: int, total: int) -> None:
    """Call ``progress``, if there is one."""
    if progress is not None:
        progress(phase, done, total)


expected = logging.getLogger("libortho.expected")
"""Says, at the level INFO, how long a call is expected to take, as soon as that can be told."""


def in_words(seconds: float) -> str:
    """A time that is a guess: seconds up to two minutes, then minutes, then hours, rounded up."""
    if seconds <= 120:
        return f"{max(5, 5 * math.ceil(seconds / 5))} seconds"
    return f"{math.ceil(seconds / 60)} minutes" if seconds <= 7200 else f"{seconds / 3600:.1f} hours"


class Stopwatch:
    """Wall time of phases; what runs in a phase within another counts for the inner one alone.

    Attributes:
        seconds: Wall time by phase, in the order in which they end first.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for this phase."""
        began, outside, self._inside = time.monotonic(), self._inside, 0.0
        try:
            yield
        finally:
            took = time.monotonic() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inside
            self._inside = outside + took
