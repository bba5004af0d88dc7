"""The switch: values, scope, batches, caches, recomputation. A wrong alpha must raise, never run as 1."""

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import functools
import io
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TextIteratorStreamer,
)

import libortho
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.streams import Columns, OrthoStream
from libortho.core.switch.alpha import get_switch

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


@pytest.fixture
def two_streams(split_llama):
    """Streams ``default`` and ``hr``."""
    get_switch(split_llama).add_stream("hr", 1.0)
    for layer in ortho_layers(split_llama).values():
        index = torch.arange(8, dtype=torch.int32)
        layer.add_stream("hr", OrthoStream(Columns(index, torch.randn(8, layer.out_features))))
    return split_llama


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, value: Any = None, **inputs: Any) -> torch.Tensor:
    if value is None:
        return model(tokens, **inputs).logits
    with libortho.alpha(model, value):
        return model(tokens, **inputs).logits


def generate(model: Any, tokens: torch.Tensor, value: Any, **options: Any) -> torch.Tensor:
    with libortho.alpha(model, value):
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **GENERATE, **options)


def in_thread(target: Callable[[], Any]) -> tuple[threading.Thread, dict[str, Any]]:
    """A running thread whose result or exception ends up in the returned dictionary."""
    outcome: dict[str, Any] = {}

    def body() -> None:
        try:
            outcome["value"] = target()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=body)
    thread.start()
    return thread, outcome


def finish(thread: threading.Thread) -> None:
    thread.join(timeout=30)
    assert not thread.is_alive()


def outcome_in_thread(target: Callable[[], Any]) -> dict[str, Any]:
    thread, outcome = in_thread(target)
    finish(thread)
    return outcome


def void(_: Any) -> None:
    """A hook that returns something would replace the output."""


def base_alone(model: nn.Module) -> nn.Module:
    """The model with its ortho streams physically removed."""
    bare = copy.deepcopy(model)
    for layer in ortho_layers(bare).values():
        layer.streams.clear()
    return bare


def merged(model: nn.Module, share: float | dict[str, float]) -> nn.Module:
    """The model with plain dense layers of the weight that ``share`` means."""
    dense = copy.deepcopy(model)
    for name, layer in ortho_layers(dense).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data.copy_(layer.dense_weight(share))
        dense.set_submodule(name, linear)
    return dense


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_alpha_scales_the_ortho_stream(split_llama, tokens, share):
    torch.testing.assert_close(
        logits(split_llama, tokens, share), logits(merged(split_llama, share), tokens), atol=1e-4, rtol=1e-4
    )


def test_alpha_matters_in_these_tests(two_streams, tokens):
    values = [{"default": 1.0}, {"hr": 1.0}, {"default": 1.0, "hr": 1.0}, 0.0, 0.5]
    outputs = [logits(two_streams, tokens, value) for value in values]
    for i, first in enumerate(outputs):
        assert all((first - second).abs().max() > 0.1 for second in outputs[i + 1 :])


def test_everything_is_on_after_a_split(split_llama, tokens):
    assert torch.equal(logits(split_llama, tokens), logits(split_llama, tokens, 1.0))


@pytest.mark.parametrize("structure", ["columns", "unstructured"])
@pytest.mark.parametrize("bits", [8, 4, None])
def test_alpha_zero_is_bitwise_the_base_alone(tiny_llama, tokens, structure, bits):
    libortho.split(tiny_llama, libortho.SplitConfig(structure=structure, bits=bits, ratio=0.1, rank_ratio=0.9))
    assert torch.equal(logits(tiny_llama, tokens, 0.0), logits(base_alone(tiny_llama), tokens))


@pytest.mark.parametrize("value", [0, 0.0, -0.0, {"default": 0.0}, {}, [0.0, 0.0, 0.0], torch.zeros(3)])
def test_alpha_zero_does_not_call_the_stream(split_llama, tokens, monkeypatch, value):
    calls: list[Any] = []
    monkeypatch.setattr(OrthoStream, "forward", lambda self, y, x, alpha: calls.append(alpha) or y)
    libortho.set_alpha(split_llama, 0.0)
    if value == {}:
        logits(split_llama, tokens, value)
    else:
        libortho.set_alpha(split_llama, value)
        logits(split_llama, tokens)
    off = len(calls)
    logits(split_llama, tokens, 1.0)
    assert (off, len(calls)) == (0, 2)


def test_only_the_streams_that_are_on_are_called(two_streams, tokens, monkeypatch):
    calls: list[OrthoStream] = []
    monkeypatch.setattr(OrthoStream, "forward", lambda self, y, x, alpha: calls.append(self) or y)
    logits(two_streams, tokens, {"hr": 0.5})
    assert calls == [layer.streams["hr"] for layer in ortho_layers(two_streams).values()]


