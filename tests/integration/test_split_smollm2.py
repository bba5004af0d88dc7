"""The weights-only split on the real model, against the figures that the design asks for."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from libortho import SplitConfig, alpha, layer_report, replace_linear_layers, split
from libortho.auditing.measures.utility import general_items
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def dense_perplexity(smollm2: Any) -> float:
    model, tokenizer = smollm2
    return perplexity(LanguageModel(model), general_items(tokenizer, None))


def _off(model: Any, tokenizer: Any) -> float:
    with alpha(model, 0.0):
        return perplexity(LanguageModel(model), general_items(tokenizer, None))


def test_default_call_of_the_original_note(smollm2: Any) -> None:
    model = replace_linear_layers(copy.deepcopy(smollm2[0]), target_modules=["down_proj"], ratio=0.005)
    reports = layer_report(model)
    assert len(reports) == 30
    for r in reports:
        assert r.used_low_rank
        assert r.base_error < 0.15
        assert r.final_error < 0.05
        assert r.ortho_density <= 0.005
        assert r.tail_density > 0.05  # the price, which is printed beside it


def test_aggressive_truncation_falls_back(smollm2: Any) -> None:
    model = replace_linear_layers(copy.deepcopy(smollm2[0]), rank_ratio=0.8)
    direct = [r for r in layer_report(model) if not r.used_low_rank]
    assert 0 < len(direct) < 30
    assert all(r.low_rank_error is not None and r.low_rank_error > 0.2 and r.base_error < 0.02 for r in direct)


def test_direct_int8(smollm2: Any, dense_perplexity: float) -> None:
    model = split(copy.deepcopy(smollm2[0]), SplitConfig(use_low_rank=False))
    for r in layer_report(model):
        assert r.base_error < 0.013
        assert r.final_error < 0.013
        assert r.ortho_density <= 0.005
    assert _off(model, smollm2[1]) == pytest.approx(dense_perplexity, rel=0.005)


def test_direct_int4(smollm2: Any, dense_perplexity: float) -> None:
    model = split(copy.deepcopy(smollm2[0]), SplitConfig(use_low_rank=False, bits=4))
    assert _off(model, smollm2[1]) <= 1.15 * dense_perplexity
