"""Whose alpha it is: generators, tasks, threads, executors, interrupts, copies. What is not known is off, or raises."""

import asyncio
import contextlib
import contextvars
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from torch import nn

import libortho
from libortho.core.errors import AlphaContextError
from probe import VALUES, in_thread, persistent, unknown

# -- generators --------------------------------------------------------------------------------------------------------


def test_interleaved_generators_keep_their_alphas(probe):
    first, second = probe.stream(0.0), probe.stream(1.0)
    assert [next(first), next(second), next(first), next(second)] == [0.0, 1.0, 0.0, 1.0]
    assert probe() == unknown(probe)
    with libortho.alpha(probe.model, 0.5):
        assert (probe(), next(first), probe()) == (0.5, 0.0, 0.5)
    first.close()
    second.close()
    assert probe() == persistent(probe)


def test_a_generator_that_is_dropped_ends_its_context(probe):
    stream = probe.stream(0.5)
    next(stream)
    del stream
    gc.collect()
    assert probe() == persistent(probe)


def test_a_generator_keeps_its_alpha_in_any_thread(probe):
    stream = probe.stream(0.5)
    with ThreadPoolExecutor(2) as pool:
        assert [pool.submit(next, stream).result() for _ in range(3)] == [0.5] * 3
        assert pool.submit(probe).result() == unknown(probe)
    assert probe() == unknown(probe)
    in_thread(stream.close)
    assert probe() == persistent(probe)


def test_a_streamed_response_runs_each_step_in_another_context(probe):
    async def serve() -> list[Any]:
        stream, found = probe.stream(0.5), []
        for _ in range(3):
            found.append(await anyio.to_thread.run_sync(next, stream))
        await anyio.to_thread.run_sync(stream.close)
        return found

    assert anyio.run(serve) == [0.5] * 3
    assert probe() == persistent(probe)


class Session:
    """Somebody's own context manager around ours."""

    def __init__(self, model: nn.Module, value: float) -> None:
        self.inner = libortho.alpha(model, value)

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


@contextlib.contextmanager
def managed(model: nn.Module, value: float) -> Iterator[None]:
    with libortho.alpha(model, value):
        yield


@contextlib.contextmanager
def stacked(model: nn.Module, value: float) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(libortho.alpha(model, value))
        yield


@pytest.mark.parametrize("manager", [Session, managed, stacked])
def test_a_context_managers_context_holds_for_its_block_and_generator(probe, manager):
    with manager(probe.model, 0.5):
        assert probe() == 0.5
    assert probe() == persistent(probe)

    def stream(value: float) -> Iterator[Any]:
        with manager(probe.model, value):
            while True:
                yield probe()

    first, second = stream(0.0), stream(1.0)
    assert [next(first), next(second), next(first)] == [0.0, 1.0, 0.0]
    assert probe() == unknown(probe)
    first.close()
    second.close()
    assert probe() == persistent(probe)


def test_a_generator_inside_a_context_inside_a_generator(probe):
    def outer() -> Iterator[tuple[Any, Any]]:
        with libortho.alpha(probe.model, 0.5):
            inner = probe.stream(0.0)
            for _ in range(2):
                yield next(inner), probe()
            inner.close()

    assert list(outer()) == [(0.0, 0.5)] * 2
    assert probe() == persistent(probe)


def test_a_context_inside_a_generator_expression(probe):
    def run(value: float) -> Any:
        with libortho.alpha(probe.model, value):
            context = contextvars.copy_context()
            return probe(), in_thread(lambda: context.run(probe)), context

    results = list(run(v) for v in VALUES)  # noqa: C400 - the generator expression is the point
    assert [(a, b) for a, b, _ in results] == [(v, v) for v in VALUES]
    later = [context.run(probe) for *_, context in results]  # whose block it was is not known any more
    assert later == [min(v, persistent(probe)) for v in VALUES]
    assert probe() == persistent(probe)


def test_a_fixture_that_yields_inside_a_context_does_not_reach_the_test(probe):
    def fixture() -> Iterator[None]:
        with libortho.alpha(probe.model, 1.0 - persistent(probe)):
            yield

    setup = fixture()
    next(setup)
    assert probe() == unknown(probe)
    with contextlib.suppress(StopIteration):
        next(setup)
    assert probe() == persistent(probe)


def test_asynchronous_generators_keep_their_alphas(probe):
    async def stream(value: float) -> Any:
        with libortho.alpha(probe.model, value):
            while True:
                await asyncio.sleep(0)
                yield probe()

    async def main() -> None:
        first, second = stream(0.0), stream(1.0)
        assert [await anext(s) for s in (first, second, first, second)] == [0.0, 1.0, 0.0, 1.0]
        assert await asyncio.gather(anext(first)) == [0.0]  # in a task of its own
        assert probe() == unknown(probe)
        await first.aclose()
        await asyncio.create_task(second.aclose())
        assert probe() == persistent(probe)

    asyncio.run(main())
    assert probe() == persistent(probe)


