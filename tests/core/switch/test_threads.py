"""Threads and tasks read their own alpha, or raise."""

import asyncio
import contextvars
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    TextIteratorStreamer,
)

import libortho
from libortho.core.layer import ortho_layers
from switching import GENERATE, finish, generate, in_thread, logits, outcome_in_thread, void

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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
