"""Codes that make up for each other."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from libortho.core.ops.quantisation import choose_scales, dequantise, quantise
from libortho.core.surgery import linear_shape, linear_weight
from libortho.core.targets import find_targets
from libortho.training.rounding import gptq_bases, gptq_codes


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """One token in eight is massive, always with the same inputs, as the first token of a text is."""
    rng = torch.Generator().manual_seed(seed)
    massive = torch.randn(width, generator=torch.Generator().manual_seed(9))
    massive[[3, 40]] *= 100
    return torch.randn(tokens, width, generator=rng) + massive * (torch.arange(tokens) % 8 == 0)[:, None]


def _weight(rows: int = 48, width: int = 96) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("bits", "group"), [(8, -1), (8, 32), (4, 32), (4, -1)])
def test_outputs_on_text_that_was_not_read_are_nearer_than_by_the_nearest_codes(bits: int, group: int) -> None:
    weight = _weight()
    scales = choose_scales(weight, bits, group, torch.float32)
    read, others = inputs(512, 96), inputs(512, 96, seed=5)

    def error(codes: torch.Tensor) -> float:
        return float(((dequantise(codes, scales, torch.float32) - weight) @ others.T).square().mean())

    codes = gptq_codes(weight, scales, bits, read)
    assert codes.dtype is torch.int8
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    assert error(codes) < 0.6 * error(quantise(weight, scales, bits))


def test_what_is_exact_takes_none_of_the_compensation() -> None:
    """With a massive column left out, the others make up for each other as if it were not there."""
    weight, exact = _weight(), torch.tensor([3])
    rest = torch.tensor([i for i in range(96) if i != 3])
    scales, x = choose_scales(weight, 8, -1, torch.float32), inputs(512, 96)
    codes = gptq_codes(weight, scales, 8, x, exact)
    mean = x.square().sum(0).mean() / x[:, rest].square().sum(0).mean()  # damping is a share of the mean of all
    alone = gptq_codes(weight[:, rest], scales, 8, x[:, rest], damping=0.3 * float(mean))
    assert torch.equal(codes[:, rest], alone)
    assert float((gptq_codes(weight, scales, 8, x)[:, rest] == alone).float().mean()) < 0.9


def test_the_nearest_codes_are_kept_where_inputs_have_nothing_to_do_with_each_other() -> None:
    weight = _weight()
    scales = choose_scales(weight, 8, -1, torch.float32)
    assert torch.equal(gptq_codes(weight, scales, 8, torch.eye(96)), quantise(weight, scales, 8))


def test_exact_columns_are_the_nearest_and_nothing_else_depends_on_them() -> None:
    weight, exact = _weight(), torch.tensor([3, 17, 80])
    scales = choose_scales(weight, 4, -1, torch.float32)
    first = gptq_codes(weight, scales, 4, inputs(512, 96), exact)
    changed = weight.clone()
    changed[:, exact] = torch.randn(48, 3, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    second = gptq_codes(changed, scales, 4, inputs(512, 96), exact)
    others = torch.ones(96, dtype=torch.bool)
    others[exact] = False
    assert torch.equal(first[:, others], second[:, others])
    for codes, values in ((first, weight), (second, changed)):
        assert torch.equal(codes[:, exact], quantise(values, scales, 4)[:, exact])


def read(layers: dict[str, nn.Module], seed: int = 0) -> dict[str, torch.Tensor]:
    return {n: inputs(256, linear_shape(m)[1], seed) for n, m in layers.items()}


@pytest.mark.parametrize(("bits", "group"), [(8, -1), (4, 32)])
def test_every_layer_gets_the_base_that_its_own_inputs_ask_for(
    bits: Literal[8, 4], group: int, tiny_llama: PreTrainedModel
) -> None:
    layers = find_targets(tiny_llama, "mlp-out")
    exact = {next(iter(layers)): torch.tensor([3, 40])}
    given = read(layers)
    bases = gptq_bases(layers, exact, given.__getitem__, bits, group)
    assert set(bases) == set(layers)
    for name, base in bases.items():
        weight = linear_weight(layers[name])
        scales = choose_scales(weight, bits, group, weight.dtype)
        codes = gptq_codes(weight, scales, bits, given[name], exact.get(name))
        assert torch.equal(base.unpacked_codes(), codes)
        assert torch.equal(base.scales, scales)
        assert not torch.equal(codes, quantise(weight, scales, bits))


def test_inputs_in_bf16_will_do(tiny_llama: PreTrainedModel) -> None:
    """As they are read."""
    layers = find_targets(tiny_llama, "mlp-out")
    rounded = {n: x.bfloat16() for n, x in read(layers).items()}
    bases = gptq_bases(layers, {}, rounded.__getitem__, 8, -1)
    same = gptq_bases(layers, {}, lambda n: rounded[n].float(), 8, -1)
    assert all(torch.equal(bases[n].codes, same[n].codes) for n in layers)


def test_gpt2_keeps_its_weights_the_other_way_round(tiny_gpt2: PreTrainedModel) -> None:
    layers = find_targets(tiny_gpt2, "mlp-out")
    for name, base in gptq_bases(layers, {}, read(layers).__getitem__, 8, -1).items():
        assert base.codes.is_contiguous()  # torch's kernel for few tokens takes no other
        weight = linear_weight(layers[name])
        assert float((base.dense() - weight).norm() / weight.norm()) < 0.02


def test_a_layer_that_no_text_reaches_has_the_nearest_codes() -> None:
    lonely = nn.Linear(32, 16, bias=False)
    bases = gptq_bases({"lonely": lonely}, {}, lambda _: torch.zeros(0, 32), 8, -1)
    weight = lonely.weight.detach()
    expected = quantise(weight, choose_scales(weight, 8, -1, torch.float32), 8)
    assert torch.equal(bases["lonely"].codes, expected)
