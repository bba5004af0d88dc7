"""Whose alpha it is: the contexts of one switch, by flow of control.

A flow of control is a thread, or a task of asyncio. A context belongs to the flow that entered it, and to whatever runs
in a copy of its ``contextvars`` context. Generators are the exception: they share the context of whoever resumes them.
A context that is entered while a generator runs therefore holds only while that generator is on the call stack, in
whatever thread or context it is resumed.

What no context covers runs under the persistent value. A flow may do so if that value is off; if it made the switch or
set the value; or if no context was ever in use beside it, whose work it may have been handed. Others raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType
from typing import Any

from libortho.alpha_state import AlphaState
from libortho.errors import AlphaContextError

_MANAGERS = contextlib.__file__
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_OWN_TASKS = ("trio", "curio")
"""Frameworks that drive coroutines by hand, each in a context of its own."""
_BESIDE = (
    "this thread or task has no alpha of its own, and it runs beside an alpha context, or was running while one was in "
    "use, so that the work may belong to that context; enter libortho.alpha(model, ...) here, or start the work with "
    "contextvars.copy_context().run"
)
_SUSPENDED = (
    "a generator stands suspended inside an alpha context that it was resumed into from here, so that it is unclear "
    "which alpha this call means; enter libortho.alpha(model, ...) around the call, or close the generator first"
)


@dataclass(eq=False)
class Entry:
    """One entered context.

    Attributes:
        state: The alpha in it.
        outer: The context around it in the same ``contextvars`` context.
        generator: The innermost generator that ran when it was entered: the context holds while that is on the stack.
        owned: Whether the block lies in the generator itself, and not in a function that the generator calls.
        flow: The thread or task that entered it.
    """

    state: AlphaState
    outer: Entry | None
    generator: FrameType | None
    owned: bool
    flow: object
    ended: bool = False
    lost: bool = False  # left in another contextvars context than the one that still holds it
    token: Token[Mapping[Scope, Entry]] | None = field(default=None, repr=False)


# Innermost entered context of every switch. Immutable mappings, so that a child task cannot change its parent's.
_ENTERED: ContextVar[Mapping[Scope, Entry]] = ContextVar("libortho_alpha_contexts", default=MappingProxyType({}))


class Scope:
    """The contexts of one switch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._used = False
        self._strangers = False  # work of a context may be with a thread or task that is not known yet
        self._bound: Mapping[FrameType, tuple[Entry, ...]] = MappingProxyType({})
        self._beside: weakref.WeakSet[Any] = weakref.WeakSet()
        self._home: weakref.WeakSet[Any] = weakref.WeakSet()
        self.adopt()

    def adopt(self) -> None:
        """Let the running thread or task know the persistent value."""
        self._home.add(threading.current_thread())
        if (task := _task()) is not None:
            self._home.add(task)

    def enter(self, state: AlphaState, frame: FrameType) -> Entry:
        """Enter a context.

        Args:
            state: Its alpha.
            frame: Where the ``with`` statement is.
        """
        generator, owned = _generator(frame)
        outer = _ENTERED.get().get(self)
        entry = Entry(state, outer, generator, owned, _flow())
        try:
            with self._lock:
                self._active += 1
                self._used = True
                if generator is not None:
                    self._bound = {**self._bound, generator: (*self._bound.get(generator, ()), entry)}
            if not owned:
                entry.token = _ENTERED.set({**_ENTERED.get(), self: entry})
        except BaseException:  # an interrupt: the block will not run, and nobody leaves it
            self.leave(entry)
            raise
        return entry

    def leave(self, entry: Entry) -> None:
        """Leave a context.

        Raises:
            AlphaContextError: if this is not the ``contextvars`` context that it was entered in. It has ended even so.
        """
        try:
            if entry.token is not None:
                top = _ENTERED.get().get(self)
                try:
                    _ENTERED.reset(entry.token)
                except ValueError as error:
                    entry.lost = True
                    raise AlphaContextError(
                        "an alpha context is left in another contextvars context than it was entered in, so that the "
                        "calls between may have run without it; enter and leave it in one function"
                    ) from error
                self._restore(top, entry)
        finally:
            self._end(entry)

    def _restore(self, top: Entry | None, left: Entry) -> None:
        """Put back what is to stand without ``left``, which need not be the innermost."""
        if top is left:
            top = left.outer
        inner = top
        while inner is not None:
            if inner.outer is left:
                inner.outer = left.outer
            inner = inner.outer
        found = dict(_ENTERED.get())
        found.pop(self, None)
        _ENTERED.set(found if top is None else {**found, self: top})

    def _end(self, entry: Entry) -> None:
        task = _task()
        tasks = [t for t in asyncio.all_tasks() if t is not task] if task is not None else []
        threads = [t for t in threading.enumerate() if t is not threading.current_thread() and not _monitors(t)]
        known = {t.ident for t in threading.enumerate()}
        with self._lock:
            if entry.ended:
                return
            entry.ended = True
            self._active -= 1
            if entry.generator is not None:
                rest = tuple(e for e in self._bound.get(entry.generator, ()) if e is not entry)
                bound = {g: entries for g, entries in self._bound.items() if g is not entry.generator}
                self._bound = {**bound, entry.generator: rest} if rest else bound
            others = [t for t in (*threads, *tasks) if t not in self._home]
            self._beside.update(others)
            self._strangers |= bool(others) or not known.issuperset(sys._current_frames())

    def state(self, persistent: AlphaState) -> AlphaState:
        """The alpha of a call that is made here.

        Raises:
            AlphaContextError: if it cannot be known.
        """
        entry = _ENTERED.get().get(self)
        bound, suspended = self._bound, False
        if bound:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                if frame in bound:
                    return bound[frame][-1].state
                frame = frame.f_back
            flow = _flow()
            suspended = any(e.owned and e.flow is flow for entries in bound.values() for e in entries)
        while entry is not None:
            waiting = entry.generator is not None and not entry.ended
            if entry.lost:
                pass
            elif waiting and entry.flow is _flow():
                suspended = True
            else:
                return entry.state
            entry = entry.outer
        if not self._used or persistent.off:
            return persistent
        if suspended:
            raise AlphaContextError(_SUSPENDED)
        if not self._knows():
            raise AlphaContextError(_BESIDE)
        return persistent

    def _knows(self) -> bool:
        """True if the running thread or task may take the persistent value."""
        thread, task = threading.current_thread(), _task()
        if (task or thread) in self._home:
            return True
        if self._active:
            return False
        if task is not None and thread in self._home and _is_main(task):
            return True
        return not self._strangers and thread not in self._beside and task not in self._beside


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _flow() -> object:
    return _task() or threading.current_thread()


