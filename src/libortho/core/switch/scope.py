"""Whose alpha it is: the contexts of one switch, by flow of control.

A flow of control is a thread, a task of asyncio, or a greenlet. A context belongs to the flow that entered it, and to
whatever runs in a copy of its ``contextvars`` context. Generators are the exception: they share the context of whoever
resumes them. A context that is entered while a generator runs therefore holds only while that generator is on the call
stack, in whatever thread or context it is resumed.

What no context covers runs under the persistent value. A flow may do so if that value is off; or if no context is open
in another flow, and none can have handed it the work. Others raise.

An interrupt may cut off the code that enters or leaves a context. A context therefore also ends when the object that
stands for it is gone: see ``holder``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType
from typing import Any

from libortho.core.errors import AlphaContextError
from libortho.core.switch.state import AlphaState

_MANAGERS = contextlib.__file__
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_YIELD = dis.opmap["YIELD_VALUE"]
_DRIVERS = ("trio", "curio")
"""Frameworks that drive coroutines of tasks by ``send``, each in a context of its own."""
_BESIDE = (
    "this thread or task has no alpha of its own, and it runs beside an alpha context, or was running while one was in "
    "use, so that the work may belong to that context; enter libortho.alpha(model, ...) here, or start the work with "
    "contextvars.copy_context().run"
)
_SUSPENDED = (
    "a generator stands suspended inside an alpha context, so that it is unclear which alpha this call means; enter "
    "libortho.alpha(model, ...) around the call, or close the generator first"
)
_LOCAL = threading.local()
_forks = 0  # how many forks lie between this process and the first


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _LeftElsewhereError(AlphaContextError, ValueError):
    """Also what ``contextvars`` raises, for those who expect that."""


class _Thread:
    """One thread; unlike an identifier it is never another's."""


@dataclass(eq=False)
class Entry:
    """One context.

    Attributes:
        state: The alpha in it.
        outer: The context around it in the same ``contextvars`` context.
        generator: The innermost generator that ran when it was entered: the context holds while that is on the stack.
        owned: Whether the block lies in the generator itself, and not in a function that the generator calls.
        coroutine: The coroutine in which the block lies: if that is suspended while its own task runs, somebody in the
            task drives it by hand.
        flow: The thread, task or greenlet that entered it.
        holder: What lives as long as the block, even if an interrupt keeps the context from being left.
    """

    state: AlphaState
    outer: Entry | None
    generator: FrameType | None
    owned: bool
    coroutine: FrameType | None
    flow: object
    holder: weakref.ref[Any]
    forks: int
    ended: bool = False
    restored: bool = False  # what holds it still is a copy
    lost: bool = False  # left in another contextvars context than the one that still holds it
    token: Token[Mapping[Scope, Entry]] | None = field(default=None, repr=False)

    @property
    def stuck(self) -> bool:
        """True if its block has ended, and an interrupt kept it from being left."""
        return self.holder() is None and not self.restored


# Innermost entered context of every switch. Immutable mappings, so that a child task cannot change its parent's.
_ENTERED: ContextVar[Mapping[Scope, Entry]] = ContextVar("libortho_alpha_contexts", default=MappingProxyType({}))