def test_streams_add_up(two_streams, tokens):
    shares = {"default": 0.3, "hr": 0.8}
    torch.testing.assert_close(
        logits(two_streams, tokens, shares), logits(merged(two_streams, shares), tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], (1, 0, 1), torch.tensor([0.2, 1.0, 0.0])])
def test_a_mixed_batch_equals_separate_runs(split_llama, tokens, values):
    mixed = logits(split_llama, tokens, values)
    for row, value in enumerate(values):
        alone = logits(split_llama, tokens[row : row + 1], float(value))
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_mixed_batch_with_a_value_per_stream(two_streams, tokens):
    hr = [1.0, 0.0, 0.5]
    mixed = logits(two_streams, tokens, {"hr": hr, "default": 0.25})
    for row, value in enumerate(hr):
        alone = logits(two_streams, tokens[row : row + 1], {"hr": value, "default": 0.25})
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_value_per_sequence_survives_padding(split_llama, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    mixed = logits(split_llama, tokens, [1.0, 0.0, 1.0], attention_mask=mask)
    alone = logits(split_llama, tokens[:1], 1.0, attention_mask=mask[:1])
    torch.testing.assert_close(mixed[:1, 3:], alone[:, 3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [torch.tensor(0.5), np.float64(0.5), {"default": torch.tensor([0.5, 0.5, 0.5])}])
def test_numbers_of_other_libraries(split_llama, tokens, value):
    torch.testing.assert_close(logits(split_llama, tokens, value), logits(split_llama, tokens, 0.5))


def test_gpt2_takes_a_value_per_sequence(tiny_gpt2, tokens):
    libortho.split(tiny_gpt2, libortho.SplitConfig(ratio=0.1, bits=4))
    mixed = logits(tiny_gpt2, tokens, [0.0, 1.0, 0.5])
    alone = logits(tiny_gpt2, tokens[2:], 0.5)
    torch.testing.assert_close(mixed[2:], alone, atol=1e-4, rtol=1e-4)
    assert (mixed[0] - logits(tiny_gpt2, tokens[:1], 1.0)[0]).abs().max() > 0.01


# -- bad values -------------------------------------------------------------------------------------------------------

BAD = [
    math.nan,
    math.inf,
    -math.inf,
    -0.1,
    1.0001,
    10**400,
    True,
    "1.0",
    b"\x01",
    None,
    1j,
    object,
    [],
    [0.5, math.nan, 0.5],
    [0.5, True, 0.5],
    [[0.5], [0.5]],
    ["0", "1"],
    torch.zeros(2, 2),
    torch.tensor([0.0, math.nan]),
    torch.tensor(True),
    torch.tensor([]),
    {"nobody": 1.0},
    {"default": 2.0},
    {"default": {"default": 1.0}},
    {"default": 0.5, "nobody": 0.5},
    {1: 0.5},
]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_bad_values_are_refused_and_change_nothing(split_llama, tokens, value):
    libortho.set_alpha(split_llama, 0.25)
    before = logits(split_llama, tokens)
    with pytest.raises(libortho.AlphaError):
        libortho.set_alpha(split_llama, value)
    with pytest.raises(libortho.AlphaError), libortho.alpha(split_llama, value):
        pass
    assert torch.equal(logits(split_llama, tokens), before)
    outcome = outcome_in_thread(lambda: logits(split_llama, tokens))
    assert torch.equal(outcome["value"], before)


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.0], [1.0] * 4, [0.5] * 6])
def test_a_wrong_batch_length_is_refused(split_llama, tokens, values):
    with pytest.raises(libortho.AlphaError, match=f"names {len(values)} sequences, the batch has 3"):
        logits(split_llama, tokens, values)
    assert torch.equal(logits(split_llama, tokens), logits(split_llama, tokens, 1.0))


def test_a_multiple_of_the_batch_is_not_taken_for_beams(split_llama, tokens):
    with pytest.raises(libortho.AlphaError, match="names 1 sequences, the batch has 3"):
        logits(split_llama, tokens, [0.5])


def test_lengths_that_differ_between_streams_are_refused(two_streams):
    with pytest.raises(libortho.AlphaError, match="different lengths"):
        libortho.set_alpha(two_streams, {"hr": [1.0, 0.0], "default": [1.0, 0.0, 1.0]})


def test_values_for_a_layer_called_alone_need_the_batch(split_llama):
    layer = next(iter(ortho_layers(split_llama).values()))
    with libortho.alpha(split_llama, [0.0, 1.0]):
        assert layer(torch.randn(2, 5, 128)).shape == (2, 5, 64)
        for shape in [(3, 5, 128), (128,)]:
            with pytest.raises(libortho.AlphaError, match="need the batch as first dimension"):
                layer(torch.randn(shape))


