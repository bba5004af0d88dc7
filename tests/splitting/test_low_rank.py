"""The low-rank base: how many directions it keeps, what it loses by that, and when a layer goes without."""

import logging
from typing import Any

import pytest
import torch
from one_layer import decaying, report_of, split_one

import libortho


@pytest.mark.parametrize(("rank_ratio", "rank"), [(1.0, 40), (0.95, 38), (0.5, 20), (0.001, 1)])
def test_rank_ratio_is_a_share_of_the_directions(rank_ratio, rank):
    layer = split_one(torch.randn(40, 64), rank_ratio=rank_ratio, max_low_rank_error=1.0, bits=None)
    report = report_of(layer)
    assert (report.rank, report.tail_rank) == (rank, 40 - rank)
    assert torch.linalg.matrix_rank(layer.dense_weight(0.0), rtol=1e-4) == rank


def test_full_rank_drops_no_direction():
    weight = torch.randn(40, 64)
    layer = split_one(weight, rank_ratio=1.0, bits=None)
    report = report_of(layer)
    assert report.used_low_rank
    assert (report.low_rank_error, report.tail_rank, report.tail_density) == (0.0, 0, 0.0)
    torch.testing.assert_close(layer.dense_weight(0.0), weight, atol=1e-5, rtol=1e-4)


def test_the_truncation_is_the_best_of_its_rank():
    weight = torch.randn(40, 64)
    report = report_of(split_one(weight, rank_ratio=0.5, max_low_rank_error=1.0))
    singular = torch.linalg.svdvals(weight)
    assert report.low_rank_error == pytest.approx(float(singular[20:].norm() / singular.norm()), rel=1e-4)


@pytest.mark.parametrize("decay", [0.8, 0.97])
def test_auto_takes_the_fewest_directions_within_the_budget(decay):
    weight = decaying(40, 64, decay)
    report = report_of(split_one(weight, rank_ratio="auto", error_budget=0.05))
    singular = torch.linalg.svdvals(weight)
    error = [float(singular[i:].norm() / singular.norm()) for i in range(41)]
    assert report.rank == next(i for i, e in enumerate(error) if e <= 0.05)
    assert report.low_rank_error == pytest.approx(error[report.rank], rel=1e-3)


def test_auto_keeps_all_directions_where_none_can_go():
    report = report_of(split_one(torch.eye(32), rank_ratio="auto", error_budget=0.05))
    assert (report.rank, report.tail_rank) == (32, 0)


def test_auto_keeps_at_least_one_direction():
    assert (
        report_of(split_one(torch.randn(8, 32), rank_ratio="auto", error_budget=1.0, max_low_rank_error=1.0)).rank == 1
    )


def test_the_tail_is_the_discarded_directions():
    weight = torch.randn(40, 64)
    with_tail = split_one(weight, rank_ratio=0.9, bits=None, value_dtype="float32")
    without = split_one(weight, rank_ratio=0.9, bits=None, value_dtype="float32", keep_tail=False)
    tail = torch.zeros(40, 64)
    with_tail.streams["default"].tail.add_to(tail)
    torch.testing.assert_close(with_tail.dense_weight(0.0) + tail, weight, atol=1e-5, rtol=1e-4)
    assert without.streams["default"].tail is None
    assert report_of(without).final_error > report_of(with_tail).final_error
    report = report_of(with_tail)
    assert report.tail_density == report.tail_rank * (40 + 64) / (40 * 64)


def test_without_low_rank_there_is_neither_truncation_nor_tail():
    report = report_of(split_one(torch.randn(40, 64), use_low_rank=False))
    assert not report.used_low_rank
    assert report.low_rank_error is None
    assert (report.rank, report.tail_rank) == (40, 0)


def test_a_layer_that_loses_too_much_falls_back_and_says_so_once(tiny_llama, caplog):
    with caplog.at_level(logging.WARNING, logger="libortho"):
        libortho.replace_linear_layers(tiny_llama, rank_ratio=0.3)
    assert len(caplog.records) == 1
    assert "2 of 2 layers" in caplog.text
    for report in libortho.layer_report(tiny_llama):
        assert not report.used_low_rank
        assert report.low_rank_error > 0.2
        assert report.base_error < 0.013
        assert (report.rank, report.tail_rank) == (64, 0)


def test_only_the_layers_that_lose_too_much_fall_back(tiny_llama, caplog):
    tiny_llama.model.layers[1].mlp.down_proj.weight.data.copy_(decaying(64, 128, 0.7))
    with caplog.at_level(logging.WARNING, logger="libortho"):
        libortho.replace_linear_layers(tiny_llama, rank_ratio=0.3)
    assert [r.used_low_rank for r in libortho.layer_report(tiny_llama)] == [False, True]
    assert "1 of 2 layers" in caplog.text


def test_no_warning_without_a_fallback(tiny_llama, caplog):
    with caplog.at_level(logging.WARNING, logger="libortho"):
        libortho.replace_linear_layers(tiny_llama)
    assert not caplog.records


def test_the_randomised_factorisation_is_close_and_reproducible():
    weight = decaying(64, 128, 0.8)
    options: dict[str, Any] = {"rank_ratio": 0.2, "keep_tail": False, "max_low_rank_error": 1.0, "bits": None}
    torch.manual_seed(5)
    first = split_one(weight, **options)
    torch.manual_seed(6)
    second = split_one(weight, **options)
    assert torch.equal(first.dense_weight(0.0), second.dense_weight(0.0))
    singular = torch.linalg.svdvals(weight)
    best = float(singular[12:].norm() / singular.norm())
    assert report_of(first).rank == 12
    assert best * 0.999 <= report_of(first).base_error <= best * 1.01


def test_the_seed_changes_the_randomised_factorisation():
    weight = torch.randn(64, 128)
    options: dict[str, Any] = {"rank_ratio": 0.2, "keep_tail": False, "max_low_rank_error": 1.0, "bits": None}
    assert not torch.equal(
        split_one(weight, seed=0, **options).dense_weight(0.0), split_one(weight, seed=1, **options).dense_weight(0.0)
    )
