"""The switch under random interleavings of generators, threads, executors, tasks, copies and interrupts."""

import asyncio
import contextlib
import contextvars
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import libortho
from libortho.core.errors import AlphaContextError
from probe import RAISED, VALUES, Probe, in_thread

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
        for future, alpha in self.handed:
            self.expect(future.result(), alpha, 0.0, RAISED)
        for context, alpha in self.copied:
            self.expect(context.run(self.probe), alpha)
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
        here = threading.get_ident()

        def interrupt(*_: Any) -> None:
            if threading.get_ident() == here:  # and not in the worker
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


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.nightly)])
def test_random_interleavings_know_their_alpha_or_refuse(shared, count):
    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(steps=program, start=value)
    def interleaved(steps, start):
        run = Run(shared, start)
        run.run(steps)
        run.finish()

    interleaved()
