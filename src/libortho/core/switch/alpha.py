"""The switch: which share of each ortho stream takes part in a forward pass.

    y = W_base x + sum_s alpha_s W_ortho,s x          alpha_s in [0, 1]

One switch belongs to one model and is shared by all its split layers.

    set_alpha(model, 0.0)                 persistent, all streams
    set_alpha(model, {"hr": 1.0})         persistent, only the named streams change
    with alpha(model, [1.0, 0.0]):        this context only, one value per sequence in the batch

What is not known is off, or raises; it is never on:

* ``alpha = 0`` is a Python branch, not a multiplication by zero: the base stream alone runs.
* A context is seen by the thread or task that entered it, and by what runs in a copy of its ``contextvars`` context;
  in a generator it holds while the generator runs, whoever resumes it (:mod:`libortho.core.switch.scope`). A thread or
  task that cannot know its alpha raises :class:`~libortho.core.errors.AlphaContextError`, unless all streams are off
  persistently. So does a gradient-checkpoint recomputation whose forward pass is not on record.
* A KV cache, or another state that is carried from one forward pass to the next, is stamped with the alpha that
  computed it. Continuing it under another alpha raises (:mod:`libortho.core.switch.carried`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any

from torch import nn

from libortho.core.arguments import check_model
from libortho.core.errors import AlphaContextError, AlphaError
from libortho.core.switch.state import AlphaSpec, AlphaState, AlphaValue
from libortho.core.switch.switch import Context, Switch, switch_of


def get_switch(model: nn.Module) -> Switch:
    """The switch of a split model, of a part of it or of a wrapper around it; that of a bare base controls no stream.

    Raises:
        AlphaError: if no layer of the model is split, or if parts of it were split apart.
        TargetError: if ``model`` is no model in memory.
    """
    check_model(model)
    found: list[Switch] = []
    waiting, seen = [model], set()
    while waiting:  # not modules(), which is much slower: this runs once for every request
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        switch = own.get("switch")  # of a split layer
        if isinstance(switch, Switch) and switch not in found:
            found.append(switch)
        waiting.extend(m for m in own["_modules"].values() if m is not None)
    if not found:
        raise AlphaError("this model has no ortho stream; call libortho.split, isolate or load first")
    if len(found) > 1:
        raise AlphaError(
            f"this model has more than one switch: {len(found)} parts of it were split apart; set alpha on each part, "
            "or split the whole model at once"
        )
    return found[0]


def set_alpha(model: nn.Module, value: AlphaSpec, *, allow_extrapolation: bool = False) -> None:
    """Set alpha until it is set again.

    Args:
        model: A model with split layers.
        value: A number in [0, 1]; one number per sequence of the batch; or a mapping from stream name to either.
            A mapping changes only the streams that it names. A base without any stream takes 0 alone.
        allow_extrapolation: Accept values above 1.

    Raises:
        AlphaError: if the value is not a number, out of range, or names an unknown stream. Nothing changes then.
    """
    get_switch(model).set(value, extrapolate=allow_extrapolation)


def current_alphas(model: nn.Module) -> dict[str, float]:
    """Alpha of each stream that has one value for all sequences, as it holds here; empty for a base alone."""
    return {name: a for name, a in get_switch(model).current().values.items() if isinstance(a, float)}


_UNDONE = (Awaitable, AsyncGenerator, Generator, map, filter)


class alpha:
    """Run a block, or a function that it decorates, under another alpha; other threads and tasks do not see it.

    A decorated coroutine function, generator or asynchronous generator has that alpha while its body runs.

    Args:
        model: A model with split layers.
        value: As in :func:`set_alpha`, but streams that a mapping does not name are off.
        allow_extrapolation: Accept values above 1.

    Raises:
        AlphaError: as :func:`set_alpha`, when the block is entered.
        AlphaContextError: if the block is left in another ``contextvars`` context than it was entered in, if it is
            entered twice at a time, or if a decorated function returns work that would run after the block.
    """

    def __init__(self, model: nn.Module, value: AlphaSpec, *, allow_extrapolation: bool = False) -> None:
        self._arguments = (model, value, allow_extrapolation)
        self._entered: tuple[Switch, Context] | None = None

    def __enter__(self) -> None:
        model, value, extrapolate = self._arguments
        if self._entered is not None:
            raise AlphaContextError("this alpha context is entered already; make another with libortho.alpha(...)")
        switch = get_switch(model)
        context = switch.context(value, sys._getframe(1), self, extrapolate=extrapolate)
        try:
            self._entered = switch, context
            switch.enter(context)
        except BaseException:  # an interrupt: the block will not run
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered is not None:
            switch, context = self._entered
            try:
                switch.leave(context)
            finally:
                self._entered = None

    def _again(self) -> alpha:
        model, value, extrapolate = self._arguments
        return alpha(model, value, allow_extrapolation=extrapolate)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, every call of which runs in a context of its own."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with self._again():
                    return await function(*args, **kwargs)

            return awaited
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def streamed(*args: Any, **kwargs: Any) -> Any:
                with self._again():
                    stream, sent = function(*args, **kwargs), None
                    try:
                        while True:
                            try:
                                item = await stream.asend(sent)
                            except StopAsyncIteration:
                                return
                            sent = yield item
                    finally:
                        await stream.aclose()

            return streamed
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def yielded(*args: Any, **kwargs: Any) -> Any:
                with self._again():
                    return (yield from function(*args, **kwargs))

            return yielded

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self._again():
                result = function(*args, **kwargs)
            if isinstance(result, _UNDONE) and not isinstance(result, asyncio.Future):
                if isinstance(result, Coroutine):
                    result.close()  # or Python warns that nobody awaited it
                raise AlphaContextError(
                    f"the decorated {getattr(function, '__name__', function)!r} returns a {type(result).__name__}, "
                    "whose body would run outside the alpha context; decorate the function that it comes from"
                )
            return result

        return called


__all__ = ["AlphaSpec", "AlphaState", "AlphaValue", "Switch", "alpha", "get_switch", "set_alpha", "switch_of"]
