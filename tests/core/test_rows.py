"""Tokens at alpha = 0 beside others in one batch: the base to the last bit, whatever overflows in a stream."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libortho
from libortho import DataError, SplitConfig, alpha
from libortho.core.errors import AlphaError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.ops import add_columns, add_factors, add_sparse, library
from libortho.core.streams import Entries

INDEX = torch.tensor([2, 5, 11], dtype=torch.int32)
OVERFLOWS = [float("inf"), float("-inf"), float("nan"), 3e38]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def columns(size: float) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    values = torch.randn(3, 8)
    values[1] = size
    return add_columns, (INDEX, values)


def entries(size: float) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    matrix = torch.randn(8, 16) * (torch.rand(8, 16) < 0.3)
    matrix[:, 4] = size
    part = Entries.from_mask(matrix, matrix != 0, torch.float32)
    return add_sparse, (part.rows, part.columns, part.values)


def factors(size: float) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    down, up = torch.randn(2, 16), torch.randn(8, 2)
    down[0] = size
    return add_factors, (down, up)


def factors_out(size: float) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    down, up = torch.randn(2, 16), torch.randn(8, 2)
    up[:, 1] = size
    return add_factors, (down, up)


PARTS = {"columns": columns, "entries": entries, "factors": factors, "factors that end so": factors_out}
TRACED = {
    "columns": library.add_columns, "entries": library.add_entries, "factors": library.add_factors,
    "factors that end so": library.add_factors,
}  # fmt: skip


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = BITS[one.dtype]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


@pytest.mark.parametrize("size", OVERFLOWS)
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("kind", PARTS)
def test_tokens_that_are_off_keep_every_bit(kind, dtype, size):
    add, part = PARTS[kind](size)
    part = tuple(p.to(dtype) if p.is_floating_point() else p for p in part)
    x, y = torch.randn(6, 16, dtype=dtype) * 8, torch.randn(6, 8, dtype=dtype)
    y[:, 3] = -0.0
    x[1, :] = float("inf")  # off, and its own input overflows
    share = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0]).unsqueeze(1)
    off = share[:, 0] == 0
    for wide in [None, part[1].float()] if add is add_columns else [None]:
        given = () if wide is None else (wide,)
        found = add(y.clone(), x, *part, share, *given)
        assert same_bits(found[off], y[off])
        alone = add(y[~off].clone(), x[~off], *part, share[~off], *given)
        torch.testing.assert_close(found[~off], alone, equal_nan=True)
        assert not torch.isfinite(found[~off]).all()
    traced = TRACED[kind](y, x, *part, share[:, 0])
    assert same_bits(traced[off], y[off])
    torch.testing.assert_close(traced[~off], alone, equal_nan=True, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("size", OVERFLOWS)
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("traced", [False, True])
def test_gradients_of_tokens_that_are_off_are_those_of_the_base(kind, size, traced):
    add, part = PARTS[kind](size)
    base = torch.randn(8, 16)
    x = torch.randn(4, 16)
    x[3] = float("inf")
    share = torch.tensor([1.0, 0.0, 0.25, 0.0])
    weights = torch.randn(4, 8)
    weights[1, 2] = float("inf")  # what comes back may overflow as well

    def gradients(with_stream: bool) -> tuple[Tensor, Tensor]:
        inputs = x.clone().requires_grad_()
        before = (inputs @ base.T).detach().requires_grad_()
        y = inputs @ base.T + before
        if with_stream:
            y = TRACED[kind](y, inputs, *part, share) if traced else add(y, inputs, *part, share.unsqueeze(1))
        y.backward(weights)
        assert inputs.grad is not None
        assert before.grad is not None
        return inputs.grad, before.grad

    mine, alone = gradients(True), gradients(False)
    off = share == 0
    for found, expected in zip(mine, alone, strict=True):
        torch.testing.assert_close(found[off], expected[off], rtol=0, atol=0, equal_nan=True)
    assert not torch.isfinite(mine[0][~off]).all()


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("kind", PARTS)
def test_one_alpha_for_all_gives_what_equal_ones_for_each_give(kind, share):
    add, part = PARTS[kind](1.5)
    x, y = torch.randn(4, 16), torch.randn(4, 8)
    one = add(y.clone(), x, *part, share)
    torch.testing.assert_close(add(y.clone(), x, *part, torch.full((4, 1), share)), one)
    assert torch.equal(TRACED[kind](y, x, *part, torch.full((4,), share)), one)


def model_with(dtype: torch.dtype, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)
    given: dict[str, Any] = {
        "target_modules": ["0"], "use_low_rank": False, "ratio": 0.05, "structure": "columns", **options
    }  # fmt: skip
    libortho.split(model, SplitConfig(**given))
    return model


LAYERS: dict[str, dict[str, Any]] = {
    "int8": {}, "int4": {"bits": 4}, "dense": {"bits": None}, "entries": {"structure": "unstructured"},
    "tail": {"use_low_rank": True, "rank_ratio": 0.5, "max_low_rank_error": 1.0},
}  # fmt: skip


def overflow(layer: OrthoLinear) -> None:
    """Let the stream answer inf to everything."""
    for stream in layer.streams.values():
        for buffer in stream.buffers():
            if buffer.is_floating_point():
                buffer.fill_(float("inf"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_in_a_mixed_batch(kind, dtype, compiled):
    model = model_with(dtype, **LAYERS[kind])
    [layer] = ortho_layers(model).values()
    overflow(layer)
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    for tokens in (1, 3, 40):
        x = torch.randn(2, tokens, 64, dtype=dtype)
        with torch.no_grad():
            with alpha(model, 0.0):
                base = run(x)
            with alpha(model, [1.0, 0.0]):
                mixed = run(x)
        assert same_bits(mixed[1], base[1])
        assert not torch.isfinite(mixed[0]).all()
    torch._dynamo.reset()


# -- nothing at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_without_tokens(kind, dtype):
    model = model_with(dtype, **LAYERS[kind])
    [layer] = ortho_layers(model).values()
    runs = [layer] if dtype is torch.bfloat16 else [layer, torch.compile(layer, backend="eager", fullgraph=True)]
    for value in (0.0, 0.5, 1.0):
        for shape in ((0, 64), (0, 3, 64), (2, 0, 64), (0, 0, 64)):
            x = torch.empty(*shape, dtype=dtype, requires_grad=True)
            with alpha(model, value):
                with torch.no_grad():
                    assert {run(x).shape for run in runs} == {(*shape[:-1], 96)}
                y = layer(x)
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == shape
    with alpha(model, [1.0, 0.0]):
        assert layer(torch.empty(2, 0, 64, dtype=dtype)).shape == (2, 0, 96)
        with pytest.raises(AlphaError, match="alpha names 2 sequences"):
            layer(torch.empty(0, 3, 64, dtype=dtype))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_activations_without_tokens(dtype):
    model = model_with(dtype)
    libortho.quantise_activations(model)
    with torch.no_grad():
        assert model(torch.empty(0, 64, dtype=dtype)).shape == (0, 64)


@pytest.mark.parametrize("value", [0.0, 1.0, [1.0, 0.0]], ids=str)
@pytest.mark.parametrize("shape", [(0, 6), (0, 0), (2, 0)], ids=str)
def test_a_model_without_tokens_is_an_error_of_ours(split_llama, shape, value):
    empty = torch.empty(*shape, dtype=torch.long)
    for given in ({"input_ids": empty}, {"inputs_embeds": torch.empty(*shape, 64)}):
        with alpha(split_llama, value), pytest.raises((DataError, AlphaError), match=r"batch (is empty|has 0)"):
            split_llama(**given)
    assert split_llama(torch.ones(1, 2, dtype=torch.long)).logits.shape == (1, 2, 128)


def test_an_error_that_is_not_about_an_empty_batch_stays_itself(split_llama):
    with pytest.raises(IndexError):
        split_llama(torch.full((1, 2), 9999))
