"""The gradient that is taken while logits exist is the one that autograd finds with all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from libortho.lm.head import HEAD_POSITIONS, by_record, evenly, summed
from libortho.lm.model import LanguageModel


@pytest.mark.parametrize("positions", [1, HEAD_POSITIONS, 2 * HEAD_POSITIONS + 3])
def test_loss_and_gradient_are_those_of_all_logits_at_once(tiny_llama: PreTrainedModel, positions: int) -> None:
    tiny_llama.requires_grad_(False)
    lm = LanguageModel(tiny_llama)
    states = torch.randn(positions, tiny_llama.config.hidden_size, generator=torch.Generator().manual_seed(0))
    labels, states = torch.arange(positions) % 50, states.requires_grad_()

    def loss(logits: torch.Tensor, part: slice) -> torch.Tensor:
        return F.cross_entropy(logits, labels[part], reduction="sum")

    whole = loss(lm.logits(states), slice(None))
    found = summed(lm, states, loss, evenly(positions))
    torch.testing.assert_close(found, whole)
    [mine], [plain] = (torch.autograd.grad(3 * x, states) for x in (found, whole))
    torch.testing.assert_close(mine, plain)


def test_without_gradients_the_loss_is_the_same_and_none_is_made(tiny_llama: PreTrainedModel) -> None:
    lm = LanguageModel(tiny_llama)
    states = torch.randn(5, tiny_llama.config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = summed(lm, states, lambda logits, _: logits.square().sum(), evenly(5))
    assert not found.requires_grad
    torch.testing.assert_close(found, lm.logits(states).square().sum())


@pytest.mark.parametrize("sizes", [[3, 4], [40, 40, 10], [HEAD_POSITIONS], [5, 3 * HEAD_POSITIONS + 7, 60, 2], []])
def test_parts_cover_every_position_once_and_cut_no_record_that_fits(sizes: list[int]) -> None:
    parts = by_record(sizes)
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(sum(sizes)))
    assert all(p.stop - p.start <= HEAD_POSITIONS for p in parts)
    begin = 0
    for size in sizes:
        inside = [p for p in parts if p.start < begin + size and begin < p.stop]
        assert size > HEAD_POSITIONS or len(inside) == 1
        begin += size
