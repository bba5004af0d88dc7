"""How often a key may ask: a bucket that fills by the minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from libortho.serving.errors import ApiError
from libortho.serving.keys import Key


class Rates:
    """The buckets of all keys.

    Args:
        clock: Seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, key: Key) -> None:
        """Count a request.

        Raises:
            ApiError: 429 if the key has none left.
        """
        most, now = key.requests_per_minute, self._clock()
        if most is None:
            return
        left, since = self._left.get(key.id, (float(most), now))
        left = min(float(most), left + (now - since) * most / 60)
        if left < 1:
            self._left[key.id] = left, now
            wait = math.ceil((1 - left) * 60 / most)
            raise ApiError(429, "this key asks too often", code="rate_limit_exceeded", retry_after=wait)
        self._left[key.id] = left - 1, now
