"""One split layer against the dense layer whose weight it stands for."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import libortho
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.streams import BaseStream, Columns, OrthoStream
from libortho.core.switch.switch import Switch

BASES = [
    {"bits": 8},
    {"bits": 8, "group_size": 32},
    {"bits": 4},
    {"bits": 4, "group_size": -1},
    {"bits": None},
]
SHAPES = [(64,), (5, 64), (2, 5, 64), (2, 3, 5, 64)]


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def split_layer(dense: nn.Module | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Holder:
    if dense is None:
        dense = nn.Linear(64, 48)
    options = {"ratio": 0.05, "rank_ratio": 0.9, "max_low_rank_error": 1.0, **options}
    holder = Holder(dense.to(dtype))
    return libortho.split(holder, libortho.SplitConfig(target_modules="layer", **options))


def reference(holder: Holder, x: torch.Tensor, share: float) -> torch.Tensor:
    layer = holder.layer
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), layer.dense_weight(share), bias)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("structure", ["columns", "unstructured"])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_layer_is_the_dense_layer_of_its_weight(base, structure, share):
    holder = split_layer(structure=structure, **base)
    x = torch.randn(2, 5, 64)
    with libortho.alpha(holder, share):
        torch.testing.assert_close(holder(x), reference(holder, x, share), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_half_precision_stays_close_and_keeps_its_dtype(base, dtype, tokens):
    holder = split_layer(dtype=dtype, **base)
    x = torch.randn(tokens, 64, dtype=dtype)
    with torch.no_grad():
        y = holder(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), reference(holder, x, 1.0), atol=0.05, rtol=0.03)


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_agrees_with_the_training_path(bits):
    holder = split_layer(dtype=torch.bfloat16, bits=bits)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        decoded = holder(x)
    torch.testing.assert_close(decoded, holder(x.clone().requires_grad_()).detach(), atol=0.05, rtol=0.03)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("structure", ["columns", "unstructured"])
def test_inputs_of_any_rank(shape, structure):
    holder = split_layer(structure=structure)
    x = torch.randn(shape)
    y = holder(x)
    assert y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, reference(holder, x, 1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("structure", ["columns", "unstructured"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch(shape, structure, dtype):
    holder = split_layer(structure=structure, dtype=dtype)
    assert holder(torch.zeros(shape, dtype=dtype)).shape == (*shape[:-1], 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: torch.randn(64, 3, 2).permute(2, 1, 0), lambda: torch.randn(64, 2).T])
def test_inputs_that_are_not_contiguous(dtype, make):
    holder = split_layer(dtype=dtype)
    x = make().to(dtype)
    assert not x.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(holder(x), holder(x.contiguous()))


@pytest.mark.parametrize("value", [0.5, [0.0, 1.0]])
def test_values_per_sequence_at_any_rank(value):
    holder = split_layer()
    for shape in SHAPES[2:]:
        x = torch.randn(shape)
        with libortho.alpha(holder, value):
            y = holder(x)
        for row in range(2):
            share = value if isinstance(value, float) else value[row]
            torch.testing.assert_close(y[row], reference(holder, x[row], share), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_bias_is_the_same_parameter(kind, bias):
    dense = nn.Linear(64, 48, bias=bias) if kind == "linear" else Conv1D(48, 64)
    parameter = dense.bias
    if parameter is not None:
        nn.init.normal_(parameter)
        parameter.requires_grad_(False)
    holder = split_layer(dense)
    assert holder.layer.bias is parameter
    x = torch.randn(3, 64)
    torch.testing.assert_close(holder(x), reference(holder, x, 1.0), atol=1e-4, rtol=1e-4)
    with libortho.alpha(holder, 0.0):
        torch.testing.assert_close(holder(x), reference(holder, x, 0.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_base_with_a_bias_is_the_layer_to_the_last_bit(tokens, dtype):
    layer = nn.Linear(576, 1536).to(dtype)
    x = torch.randn(2, tokens, 576).to(dtype)
    expected = layer(x)
    split = OrthoLinear(BaseStream(None, weight=layer.weight.detach()), layer.bias, Switch())
    assert torch.equal(split(x), expected)


def test_conv1d_is_split_by_its_transposed_weight():
    dense = Conv1D(48, 64)
    nn.init.normal_(dense.weight)
    original = copy.deepcopy(dense)
    holder = split_layer(dense)
    assert (holder.layer.in_features, holder.layer.out_features) == (64, 48)
    assert holder.layer.report.shape == (48, 64)
    x = torch.randn(2, 5, 64)
    assert (holder(x) - original(x)).norm() / original(x).norm() < 0.02


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(training):
    holder = split_layer(nn.Linear(64, 48).train(training))
    assert all(module.training is training for module in holder.layer.modules())


def test_the_split_layer_has_no_trainable_weight_left():
    assert [name for name, _ in split_layer().named_parameters()] == ["layer.bias"]


@pytest.mark.parametrize("structure", ["columns", "unstructured"])
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, [1.0, 0.25]])
def test_gradients_are_those_of_the_dense_layer(structure, base, share):
    holder = split_layer(structure=structure, **base)
    x = torch.randn(2, 5, 64, requires_grad=True)
    with libortho.alpha(holder, share):
        holder(x).square().sum().backward()
    got, bias = x.grad.clone(), holder.layer.bias.grad.clone()
    x.grad = holder.layer.bias.grad = None
    shares = share if isinstance(share, list) else [share, share]
    sum(reference(holder, x[row], value).square().sum() for row, value in enumerate(shares)).backward()
    torch.testing.assert_close(got, x.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias, holder.layer.bias.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("structure", ["columns", "unstructured"])
def test_gradients_flow_in_bf16(structure):
    holder = split_layer(structure=structure, dtype=torch.bfloat16)
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    holder(x).float().sum().backward()
    expected = holder.layer.dense_weight(1.0).sum(0).expand(2, 64)
    torch.testing.assert_close(x.grad.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("structure", ["columns", "unstructured"])
@pytest.mark.parametrize("share", [0.5, [1.0, 0.0]])
def test_autocast(structure, share):
    holder = split_layer(structure=structure)
    x = torch.randn(2, 5, 64, requires_grad=True)
    with libortho.alpha(holder, share):
        exact = holder(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = holder(x)
            mixed = torch.autograd.grad(y.float().sum(), x)[0]
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.03)
    torch.testing.assert_close(mixed, torch.autograd.grad(exact.sum(), x)[0], atol=0.1, rtol=0.05)


def test_large_activations_do_not_overflow_in_bf16():
    holder = split_layer(dtype=torch.bfloat16, structure="unstructured")
    x = torch.full((6, 64), 1e6, dtype=torch.bfloat16)
    with torch.no_grad():
        y = holder(x)
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), reference(holder, x, 1.0), rtol=0.03, atol=1e5)


def test_the_input_is_left_alone():
    x = torch.randn(3, 64)
    before = x.clone()
    split_layer()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("structure", ["columns", "unstructured"])
@pytest.mark.parametrize("bits", [8, 4, None])
def test_codes_scales_and_values_are_buffers(structure, bits):
    holder = split_layer(structure=structure, bits=bits)
    base = {"base.weight"} if bits is None else {"base.codes", "base.scales"}
    support = {"index", "values"} if structure == "columns" else {"rows", "columns", "values"}
    tail = {"down", "up"}
    expected = base | {f"streams.default.support.{n}" for n in support} | {f"streams.default.tail.{n}" for n in tail}
    assert set(dict(holder.layer.named_buffers())) == expected
    assert set(holder.layer.state_dict()) == expected | {"bias"}


@pytest.mark.parametrize("bits", [8, 4])
def test_to_another_dtype_carries_values_and_keeps_codes(bits):
    holder = split_layer(bits=bits, value_dtype="float32")
    codes = holder.layer.base.codes.clone()
    x = torch.randn(12, 64)
    expected = holder(x)
    holder.to(torch.bfloat16)
    assert torch.equal(holder.layer.base.codes, codes)
    assert holder.layer.base.scales.dtype is torch.bfloat16
    torch.testing.assert_close(holder(x.bfloat16()).float(), expected, atol=0.05, rtol=0.03)


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"structure": "columns"}, {"bits": None, "use_low_rank": False}], ids=str
)
def test_a_state_dict_round_trips_through_a_plain_file(options):
    first, second = split_layer(**options), split_layer(**options)
    x = torch.randn(3, 64)
    assert not torch.allclose(first(x), second(x))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for share in (0.0, 1.0):
        with libortho.alpha(first, share):
            expected = first(x)
        with libortho.alpha(second, share):
            assert torch.equal(second(x), expected)


def test_a_copy_owns_its_tensors():
    holder = split_layer()
    other = copy.deepcopy(holder)
    x = torch.randn(3, 64)
    expected = holder(x)
    for buffer in other.buffers():
        buffer.zero_()
    assert torch.equal(holder(x), expected)


def test_dense_weight_by_stream():
    holder = split_layer(structure="columns", use_low_rank=False)
    layer = holder.layer
    layer.add_stream("hr", OrthoStream(Columns(torch.tensor([7]), torch.ones(1, 48))))
    both, hr, base = layer.dense_weight(), layer.dense_weight({"hr": 0.5}), layer.dense_weight(0.0)
    assert torch.equal(base, layer.base.dense())
    torch.testing.assert_close((hr - base)[:, 7], torch.full((48,), 0.5))
    torch.testing.assert_close(both - base, layer.dense_weight({"default": 1.0}) - base + 2 * (hr - base))


def test_a_second_stream_of_the_same_name_is_refused():
    layer = split_layer().layer
    with pytest.raises(libortho.ConfigError, match="'default' exists already"):
        layer.add_stream("default", OrthoStream())


def test_the_layer_prints_what_it_is():
    text = repr(split_layer(bits=4))
    assert "in_features=64, out_features=48, streams=['default']" in text
    assert "bits=4" in text


def test_ortho_layers_lists_paths(split_llama):
    layers = ortho_layers(split_llama)
    assert list(layers) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert all(isinstance(layer, OrthoLinear) for layer in layers.values())


def test_the_other_modules_of_a_model_are_untouched(tiny_llama):
    before = {n: m for n, m in tiny_llama.named_modules() if "down_proj" not in n}
    state = {n: t.clone() for n, t in tiny_llama.state_dict().items() if "down_proj" not in n}
    libortho.split(tiny_llama)
    after = dict(tiny_llama.named_modules())
    assert all(after[n] is m for n, m in before.items())
    assert all(torch.equal(tiny_llama.state_dict()[n], t) for n, t in state.items())
