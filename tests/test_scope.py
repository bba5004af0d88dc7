"""Whose alpha it is: generators, tasks, threads, executors, interrupts, copies. What is not known is off, or raises."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import libortho
from libortho.alpha import get_switch
from libortho.errors import AlphaContextError, AlphaError
from libortho.layer import ortho_layers

VALUES = (0.0, 0.5, 1.0)
RAISED = "raised"


def small() -> nn.Module:
    """A split model whose forward pass takes no time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Identity())
    config = libortho.SplitConfig(target_modules="0", use_low_rank=False, structure="columns", ratio=0.2)
    libortho.split(model, config)
    for layer in ortho_layers(model).values():
        layer.streams["default"].support.values.normal_()
    return model


class Probe:
    """A model, and what its answer says of the alpha that it ran under."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = small() if model is None else model
        self.x = torch.randn(2, 16)
        self.answers = {}
        for value in VALUES:
            with torch.no_grad(), libortho.alpha(self.model, value):
                self.answers[value] = self.model(self.x)

    def __call__(self, model: Callable[..., Any] | None = None) -> float | str:
        try:
            with torch.no_grad():
                answer = (model or self.model)(self.x)
        except AlphaContextError:
            return RAISED
        return next(v for v, known in self.answers.items() if torch.allclose(answer, known, atol=1e-5))

    def stream(self, value: float) -> Iterator[float | str]:
        with libortho.alpha(self.model, value):
            while True:
                yield self()


@pytest.fixture(params=[1.0, 0.0], ids=["on", "off"])
def probe(request: pytest.FixtureRequest) -> Probe:
    made = Probe()
    libortho.set_alpha(made.model, request.param)
    return made


def persistent(probe: Probe) -> float:
    return get_switch(probe.model).persistent["default"]  # type: ignore[return-value]


def unknown(probe: Probe) -> float | str:
    """What a call whose alpha is not known does: it is never on."""
    return RAISED if persistent(probe) else 0.0


def in_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join(timeout=30)
    return found[0]


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
    assert probe() == persistent(probe)
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
    assert [context.run(probe) for *_, context in results] == list(VALUES)
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


def test_the_thread_that_set_the_value_knows_it_beside_others(probe):
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with libortho.alpha(probe.model, 0.5):
            entered.set()
            leave.wait(timeout=30)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(timeout=30)
    assert probe() == persistent(probe)
    assert in_thread(probe) == unknown(probe)
    leave.set()
    thread.join(timeout=30)
    assert probe() == persistent(probe)


def test_a_thread_that_sets_the_value_knows_it(probe):
    def work() -> Any:
        libortho.set_alpha(probe.model, 0.5)
        return probe()

    with libortho.alpha(probe.model, 0.0):
        assert in_thread(work) == 0.5


# -- interrupts, copies, tracers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, ValueError])
@pytest.mark.parametrize("under", [True, False])
def test_an_interrupt_in_a_forward_pass_leaves_no_alpha_behind(probe, error, under):
    def interrupt(*_: Any) -> None:
        raise error

    hook = probe.model[1].register_forward_pre_hook(interrupt)
    libortho.set_alpha(probe.model, 0.0 if under else 1.0)
    with contextlib.suppress(error), libortho.alpha(probe.model, 1.0) if under else contextlib.nullcontext():
        probe.model(probe.x)
    hook.remove()
    layer = probe.model[0]
    for value in VALUES:
        libortho.set_alpha(probe.model, value)
        assert (probe(), probe(layer)) == (value, value)
        with libortho.alpha(probe.model, 1.0 - value):
            assert (probe(), probe(layer)) == (1.0 - value, 1.0 - value)


def test_a_context_inside_a_forward_pass_counts(probe):
    found = []

    def hook(*_: Any) -> None:
        with libortho.alpha(probe.model, 0.5):
            found.append(probe(probe.model[0]))
        found.append(probe(probe.model[0]))

    handle = probe.model[1].register_forward_pre_hook(hook)
    with libortho.alpha(probe.model, 1.0):
        probe.model(probe.x)
    handle.remove()
    assert found == [0.5, 1.0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_made_inside_a_context_has_its_alpha_or_is_refused(probe, duplicate):
    with libortho.alpha(probe.model, 0.0):
        assert probe(duplicate(probe.model)) == 0.0
    with libortho.alpha(probe.model, 1.0):
        if persistent(probe):
            assert probe(duplicate(probe.model)) == 1.0
        else:
            with pytest.raises(AlphaContextError, match="copied or pickled inside"):
                duplicate(probe.model)
    assert probe(duplicate(probe.model)) == persistent(probe)


TRACERS = {
    "jit": lambda m, x: torch.jit.trace(m, x),
    "jit of a layer": lambda m, x: torch.jit.trace(m[0], x),
    "make_fx": lambda m, x: make_fx(m)(x),
    "make_fx, fake": lambda m, x: make_fx(m, tracing_mode="fake")(x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
}


@pytest.mark.parametrize("tracer", list(TRACERS))
def test_what_would_freeze_an_alpha_is_refused(probe, tracer):
    with pytest.raises(AlphaContextError, match="would freeze the alpha"):
        TRACERS[tracer](probe.model, probe.x)
    assert probe() == persistent(probe)


def test_a_graph_of_another_process_finds_no_switch_by_accident(probe):
    numbers = {get_switch(copy.deepcopy(probe.model)).number for _ in range(20)}
    assert len(numbers) == 20
    assert min(numbers) > 2**40
    with pytest.raises(AlphaError, match="belongs to another process"):
        torch.ops.libortho.alpha(probe.x, 0, "default")


def test_a_second_head_over_the_same_layers_is_switched_too(probe):
    head = nn.Sequential(probe.model[0], nn.ReLU())
    libortho.set_alpha(head, 0.5)
    assert probe() == 0.5
    with libortho.alpha(head, 1.0):
        assert probe() == 1.0


def test_a_model_is_freed_when_nobody_needs_it(probe):
    import weakref

    gone = weakref.ref(probe.model)
    gc.disable()
    try:
        probe.model = None  # type: ignore[assignment]
        assert gone() is None
    finally:
        gc.enable()


# -- any of these, in any order ---------------------------------------------------------------------------------------

value = st.sampled_from(VALUES)
step = st.one_of(
    st.tuples(st.sampled_from(["open", "hand over", "interrupt", "set", "copy", "callback"]), value),
    st.tuples(st.sampled_from(["next", "close", "next elsewhere", "close elsewhere", "tasks"]), st.integers(0, 7)),
    st.tuples(st.sampled_from(["call", "worker", "fresh thread"]), st.none()),
)
program = st.recursive(
    st.lists(step, max_size=6),
    lambda inner: st.lists(st.one_of(step, st.tuples(st.just("block"), st.tuples(value, inner))), max_size=8),
    max_leaves=24,
)


class Run:
    """Carries a program out, and compares every answer with what may be answered."""

    def __init__(self, shared: Probe, start: float) -> None:
        self.probe = Probe.__new__(Probe)
        self.probe.__dict__ |= {**shared.__dict__, "model": copy.deepcopy(shared.model)}
        libortho.set_alpha(self.probe.model, start)
        self.standing = start
        self.open: list[tuple[Iterator[Any], float]] = []
        self.handed: list[tuple[Any, float]] = []
        self.copied: list[tuple[contextvars.Context, float]] = []
        self.pool = ThreadPoolExecutor(1)
        self.pool.submit(int).result()

    def expect(self, found: Any, *allowed: Any) -> None:
        assert found in allowed, (found, allowed)

    def run(self, steps: list[Any], inside: float | None = None) -> None:
        for name, argument in steps:
            getattr(self, "_" + name.replace(" ", "_"))(argument, inside)
            self._call(None, inside)

    def finish(self) -> None:
        for stream, _ in self.open:
            stream.close()  # type: ignore[attr-defined]
        for future, given in self.handed:
            self.expect(future.result(), given, 0.0, RAISED)
        for context, given in self.copied:
            self.expect(context.run(self.probe), given)
        self.pool.shutdown()
        assert self.probe() == self.standing
        for alpha in VALUES:
            with libortho.alpha(self.probe.model, alpha):
                assert self.probe() == alpha

    def _call(self, _: None, inside: float | None) -> None:
        if inside is not None:
            return self.expect(self.probe(), inside)
        suspended = [RAISED] if self.open and self.standing else []
        return self.expect(self.probe(), self.standing, *suspended)

    def _block(self, argument: tuple[float, list[Any]], inside: float | None) -> None:
        alpha, steps = argument
        with libortho.alpha(self.probe.model, alpha):
            self.run(steps, alpha)

    def _open(self, alpha: float, inside: float | None) -> None:
        stream = self.probe.stream(alpha)
        self.open.append((stream, alpha))
        self.expect(next(stream), alpha)

    def _pick(self, number: int) -> tuple[Iterator[Any], float] | None:
        return self.open[number % len(self.open)] if self.open else None

    def _next(self, number: int, inside: float | None) -> None:
        if (picked := self._pick(number)) is not None:
            self.expect(next(picked[0]), picked[1])

    def _next_elsewhere(self, number: int, inside: float | None) -> None:
        if (picked := self._pick(number)) is not None:
            self.expect(in_thread(lambda: next(picked[0])), picked[1])

    def _close(self, number: int, inside: float | None) -> None:
        if (picked := self._pick(number)) is not None:
            self.open.remove(picked)
            picked[0].close()  # type: ignore[attr-defined]

    def _close_elsewhere(self, number: int, inside: float | None) -> None:
        if (picked := self._pick(number)) is not None:
            self.open.remove(picked)
            in_thread(picked[0].close)  # type: ignore[attr-defined]

    def _hand_over(self, alpha: float, inside: float | None) -> None:
        with libortho.alpha(self.probe.model, alpha):
            self.handed.append((self.pool.submit(self.probe), alpha))
            self.copied.append((contextvars.copy_context(), alpha))

    def _worker(self, _: None, inside: float | None) -> None:
        self.expect(self.pool.submit(self.probe).result(), self.standing, 0.0, RAISED)

    def _fresh_thread(self, _: None, inside: float | None) -> None:
        self.expect(in_thread(self.probe), self.standing, 0.0, RAISED)

    def _callback(self, alpha: float, inside: float | None) -> None:
        def work() -> Any:
            with libortho.alpha(self.probe.model, alpha):
                return self.probe()

        self.expect(self.pool.submit(work).result(), alpha)

    def _interrupt(self, alpha: float, inside: float | None) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = self.probe.model[1].register_forward_pre_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt), libortho.alpha(self.probe.model, alpha):
            self.probe.model(self.probe.x)
        hook.remove()

    def _set(self, alpha: float, inside: float | None) -> None:
        libortho.set_alpha(self.probe.model, alpha)
        self.standing = alpha

    def _copy(self, alpha: float, inside: float | None) -> None:
        with libortho.alpha(self.probe.model, alpha):
            if alpha <= self.standing:
                assert self.probe(copy.deepcopy(self.probe.model)) == alpha
            else:
                with pytest.raises(AlphaContextError):
                    copy.deepcopy(self.probe.model)

    def _tasks(self, number: int, inside: float | None) -> None:
        async def work(alpha: float) -> None:
            with libortho.alpha(self.probe.model, alpha):
                for _ in range(2):
                    self.expect(self.probe(), alpha)
                    await asyncio.sleep(0)

        async def beside() -> None:
            for _ in range(3):
                known = self.standing if inside is None else inside
                self.expect(self.probe(), known, 0.0 if inside is None else known, RAISED if inside is None else known)
                await asyncio.sleep(0)

        async def main() -> None:
            await asyncio.gather(*(work(VALUES[(number >> i) % 3]) for i in range(3)), beside())

        asyncio.run(main())


@pytest.fixture(scope="module")
def shared() -> Probe:
    return Probe()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(steps=program, start=value)
def test_random_interleavings_know_their_alpha_or_refuse(shared, steps, start):
    run = Run(shared, start)
    run.run(steps)
    run.finish()