def test_a_loop_that_runs_below_a_generator(probe):
    async def work(value: float) -> list[Any]:
        with libortho.alpha(probe.model, value):
            before = probe()
            await asyncio.sleep(0)
            return [before, probe()]

    async def beside() -> Any:
        await asyncio.sleep(0)
        return probe()

    async def main() -> list[Any]:
        return await asyncio.gather(work(0.0), work(1.0), beside())

    assert next(asyncio.run(main()) for _ in range(1)) == [[0.0, 0.0], [1.0, 1.0], unknown(probe)]


def test_coroutines_that_are_driven_by_hand(probe):
    class Pause:
        def __await__(self) -> Iterator[None]:
            yield

    async def work(value: float) -> list[Any]:
        with libortho.alpha(probe.model, value):
            before = probe()
            await Pause()
            return [before, probe()]

    first, second = work(0.0), work(1.0)
    first.send(None)
    second.send(None)
    assert probe() == unknown(probe)
    for coroutine, value in ((first, 0.0), (second, 1.0)):
        with pytest.raises(StopIteration) as stopped:
            coroutine.send(None)
        assert stopped.value.value == [value, value]
    assert probe() == persistent(probe)


def test_coroutines_that_are_driven_by_hand_inside_a_task(probe):
    class Pause:
        def __await__(self) -> Iterator[None]:
            yield

    async def work() -> Any:
        with libortho.alpha(probe.model, 1.0):
            await Pause()
            return probe()

    async def main() -> None:
        driven = work()
        driven.send(None)
        assert probe() == unknown(probe)
        with pytest.raises(StopIteration) as stopped:
            driven.send(None)
        assert stopped.value.value == 1.0

    asyncio.run(main())
    assert probe() == persistent(probe)


def test_a_context_that_a_coroutine_enters_for_its_caller(probe):
    class Asynchronous(Session):
        async def __aenter__(self) -> None:
            await asyncio.sleep(0)
            self.__enter__()

        async def __aexit__(self, *error: Any) -> None:
            self.__exit__(*error)

    async def main() -> None:
        async with Asynchronous(probe.model, 0.5):
            assert probe() == 0.5
            await asyncio.sleep(0)
            assert probe() == 0.5
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(libortho.alpha(probe.model, 0.5))
            await asyncio.sleep(0)
            assert probe() == 0.5
        assert probe() == persistent(probe)

    asyncio.run(main())


# -- decorators --------------------------------------------------------------------------------------------------------


def test_decorated_functions_of_every_kind(probe):
    under = libortho.alpha(probe.model, 0.5)

    @under
    def plain() -> Any:
        return probe()

    @under
    def stream() -> Iterator[Any]:
        got = yield probe()
        yield got, probe()

    @under
    async def coroutine() -> Any:
        await asyncio.sleep(0)
        return probe()

    @under
    async def astream() -> Any:
        got = yield probe()
        await asyncio.sleep(0)
        yield got, probe()

    async def main() -> None:
        assert await asyncio.gather(coroutine(), coroutine()) == [0.5, 0.5]
        steps = astream()
        assert await anext(steps) == 0.5
        assert await steps.asend("sent") == ("sent", 0.5)
        await steps.aclose()

    assert plain() == plain() == 0.5
    steps = stream()
    assert next(steps) == 0.5
    assert probe() == unknown(probe)
    assert steps.send("sent") == ("sent", 0.5)
    steps.close()
    asyncio.run(main())
    assert probe() == persistent(probe)
    assert plain.__name__ == "plain"


def test_a_decorated_function_that_hands_its_work_on_is_refused(probe):
    async def later() -> Any:
        return probe()

    for make in (lambda: probe.stream(1.0), lambda: later()):
        with pytest.raises(AlphaContextError, match="whose body would run outside"):
            libortho.alpha(probe.model, 0.0)(make)()


def test_a_context_is_entered_once_at_a_time(probe):
    context = libortho.alpha(probe.model, 0.5)
    with context:
        with pytest.raises(AlphaContextError, match="entered already"):
            context.__enter__()
        assert probe() == 0.5
    with context:
        assert probe() == 0.5
    assert probe() == persistent(probe)


def test_contexts_may_be_left_in_another_order(probe):
    first, second = libortho.alpha(probe.model, 0.0), libortho.alpha(probe.model, 0.5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert probe() == 0.5
    second.__exit__(None, None, None)
    assert probe() == persistent(probe)


def test_a_context_left_elsewhere_says_so_and_leaves_the_switch_usable(probe):
    context = libortho.alpha(probe.model, 1.0)
    copied = contextvars.copy_context()
    copied.run(context.__enter__)
    with pytest.raises(AlphaContextError, match="left in another contextvars context"):
        context.__exit__(None, None, None)
    assert probe() == persistent(probe)
    assert copied.run(probe) == persistent(probe)
