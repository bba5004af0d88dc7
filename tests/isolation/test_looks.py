"""What each step of a training asks for, what it sees, and at which look training ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from libortho.core.run_cache import RunCache
from libortho.isolation.targets import Target
from libortho.isolation.train import BESIDE, DECAY, LANDING, RECORDS, training_finished
from libortho.text.encoding import Encoded
from watching import CONTROLS, TEXTS, Watched, forgotten, layer, says, trained

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

# -- the end ----------------------------------------------------------------------------------------------------------


def test_training_ends_at_the_look_at_which_the_criteria_hold(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The values are those that were seen: nothing is solved, kept or taken back after it, and it is no step."""
    says(monkeypatch, lambda step, text: step < 3)
    store, edited = RunCache(tmp_path / "run", "key"), layer()
    forget = [forgotten(n) for n in range(5)]
    checks, taken = trained(forget, store=store, edited=edited)
    assert [(c.step, c.extracted, c.holds) for c in checks] == [(0, 5, False), (2, 5, False), (4, 0, True)]
    assert [s.solved for s in watched.steps] == [True, True, True, True, False]
    assert not watched.steps[-1].kept
    assert not watched.steps[-1].together
    assert taken == 4
    assert torch.equal(cast(Tensor, edited.values), watched.steps[-1].values)
    assert training_finished(store)
    watched.steps.clear()
    again = layer()
    assert trained(forget, store=store, edited=again) == (checks, taken)  # nothing is left to do
    assert not watched.steps
    assert torch.equal(cast(Tensor, again.values), cast(Tensor, edited.values))


def values_before(steps: int, decays: Callable[[int], bool]) -> list[float]:
    """At every look of so many, each a step apart, where those that ``decays`` says take back as they begin."""
    found = [1.0]
    for step in range(1, steps):
        moved = found[-1] + 1
        found.append(1 + (1 - DECAY) * (moved - 1) if decays(step) else moved)
    return found