def test_extrapolation_must_be_asked_for(split_llama, tokens):
    with pytest.raises(libortho.AlphaError, match="allow_extrapolation"):
        libortho.set_alpha(split_llama, 1.5)
    libortho.set_alpha(split_llama, 1.5, allow_extrapolation=True)
    expected = logits(merged(split_llama, 1.5), tokens)
    torch.testing.assert_close(logits(split_llama, tokens), expected, atol=1e-4, rtol=1e-4)
    for value in (-0.5, math.inf, math.nan, 10**400):
        with pytest.raises(libortho.AlphaError):
            libortho.set_alpha(split_llama, value, allow_extrapolation=True)


@pytest.mark.parametrize("call", [libortho.set_alpha, lambda m, v: libortho.alpha(m, v).__enter__()])
def test_a_model_without_streams_has_no_switch(tiny_llama, call):
    with pytest.raises(libortho.AlphaError, match="no ortho stream"):
        call(tiny_llama, 0.0)


def test_parts_split_apart_cannot_be_switched_as_one(tiny_llama):
    for layer in tiny_llama.model.layers:
        libortho.split(layer, libortho.SplitConfig(use_low_rank=False))
    with pytest.raises(libortho.AlphaError, match="more than one switch"):
        libortho.set_alpha(tiny_llama, 0.0)
    libortho.set_alpha(tiny_llama.model.layers[0], 0.0)


# -- scope ------------------------------------------------------------------------------------------------------------


def test_setting_a_mapping_leaves_other_streams(two_streams, tokens):
    libortho.set_alpha(two_streams, {"hr": 0.5})
    assert torch.equal(logits(two_streams, tokens), logits(two_streams, tokens, {"hr": 0.5, "default": 1.0}))
    libortho.set_alpha(two_streams, {"default": 0.0})
    assert torch.equal(logits(two_streams, tokens), logits(two_streams, tokens, {"hr": 0.5, "default": 0.0}))


def test_a_context_turns_unnamed_streams_off(two_streams, tokens):
    expected = logits(two_streams, tokens, {"hr": 1.0, "default": 0.0})
    assert torch.equal(logits(two_streams, tokens, {"hr": 1.0}), expected)
    assert torch.equal(logits(two_streams, tokens, {}), logits(base_alone(two_streams), tokens))


def test_contexts_nest_and_end(split_llama, tokens):
    at = {value: logits(split_llama, tokens, value) for value in (0.0, 0.5, 1.0)}
    libortho.set_alpha(split_llama, 0.5)
    with libortho.alpha(split_llama, 1.0):
        with libortho.alpha(split_llama, 0.0):
            assert torch.equal(logits(split_llama, tokens), at[0.0])
        assert torch.equal(logits(split_llama, tokens), at[1.0])
    assert torch.equal(logits(split_llama, tokens), at[0.5])


def test_setting_inside_a_context_holds_after_it(split_llama, tokens):
    with libortho.alpha(split_llama, 1.0):
        libortho.set_alpha(split_llama, 0.0)
        assert torch.equal(logits(split_llama, tokens), logits(split_llama, tokens, 1.0))
    assert torch.equal(logits(split_llama, tokens), logits(split_llama, tokens, 0.0))


def test_a_context_ends_with_an_exception(split_llama, tokens):
    with pytest.raises(KeyError), libortho.alpha(split_llama, 0.0):
        raise KeyError
    assert torch.equal(logits(split_llama, tokens), logits(split_llama, tokens, 1.0))


@pytest.mark.parametrize("where", ["layer", "output"])
def test_an_exception_inside_forward_leaves_the_switch_usable(split_llama, tokens, where):
    module = next(iter(ortho_layers(split_llama).values())) if where == "layer" else split_llama.lm_head
    expected = {value: logits(split_llama, tokens, value) for value in (0.0, 0.5)}

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(split_llama, tokens, 0.0)
    handle.remove()
    libortho.set_alpha(split_llama, 0.5)
    layer, x = next(iter(ortho_layers(split_llama).values())), torch.randn(2, 128)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight(0.5).T)
    assert torch.equal(logits(split_llama, tokens), expected[0.5])
    assert torch.equal(logits(split_llama, tokens, 0.0), expected[0.0])


def test_two_models_do_not_share_a_context(split_llama, tokens):
    other = copy.deepcopy(split_llama)
    with libortho.alpha(split_llama, 0.0):
        assert torch.equal(logits(other, tokens), logits(other, tokens, 1.0))


def test_a_copy_has_a_switch_of_its_own(split_llama, tokens):
    libortho.set_alpha(split_llama, 0.5)
    other = copy.deepcopy(split_llama)
    half = logits(split_llama, tokens)
    assert torch.equal(logits(other, tokens), half)
    libortho.set_alpha(split_llama, 0.0)
    assert torch.equal(logits(other, tokens), half)
    libortho.set_alpha(other, 1.0)
    assert torch.equal(logits(split_llama, tokens), logits(base_alone(split_llama), tokens))


def test_a_wrapped_model_is_switched_through_its_wrapper(split_llama, tokens):
    wrapper = nn.ModuleDict({"inner": split_llama})
    libortho.set_alpha(wrapper, 0.0)
    assert torch.equal(logits(split_llama, tokens), logits(base_alone(split_llama), tokens))


