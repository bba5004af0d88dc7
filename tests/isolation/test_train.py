"""Whose turn it is, when a training ends, and that it goes on where it was put away."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import made_up
import tiny
from isolating import CONFIG
from libortho import isolate
from libortho.core.progress import Stopwatch
from libortho.core.run_cache import Entry, RunCache
from libortho.isolation import train as trainer
from libortho.isolation.criteria import Criteria
from libortho.isolation.equations import Seen
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.targets import Target
from libortho.isolation.train import LANDING, RECORDS, Training, Turns, train, training_finished
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
        turn = (next(state.records), next(state.neighbours), next(state.retain), state.rng.random())
        drawn.append(turn)
        rows = {
            n: [state.optimiser.whiten(n, torch.stack([v.detach() ** 2 + turn[0][0], v.detach() + turn[3]]))]
            for n, v in state.optimiser.values.items()
        }
        state.optimiser.step(rows, torch.tensor([0.3, -0.2]), 0.5)
        for i in turn[0][:3]:
            state.seen[i] = Seen(torch.rand(4), torch.rand(4), i % 2 == 0)
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
    assert other.seen.keys() == first.seen.keys()
    assert all(torch.equal(s.surprise, first.seen[i].surprise) for i, s in other.seen.items())
    assert all(torch.equal(s.wanted, first.seen[i].wanted) for i, s in other.seen.items())
    assert [s.greedy for s in other.seen.values()] == [s.greedy for s in first.seen.values()]
    assert begun + steps(other, 4) == expected
    assert all(torch.equal(v, other.optimiser.values[n]) for n, v in whole.optimiser.values.items())
    assert (other.step, other.landing, other.finished) == (7, 1, False)
    assert other.checks == [Criteria(3, 1, 2, 0, 0.1, False)]


class Watched:
    """In place of equations: it remembers what it is asked, and has seen whatever the test says."""

    added: list[tuple[list[Target], bool, bool]]
    greedy = False

    def __init__(self, *arguments: Any) -> None:
        self.residuals = [torch.zeros(1)]

    def add(self, targets: Sequence[Target], *, records: bool, surprise: bool, weight: float = 1.0) -> list[Seen]:
        self.added.append((list(targets), records, surprise))
        return [Seen(torch.full((4,), 4.0), torch.full((4,), 4.0), self.greedy) for _ in targets]

    def solve(self, share: float) -> None:
        pass


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(trainer, "Equations", Watched)

    def targets(lm: Any, forget: Sequence[ForgetRecord], original: Any) -> list[Target]:
        return [Target.kept(r.secret, torch.zeros(4, 2)) for r in forget]

    monkeypatch.setattr(trainer, "record_targets", targets)
    monkeypatch.setattr(Watched, "added", [], raising=False)
    monkeypatch.setattr(Watched, "greedy", False)
    return Watched


def trained(
    forget: list[ForgetRecord], max_steps: int = 40, store: RunCache | None = None, **known: Any
) -> tuple[list[Criteria], int]:
    original = made_up.original(
        len(forget), neighbours=(torch.zeros(3, 2),) * len(forget), retain=(torch.zeros(63, 2),) * 7, **known
    )
    layer = EditLinear(torch.ones(6, 8), None, torch.tensor([1, 4]), 8, -1)
    config, lm = replace(CONFIG, max_steps=max_steps), cast(Any, None)
    return train(lm, {"l": layer}, forget, TEXTS, original, config, {}, store or RunCache(), None, Stopwatch())


def test_training_ends_a_few_steps_after_the_criteria_held(watched: type[Watched], tmp_path: Path) -> None:
    store = RunCache(tmp_path / "run", "key")
    checks, taken = trained(many(10), store=store)
    assert [c.step for c in checks] == list(range(1 + LANDING))  # every look is before its step
    assert all(c.holds for c in checks)
    assert taken == 1 + LANDING
    assert training_finished(store)
    watched.added.clear()
    assert trained(many(10), store=store) == (checks, taken)  # nothing is left to do
    assert not watched.added


def test_training_ends_after_the_last_step_that_is_allowed(watched: type[Watched], tmp_path: Path) -> None:
    watched.greedy = True
    store = RunCache(tmp_path / "run", "key")
    checks, taken = trained(many(10), max_steps=5, store=store)
    assert not any(c.holds for c in checks)
    assert (taken, len(checks)) == (5, 5)
    assert training_finished(store)


def test_many_records_take_turns_and_are_judged_when_all_were_seen(watched: type[Watched]) -> None:
    count = 2 * RECORDS + 9
    checks, _ = trained(many(count), max_steps=6)
    asked = [len(targets) for targets, records, _ in watched.added if records]
    assert set(asked) == {RECORDS}
    assert checks[0].step == 2  # three turns


def test_the_surprise_is_asked_for_when_nothing_is_recited(watched: type[Watched]) -> None:
    trained(many(10), max_steps=3)
    assert [surprise for _, records, surprise in watched.added if records] == [False, True, True]
    watched.added.clear()
    watched.greedy = True
    trained(many(10), max_steps=3)
    assert not any(surprise for _, _, surprise in watched.added)


def test_neighbours_and_text_to_keep_are_held_in_every_step(watched: type[Watched]) -> None:
    trained(many(10), max_steps=3)
    for kept, _, _ in watched.added[1::2]:
        texts = [t.text for t in kept]
        assert NEIGHBOUR in texts
        assert TEXTS[0] in texts


@pytest.mark.parametrize("leaks", [True, False])
def test_what_leaks_to_other_prompts_is_asked_for_there_in_every_other_step(
    watched: type[Watched], leaks: bool
) -> None:
    own = made_up.record(4)
    other = Encoded((9, 8, *own.secret.ids[1:]), (-100, -100, *own.secret.labels[1:]))
    watched.greedy = True
    trained([replace(own, swapped_prompt=(other,))], leaks=torch.tensor([leaks]))
    texts = [targets[0].text for targets, records, _ in watched.added if records]
    assert len(texts) == 40
    assert texts[0] == own.secret  # until a record was seen, it is looked at itself
    assert 10 < texts.count(other) < 30 if leaks else other not in texts


def test_a_small_model_is_trained_until_the_criteria_hold_a_few_steps_after_nothing_is_recited(
    planted: nn.Module, tokenizer: Any
) -> None:
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=CONFIG)
    first = next(c for c in result.checks if c.holds)
    assert [c.step for c in result.checks] == list(range(result.steps))
    silent = next(c for c in result.checks if c.extracted == 0)
    assert result.steps == max(first.step, silent.step + LANDING) + 1 < CONFIG.max_steps
    assert first.step > 2
    assert result.checks[0].extracted == 4
    assert result.checks[0].gap < result.checks[2].gap < first.gap


def test_a_gpu_reads_more_at_a_time() -> None:
    items = [TEXTS[0]] * (2 * SCORING_TOKENS // len(TEXTS[0].ids))
    passes = {d: list(batches(items, scoring_tokens(torch.device(d)))) for d in ("cpu", "cuda")}
    assert len(passes["cuda"]) == 1 < len(passes["cpu"])
    for rows in passes.values():
        assert [i for some in rows for i in some] == list(range(len(items)))
