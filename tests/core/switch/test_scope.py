"""Whose alpha it is: generators, tasks, threads, executors, interrupts, copies. What is not known is off, or raises."""

import asyncio
import contextlib
import contextvars
import gc
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from torch import nn

import libortho
from libortho.core.errors import AlphaContextError
from probe import VALUES, in_thread, persistent, unknown

# -- generators -------------------------------------------------------------------------------------------------------


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


# -- decorators -------------------------------------------------------------------------------------------------------


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


# -- work that is handed over -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
def test_work_that_runs_after_the_block_in_an_older_worker(probe, value):
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gate.wait)
        with libortho.alpha(probe.model, value):
            handed = pool.submit(probe)
        gate.set()
        assert handed.result() == unknown(probe)
        with libortho.alpha(probe.model, value):
            copied = contextvars.copy_context()
        assert pool.submit(copied.run, probe).result() == value
    assert probe() == persistent(probe)


def test_a_thread_started_by_a_thread_of_the_block(probe):
    go, found = threading.Event(), []

    def parent() -> None:
        go.wait(timeout=30)
        found.append(in_thread(probe))

    with libortho.alpha(probe.model, 0.5):
        thread = threading.Thread(target=parent)
        thread.start()
    go.set()
    thread.join(timeout=30)
    assert found == [unknown(probe)]


def test_a_raw_thread_and_a_timer(probe):
    import _thread

    go, found = threading.Event(), queue.Queue()

    def raw() -> None:
        go.wait(timeout=30)
        found.put(probe())

    with libortho.alpha(probe.model, 0.5):
        _thread.start_new_thread(raw, ())
        timer = threading.Timer(0.05, raw)
        timer.start()
    go.set()
    assert [found.get(timeout=30) for _ in range(2)] == [unknown(probe)] * 2
    timer.join()


def test_an_executor_of_a_loop_and_a_worker_task(probe):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        gate, jobs = threading.Event(), asyncio.Queue()

        async def worker() -> None:
            while True:
                future = await jobs.get()
                future.set_result(probe())

        consumer = asyncio.create_task(worker())
        await asyncio.sleep(0)
        blocked = loop.run_in_executor(None, gate.wait)
        with libortho.alpha(probe.model, 0.5):
            handed = loop.run_in_executor(None, probe)
            queued = loop.create_future()
            jobs.put_nowait(queued)
            inherited = asyncio.create_task(asyncio.to_thread(probe))
        gate.set()
        assert (await handed, await queued, await inherited) == (unknown(probe), unknown(probe), 0.5)
        await blocked
        assert probe() == persistent(probe)  # what asyncio.run was called with goes on as before
        consumer.cancel()

    asyncio.run(main())
    assert probe() == persistent(probe)


def test_a_callback_of_a_loop_has_the_context_it_was_made_in(probe):
    async def main() -> Any:
        loop, found = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        with libortho.alpha(probe.model, 0.5):
            loop.call_soon(lambda: found.set_result(probe()))
        return await found

    assert asyncio.run(main()) == 0.5


def test_the_main_thread_knows_the_value_when_others_have_left_their_blocks(probe):
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with libortho.alpha(probe.model, 0.5):
            entered.set()
            leave.wait(timeout=30)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(timeout=30)
    assert probe() == in_thread(probe) == unknown(probe)
    leave.set()
    thread.join(timeout=30)
    assert probe() == persistent(probe)


def test_a_thread_that_sets_the_value_knows_it(probe):
    go, found, before = threading.Event(), [], unknown(probe)

    def work() -> None:
        go.wait(timeout=30)
        found.append(probe())
        libortho.set_alpha(probe.model, 0.5)
        found.append(probe())

    with libortho.alpha(probe.model, 1.0):
        thread = threading.Thread(target=work)
        thread.start()
    go.set()
    thread.join(timeout=30)
    assert found == [before, 0.5]


def test_a_block_that_an_interrupt_kept_from_being_left_is_over_for_copies_too(probe):
    context = libortho.alpha(probe.model, 1.0)
    context.__enter__()
    del context  # what is left when nothing of __exit__ has run

    async def main() -> tuple[Any, Any]:
        return probe(), await asyncio.to_thread(probe)

    assert probe() == persistent(probe)
    assert asyncio.run(main()) == (persistent(probe), persistent(probe))
    assert in_thread(lambda: contextvars.copy_context().run(probe)) in (persistent(probe), unknown(probe))
