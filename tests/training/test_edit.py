"""The layer under edit: what trains is what is stored, gradients are exact, and nothing off the support can move."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from libortho.core.ops.quantisation import unpack_int4
from libortho.core.streams import BaseStream, Columns
from libortho.core.surgery import linear_weight
from libortho.isolation.config import IsolateConfig
from libortho.training.edit import EditLinear

OUT, IN = 12, 32
COLUMNS = torch.tensor([3, 7, 20])
WIDTHS = pytest.mark.parametrize(
    ("bits", "group_size"), [(8, None), (8, 16), (4, None), (4, -1), (None, None)], ids=str
)  # fmt: skip


def make(bits: int | None, group_size: int | None = None, weight: Tensor | None = None):
    weight = torch.randn(OUT, IN) if weight is None else weight
    config = IsolateConfig(bits=bits, group_size=group_size)
    return EditLinear(weight, None, COLUMNS, config.bits, config.resolved_group_size), weight


def mask() -> Tensor:
    on = torch.zeros(OUT, IN, dtype=torch.bool)
    on[:, COLUMNS] = True
    return on


def scatter(values: Tensor) -> Tensor:
    """Values on the columns as a dense matrix, zero elsewhere; differentiable."""
    return torch.zeros(OUT, IN).index_add(1, COLUMNS, values.T)


def move(layer: EditLinear, size: float = 0.3) -> None:
    with torch.no_grad():
        layer.values.add_(size * torch.randn_like(layer.values))
    layer.clamp()


# -- forward and backward ---------------------------------------------------------------------------------------------


@WIDTHS
def test_before_any_step_it_is_the_quantised_layer(bits, group_size):
    layer, weight = make(bits, group_size)
    base = BaseStream.from_weight(weight, bits, IsolateConfig(bits=bits, group_size=group_size).resolved_group_size)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(layer(x), F.linear(x, base.dense()))


@WIDTHS
def test_forward_is_the_dense_layer_with_stored_values(bits, group_size):
    layer, _ = make(bits, group_size)
    move(layer)
    dense = torch.where(mask(), scatter(layer.stored()), layer.base.dense())
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(layer(x), F.linear(x, dense), atol=1e-5, rtol=1e-5)


@WIDTHS
def test_gradients_are_those_of_the_dense_formula(bits, group_size):
    """Straight-through: the derivative of the stored value by theta counts as 1."""
    layer, _ = make(bits, group_size)
    move(layer)
    x = torch.randn(2, 5, IN, requires_grad=True)
    upstream = torch.randn(2, 5, OUT)
    layer(x).backward(upstream)

    x_again = x.detach().clone().requires_grad_()
    values = layer.stored().clone().requires_grad_()
    off = torch.where(mask(), 0.0, layer.base.dense())
    F.linear(x_again, off + scatter(values)).backward(upstream)
    torch.testing.assert_close(x.grad, x_again.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.values.grad, values.grad, atol=1e-5, rtol=1e-5)


def test_a_layer_without_a_share_passes_gradients_on():
    layer = EditLinear(torch.randn(OUT, IN), None, None, 8, -1)
    assert not list(layer.parameters())
    x = torch.randn(4, IN, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.base.dense().sum(0).expand(4, IN))


def test_the_bias_is_added_and_is_the_original_s():
    bias = nn.Parameter(torch.randn(OUT))
    layer = EditLinear(torch.randn(OUT, IN), bias, COLUMNS, 8, -1)
    assert layer.bias is bias
    torch.testing.assert_close(layer(torch.zeros(1, IN))[0], bias)


def test_bf16_activations_train_fp32_values():
    layer, _ = make(8, weight=torch.randn(OUT, IN).bfloat16())
    y = layer(torch.randn(3, IN, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.values.dtype == layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_clamp_keeps_theta_on_the_grid(bits):
    layer, weight = make(bits)
    with torch.no_grad():
        layer.values.mul_(100.0)
    layer.clamp()
    top = 2 ** (bits - 1) - 1
    limit = (layer.step * top).expand_as(layer.values)
    assert (layer.values.abs() <= limit).all()
    assert (layer.values.abs() == limit).any()
    assert layer.codes().abs().max() == top
    small = EditLinear(weight, None, layer.support, 8, -1)
    before = small.values.detach().clone()
    small.clamp()
    torch.testing.assert_close(small.values.detach(), before)  # INT8 clamps no original weight


# -- what is stored ---------------------------------------------------------------------------------------------------


@WIDTHS
def test_nothing_off_the_support_moves_by_a_bit(bits, group_size):
    layer, weight = make(bits, group_size)
    plain = BaseStream.from_weight(weight, bits, layer.base.group_size if bits else -1)
    move(layer)
    base, _ = layer.finish(torch.bfloat16)
    off = ~mask()
    if bits is None:
        assert torch.equal(base.weight[off], weight[off])
        assert not torch.equal(base.weight, weight)
        return
    assert torch.equal(base.scales, plain.scales)
    assert torch.equal(base.unpacked_codes()[off], plain.unpacked_codes()[off])
    assert not torch.equal(base.unpacked_codes(), plain.unpacked_codes())
    assert base.codes.shape == plain.codes.shape
    assert base.codes.dtype == plain.codes.dtype
    if bits == 4:
        assert torch.equal(unpack_int4(base.codes), base.unpacked_codes())


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_ortho_are_the_original_on_the_support(bits, group_size, dtype):
    layer, weight = make(bits, group_size)
    move(layer)
    base, ortho = layer.finish(dtype)
    assert isinstance(ortho, Columns)
    assert ortho.values.dtype == dtype
    assert ortho.values.numel() == int(mask().sum())
    on = mask()
    residual = (weight - base.dense())[on]
    whole = base.dense()
    ortho.add_to(whole)
    rounding = residual.abs() * torch.finfo(dtype).eps + 1e-6
    assert ((whole - weight)[on].abs() <= rounding).all()
    assert torch.equal(whole[~on], base.dense()[~on])


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_base_computes_what_was_trained(bits, group_size, dtype):
    layer, _ = make(bits, group_size, weight=torch.randn(OUT, IN).to(dtype))
    move(layer)
    x = torch.randn(5, IN)
    trained = layer(x).detach()
    base, _ = layer.finish(torch.bfloat16)
    torch.testing.assert_close(F.linear(x, base.dense()), trained, atol=1e-5, rtol=1e-5)


def test_a_layer_without_a_share_stores_the_plain_base():
    weight = torch.randn(OUT, IN)
    base, ortho = EditLinear(weight, None, None, 4, 32).finish(torch.bfloat16)
    assert ortho is None
    assert torch.equal(base.codes, BaseStream.from_weight(weight, 4, 32).codes)


@WIDTHS
def test_gpt2_layers_store_the_transpose(bits, group_size):
    """A Conv1D weight arrives as a transposed view: values must land in the same places."""
    conv = Conv1D(OUT, IN)
    nn.init.normal_(conv.weight)
    weight = linear_weight(conv)
    viewed, _ = make(bits, group_size, weight=weight)
    packed, _ = make(bits, group_size, weight=weight.contiguous())
    for layer in (viewed, packed):
        torch.manual_seed(5)
        move(layer)
    x = torch.randn(5, IN)
    torch.testing.assert_close(viewed(x), packed(x), atol=1e-5, rtol=1e-5)
    (base, ortho), (base_again, ortho_again) = (layer.finish(torch.float32) for layer in (viewed, packed))
    assert torch.equal(base.dense(), base_again.dense())
    assert torch.equal(ortho.values, ortho_again.values)
