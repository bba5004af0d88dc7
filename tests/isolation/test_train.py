"""Whose turn it is, when a training ends, and that it goes on where it was put away."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import made_up
import tiny
from isolating import CONFIG
from libortho import isolate
from libortho.core.run_cache import Entry
from libortho.isolation.criteria import Criteria
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.train import LANDING, Training, Turns
from libortho.lm.scoring import SCORING_TOKENS, scoring_tokens
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import Encoded, batches
from libortho.training.edit import EditLinear

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

TEXTS = [Encoded(tuple(range(64)), tuple(range(64)))] * 7
NEIGHBOUR = made_up.text(3)


def many(count: int) -> list[ForgetRecord]:
    """Records of which every third has a neighbour."""
    return [replace(made_up.record(4), held=(NEIGHBOUR,) if i % 3 == 0 else ()) for i in range(count)]


def test_every_record_comes_once_before_any_comes_again() -> None:
    turns = Turns(5, 2, random.Random(0))
    drawn = [i for _ in range(10) for i in next(turns)]
    for start in range(0, 20, 5):
        assert sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4]
    assert sorted(next(Turns(3, 64, random.Random(0)))) == [0, 1, 2]


def training() -> Training:
    torch.manual_seed(0)
    layers = {n: EditLinear(torch.randn(6, 8), None, torch.tensor([1, 4]), 8, -1) for n in "ab"}
    metrics = {n: KroneckerPreconditioner.of(torch.eye(2), torch.arange(6.0).diag(), 0.1) for n in "ab"}
    return Training(layers, metrics, many(100), TEXTS, made_up.original(100), 0)


def steps(state: Training, count: int) -> list[Any]:
    """Steps that hang on all that is drawn."""
    drawn = []
    for _ in range(count):
        turn = [next(t) for t in (state.records, state.neighbours, state.level, state.retain)]
        drawn.append((turn, state.rng.random()))
        rows = {
            n: [state.optimiser.whiten(n, torch.stack([v.detach() ** 2 + turn[0][0], v.detach() + drawn[-1][1]]))]
            for n, v in state.optimiser.values.items()
        }
        state.optimiser.step(rows, torch.tensor([0.3, -0.2]), 0.5)
        state.recited |= {i: i % 2 == 0 for i in turn[0][:3]}
        state.step += 1
    return drawn


def test_a_training_goes_on_where_it_was_put_away() -> None:
    """Seven steps at once, and three, a way through JSON, and four: the same draws and the same values."""
    whole, first, other = training(), training(), training()
    expected = steps(whole, 7)
    begun = steps(first, 3)
    first.checks.append(Criteria(3, 1, 2, 0, 0.1, False))
    first.landing = 1
    part = first.part()
    other.take_up(Entry({n: t.clone() for n, t in part.tensors.items()}, json.loads(json.dumps(part.data))))
    assert other.recited == first.recited
    assert begun + steps(other, 4) == expected
    assert other.recited == whole.recited
    assert all(torch.equal(v, other.optimiser.values[n]) for n, v in whole.optimiser.values.items())
    assert (other.step, other.landing, other.finished) == (7, 1, False)
    assert other.checks == [Criteria(3, 1, 2, 0, 0.1, False)]


def test_a_small_model_is_trained_until_the_criteria_hold_at_a_look_at_which_nothing_is_recited(
    planted: nn.Module, tokenizer: Any
) -> None:
    """Or until the landing is over: whether they hold differs from processor to processor in so small a model."""
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=CONFIG)
    assert [c.step for c in result.checks] == list(range(0, result.steps + 1, 2))
    assert result.steps == result.checks[-1].step < CONFIG.max_steps
    assert not any(c.holds for c in result.checks[:-1])
    landing = 2 + max(c.step for c in result.checks if c.extracted)
    assert result.checks[-1].holds or result.steps == landing + LANDING
    assert result.checks[0].extracted == 4
    assert result.checks[-1].extracted == 0
    assert result.checks[-1].step > 2
    assert result.checks[0].gap < result.checks[1].gap < result.checks[-1].gap


def test_a_gpu_reads_more_at_a_time() -> None:
    items = [TEXTS[0]] * (2 * SCORING_TOKENS // len(TEXTS[0].ids))
    passes = {d: list(batches(items, scoring_tokens(torch.device(d)))) for d in ("cpu", "cuda")}
    assert len(passes["cuda"]) == 1 < len(passes["cpu"])
    for rows in passes.values():
        assert [i for some in rows for i in some] == list(range(len(items)))
