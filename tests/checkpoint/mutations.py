"""Seeded changes of the bytes of a file, and a limit to how long a reader may take over them."""

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**12, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "a\x00b", "\ud800", "é" * 300, [], [[]], {}, {"": 0}, [1, "a", None],
    {"a": {"b": []}},
]  # fmt: skip


def spots(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    return [spot for k in keys for spot in [(data, k), *spots(data[k])]]


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    data = json.loads(content)
    container, key = rng.choice(spots(data))
    how = rng.randrange(5)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif how == 2 and isinstance(container[key], int | float):
        container[key] = container[key] * rng.choice([-1, 2, 1000]) + rng.choice([0, 1, -1])
    else:
        container[key] = rng.choice(HOSTILE)
    return json.dumps(data).encode()


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        # headers are short and tell most
        position = rng.randrange(min(len(changed), 64) if rng.random() < 0.3 else len(changed))
        changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return rng.choice([content[:start], content[start:], content[:start] + content[start + 1 :], content + b"\0" * 8])


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not decided after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
