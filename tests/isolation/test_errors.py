"""Errors and interruptions leave nothing behind."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import libortho
import tiny
from isolating import SHORT, assert_same, state
from libortho import DataError, TargetError, isolate

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.fixture
def unusual(planted) -> nn.Module:
    """A model in training mode with one part in evaluation mode and one frozen parameter."""
    planted.train()
    planted.model.layers[0].self_attn.eval()
    planted.lm_head.weight.requires_grad_(False)
    return planted


def poison(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")


def foreign(model: nn.Module) -> None:
    class Quantised(nn.Module):
        weight = torch.zeros(3, dtype=torch.int8)

    model.model.layers[1].mlp.down_proj = Quantised()


@pytest.mark.parametrize(
    ("change", "arguments", "error", "complaint"),
    [
        (None, {"forget": []}, DataError, "forget holds no record"),
        (None, {"forget": [{"prompt": "a", "completion": ""}]}, DataError, "forget record 1"),
        (None, {"forget": "nowhere.jsonl"}, DataError, "there is no file"),
        (None, {"forget": [{"prompt": "It", "completion": " is."}]}, DataError, r"record 1.*alternates="),
        (None, {"alternates": [["a"]]}, DataError, "alternates has 1 entries for 4"),
        (None, {"alternates": [["a"], ["b"], [], ["c"]]}, DataError, "forget record 3"),
        (None, {"alternates": [" 1111.", " 2222.", " 3333.", " 4444."]}, DataError, "alternates holds a string"),
        (None, {"neighbours": [["a"]] * 5}, DataError, "neighbours has 5 entries for 4"),
        (None, {"retain": []}, DataError, "retain holds no record"),
        (None, {"retain": [{"text": "short"}]}, DataError, "retain holds 0 sequences"),
        (None, {"config": replace(SHORT, target_modules="down_project")}, TargetError, "did you mean down_proj"),
        (None, {"config": replace(SHORT, target_modules="lm_head")}, TargetError, "makes the logits"),
        (None, {"config": replace(SHORT, group_size=48)}, libortho.ConfigError, "does not divide 128"),
        (poison, {}, TargetError, r"layers\.1\.mlp\.down_proj holds NaN"),
        (foreign, {}, TargetError, "Quantised"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_what_it_was(unusual, tokenizer, change, arguments, error, complaint):
    if change is not None:
        change(unusual)
    before = state(unusual)
    with pytest.raises(error, match=complaint):
        isolate(unusual, tokenizer, **{"forget": tiny.FORGET, "retain": tiny.RETAIN, "config": SHORT, **arguments})
    if change is poison:
        before["tensors"] = {n: t.nan_to_num() for n, t in before["tensors"].items()}
        unusual.model.layers[1].mlp.down_proj.weight.data.nan_to_num_()
    assert_same(unusual, before)


def test_the_same_stream_again_is_refused(planted, tokenizer):
    """Another name is another request: test_sequential.py."""
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    before = state(planted)
    with pytest.raises(libortho.ConfigError, match="stream 'default' exists already"):
        isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    assert_same(planted, before)


def test_a_module_that_is_no_language_model_is_refused(tokenizer):
    model = nn.Sequential(nn.Linear(4, 4))
    before = state(model)
    with pytest.raises(TargetError, match="not a causal language model"):
        isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, target_modules="0"))
    assert_same(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["original", "columns", "steps"])
def test_an_interruption_at_any_moment_leaves_the_model_as_it_was(unusual, tokenizer, error, moment):
    before = state(unusual)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == moment and done == (2 if phase == "steps" else total):
            raise error("stopped by the test")

    with pytest.raises(error, match="stopped by the test"):
        isolate(unusual, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT, progress=stop)
    assert_same(unusual, before)
    result = isolate(unusual, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)  # and it can be tried again
    assert result.steps == 3


@pytest.mark.parametrize("place", ["preconditioners", "EditLinear", "install", "swap"])
def test_a_failure_between_the_phases_leaves_the_model_as_it_was(unusual, tokenizer, monkeypatch, place):
    module = sys.modules["libortho.isolation." + ("isolate" if place == "install" else "attempt")]
    real = getattr(module, place)
    calls = []

    def fail_once(*args: Any, **options: Any) -> Any:
        calls.append(place)
        if len(calls) == 1:
            if place == "swap":  # half of the layers are in
                name = next(iter(args[1]))
                real(args[0], {name: args[1][name]})
            raise MemoryError(place)
        return real(*args, **options)

    before = state(unusual)
    monkeypatch.setattr(module, place, fail_once)
    with pytest.raises(MemoryError):
        isolate(unusual, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    assert_same(unusual, before)
