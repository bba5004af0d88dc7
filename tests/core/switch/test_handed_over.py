"""Work that a block hands to a thread, an executor or a loop has the block's alpha, or raises."""

import asyncio
import contextvars
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import libortho
from probe import VALUES, in_thread, persistent, unknown


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