class Scope:
    """The contexts of one switch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used = False
        self._open: weakref.WeakKeyDictionary[Any, Entry] = weakref.WeakKeyDictionary()
        self._bound: Mapping[FrameType, tuple[Entry, ...]] = MappingProxyType({})
        self._home: weakref.WeakSet[Any] = weakref.WeakSet()
        self._beside: weakref.WeakSet[Any] = weakref.WeakSet()
        self._strange_threads = False  # threads that are not known yet may have work of a context
        self._strange_tasks = False
        self.adopt()

    def adopt(self) -> None:
        """Let the running thread or task know the persistent value."""
        self._home.add(_flow())
        self._beside.discard(_task() or threading.current_thread())

    def entry(self, state: AlphaState, frame: FrameType, holder: Any) -> Entry:
        """A context that is not entered yet.

        Args:
            state: Its alpha.
            frame: Where the ``with`` statement is.
            holder: See :class:`Entry`.
        """
        generator, owned, coroutine = _resumable(frame)
        outer = _ENTERED.get().get(self)
        return Entry(state, outer, generator, owned, coroutine, _flow(), weakref.ref(holder), _forks)

    def enter(self, entry: Entry) -> None:
        """Enter a context."""
        with self._lock:
            self._used = True
            self._open[entry.holder()] = entry
            if entry.generator is not None:
                self._bound = {**self._bound, entry.generator: (*self._bound.get(entry.generator, ()), entry)}
        if not entry.owned:
            entry.token = _ENTERED.set({**_ENTERED.get(), self: entry})

    def leave(self, entry: Entry, persistent: AlphaState) -> None:
        """Leave a context.

        Raises:
            AlphaContextError: if this is not the ``contextvars`` context that it was entered in. It has ended even so.
        """
        if sys.is_finalizing():
            return
        try:
            if not entry.owned:
                top = _ENTERED.get().get(self)
                try:
                    if entry.token is not None:  # an interrupt may have lost it
                        _ENTERED.reset(entry.token)
                except ValueError as error:
                    entry.lost = True
                    raise _LeftElsewhereError(
                        "an alpha context is left in another contextvars context than it was entered in, so that the "
                        "calls between may have run without it; enter and leave it in one function"
                    ) from error
                self._restore(top, entry)
            entry.restored = True
        finally:
            self._end(entry, scan=not persistent.off)

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

    def _end(self, entry: Entry, scan: bool) -> None:
        """Note who may have been handed work of the context; without ``scan`` of the tasks, any of them."""
        task, threads = _task(), threading.enumerate()
        tasks = [] if task is None or not scan else [t for t in asyncio.all_tasks() if t is not task]
        safe = (threading.current_thread(), threading.main_thread())
        others = [t for t in threads if t not in safe and not _monitors(t)]
        raw = not {t.ident for t in threads}.issuperset(sys._current_frames())
        with self._lock:
            if entry.ended:
                return
            entry.ended = True
            holder = entry.holder()
            if holder is not None:
                self._open.pop(holder, None)
            if entry.generator is not None:
                rest = tuple(e for e in self._bound.get(entry.generator, ()) if e is not entry)
                bound = {g: entries for g, entries in self._bound.items() if g is not entry.generator}
                self._bound = {**bound, entry.generator: rest} if rest else bound
            handed = [t for t in tasks if not _is_main(t)]
            self._beside.update((*others, *handed))
            self._strange_threads |= bool(others) or raw
            self._strange_tasks |= bool(handed) or (task is not None and not scan)

    def state(self, persistent: AlphaState) -> AlphaState:
        """The alpha of a call that is made here.

        Raises:
            AlphaContextError: if it cannot be known.
        """
        entry, bound, suspended = _ENTERED.get().get(self), self._bound, False
        if bound:
            found = _innermost(bound)
            if found is not None:
                return found.state
            flow = _flow()
            suspended = any(e.flow is flow and not e.stuck for entries in bound.values() for e in entries)
        while entry is not None:
            if entry.lost or (entry.stuck and entry.flow is _flow()):
                pass
            elif entry.stuck:  # copied in its block or after it: nobody knows
                return _lower(entry.state, persistent)
            elif entry.forks != _forks or entry.generator is not None:
                if entry.ended or entry.forks != _forks or entry.flow is not _flow():
                    certain = entry.forks == _forks and not entry.ended and _runs(entry.generator)
                    return entry.state if certain else _lower(entry.state, persistent)
                suspended = True
            elif not entry.ended and _suspended(entry.coroutine) and entry.flow is _flow():
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
        flow, thread = _flow(), threading.current_thread()
        with self._lock:
            if any(e.flow is not flow for e in self._open.values()):
                return False
        at_home = flow in self._home
        main = thread is threading.main_thread()
        if isinstance(flow, _Thread):
            return main or (thread not in self._beside and (at_home or not self._strange_threads))
        if not isinstance(flow, asyncio.Task):
            return at_home
        safe = main or (thread not in self._beside and not self._strange_threads)
        return (at_home and flow not in self._beside) or (
            safe and (_is_main(flow) or (flow not in self._beside and not self._strange_tasks))
        )


def _lower(state: AlphaState, other: AlphaState) -> AlphaState:
    """Of two alphas of which one is meant, that which turns nothing on that the other does not."""
    if state.within(other):
        return state
    if other.within(state):
        return other
    raise AlphaContextError(_BESIDE)


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _flow() -> object:
    if (task := _task()) is not None:
        return task
    if (greenlet := sys.modules.get("greenlet")) is not None:
        current = greenlet.getcurrent()
        if current.parent is not None:
            return current
    if not hasattr(_LOCAL, "thread"):
        _LOCAL.thread = _Thread()
    return _LOCAL.thread


def _is_main(task: asyncio.Task[Any]) -> bool:
    """True for what ``asyncio.run`` was called with, which goes on where the thread stopped."""
    callbacks = getattr(task, "_callbacks", None) or ()
    return any(getattr(c[0], "__name__", "") == "_run_until_complete_cb" for c in callbacks)


def _monitors(thread: threading.Thread) -> bool:
    """True for the thread that redraws progress bars; it takes no work."""
    return type(thread).__module__.partition(".")[0] == "tqdm"


def _bottom() -> FrameType | None:
    """The first frame of the running task; below it are the loop, and whoever called it. None outside a task."""
    task = _task()
    return None if task is None else getattr(task.get_coro(), "cr_frame", None)


def _innermost(bound: Mapping[FrameType, tuple[Entry, ...]]) -> Entry | None:
    """The context of the innermost generator on the stack that has one."""
    frame: FrameType | None = sys._getframe(2)
    bottom = _bottom()
    while frame is not None:
        for entry in reversed(bound.get(frame, ())):
            if not entry.stuck:
                return entry
        frame = None if frame is bottom else frame.f_back
    return None


def _runs(generator: FrameType | None) -> bool:
    """True if a generator is on the stack of a thread at this moment."""
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            if frame is generator:
                return True
            frame = frame.f_back
    return False


def _resumable(frame: FrameType | None) -> tuple[FrameType | None, bool, FrameType | None]:
    """The innermost generator on the stack, whether the block at ``frame`` lies in it, and its coroutine.

    The machinery of ``contextlib``, and generators that it runs as context managers, are looked through.
    """
    direct, bottom, coroutine = True, _bottom(), None
    while frame is not None:
        code, back = frame.f_code, frame.f_back
        managed = back is not None and back.f_code.co_filename == _MANAGERS and back.f_code.co_name.startswith("__")
        if code.co_flags & _RESUMABLE and not managed:
            return frame, direct, coroutine
        if direct and not managed and code.co_flags & inspect.CO_COROUTINE and code.co_filename != _MANAGERS:
            if _driven_by_hand(frame, bottom):
                return frame, True, None
            coroutine = frame
        if code.co_filename != _MANAGERS and not code.co_flags & _RESUMABLE:
            direct = False
        frame = None if frame is bottom else back
    return None, False, coroutine


def _suspended(coroutine: FrameType | None) -> bool:
    """True if a coroutine waits for something, and neither runs nor has ended."""
    return coroutine is not None and coroutine.f_code.co_code[coroutine.f_lasti] == _YIELD


def _driven_by_hand(coroutine: FrameType, bottom: FrameType | None) -> bool:
    """True if whoever resumes a coroutine is neither the running task nor a framework with tasks of its own."""
    frame: FrameType | None = coroutine
    while frame is not None and frame.f_code.co_flags & (inspect.CO_COROUTINE | _RESUMABLE):
        if frame is bottom:
            return False
        frame = frame.f_back
    return frame is None or str(frame.f_globals.get("__name__")).partition(".")[0] not in _DRIVERS