def test_a_pickled_model_keeps_its_alpha(split_llama, tokens):
    libortho.set_alpha(split_llama, 0.5)
    buffer = io.BytesIO()
    torch.save(split_llama, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(other, tokens), logits(split_llama, tokens))
    libortho.set_alpha(other, 0.0)
    assert torch.equal(logits(other, tokens), logits(base_alone(split_llama), tokens))


# -- threads and tasks ------------------------------------------------------------------------------------------------


def test_threads_with_own_contexts_never_see_each_other(split_llama, tokens):
    values = [0.0, 0.3, 1.0]
    expected = {value: logits(split_llama, tokens, value) for value in values}
    barrier = threading.Barrier(len(values))

    def work(value: float) -> list[torch.Tensor]:
        with libortho.alpha(split_llama, value):
            results = []
            for _ in range(5):
                barrier.wait(timeout=30)
                results.append(logits(split_llama, tokens))
            barrier.wait(timeout=30)
        return results

    running = [(value, *in_thread(lambda value=value: work(value))) for value in values]
    for value, thread, outcome in running:
        finish(thread)
        assert all(torch.equal(result, expected[value]) for result in outcome["value"])


def test_a_layer_reads_its_own_threads_value_in_mid_forward(split_llama, tokens):
    """Both threads stand between the first and the second split layer at the same time."""
    expected = {value: logits(split_llama, tokens, value) for value in (0.0, 1.0)}
    barrier = threading.Barrier(2)
    first = next(iter(ortho_layers(split_llama).values()))
    first.register_forward_hook(lambda *_: void(barrier.wait(timeout=30)))
    running = [(v, *in_thread(lambda v=v: logits(split_llama, tokens, v))) for v in (0.0, 1.0)]
    for value, thread, outcome in running:
        finish(thread)
        assert torch.equal(outcome["value"], expected[value])


def test_tasks_with_own_contexts_never_see_each_other(split_llama, tokens):
    expected = {value: logits(split_llama, tokens, value) for value in (0.0, 0.5, 1.0)}

    async def work(value: float) -> None:
        with libortho.alpha(split_llama, value):
            for _ in range(4):
                await asyncio.sleep(0)
                assert torch.equal(logits(split_llama, tokens), expected[value])

    async def main() -> None:
        await asyncio.gather(*(work(value) for value in expected))

    asyncio.run(main())


def test_a_task_inherits_the_context_it_was_made_in(split_llama, tokens):
    expected = logits(split_llama, tokens, 0.0)

    async def work() -> torch.Tensor:
        await asyncio.sleep(0)
        return logits(split_llama, tokens)

    async def main() -> list[torch.Tensor]:
        with libortho.alpha(split_llama, 0.0):
            task = asyncio.create_task(work())
            offloaded = await asyncio.to_thread(logits, split_llama, tokens)
        return [await task, offloaded]

    assert all(torch.equal(result, expected) for result in asyncio.run(main()))


def test_a_task_beside_a_context_raises(split_llama, tokens):
    async def inside(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with libortho.alpha(split_llama, 0.0):
            entered.set()
            await leave.wait()

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, leave))
        await entered.wait()
        with pytest.raises(libortho.AlphaContextError):
            logits(split_llama, tokens)
        leave.set()
        await task

    asyncio.run(main())
    assert torch.equal(logits(split_llama, tokens), logits(split_llama, tokens, 1.0))


def test_a_thread_started_inside_a_context_raises(split_llama, tokens):
    with libortho.alpha(split_llama, 0.0):
        outcome = outcome_in_thread(lambda: logits(split_llama, tokens))
    assert isinstance(outcome["error"], libortho.AlphaContextError)


def test_a_thread_that_outlives_its_context_raises(split_llama, tokens):
    go = threading.Event()

    def late() -> torch.Tensor:
        assert go.wait(timeout=30)
        return logits(split_llama, tokens)

    with libortho.alpha(split_llama, 0.0):
        thread, outcome = in_thread(late)
    go.set()
    finish(thread)
    assert isinstance(outcome["error"], libortho.AlphaContextError)


@pytest.mark.parametrize("outlive", [False, True])
def test_a_thread_that_copies_the_context_sees_its_alpha(split_llama, tokens, outlive):
    go = threading.Event()

    def late() -> torch.Tensor:
        assert go.wait(timeout=30)
        return logits(split_llama, tokens)

    with libortho.alpha(split_llama, 0.0):
        context = contextvars.copy_context()
        thread, outcome = in_thread(lambda: context.run(late))
        if not outlive:
            go.set()
            finish(thread)
    go.set()
    finish(thread)
    assert torch.equal(outcome["value"], logits(split_llama, tokens, 0.0))


