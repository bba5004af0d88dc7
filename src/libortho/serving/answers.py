"""Pieces of the rows of one request as OpenAI's objects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from libortho.serving.engine import Piece, TokenLogprob


@dataclass(frozen=True)
class Form:
    """How an answer is written.

    Attributes:
        id: Of the answer.
        created: Unix time.
        model: As it was asked for.
        chat: A chat, or a completion.
        usage: Whether a stream ends with a count of tokens.
        logprobs: Whether tokens are told.
    """

    id: str
    created: int
    model: str
    chat: bool
    usage: bool
    logprobs: bool

    def _object(self, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        kind += ".chunk" if streamed and self.chat else ""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        found: dict[str, Any] = {"index": index}
        if self.chat:
            found["delta"] = ({"role": "assistant"} if first else {}) | ({"content": piece.text} if piece.text else {})
        else:
            found["text"] = piece.text
        found |= {"logprobs": self._logprobs(piece.logprobs), "finish_reason": piece.finish}
        return {**self._object(True), "choices": [found], **({"usage": None} if self.usage else {})}

    def whole(self, rows: Sequence[Collected], prompt_tokens: int) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for index, row in enumerate(rows):
            text: dict[str, Any] = {"text": row.text}
            if self.chat:
                text = {"message": {"role": "assistant", "content": row.text, "refusal": None}}
            told = self._logprobs(row.logprobs)
            choices.append({"index": index, **text, "logprobs": told, "finish_reason": row.finish})
        return {**self._object(False), "choices": choices, "usage": usage(prompt_tokens, sum(r.tokens for r in rows))}

    def last(self, prompt_tokens: int, said: int) -> dict[str, Any]:
        """The event that counts tokens."""
        return {**self._object(True), "choices": [], "usage": usage(prompt_tokens, said)}

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [{**_entry(t.token, t.logprob), "top_logprobs": _top(t)} for t in told], "refusal": None}
        return {
            "tokens": [t.token for t in told],
            "token_logprobs": [t.logprob for t in told],
            "top_logprobs": [dict(t.top) for t in told],
            "text_offset": [],
        }


@dataclass
class Collected:
    """What was said of one answer so far."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.finish = piece.finish


def usage(prompt: int, said: int) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


async def merged(rows: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all rows as they come, with the place of their row. Closed, it closes all of them."""
    found: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def read(place: int, row: AsyncIterator[Piece]) -> None:
        try:
            async with aclosing(row):  # type: ignore[type-var]
                async for piece in row:
                    found.put_nowait((place, piece))
        except Exception as error:  # raised again below
            found.put_nowait((place, error))

    tasks = [asyncio.create_task(read(i, r)) for i, r in enumerate(rows)]
    try:
        left = len(rows)
        while left:
            place, piece = await found.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield place, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _top(told: TokenLogprob) -> list[dict[str, Any]]:
    return [_entry(t, p) for t, p in told.top]
