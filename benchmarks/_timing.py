"""Ratios of interleaved pairs: both sides see the same minute of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], Any]


def rounds(calls: Mapping[str, Call], count: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call in every round; each round runs all of them, in an order that is turned round by round."""
    names = list(calls)
    seconds: dict[str, list[float]] = {n: [] for n in names}
    for number in range(-warmup, count):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            calls[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], above: str, below: str) -> dict[str, float]:
    """Median of the per-round ratios, with their quartiles."""
    pairs = sorted(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
    low, _, high = statistics.quantiles(pairs, n=4)
    return {"median": statistics.median(pairs), "low": low, "high": high, "pairs": len(pairs)}


def shown(found: Mapping[str, float]) -> str:
    """``1.042 [1.031, 1.055]``: median and quartiles."""
    return f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