def test_a_thread_started_inside_a_context_may_enter_its_own(split_llama, tokens):
    with libortho.alpha(split_llama, 0.0):
        outcome = outcome_in_thread(lambda: logits(split_llama, tokens, 0.5))
    assert torch.equal(outcome["value"], logits(split_llama, tokens, 0.5))


ALONE = """
import threading
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import libortho
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = libortho.split(LlamaForCausalLM(config).eval(), libortho.SplitConfig(bits=4, ratio=0.1, structure="columns"))
libortho.set_alpha(model, 0.5)
with libortho.alpha(model, 0.0):
    pass
found = []
thread = threading.Thread(target=lambda: found.append(model(torch.tensor([[1, 2, 3]])).logits))
thread.start()
thread.join()
with libortho.alpha(model, 0.5):
    assert torch.equal(found[0], model(torch.tensor([[1, 2, 3]])).logits)
"""


def test_threads_outside_any_context_use_the_persistent_value():
    # A process of its own: a thread of the test runner that lived during the context could have been handed its work.
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class _Tokenizer:
    """What a streamer needs of a tokenizer: numbers as words."""

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids) + " "


def stream_words(model: Any, tokens: torch.Tensor, run: Callable[..., Any]) -> tuple[list[int], dict[str, Any]]:
    streamer = TextIteratorStreamer(_Tokenizer(), skip_prompt=True, timeout=30)  # type: ignore[arg-type]

    def body() -> None:
        try:
            run(model.generate, tokens[:1], attention_mask=torch.ones(1, 6), streamer=streamer, **GENERATE)
        finally:
            streamer.end()

    thread, outcome = in_thread(body)
    text = "".join(streamer)
    finish(thread)
    return [int(word) for word in text.split()], outcome


def test_a_text_streamer_thread_sees_the_context_or_raises(split_llama, tokens):
    expected = generate(split_llama, tokens[:1], 0.0)[0, 6:].tolist()
    assert expected != generate(split_llama, tokens[:1], 1.0)[0, 6:].tolist()
    with libortho.alpha(split_llama, 0.0):
        words, _ = stream_words(split_llama, tokens, contextvars.copy_context().run)
        nothing, outcome = stream_words(split_llama, tokens, lambda f, *args, **kwargs: f(*args, **kwargs))
    assert words == expected
    assert nothing == []
    assert isinstance(outcome["error"], libortho.AlphaContextError)


# -- gradient checkpointing -------------------------------------------------------------------------------------------


def gradients(model: Any, tokens: torch.Tensor, value: Any) -> torch.Tensor:
    """Gradient of the loss at the first up projection; backward runs after the context."""
    model.train()
    model.zero_grad()
    with libortho.alpha(model, value):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return model.model.layers[0].mlp.up_proj.weight.grad.clone()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, [0.0, 1.0, 0.5]])
def test_checkpointed_gradients_are_those_of_the_alpha(split_llama, tokens, use_reentrant, value):
    split_llama.enable_input_require_grads()
    expected = gradients(split_llama, tokens, value)
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: list[int] = []
    split_llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(split_llama, tokens, value), expected)
    assert len(calls) == 2  # it was recomputed


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_inside_another_context_uses_the_forward_alpha(split_llama, tokens, use_reentrant):
    split_llama.enable_input_require_grads()
    expected = gradients(split_llama, tokens, 0.0)
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    split_llama.zero_grad()
    with libortho.alpha(split_llama, 0.0):
        loss = split_llama(tokens, labels=tokens).loss
    with libortho.alpha(split_llama, 1.0):
        loss.backward()
    torch.testing.assert_close(split_llama.model.layers[0].mlp.up_proj.weight.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("values", [(0.2, 0.9), (0.9, 0.2)])
def test_two_alphas_in_one_checkpointed_backward_are_right_or_refused(split_llama, tokens, use_reentrant, values):
    def backward() -> torch.Tensor:
        split_llama.zero_grad()
        losses = []
        for value in values:
            with libortho.alpha(split_llama, value):
                losses.append(split_llama(tokens, labels=tokens).loss)
        (losses[0] - 3 * losses[1]).backward()
        return split_llama.model.layers[0].mlp.up_proj.weight.grad.clone()

    split_llama.train()
    split_llama.enable_input_require_grads()
    expected = backward()
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with pytest.raises(libortho.AlphaContextError, match="more than one alpha"):
        backward()
    split_llama.gradient_checkpointing_disable()
    torch.testing.assert_close(backward(), expected)


def test_activations_of_another_pass_are_recomputed_under_its_alpha(split_llama, tokens):
    """A hook keeps what a layer made under one alpha, and one backward goes through it and a pass under another."""

    def gradient() -> torch.Tensor:
        split_llama.zero_grad()
        kept: list[torch.Tensor] = []
        layer = split_llama.model.layers[0]
        handle = layer.mlp.register_forward_hook(lambda _, __, output: void(kept.append(output)))
        for value in (0.5, 1.0):
            with libortho.alpha(split_llama, value):
                loss = split_llama(tokens, labels=tokens).loss
        handle.remove()
        (kept[0].square().sum() + loss).backward()
        return layer.mlp.up_proj.weight.grad.clone()

    split_llama.train()
    split_llama.enable_input_require_grads()
    expected = gradient()
    split_llama.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(), expected)


