"""The engine in this process: one thread runs the model, and rows come and go between its steps."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from libortho.core.errors import LibOrthoError
from libortho.core.models import denormals_flushed
from libortho.core.report import methods
from libortho.core.switch.alpha import get_switch
from libortho.lm.generation import context_length, whole_states
from libortho.serving.acts import Shares, shares
from libortho.serving.batch import Answer, Batch
from libortho.serving.engine import BusyError, EngineError, Piece, Row
from libortho.serving.streams import stream_hashes

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 4096
"""Tokens of prompts, padding included, that one pass reads."""
STALE = "the streams of the model have changed; ask again"


_Change = tuple[Callable[[nn.Module], None], asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class _Ticket:
    """A row on its way, and where its pieces go."""

    __slots__ = ("answer", "gone", "loop", "pieces", "row")

    def __init__(self, row: Row, loop: asyncio.AbstractEventLoop) -> None:
        self.row, self.loop = row, loop
        self.pieces: asyncio.Queue[Piece | EngineError] = asyncio.Queue()
        self.answer: Answer | None = None
        self.gone = False


class _Aside:
    """Work that the thread does between two steps, and its result."""

    __slots__ = ("found", "work")

    def __init__(self, work: Callable[[], Shares]) -> None:
        self.work, self.found = work, Future[Shares]()

    def do(self) -> None:
        """Do it, unless nobody waits any more."""
        if not self.found.set_running_or_notify_cancel():
            return
        try:
            self.found.set_result(self.work())
        except Exception as error:  # whatever a model raises: its text may hold a prompt
            logger.error("a forward pass failed: %s", type(error).__name__)
            self.found.set_exception(EngineError("the model could not tell which layers act"))


class LocalEngine:
    """See :class:`~libortho.serving.engine.Engine`.

    Args:
        model: A model with a switch. It belongs to the engine until that is closed.
        tokenizer: Its tokenizer.
        most_rows: Rows that are answered at a time.
        most_waiting: Rows that may wait for a place.
        constant: Whether streams that are off are computed all the same, so that time does not tell an alpha.
    """

    forces = True

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, most_rows: int, most_waiting: int, constant: bool = False
    ) -> None:
        switch = get_switch(model)
        switch.constant = constant
        if not switch.streams:  # alphas of a base alone are looked at, too: streams may come
            switch.attach(model)
        self.context = context_length(model)
        self.streams: Mapping[str, str] = {}
        self._model, self._tokenizer = model, tokenizer
        self._fixed: dict[str, float] = {}
        self._read_streams()
        self._most_rows, self._most_waiting = most_rows, most_waiting
        self._waiting: deque[_Ticket] = deque()
        self._asides: deque[_Aside] = deque()
        self._running: list[_Ticket] = []
        self._changes: deque[_Change] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Start the thread.

        Raises:
            TargetError: if the model cannot answer several rows at a time.
        """
        self._batch = Batch(self._model, self._tokenizer, self._fixed)
        self._thread = threading.Thread(target=self._work, name="libortho-engine", daemon=True)
        self._thread.start()

    def generate(self, rows: Sequence[Row]) -> list[AsyncIterator[Piece]]:
        """See :meth:`~libortho.serving.engine.Engine.generate`; called in the event loop that reads the answers."""
        loop = asyncio.get_running_loop()
        with self._changed:
            self._check_runs()
            rows = [self._fitted(r) for r in rows]
            tickets = [_Ticket(r, loop) for r in rows]
            if not all(self._fits(r) for r in rows):
                raise EngineError(STALE)
            if len(self._running) + len(self._waiting) + len(rows) > self._most_rows + self._most_waiting:
                raise BusyError(f"{len(self._waiting)} answers wait already, of at most {self._most_waiting}")
            self._waiting.extend(tickets)
            self._changed.notify()
        return [self._pieces(t) for t in tickets]

    def _fitted(self, row: Row) -> Row:
        """A row that asks for no stream, whatever the streams are now; any other as it is."""
        return row if any(row.alpha.values()) else replace(row, alpha=dict.fromkeys(self.streams, 0.0))

    def alive(self) -> bool:
        """True while rows are answered."""
        return not self._closing and self._thread is not None and self._thread.is_alive()

    def _fits(self, row: Row) -> bool:
        """Whether the streams of a row are those that there are: rows of one pass name the same."""
        return row.alpha.keys() == self.streams.keys()

    def _check_runs(self) -> None:
        if not self.alive():
            raise EngineError("the engine does not run")

    async def acts(self, ids: Sequence[int], alpha: Mapping[str, float]) -> Shares:
        """See :meth:`~libortho.serving.engine.Engine.acts`."""
        aside = _Aside(partial(shares, self._model, tuple(ids), {**self._fixed, **alpha}, tuple(self.streams)))
        with self._changed:
            self._check_runs()
            if len(self._asides) >= self._most_waiting:
                raise BusyError(f"{len(self._asides)} requests wait already, of at most {self._most_waiting}")
            self._asides.append(aside)
            self._changed.notify()
        return await asyncio.wrap_future(aside.found)

    async def _pieces(self, ticket: _Ticket) -> AsyncIterator[Piece]:
        try:
            while True:
                piece = await ticket.pieces.get()
                if isinstance(piece, EngineError):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            ticket.gone = True  # the thread drops it before its next step
            with self._changed:
                self._changed.notify()

    def load(self) -> tuple[int, int]:
        """Rows that are being answered, and rows that wait."""
        return len(self._running), len(self._waiting)

    async def change(self, work: Callable[[nn.Module], None]) -> None:
        """Change the model's streams: rows that are being answered end as they began, others wait until it is done.

        Args:
            work: Is given the model, in the engine's thread.

        Raises:
            EngineError: if the engine does not run.
            LibOrthoError: what ``work`` raises.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        with self._changed:
            self._check_runs()
            self._changes.append((work, loop, done))
            self._changed.notify()
        await done

    async def close(self) -> None:
        """Let the rows that are being answered end; those that wait get an error."""
        with self._changed:
            self._closing = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        self._fail(left, "the server is going down")
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        batch = self._batch
        try:
            self._answer(batch)
        finally:  # also where something is wrong with this thread: nobody waits for ever
            batch.clear()
            with self._changed:
                self._closing = True
                left, self._running = [*self._running, *self._waiting], []
                self._waiting.clear()
            self._fail(left, "the engine has stopped")

    def _answer(self, batch: Batch) -> None:
        with denormals_flushed(), whole_states(self._model):
            while (coming := self._next(batch)) is not None:
                try:
                    said = batch.admit([t.answer for t in coming if t.answer is not None]) if coming else []
                    if batch.answers:
                        said = [*said, *batch.step()]
                except Exception as error:  # whatever a model raises: the rows of the pass are lost, the server lives
                    logger.error("a forward pass failed: %s", type(error).__name__)
                    lost, self._running = self._running, []
                    batch.clear()
                    self._fail(lost, "the model could not answer")
                    continue
                self._tell(said)
                self._do_asides()

    def _do_asides(self) -> None:
        """Do what was asked for meanwhile; another pass goes between two of them."""
        if self._asides:
            self._asides.popleft().do()

    def _next(self, batch: Batch) -> list[_Ticket] | None:
        """Rows that come in before the next step, once there is one to take; None when all is over."""
        with self._changed:
            while True:
                self._waiting = deque(t for t in self._waiting if not t.gone)
                gone = [t for t in self._running if t.gone]
                if self._changes and not self._running:
                    self._apply()
                if self._waiting or self._running or self._asides:
                    break
                if self._closing:
                    return None
                self._changed.wait()
            self._running = [t for t in self._running if not t.gone]
            coming: list[_Ticket] = []
            longest = 0
            while self._waiting and not self._changes and len(self._running) < self._most_rows:
                longest = max(longest, len(self._waiting[0].row.prompt))
                if coming and longest * (len(coming) + 1) > PROMPT_TOKENS:
                    break
                ticket = self._waiting.popleft()
                ticket.answer = batch.answer(ticket.row)
                coming.append(ticket)
                self._running.append(ticket)
        batch.drop([t.answer for t in gone if t.answer is not None])
        return coming

    def _apply(self) -> None:
        """Make the changes that wait."""
        before = self.streams
        while self._changes:
            work, loop, done = self._changes.popleft()
            outcome = partial(done.set_result, None)
            try:
                work(self._model)
            except LibOrthoError as error:
                outcome = partial(done.set_exception, error)
            except Exception as error:  # whatever a file holds: the thread lives on
                logger.error("a change of streams failed: %s", type(error).__name__)
                outcome = partial(done.set_exception, EngineError("the streams could not be changed"))
            self._read_streams()  # work that fails may have changed some of them
            _call(loop, outcome)
        for ticket in self._waiting:
            ticket.row = self._fitted(ticket.row)
        changed = {n for n in before if before[n] != self.streams.get(n)}
        stale = [t for t in self._waiting if not self._fits(t.row) or any(t.row.alpha.get(n) for n in changed)]
        self._waiting = deque(t for t in self._waiting if t not in stale)
        self._fail(stale, STALE)

    def _read_streams(self) -> None:
        hashes, made = stream_hashes(self._model), methods(self._model)
        fixed = {n: 1.0 for n in hashes if made.get(n, {}).get("verb") == "split"}  # a part of the weights
        self.streams = {n: h for n, h in hashes.items() if n not in fixed}
        self._fixed.clear()
        self._fixed.update(fixed)

    def _tell(self, said: Sequence[tuple[Answer, Piece]]) -> None:
        """Hand the pieces over, those of one event loop in one call."""
        of = {id(t.answer): t for t in self._running}
        found: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, Piece | EngineError]]] = {}
        for answer, piece in said:
            ticket = of[id(answer)]
            found.setdefault(ticket.loop, []).append((ticket, piece))
        ended = {id(a) for a, p in said if p.finish is not None}
        self._running = [t for t in self._running if id(t.answer) not in ended]
        for loop, pieces in found.items():
            _hand(loop, pieces)

    def _fail(self, tickets: Sequence[_Ticket], reason: str) -> None:
        for ticket in tickets:
            _hand(ticket.loop, [(ticket, EngineError(reason))])


def _hand(loop: asyncio.AbstractEventLoop, pieces: Sequence[tuple[_Ticket, Piece | EngineError]]) -> None:
    def put() -> None:
        for ticket, piece in pieces:
            ticket.pieces.put_nowait(piece)

    _call(loop, put)


def _call(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
        loop.call_soon_threadsafe(work)
