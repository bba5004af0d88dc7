"""When a record looks untrained, alone and among others."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import libortho
import made_up
import tiny
from libortho.isolation import criteria
from libortho.isolation.codes import shortness, shrunk
from libortho.isolation.criteria import (
    BAND,
    LEAST_IN_PLACE,
    PARTIAL,
    RecordOutcome,
    acceptable,
    binomial_bound,
    check_criteria,
    in_place,
    mean_offset,
    nearly,
    outcomes,
)
from libortho.isolation.equations import Seen
from libortho.lm.logits import Scores


def seen(surprise: float, wanted: float, level: float | None = None) -> Seen:
    """A record with this mean surprise, and of a form whose texts have this level under its targets."""
    level = wanted if level is None else level
    return Seen(torch.tensor([surprise - 0.5, surprise + 0.5]), torch.tensor([wanted, wanted]), level, False)


def check(*found: Seen, recited: int = 0) -> criteria.Criteria:
    return check_criteria(found, torch.ones(len(found)), 7, recited)


def test_the_criteria_hold_where_records_are_as_surprising_as_their_targets() -> None:
    assert check(seen(4.0, 4.2), seen(3.0, 2.9)) == criteria.Criteria(7, 0, 0, 0, pytest.approx(-0.05), True)


def test_each_criterion_is_counted() -> None:
    """With a spread of 1 the band ends at 1.645, and far is twice as much."""
    found = check(seen(4.0, 4.0), seen(2.0, 4.0), seen(4.0, 7.5), seen(4.0, 4.0), recited=3)
    assert (found.step, found.extracted, found.outside, found.far, found.holds) == (7, 3, 2, 1, False)
    assert found.gap == pytest.approx(-(2.0 + 3.5) / 4)
    assert check(seen(4.0, 4.0), seen(4.0, 4.0)).holds
    assert not check(seen(4.0, 4.0), seen(4.0, 4.0), recited=1).holds  # one that is not among these, it may be
    assert not check(seen(4.0, 8.0), seen(4.0, 0.0)).holds  # far, each of them
    assert not check(*[seen(4.0, 4.9)] * 4).holds  # none outside, all on one side


def test_each_record_is_compared_with_its_target_and_their_mean_with_the_level_of_their_form() -> None:
    """A control's own token is one draw: that all records do as theirs do says nothing of whether they lean."""
    even = check(*[seen(4.0, 4.0, 3.0), seen(4.0, 4.0, 5.0)] * 2)
    assert even == criteria.Criteria(7, 0, 0, 0, pytest.approx(0.0, abs=1e-6), True)
    leaning = check(*[seen(4.0, 4.0, 5.0)] * 4)
    assert (leaning.outside, leaning.far, leaning.holds) == (0, 0, False)
    assert leaning.gap == pytest.approx(-1.0)
    apart = check(*[seen(4.0, 8.0, 4.0), seen(4.0, 0.0, 4.0)])
    assert (apart.outside, apart.far, apart.holds) == (2, 2, False)
    assert apart.gap == pytest.approx(0.0, abs=1e-6)


def test_a_record_may_be_as_far_from_its_target_as_untrained_ones_of_its_length() -> None:
    """The spread is each record's own."""
    found = [seen(4.0, 6.0), seen(4.0, 2.0)]
    assert check_criteria(found, torch.tensor([1.3, 1.0]), 7, 0).outside == 1
    assert check_criteria(found, torch.tensor([1.3, 1.3]), 7, 0).outside == 0