def test_a_checkpointed_submodule_called_alone_raises_in_backward(split_llama, tokens):
    split_llama.train()
    split_llama.gradient_checkpointing_enable({"use_reentrant": False})
    layer = split_llama.model.layers[0]
    x = torch.randn(2, 6, 64, requires_grad=True)
    with libortho.alpha(split_llama, 0.0):
        hidden = checkpoint(layer.mlp, x, use_reentrant=False)
    with pytest.raises(libortho.AlphaContextError, match="forward pass is not on record"):
        hidden.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_body_called_alone_is_recomputed_under_its_alpha(split_llama, tokens, use_reentrant):
    def gradient() -> torch.Tensor:
        split_llama.zero_grad()
        with libortho.alpha(split_llama, 0.5):
            hidden = split_llama.model(tokens).last_hidden_state
        hidden.square().sum().backward()
        return split_llama.model.layers[0].mlp.up_proj.weight.grad.clone()

    split_llama.train()
    split_llama.enable_input_require_grads()
    expected = gradient()
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradient(), expected)


def test_recorded_alphas_are_dropped_after_backward(split_llama, tokens):
    gradients(split_llama, tokens, 0.5)
    assert not get_switch(split_llama)._recompute


# -- key-value caches -------------------------------------------------------------------------------------------------


def prefill(model: nn.Module, tokens: torch.Tensor, value: Any) -> DynamicCache:
    cache = DynamicCache()
    logits(model, tokens[:, :4], value, past_key_values=cache)
    return cache