def _is_main(task: asyncio.Task[Any]) -> bool:
    """True for what ``asyncio.run`` was called with, which goes on where the thread stopped."""
    callbacks = getattr(task, "_callbacks", None) or ()
    return any(getattr(c[0], "__name__", "") == "_run_until_complete_cb" for c in callbacks)


def _monitors(thread: threading.Thread) -> bool:
    """True for the thread that redraws progress bars; it takes no work."""
    return type(thread).__module__.partition(".")[0] == "tqdm"


def _generator(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """The innermost generator on the stack, and whether the block at ``frame`` lies in it.

    The machinery of ``contextlib``, and generators that it runs as context managers, are looked through.
    """
    direct = True
    while frame is not None:
        code, back = frame.f_code, frame.f_back
        managed = back is not None and back.f_code.co_filename == _MANAGERS and back.f_code.co_name.startswith("__")
        if code.co_flags & _RESUMABLE and not managed:
            return frame, direct
        if direct and code.co_flags & inspect.CO_COROUTINE and _driven_by_hand() and not managed:
            return frame, True
        if code.co_filename != _MANAGERS and not (code.co_flags & _RESUMABLE):
            direct = False
        frame = back
    return None, False


def _driven_by_hand() -> bool:
    return _task() is None and not any(name in sys.modules for name in _OWN_TASKS)
