"""The switch under interrupts, copies, tracers and second heads."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import os
import pickle
import random
import signal
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import libortho
from libortho.core.errors import AlphaContextError, AlphaError
from libortho.core.switch.alpha import get_switch
from libortho.core.switch.guard import Guard
from probe import VALUES, Probe, persistent

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


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_an_interrupt_while_a_block_is_entered_or_left_leaves_no_alpha_behind(start):
    probe = Probe()
    libortho.set_alpha(probe.model, start)
    rng, interrupted, before = random.Random(0), 0, signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(1500):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-6, 3e-4))
                for _ in range(20):
                    with libortho.alpha(probe.model, 1.0 - start):
                        pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert probe(probe.model[0]) == start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100
    with libortho.alpha(probe.model, 0.5):
        assert probe() == 0.5


def test_what_was_copied_during_a_forward_pass_has_an_alpha_of_its_own(probe):
    contexts = []
    handle = probe.model[1].register_forward_pre_hook(lambda *_: contexts.append(contextvars.copy_context()) or None)
    probe.model(probe.x)
    handle.remove()
    libortho.set_alpha(probe.model, 0.5)
    assert contexts[0].run(probe) == 0.5


def test_a_shallow_copy_runs_its_own_modules(probe):
    twin = copy.copy(probe.model)
    twin._modules = dict(twin._modules) | {"1": nn.Tanh()}
    with torch.no_grad(), libortho.alpha(probe.model, 0.5):
        assert torch.equal(twin(probe.x), probe.model(probe.x).tanh())
        expected = probe.model(probe.x).tanh()
    alpha = libortho.alpha(twin, 0.5)
    probe.model = None
    with torch.no_grad(), alpha:
        assert torch.equal(twin(probe.x), expected)


def test_a_forward_that_was_put_back_is_guarded_again(probe):
    del probe.model.forward  # as an offloading hook that was there before the split does when it goes
    assert probe() == persistent(probe)
    assert isinstance(probe.model.__dict__["forward"], Guard)
    with libortho.alpha(probe.model, [0.0, 1.0, 1.0]), pytest.raises(AlphaError, match="names 3 sequences"):
        probe.model(probe.x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_inside_a_block(probe):
    with libortho.alpha(probe.model, 1.0 - persistent(probe)):
        child = os.fork()
        if child == 0:
            os._exit(0 if probe(probe.model[0]) == 0.0 else 1)
    assert os.waitpid(child, 0)[1] == 0


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
