"""One prompt under two alphas: both answers token by token, and how likely each token is on the other side.

side a   prompt --alpha a--> tokens --alpha b, forced--> the same tokens' log-probabilities on side b
side b   prompt --alpha b--> tokens --alpha a, forced--> ... on side a
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from libortho.serving.answers import merged
from libortho.serving.engine import Engine, Piece, Row, Sampling

Event = dict[str, Any]
SIDES = "ab"


def paired(rows: Sequence[Row]) -> tuple[Row, Row]:
    """The rows of both sides, drawn with the same random numbers."""
    first, second = rows
    seed = secrets.randbits(63) if first.sampling.seed is None else first.sampling.seed
    found = [replace(r, sampling=replace(r.sampling, seed=seed)) for r in (first, second)]
    return found[0], found[1]


async def contrast(
    engine: Engine, rows: tuple[Row, Row], pieces: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[Event]:
    """Events of both sides as they are known, then those that compare them, where the engine can.

    Args:
        engine: What answers.
        rows: Those of sides a and b; they tell log-probabilities.
        pieces: The answers to them, by side.

    Yields:
        ``side``, ``token``, ``text``, ``logprob`` for each token, and ``side``, ``text``, ``finish`` for the end of a
        side; ``side``, ``place``, ``other`` for each token, its log-probability under the other alpha; ``layers`` for
        each stream whose alpha differs, the largest share first.
    """
    said: tuple[list[int], list[int]] = ([], [])
    async with aclosing(pieces) as source:  # type: ignore[type-var]
        async for place, piece in source:
            said[place].extend(piece.ids)
            for found in _events(SIDES[place], piece):
                yield found
    if not engine.forces:
        return
    async with aclosing(_others(engine, rows, said)) as others:
        async for found in others:
            yield found
    yield {"layers": await _layers(engine, rows, said[1])}


def _events(side: str, piece: Piece) -> list[Event]:
    """A piece of a side. Its text comes with its last token."""
    found: list[Event] = [{"side": side, "token": t.token, "text": "", "logprob": t.logprob} for t in piece.logprobs]
    if found:
        found[-1]["text"] = piece.text
    if piece.finish is not None:
        found.append({"side": side, "text": "" if found else piece.text, "finish": piece.finish})
    return found


async def _others(
    engine: Engine, rows: tuple[Row, Row], said: tuple[list[int], list[int]]
) -> AsyncGenerator[Event, None]:
    """What was said on each side, said again under the alpha of the other."""
    sides = [i for i in (0, 1) if said[i]]
    again = [
        Row(rows[i].prompt, rows[1 - i].alpha, Sampling(len(said[i]), 0.0, logprobs=0, forced=tuple(said[i])))
        for i in sides
    ]
    places = [0] * len(sides)
    async with aclosing(merged(engine.generate(again))) as source:  # type: ignore[type-var]
        async for row, piece in source:
            for told in piece.logprobs:
                yield {"side": SIDES[sides[row]], "place": places[row], "other": told.logprob}
                places[row] += 1


async def _layers(engine: Engine, rows: tuple[Row, Row], said: Sequence[int]) -> dict[str, list[Event]]:
    """The layers of the streams that differ, over what was read and said on side b."""
    first, second = rows
    streams = sorted(n for n, a in second.alpha.items() if a != first.alpha[n])
    if not streams:
        return {}
    acts = await engine.acts([*second.prompt, *said], second.alpha)
    found = {}
    for name in streams:
        ordered = sorted(acts.get(name, {}).items(), key=lambda pair: -pair[1])
        found[name] = [{"layer": layer, "share": share} for layer, share in ordered]
    return found