@pytest.mark.parametrize("value", [0.0, 0.5, [1.0, 0.0, 0.5]])
def test_a_cache_continued_under_its_alpha_equals_no_cache(split_llama, tokens, value):
    cache = prefill(split_llama, tokens, value)
    continued = logits(split_llama, tokens[:, 4:], value, past_key_values=cache)
    torch.testing.assert_close(continued, logits(split_llama, tokens, value)[:, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("first", "then"), [(1.0, 0.0), (0.0, 1.0), (0.5, [0.5] * 3), ([1.0, 0.0, 1.0], [1.0, 1.0, 0.0]), (1.0, None)]
)
@pytest.mark.parametrize("positional", [False, True])
def test_a_cache_continued_under_another_alpha_raises(split_llama, tokens, first, then, positional):
    libortho.set_alpha(split_llama, 0.25)
    cache = prefill(split_llama, tokens, first)
    args, kwargs = ((None, None, cache), {}) if positional else ((), {"past_key_values": cache})
    other = contextlib.nullcontext() if then is None else libortho.alpha(split_llama, then)
    with other, pytest.raises(libortho.AlphaContextError, match="one request, one alpha"):
        split_llama(tokens[:, 4:], *args, **kwargs)
    assert cache.get_seq_length() == 4


def test_the_models_own_cache_is_stamped_too(split_llama, tokens):
    with libortho.alpha(split_llama, 0.0), torch.no_grad():
        cache = split_llama(tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(libortho.AlphaContextError):
        logits(split_llama, tokens[:, 4:], 1.0, past_key_values=cache)
    assert logits(split_llama, tokens[:, 4:], 0.0, past_key_values=cache).shape[1] == 2


def test_a_copied_cache_keeps_its_alpha(split_llama, tokens):
    cache = copy.deepcopy(prefill(split_llama, tokens, 0.0))
    with pytest.raises(libortho.AlphaContextError):
        logits(split_llama, tokens[:, 4:], 1.0, past_key_values=cache)


def test_an_unknown_cache_raises(tiny_llama, tokens):
    cache = prefill(tiny_llama, tokens, None)
    libortho.split(tiny_llama)
    with pytest.raises(libortho.AlphaContextError, match="alpha is unknown"):
        logits(tiny_llama, tokens[:, 4:], 0.0, past_key_values=cache)


def test_a_cache_emptied_again_takes_a_new_alpha(split_llama, tokens):
    cache = prefill(split_llama, tokens, 0.0)
    cache.crop(-4)
    result = logits(split_llama, tokens, 1.0, past_key_values=cache)
    torch.testing.assert_close(result, logits(split_llama, tokens, 1.0))
    with pytest.raises(libortho.AlphaContextError):
        logits(split_llama, tokens, 0.0, past_key_values=cache)


def test_a_cache_from_a_failed_forward_keeps_its_alpha(split_llama, tokens):
    cache = DynamicCache()
    handle = split_llama.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(split_llama, tokens[:, :4], 1.0, past_key_values=cache)
    handle.remove()
    with pytest.raises(libortho.AlphaContextError, match=r"was computed under alpha default=1\.0"):
        logits(split_llama, tokens[:, 4:], 0.0, past_key_values=cache)


# -- generation -------------------------------------------------------------------------------------------------------


def test_greedy_generation_with_mixed_alphas_equals_separate_runs(split_llama, tokens):
    values = [1.0, 0.0, 0.5]
    mixed = generate(split_llama, tokens, values, do_sample=False)
    assert mixed.shape == (3, 12)
    for row, value in enumerate(values):
        assert torch.equal(mixed[row], generate(split_llama, tokens[row : row + 1], value, do_sample=False)[0])
    assert not torch.equal(mixed[1], generate(split_llama, tokens[1:2], 1.0, do_sample=False)[0])


def test_beam_search_with_mixed_alphas_equals_separate_runs(split_llama, tokens):
    values, options = [1.0, 0.0, 0.5], {"num_beams": 3, "num_return_sequences": 2}
    mixed = generate(split_llama, tokens, values, **options)
    assert mixed.shape == (6, 12)
    for row, value in enumerate(values):
        alone = generate(split_llama, tokens[row : row + 1], value, **options)
        assert torch.equal(mixed[2 * row : 2 * row + 2], alone)


def test_returned_sequences_share_their_prompts_alpha(split_llama, tokens):
    options = {"num_return_sequences": 4, "do_sample": True, "top_k": 1}
    mixed = generate(split_llama, tokens[:2], [0.0, 1.0], **options)
    alone = [generate(split_llama, tokens[row : row + 1], float(row), do_sample=False)[0] for row in (0, 1)]
    assert not torch.equal(alone[0][6:], alone[1][6:])
    for row in range(8):
        assert torch.equal(mixed[row], alone[row // 4])


def test_generation_under_a_persistent_value_per_sequence(split_llama, tokens):
    libortho.set_alpha(split_llama, [0.0, 0.5, 1.0])
    mask = torch.ones_like(tokens)
    persistent = split_llama.generate(tokens, attention_mask=mask, do_sample=False, **GENERATE)
    assert torch.equal(persistent, generate(split_llama, tokens, [0.0, 0.5, 1.0], do_sample=False))
    with pytest.raises(libortho.AlphaError):
        split_llama.generate(tokens[:2], attention_mask=mask[:2], **GENERATE)


def test_generation_from_a_shared_prefix_cache_needs_its_alpha(split_llama, tokens):
    prompt = tokens[:1]
    with libortho.alpha(split_llama, 1.0), torch.no_grad():
        prefix = split_llama(prompt[:, :4], use_cache=True).past_key_values
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **GENERATE}
    with libortho.alpha(split_llama, 1.0):
        continued = split_llama.generate(prompt, past_key_values=copy.deepcopy(prefix), **options)
    assert torch.equal(continued, generate(split_llama, prompt, 1.0, do_sample=False))
    with libortho.alpha(split_llama, 0.0), pytest.raises(libortho.AlphaContextError):
        split_llama.generate(prompt, past_key_values=copy.deepcopy(prefix), **options)


def test_embeddings_as_input(split_llama, tokens):
    values = [0.0, 1.0, 0.5]
    embedded = split_llama.get_input_embeddings()(tokens)
    with libortho.alpha(split_llama, values), torch.no_grad():
        result = split_llama(inputs_embeds=embedded).logits
    torch.testing.assert_close(result, logits(split_llama, tokens, values))


def test_every_split_layer_reads_one_switch(split_llama):
    switches = {id(m.switch) for m in split_llama.modules() if isinstance(m, OrthoLinear)}
    assert switches == {id(get_switch(split_llama))}


def test_per_token_values_made_in_inference_mode_serve_a_later_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    libortho.split(model, libortho.SplitConfig(target_modules="0", use_low_rank=False, structure="columns", ratio=0.2))
    libortho.set_alpha(model, [1.0, 0.5])
    x = torch.randn(2, 3, 16)
    with torch.inference_mode():
        model(x)
    model(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_a_switch_is_found_in_a_tree_with_a_cycle():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    model[0].back = model
    with pytest.raises(libortho.AlphaError, match="no ortho stream"):
        libortho.set_alpha(model, 0.0)


# -- layers that see all tokens in one dimension ----------------------------------------------------------------------

SPLIT = libortho.SplitConfig(
    bits=4, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.1, structure="columns", value_dtype="float32"
)


@pytest.fixture
def split_opt():
    """OPT's feed-forward layers are given (batch * tokens, features)."""
    config = OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=64, init_std=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return libortho.split(OPTForCausalLM(config).eval(), SPLIT)


def assert_separate(model: nn.Module, tokens: torch.Tensor, values: list[float], **inputs: Any) -> None:
    mixed = logits(model, tokens, values, **inputs)
    for row, value in enumerate(values):
        torch.testing.assert_close(mixed[row], logits(model, tokens, value, **inputs)[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [6, 3, 1])  # also as many tokens as sequences
def test_flattened_tokens_take_their_sequences_value(split_opt, tokens, width):
    assert_separate(split_opt, tokens[:, :width], [1.0, 0.0, 0.5], use_cache=False)
    on, off = logits(split_opt, tokens, 1.0), logits(split_opt, tokens, 0.0)
    assert (on - off).abs().max() > 0.1


def test_flattened_tokens_of_padding_embeddings_and_caches(split_opt, tokens):
    values = [1.0, 0.0, 0.5]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    assert_separate(split_opt, tokens, values, attention_mask=mask, use_cache=False)
    embedded = split_opt.get_input_embeddings()(tokens)
    with libortho.alpha(split_opt, values), torch.no_grad():
        result = split_opt(inputs_embeds=embedded, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(result, logits(split_opt, tokens, values))
    cache = prefill(split_opt, tokens, values)
    continued = logits(split_opt, tokens[:, 4:], values, past_key_values=cache)
    torch.testing.assert_close(continued, logits(split_opt, tokens, values)[:, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_with_flattened_tokens_equals_separate_runs(split_opt, tokens, options):
    values = [1.0, 0.0, 0.5]
    mixed = generate(split_opt, tokens, values, **options)
    each = len(mixed) // 3
    for row, value in enumerate(values):
        alone = generate(split_opt, tokens[row : row + 1], value, **options)
        assert torch.equal(mixed[each * row : each * (row + 1)], alone)


def test_flattened_tokens_are_recomputed_under_their_values(split_opt, tokens):
    def gradient(*batches: torch.Tensor) -> torch.Tensor:
        split_opt.zero_grad()
        with libortho.alpha(split_opt, [0.0, 1.0, 0.5]):
            loss = sum(split_opt(t, labels=t).loss for t in batches)
        loss.backward()
        return split_opt.model.decoder.layers[0].fc1.weight.grad.clone()

    split_opt.eval()  # OPT drops layers out
    split_opt.enable_input_require_grads()
    expected, of_two_lengths = gradient(tokens), gradient(tokens, tokens[:, :4])
    for layer in split_opt.model.decoder.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    torch.testing.assert_close(gradient(tokens), expected)
    torch.testing.assert_close(gradient(tokens, tokens[:, :4]), of_two_lengths)


def test_what_a_row_belongs_to_is_never_guessed(split_opt, tokens):
    """A row of two tokens is no batch of two sequences, though its layers see (2, features)."""
    layer = next(iter(ortho_layers(split_opt).values()))
    with libortho.alpha(split_opt, [1.0, 0.0]):
        with pytest.raises(libortho.AlphaError, match="names 2 sequences, the batch has 1"):
            split_opt.model(tokens[:1, :2])
        with pytest.raises(libortho.AlphaError, match="call that model"):
            layer(torch.randn(2, layer.in_features))
        assert layer(torch.randn(2, 3, layer.in_features)).shape == (2, 3, layer.out_features)
    with libortho.alpha(split_opt, 1.0):
        split_opt.model(tokens[:1, :2])


class Routed(nn.Module):
    """A mixture of two experts without fused weights; the first sees every token, the last tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert = nn.Linear(32, 32)
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        order = torch.arange(len(flat)).flip(0)
        return (self.shared_expert(flat) + self.experts[0](flat[order])[order]).view_as(x)


def test_an_expert_that_sees_every_token_in_another_order_is_refused():
    config = dataclasses.replace(SPLIT, target_modules="all-linear")
    x = torch.randn(2, 3, 32)
    for pattern, right in (("re:shared.*", True), ("all-linear", False)):
        model = libortho.split(Routed(), dataclasses.replace(config, target_modules=pattern))
        with libortho.alpha(model, [1.0, 0.0]):
            if not right:
                with pytest.raises(libortho.AlphaError, match="an order of its own"):
                    model(x)
                continue
            mixed = model(x)
        for row, value in enumerate((1.0, 0.0)):
            with libortho.alpha(model, value):
                torch.testing.assert_close(mixed[row], model(x)[row])


def test_a_state_of_one_size_is_a_cache_too(tokens):
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, initializer_range=0.2, pad_token_id=0)
    model: Any = libortho.split(MambaForCausalLM(config).eval(), dataclasses.replace(SPLIT, target_modules="out_proj"))
    with libortho.alpha(model, 0.0), torch.no_grad():
        output = model(tokens[:, :4], use_cache=True)
    name = next(n for n in output if n.startswith("cache"))
    cache = output[name]
    with libortho.alpha(model, 1.0), pytest.raises(libortho.AlphaContextError, match="one request, one alpha"):
        model(tokens[:, 4:5], **{name: cache})
    with libortho.alpha(model, 0.0), torch.no_grad():
        model(tokens[:, 4:5], **{name: cache})
