"""Budgets that hold, and records that get about equal shares of them."""

import pytest
import torch
from torch import Tensor, nn

from libortho.selection.budget import allocate, balanced_weights, column_costs, retain_floor


def scores_of(sizes: dict[str, int]) -> dict[str, Tensor]:
    return {n: torch.rand(s) for n, s in sizes.items()}


@pytest.mark.parametrize("ratio", [0.005, 0.03, 0.2, 1.0])
@pytest.mark.parametrize("cap", [0.5, 1.0, 4.0])
def test_the_budget_and_the_cap_hold(ratio, cap):
    unit = {"a": 64, "b": 48, "c": 100}
    scores = scores_of({"a": 300, "b": 200, "c": 500})
    found = allocate(scores, ratio, cap, unit)
    weights = sum(len(scores[n]) * unit[n] for n in unit)
    assert 0 < sum(len(i) * unit[n] for n, i in found.items()) <= ratio * weights
    for name, index in found.items():
        assert len(index) <= max(1, cap * ratio * len(scores[name]))
        assert index.tolist() == sorted(set(index.tolist()))


def test_the_best_of_all_layers_are_taken():
    scores = {"a": torch.tensor([1.0, 9.0, 2.0, 8.0]), "b": torch.tensor([3.0, 0.0, 7.0, 0.0])}
    found = allocate(scores, 3 / 8, 4.0, {"a": 10, "b": 10})
    assert {n: i.tolist() for n, i in found.items()} == {"a": [1, 3], "b": [2]}


def test_a_layer_with_no_memory_gets_nothing():
    scores = {"a": torch.full((10,), 5.0), "b": torch.zeros(10)}
    assert set(allocate(scores, 0.2, 4.0, {"a": 1, "b": 1})) == {"a"}


def test_the_cap_moves_the_rest_elsewhere():
    scores = {"a": torch.full((10,), 5.0), "b": torch.ones(10)}
    found = allocate(scores, 0.2, 1.0, {"a": 1, "b": 1})
    assert {n: len(i) for n, i in found.items()} == {"a": 2, "b": 2}


def test_entries_are_flat_indices():
    scores = {"a": torch.zeros(3, 4)}
    scores["a"][1, 2] = scores["a"][2, 3] = 1.0
    assert allocate(scores, 2 / 12, 4.0, {"a": 1})["a"].tolist() == [6, 11]


def test_one_column_is_given_even_where_it_exceeds_the_budget():
    assert allocate({"a": torch.tensor([1.0, 2.0])}, 0.001, 4.0, {"a": 64})["a"].tolist() == [1]


def test_the_floor_damps_columns_that_retain_text_uses():
    floor = retain_floor({"a": torch.tensor([0.0, 3.0])})["a"]
    torch.testing.assert_close(floor, torch.tensor([1.5, 4.5]))


def test_units_are_the_rows_of_a_column():
    layers = {"a": nn.Linear(8, 3)}
    assert column_costs(layers) == {"a": 3}


def test_a_rare_record_gets_its_columns():
    """Nine records share columns 0-3; the tenth sits in 4-5, and plain sums would never choose those."""
    saliency = torch.zeros(10, 20)
    saliency[:9, :4] = torch.tensor([0.3, 0.28, 0.22, 0.2])
    saliency[9, 4:6] = 0.5
    assert sorted(saliency.sum(0).topk(4).indices.tolist()) == [0, 1, 2, 3]
    weights = balanced_weights(saliency, 4)
    assert weights[9] > 2 * weights[0]
    chosen = set((weights @ saliency).topk(4).indices.tolist())
    assert chosen & {4, 5}
    assert chosen & {0, 1}


def test_equal_records_get_equal_weights():
    weights = balanced_weights(torch.eye(6), 3)
    assert weights.sum() == pytest.approx(6.0, rel=0.05)
    same = balanced_weights(torch.rand(1, 30).expand(5, 30), 4)
    torch.testing.assert_close(same, torch.ones(5))


def test_a_record_without_any_gradient_does_no_harm():
    saliency = torch.rand(4, 10)
    saliency[2] = 0.0
    assert torch.isfinite(balanced_weights(saliency, 3) * saliency.sum(1)).all()
