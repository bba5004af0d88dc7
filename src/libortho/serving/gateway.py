"""What the server does with a request: OpenAI's API, with rights to streams.

A request passes, in this order: headers, body, key, rate, fields, rights, audit line, engine. What the engine is given
is the object that was checked; the query string is not looked at.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from libortho.serving.answers import Collected, Form, event, merged
from libortho.serving.bodies import parsed, read_body
from libortho.serving.config import ServeConfig
from libortho.serving.contrast import contrast, paired
from libortho.serving.engine import Engine, EngineError, Piece, Row
from libortho.serving.errors import ApiError, invalid
from libortho.serving.keys import ANONYMOUS, NO_KEY, Key, KeyRing
from libortho.serving.prompts import Prompts, sampling_of
from libortho.serving.rates import Rates
from libortho.serving.records import AuditLog, Counts
from libortho.serving.rights import asked_alphas, granted
from libortho.serving.schemas import Asked, ChatRequest, CompletionRequest, ContrastRequest
from libortho.serving.self_test import self_test

Kind = TypeVar("Kind", bound=Asked)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Passed(Generic[Kind]):
    """A request that may be answered.

    Attributes:
        id: Of the request.
        began: When it came.
        asked: What it holds.
        rows: What the engine is to answer, by alpha, prompt and answer.
        read: Tokens of its prompts.
    """

    id: str
    began: float
    asked: Kind
    rows: list[Row]
    read: int


class Gateway:
    """What the routes do.

    Args:
        engine: What answers.
        prompts: Makes tokens of what people write.
        config: The settings.
        name: What the model is called.
    """

    def __init__(self, engine: Engine, prompts: Prompts, config: ServeConfig, name: str) -> None:
        self.engine, self.prompts, self.config, self.name = engine, prompts, config, name
        self.keys, self.rates = KeyRing(config.keys), Rates()
        self.audit, self.counts = AuditLog(config.audit_log), Counts()
        self.ready = False
        self.created = int(time.time())

    async def start(self) -> None:
        """Start the engine, and let it prove that it keeps alphas apart, unless that is done.

        Raises:
            EngineError: if it does not.
            TargetError: if the model cannot answer several rows at a time.
        """
        if self.ready:
            return
        await self.engine.start()
        await self_test(self.engine, self.prompts)
        self.ready = True

    async def close(self) -> None:
        """Stop taking requests, and let those that are being answered end."""
        self.ready = False
        await self.engine.close()
        self.audit.close()

    def key_of(self, request: Request) -> Key:
        """The key of a request.

        Raises:
            ApiError: 401 if it is unknown, or missing where one is required.
        """
        given = request.headers.getlist("authorization")
        if len(given) > 1:
            raise ApiError(400, "the header authorization comes twice")
        scheme, _, value = given[0].partition(" ") if given else ("", "", NO_KEY)
        if value.strip() == NO_KEY:
            if self.config.require_key:
                raise ApiError(401, "a key is required: Authorization: Bearer ...", code="invalid_api_key")
            return ANONYMOUS
        key = self.keys.find(value.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(401, "the key is not valid", code="invalid_api_key")
        return key

    async def passed(self, request: Request, kind: type[Kind]) -> Passed[Kind]:
        """What a request holds, once it may be answered.

        Raises:
            ApiError: if it may not.
        """
        began, number = time.monotonic(), secrets.token_hex(12)
        if not self.ready:
            raise ApiError(503, "the model is not ready", retry_after=5)
        body = await read_body(request, self.config.body_bytes, self.config.body_seconds)
        key = self.key_of(request)
        self.rates.take(key)
        asked = parsed(body, kind)
        del body
        lines: list[dict[str, Any]] = [{"id": number, "key": key.id, "asked": None}]
        try:
            wanted = {f: asked_alphas(asked.model, self.name, a, f) for f, a in asked.alphas.items()}
            lines = [{**lines[0], "asked": a} for a in wanted.values()]
            used = [granted(key, a, self.engine.streams, f) for f, a in wanted.items()]
            prompts = await asyncio.to_thread(self.prompts.read, asked)
            rows = [self._rows(asked, prompts, a) for a in used]
        except ApiError as error:
            for line in lines:
                self.audit.write({**line, "used": None, "status": error.status}, needed=False)
            raise
        count, most = sum(map(len, rows)), self.config.most_rows + self.config.most_waiting
        if count > most:
            raise invalid("n", f"the request has {count} answers; this server holds at most {most}")
        read = sum(map(len, prompts))
        for line, alpha, own in zip(lines, used, rows, strict=True):
            self._record({**line, "prompt_tokens": read}, alpha, prompts, len(own))
        return Passed(number, began, asked, [r for own in rows for r in own], read)

    def _rows(self, asked: Asked, prompts: list[list[int]], alpha: dict[str, float]) -> list[Row]:
        context, most = self.engine.context, self.config.most_tokens
        return [
            Row(tuple(p), alpha, sampling_of(asked, p, i, context, most)) for p in prompts for i in range(asked.answers)
        ]

    def _record(self, line: dict[str, Any], alpha: dict[str, float], prompts: list[list[int]], rows: int) -> None:
        """Write the audit line of one alpha under which a request is answered."""
        on = {n: a for n, a in alpha.items() if a}
        line |= {"used": on, "streams": {n: self.engine.streams[n] for n in on}}
        if self.config.log_prompts:
            line["prompts"] = [self.prompts.text(p) for p in prompts]
        self.audit.write({**line, "rows": rows, "status": 200}, needed=bool(on))

    async def answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Answer a chat or a completion."""
        passed = await self.passed(request, kind)
        asked, read, rows = passed.asked, passed.read, len(passed.rows)
        pieces = self._pieces(passed)
        chat = isinstance(asked, ChatRequest)
        form = Form(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{passed.id}",
            created=int(time.time()),
            model=asked.model,
            chat=chat,
            usage=asked.usage_wanted,
            logprobs=asked.told is not None,
        )
        if asked.stream:
            told = _told(_chunks(form, pieces, rows, read))
            return StreamingResponse(told, media_type="text/event-stream")
        return await self._whole(request, form, pieces, rows, read)

    async def contrast(self, request: Request) -> Response:
        """Answer one prompt under two alphas."""
        passed = await self.passed(request, ContrastRequest)
        first, second = paired(passed.rows)
        pieces = self._pieces(Passed(passed.id, passed.began, passed.asked, [first, second], passed.read))
        told = self._bounded(contrast(self.engine, (first, second), pieces))
        return StreamingResponse(_told(told), media_type="text/event-stream")

    def _pieces(self, passed: Passed[Any]) -> AsyncIterator[tuple[int, Piece]]:
        """What the engine answers, counted; the request waits for its turn from now on."""
        answers = merged(self.engine.generate(passed.rows))
        self.counts.tokens.labels("read").inc(passed.read)
        return self._timed(answers, passed.began)

    async def _timed(self, answers: AsyncIterator[tuple[int, Piece]], began: float) -> AsyncIterator[tuple[int, Piece]]:
        """The same pieces, counted, and no longer than the limit."""
        first = True
        async with aclosing(self._bounded(answers)) as source:  # type: ignore[type-var]
            async for place, piece in source:
                if first:
                    self.counts.first.observe(time.monotonic() - began)
                    first = False
                self.counts.tokens.labels("said").inc(piece.tokens)
                yield place, piece

    async def _bounded(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        """The same items, no longer than the limit; what goes wrong in the engine is told as an error of the API."""
        until = asyncio.get_running_loop().time() + self.config.answer_seconds
        async with aclosing(items) as source:  # type: ignore[type-var]
            try:
                while True:
                    async with asyncio.timeout_at(until):  # around no yield: it would end whoever reads
                        item = await anext(source)
                    yield item
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise ApiError(504, "the answer took too long") from error
            except EngineError as error:
                raise ApiError(503, str(error), retry_after=5) from error

    async def _whole(
        self, request: Request, form: Form, pieces: AsyncIterator[tuple[int, Piece]], rows: int, read: int
    ) -> Response:
        """An answer at once; given up if the client goes away."""
        found = [Collected() for _ in range(rows)]

        async def collect() -> None:
            async with aclosing(pieces) as source:  # type: ignore[type-var]
                async for place, piece in source:
                    found[place].add(piece)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ApiError(400, "the client went away")
            await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return JSONResponse(form.whole(found, read))

    def models(self, key: Key) -> dict[str, Any]:
        """The model, and the model with each stream that the key may have in full; ``alpha`` is the largest of each."""
        streams = [n for n in self.engine.streams if key.streams.get(n) == 1.0]
        names = [self.name, *(f"{self.name}+{n}" for n in sorted(streams))]
        common: dict[str, Any] = {"object": "model", "created": self.created, "owned_by": "libortho"}
        common["alpha"] = {n: key.streams[n] for n in sorted(self.engine.streams) if n in key.streams}
        return {"object": "list", "data": [{"id": n, **common} for n in names]}


async def _chunks(
    form: Form, pieces: AsyncIterator[tuple[int, Piece]], rows: int, read: int
) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer."""
    begun, said = [False] * rows, 0
    async with aclosing(pieces) as source:  # type: ignore[type-var]
        async for place, piece in source:
            said += piece.tokens
            if piece.text or piece.logprobs or piece.finish:
                yield form.chunk(place, piece, first=not begun[place])
                begun[place] = True
    if form.usage:
        yield form.last(read, said)


async def _told(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Events as they are sent. An error is one of them, for the status is sent by then."""
    async with aclosing(events) as source:  # type: ignore[type-var]
        try:
            async for found in source:
                yield event(found)
        except ApiError as error:
            yield event(error.body())
    yield b"data: [DONE]\n\n"
