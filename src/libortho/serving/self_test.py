"""Before the first request, an engine shows that rows of different alphas do not touch.

    one after the other    A, B, A again             a cache that forgets the alpha gives the second A what B left
    side by side           A A A, B B B, and A B A   a batch that forgets it gives all rows one alpha

Batches of one shape are compared, so that what a difference can come from is the alpha of other rows. The prompt is
longer than the blocks in which caches share prefixes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence

from libortho.serving.engine import Engine, EngineError, Piece, Row, Sampling
from libortho.serving.prompts import Prompts
from libortho.text.corpus import shipped_text

logger = logging.getLogger(__name__)

PROMPT_TOKENS, BESIDE_TOKENS, ANSWER_TOKENS, TOLD = 600, 64, 8, 5
"""Tokens of the prompt one after the other, and side by side; tokens of an answer, and likeliest ones that are told."""
TOLERANCE = 1e-3
"""Nats by which two answers to the same may differ."""

Answer = list[dict[str, float]]
"""Log-probabilities of the likeliest tokens in each place, and of the one that was said."""


async def self_test(engine: Engine, prompts: Prompts) -> None:
    """Ask the same under different alphas.

    Raises:
        EngineError: if the answer to one alpha hangs on another's.
    """
    tokens = [i for text in shipped_text()[:20] for i in prompts.tokens(text)][:PROMPT_TOKENS]
    if engine.context is not None:
        tokens = tokens[: engine.context - ANSWER_TOKENS]
    off = dict.fromkeys(engine.streams, 0.0)
    for stream in engine.streams:
        on = {**off, stream: 1.0}
        a, b, again = [(await _answers(engine, tokens, [x]))[0] for x in (off, on, off)]
        _check(a, again, f"after one with {stream} on")
        all_off, all_on, mixed = [
            await _answers(engine, tokens[:BESIDE_TOKENS], rows) for rows in ([off] * 3, [on] * 3, [off, on, off])
        ]
        for place in (0, 2):
            _check(all_off[place], mixed[place], f"beside one with {stream} on")
        _check(all_on[1], mixed[1], f"with {stream} on, beside rows without it,")
        if difference(a, b) <= 10 * TOLERANCE:
            logger.warning("the stream %r hardly changes the answer to the self-test, which shows little of it", stream)


def difference(first: Answer, second: Answer) -> float:
    """The largest difference of a log-probability, up to the first place where another token was said.

    A token that is among the likeliest in one answer alone counts with its distance from the least likely of the other.
    """
    largest = 0.0
    for a, b in zip(first, second, strict=False):
        for x, y in ((a, b), (b, a)):
            largest = max([largest, *(abs(p - y.get(t, min(y.values()))) for t, p in x.items())])
        if next(iter(a)) != next(iter(b)):
            break
    return largest


def _check(expected: Answer, found: Answer, where: str) -> None:
    if difference(expected, found) > TOLERANCE or not found:
        raise EngineError(
            f"the engine gives another answer to a row {where} than alone: it lets alphas touch, and is not used"
        )


async def _answers(engine: Engine, prompt: list[int], alphas: Sequence[Mapping[str, float]]) -> list[Answer]:
    sampling = Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0, logprobs=TOLD)
    rows = engine.generate([Row(tuple(prompt), a, sampling) for a in alphas])
    return list(await asyncio.gather(*map(_read, rows)))


async def _read(row: AsyncIterator[Piece]) -> Answer:
    return [{t.token: t.logprob, **dict(t.top)} async for piece in row for t in piece.logprobs]