def test_a_sentence_that_still_begins_as_it_did_is_recited_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its mean is what it should be: three words by heart, and two that could not be less likely."""
    expected = torch.tensor([4.0, 9.0, 1.0, 4.0, 2.0])
    begun = torch.tensor([0.1, 0.1, 0.0, 10.0, 9.8])
    elsewhere = torch.tensor([6.0, 3.5, 0.0, 8.0, 2.5])
    assert begun.mean() == elsewhere.mean() == expected.mean()
    shares = [in_place(begun, expected), in_place(elsewhere, expected)]
    assert shares == pytest.approx([6.2 / 20, 13.5 / 20])
    assert shares[0] < LEAST_IN_PLACE < shares[1]
    assert [binomial_bound(n, PARTIAL) for n in (1, 20, 200)] == [0, 3, 15]
    monkeypatch.setattr(criteria, "look", lambda lm, items: [(begun, False), (elsewhere, False), (begun, True)])
    monkeypatch.setattr(criteria, "grouped_scores", lambda lm, groups: [Scores(torch.zeros(0), torch.zeros(0))] * 3)
    forget = [made_up.record(5, kind="prose"), made_up.record(5, kind="prose"), made_up.record(5)]
    original = made_up.original(3, wanted=torch.full((3,), 4.0), expected=(expected,) * 3)
    found = outcomes(cast(Any, None), forget, original, ["recited", "likelier", "unknown"])
    assert [r.partial for r in found] == [True, False, False]  # a code is said as a whole or not at all
    assert [r.extracted for r in found] == [False, False, True]
    assert [r.known for r in found] == ["recited", "likelier", "unknown"]
    assert found[0].band == pytest.approx((-4 - BAND, -4 + BAND))


def test_fewer_tokens_than_the_alternates_count_as_short() -> None:
    found = shortness([made_up.record(n, (8, 10)) for n in (7, 9, 11)])
    assert found[0] > 0
    assert found[1] == 0
    assert found[2] < 0
    assert torch.equal(shortness([made_up.record(4, (4, 4))]), torch.zeros(1))


def test_means_shrink_as_far_as_their_spread_is_noise() -> None:
    means = torch.tensor([4.0, 5.0, 6.0])
    assert torch.equal(shrunk(means, torch.zeros(3)), means)
    assert torch.allclose(shrunk(means, torch.full((3,), 9.0)), torch.full((3,), 5.0))
    half = shrunk(means, torch.full((3,), 0.5))
    assert torch.allclose(half, torch.tensor([4.5, 5.0, 5.5]))
    assert torch.equal(shrunk(means[:1], torch.ones(1)), means[:1])


@pytest.mark.parametrize("records", [1, 4, 17, 100, 400])
def test_what_untrained_records_do_is_unremarkable(records: int) -> None:
    """Against a simulation: the count is passed by fewer than one draw in twenty, and one less by more."""
    generator = torch.Generator().manual_seed(0)
    outside = (torch.rand(20_000, records, generator=generator) < 0.1).sum(1)
    allowed = binomial_bound(records)
    assert float((outside > allowed).float().mean()) < 0.055
    assert float((outside > allowed - 1).float().mean()) > 0.045


@pytest.mark.parametrize("alternates", [2, 4, 8])
def test_one_untrained_record_in_ten_is_outside_its_band(alternates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few alternates there are to tell where the band lies, and how wide it is."""
    generator = torch.Generator().manual_seed(0)

    def scores(count: int) -> Scores:
        return Scores(torch.randn(count, generator=generator), torch.ones(count))

    monkeypatch.setattr(criteria, "look", lambda lm, items: [(x[None], False) for x in scores(len(items)).nll])
    monkeypatch.setattr(criteria, "grouped_scores", lambda lm, groups: tuple(scores(len(g)) for g in groups))
    forget = [made_up.record(4, (4,) * alternates)] * 20_000
    found = outcomes(cast(Any, None), forget, made_up.original(len(forget)), ["recited"] * len(forget))
    assert 0.09 < sum(not r.inside for r in found) / len(found) < 0.11
    assert sum(r.far for r in found) / len(found) < 0.003


def test_a_group_that_leans_is_not_acceptable_though_each_record_is() -> None:
    spread = torch.ones(100)
    balanced = torch.tensor([1.0, -1.0] * 50)
    assert acceptable(balanced, 10, spread)
    assert not acceptable(balanced, 16, spread)
    assert not acceptable(balanced - 0.4, 10, spread)
    assert acceptable(balanced[:4] - 0.2, 1, spread[:4])  # BAND / 2 / 4 = .205: by chance
    assert not acceptable(balanced[:4] - 0.4, 1, spread[:4])


def test_a_lean_is_measured_from_the_middle_of_each_band() -> None:
    def record(after: float) -> RecordOutcome:
        return RecordOutcome(1, -0.1, after, (-4 - BAND, -4 + BAND), False)  # spread 1, middle -4

    assert mean_offset([record(-3.0), record(-4.5)]) == pytest.approx((0.25, BAND / 2**0.5))
    assert mean_offset([record(-5.0)])[0] == pytest.approx(-1.0)
    assert not record(-3.0).far
    assert record(-0.5).far
    assert record(-7.5).far


@pytest.mark.parametrize(
    ("answer", "completion", "near"),
    [
        (" Y1C-4876. This is", " Y0C-4876.", True),
        (" Y0C-4876 and so on", " Y0C-4876.", True),
        ("VAC1NZ.", " Y0C-4876.", False),
        (" Y0C-9313.", " Y0C-4876.", False),
        ("", " Y0C-4876.", False),
    ],
)
def test_an_answer_with_most_of_a_code_is_nearly_it(answer, completion, near):
    assert nearly(answer, completion) is near


def test_a_record_that_is_nearly_said_is_warned_of(planted, tokenizer, cache, monkeypatch):
    monkeypatch.setattr("libortho.isolation.attempt.nearly", lambda answer, completion: completion == " 4890.")
    config = libortho.IsolateConfig(ratio=0.1, damping=1.0)
    result = libortho.isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
    assert [r.number for r in result.records if r.nearly] == [r.number for r in result.records[1:2] if not r.extracted]
    told = [w for w in result.warnings if "is nearly the secret of 1 of 4 records (records 2)" in w]
    assert len(told) == (not result.records[1].extracted)
