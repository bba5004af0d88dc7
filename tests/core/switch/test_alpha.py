"""The switch: values, scope, batches, caches, recomputation. A wrong alpha must raise, never run as 1."""

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import libortho
from libortho.core.layer import ortho_layers
from libortho.core.streams import OrthoStream
from switching import logits, outcome_in_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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


# -- values ------------------------------------------------------------------------------------------------------------


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


# -- bad values --------------------------------------------------------------------------------------------------------


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


# -- scope -------------------------------------------------------------------------------------------------------------


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