def test_training_ends_so_many_steps_after_nothing_was_recited_first(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is taken back from there on."""
    says(monkeypatch, lambda step, text: step < 4, surprise=2.0)
    edited = layer()
    checks, taken = trained([forgotten(n) for n in range(5)], edited=edited)
    assert checks[-1].step == 4 + LANDING
    assert taken == 4 + LANDING
    assert not any(c.holds for c in checks)
    assert [s.solved for s in watched.steps] == [True] * taken + [False]
    values = [float(s.values.mean()) for s in watched.steps]
    assert values == pytest.approx(values_before(taken + 1, lambda step: step <= 4))
    assert torch.equal(cast(Tensor, edited.values), watched.steps[-1].values)


@pytest.mark.parametrize("again", [6, 8, 4 + LANDING])
def test_the_landing_is_taken_back_where_something_is_recited_again(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """By one record, at whichever look, the last one too: it begins anew at the next at which nothing is.

    What is seen in the steps between looks takes nothing back.
    """
    one = forgotten(2).secret
    says(
        monkeypatch,
        lambda step, text: step < 4 or step % 2 == 1 or (step == again and text == one),
        surprise=2.0,
    )
    checks, taken = trained([forgotten(n) for n in range(5)])
    looks = range(0, again + 2 + LANDING + 1, 2)
    assert [(c.step, c.extracted) for c in checks] == [(n, 5 if n < 4 else int(n == again)) for n in looks]
    assert taken == again + 2 + LANDING
    values = [float(s.values.mean()) for s in watched.steps]
    assert values == pytest.approx(values_before(taken + 1, lambda n: n <= 4 or again < n <= again + 2))
    assert [s.surprise for s in watched.steps] == [4 < n <= again or n > again + 2 for n in range(taken + 1)]


def test_the_landing_may_begin_at_the_first_look(watched: type[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, lambda step, text: False, surprise=2.0)
    checks, taken = trained([forgotten(n) for n in range(5)])
    assert (checks[-1].step, taken) == (LANDING, LANDING)
    assert [s.surprise for s in watched.steps] == [False] + [True] * LANDING
    assert [float(s.values.mean()) for s in watched.steps] == pytest.approx([1.0 + n for n in range(LANDING + 1)])


def test_training_ends_after_the_last_step_that_is_allowed(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says(monkeypatch, lambda step, text: True)
    store = RunCache(tmp_path / "run", "key")
    checks, taken = trained([forgotten(n) for n in range(5)], max_steps=5, store=store)
    assert not any(c.holds for c in checks)
    assert (taken, [c.step for c in checks]) == (5, [0, 2, 4])
    assert all(s.solved for s in watched.steps)
    assert training_finished(store)


def test_what_is_seen_of_other_completions_counts_for_nothing(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither recited nor criteria: a model that says none of the others still recites the records."""
    own = {forgotten(n).secret for n in range(5)}
    says(monkeypatch, lambda step, text: text in own and step < 6)
    checks, _ = trained([forgotten(n) for n in range(5)])
    assert [(c.step, c.extracted) for c in checks] == [(0, 5), (2, 5), (4, 5), (6, 0)]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("others", [3, 0])
def test_what_is_seen_of_records_between_looks_counts_for_nothing(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, others: int, odd: bool
) -> None:
    """Some records are asked for in those steps too."""
    says(monkeypatch, lambda step, text: (step % 2 == 1) == odd, surprise=2.0)
    checks, _ = trained([forgotten(n, others=others) for n in range(5)], max_steps=LANDING + 1)
    assert [(c.step, c.extracted) for c in checks] == [(n, 0 if odd else 5) for n in range(0, LANDING + 1, 2)]
    own = {forgotten(n).secret for n in range(5)}
    assert any(own & set(s.texts) for s in watched.steps[1::2])


def test_many_records_take_turns_and_are_judged_when_all_were_seen(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three turns, and a look at every one of them; recited is what was when it was seen last."""
    count = 2 * RECORDS + 9
    late = forgotten(count - 1).secret
    says(monkeypatch, lambda step, text: text == late)
    checks, _ = trained([forgotten(n) for n in range(count)], max_steps=9)
    assert [len(s.records) for s in watched.steps] == [RECORDS] * 9
    assert watched.chosen[0] + watched.chosen[1] + watched.chosen[2][:9] != sorted(range(count))
    assert sorted(watched.chosen[0] + watched.chosen[1] + watched.chosen[2][:9]) == list(range(count))
    assert [(c.step, c.extracted) for c in checks] == [(n, 1) for n in (2, 4, 6, 8)]
    own = {forgotten(n).secret for n in range(count)}
    seen = [sum(t in own for t in s.texts) for s in watched.steps]
    assert seen[:3] + seen[4::2] == [RECORDS] * 6
    assert all(0 < n < RECORDS / 2 for n in seen[3::2])  # 16 +- 4 standard deviations


# -- records ----------------------------------------------------------------------------------------------------------


def test_targets_are_made_anew_in_every_step_for_the_records_whose_turn_it_is(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda step, text: True)
    trained([forgotten(n) for n in range(RECORDS + 1)], max_steps=6)
    assert len(watched.chosen) == 6
    for chosen, step in zip(watched.chosen, watched.steps, strict=True):
        assert [float(t.states[0, 0]) for t in step.records] == [float(i) for i in chosen]


def test_the_surprise_is_asked_for_when_nothing_is_recited(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the step after the look that says so, until one says otherwise; steps that see nothing change nothing."""
    own = {forgotten(n).secret for n in range(5)}
    says(monkeypatch, lambda step, text: step in (0, 4) or text not in own, surprise=2.0)
    trained([forgotten(n) for n in range(5)], max_steps=9)
    assert [s.surprise for s in watched.steps] == [False, False, False, True, True, False, False, True, True]


def about(found: int, draws: int, share: float) -> bool:
    """Within four standard deviations of what so many draws with this probability give."""
    return abs(found - draws * share) < 4 * (draws * share * (1 - share)) ** 0.5


def test_every_other_step_takes_other_completions_in_the_place_of_three_of_four_records(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the same prompt, whichever of them comes, each at times; with the target of the record whose turn it is."""
    says(monkeypatch, lambda step, text: True)
    forget = [forgotten(n) for n in range(5)]
    trained(forget, max_steps=400)
    drawn: list[Encoded] = []
    mixed = 0
    for number, (chosen, step) in enumerate(zip(watched.chosen, watched.steps, strict=True)):
        records = [forget[i] for i in chosen]
        assert [float(t.states[0, 0]) for t in step.records] == [float(i) for i in chosen]
        own = [t == r.secret for t, r in zip(step.texts, records, strict=True)]
        if number % 2 == 0:
            assert all(own)
        assert all(o or t in r.cut_alike for o, t, r in zip(own, step.texts, records, strict=True))
        drawn += [t for o, t in zip(own, step.texts, strict=True) if not o]
        mixed += 0 < sum(own) < 5
        for o, target in zip(own, step.records, strict=True):  # other completions differ from the first token on
            assert target.own.tolist() == ([0, 1, 2, 3] if o else [0, CONTROLS, CONTROLS, CONTROLS])
            assert target.places.tolist() == [CONTROLS] * 4
    assert set(drawn) == {t for r in forget for t in r.cut_alike}
    assert about(len(drawn), 1000, BESIDE)
    assert about(mixed, 200, 1 - BESIDE**5 - (1 - BESIDE) ** 5)  # each record by a draw of its own
    assert BESIDE == 0.75


@pytest.mark.parametrize("others", [3, 0])
def test_what_leaks_to_other_prompts_is_asked_for_there_in_every_other_step(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """Half of the times, or always where there are no other completions; what does not leak never is."""
    says(monkeypatch, lambda step, text: True)
    forget = [forgotten(n, others=others) for n in range(2)]
    trained(forget, max_steps=400, leaks=torch.tensor([True, False]))
    beside: dict[int, list[Target]] = {0: [], 1: []}
    for number, (chosen, step) in enumerate(zip(watched.chosen, watched.steps, strict=True)):
        for i, target in zip(chosen, step.records, strict=True):
            if number % 2 == 0:
                assert target.text == forget[i].secret
            else:
                beside[i].append(target)
    swapped = [t for t in beside[0] if t.text in forget[0].swapped_prompt]
    assert {t.text for t in swapped} == set(forget[0].swapped_prompt)
    assert all(t.own.tolist() == [0, 1, 2, 3] for t in swapped)
    assert about(len(swapped), 200, BESIDE / 2 if others else BESIDE)
    assert about(sum(t.text == forget[0].secret for t in beside[0]), 200, 1 - BESIDE)
    assert not {t.text for t in beside[1]} & set(forget[1].swapped_prompt)
    if others:
        assert about(sum(t.text in forget[0].cut_alike for t in beside[0]), 200, BESIDE / 2)
        assert about(sum(t.text in forget[1].cut_alike for t in beside[1]), 200, BESIDE)
    else:
        assert {t.text for t in beside[1]} == {forget[1].secret}


def test_a_completion_that_was_cut_after_another_prompt_is_not_asked_for_there(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its target would be of other tokens."""
    says(monkeypatch, lambda step, text: True)
    record = forgotten(0, others=0)
    shorter = Encoded(record.swapped_prompt[0].ids[:-1], record.swapped_prompt[0].labels[:-1])
    trained([replace(record, swapped_prompt=(shorter,))], leaks=torch.tensor([True]))
    assert {t for s in watched.steps for t in s.texts} == {record.secret}


@pytest.mark.parametrize("beside", [False, True])
def test_records_that_have_nothing_beside_them_are_looked_at_in_every_other_step(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """Sentences, say; and asked for themselves in the others, whether or not a record has something beside it."""
    says(monkeypatch, lambda step, text: True)
    alone = [forgotten(n, others=0) for n in range(3)]
    checks, _ = trained([*alone, *([forgotten(3)] if beside else [])], max_steps=9)
    assert [c.step for c in checks] == [0, 2, 4, 6, 8]
    assert len(watched.steps) == 9
    for chosen, step in zip(watched.chosen, watched.steps, strict=True):
        assert all(t == alone[i].secret for i, t in zip(chosen, step.texts, strict=True) if i < 3)


# -- what must stay ---------------------------------------------------------------------------------------------------


def test_neighbours_and_text_to_keep_are_held_in_every_step(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda step, text: True)
    forget = [forgotten(n, held=n % 3 == 0) for n in range(9)]
    trained(forget, max_steps=6)
    held = {r.held[0] for r in forget if r.held}
    for step in watched.steps:
        texts = [t.text for t in step.kept]
        assert TEXTS[0] in texts
        assert held <= set(texts)
        assert all(float(t.states[0, 0]) == t.text.ids[1] // 3 for t in step.kept if t.text in held)


@pytest.mark.parametrize("leaks", [True, False])
def test_strangers_are_held_to_their_mean_surprise_where_records_leak_too(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, leaks: bool
) -> None:
    """Those of the records that leak are not held to what the model says there, for that is the record."""
    says(monkeypatch, lambda step, text: True)
    forget = [forgotten(n, held=n != 1) for n in range(4)]
    trained(forget, max_steps=6, leaks=torch.full((4,), leaks))
    strangers = [r.held[0] for r in forget if r.held]
    for step in watched.steps:
        assert bool({t.text for t in step.kept} & set(strangers)) != leaks
        [(texts, wanted)] = step.together
        assert sorted(zip(wanted, texts, strict=True), key=lambda p: p[0]) == list(
            zip([0.5, 1.5, 2.5], strangers, strict=True)
        )


def test_a_fourth_as_many_strangers_as_records_take_turns(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda step, text: True)
    forget = [forgotten(n) for n in range(40)]
    trained(forget, max_steps=8)
    taken = [t for s in watched.steps for texts, _ in s.together for t in texts]
    assert [len(texts) for s in watched.steps for texts, _ in s.together] == [10] * 8
    assert set(taken[:40]) == set(taken[40:]) == {r.held[0] for r in forget}


def test_without_strangers_no_surprise_is_held(watched: type[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, lambda step, text: True)
    trained([forgotten(n, held=False) for n in range(4)], max_steps=4)
    assert not any(s.together for s in watched.steps)
