"""The distributions that records should have: other people's, the two tokens changed about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import made_up
import tiny
from libortho.isolation import targets
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.request import forget_records
from libortho.isolation.targets import Target, record_targets
from libortho.isolation.wordings import wordings
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states
from libortho.text.encoding import Encoded
from libortho.text.records import load_records

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def forget(tokenizer: Any) -> list[ForgetRecord]:
    return forget_records(wordings(load_records(tiny.FORGET), tokenizer, 0, retains=True), tokenizer, None)


def distributions(model: nn.Module, item: Encoded) -> Tensor:
    """What the model says where each token of the completion stands, (tokens, vocabulary)."""
    first = len(item.ids) - len(item.completion)
    with torch.no_grad():
        return model(input_ids=torch.tensor([item.ids])).logits[0, first - 1 : -1].softmax(-1)


def probabilities(lm: LanguageModel, target: Target) -> Tensor:
    return Target.logits(lm, target.states, target.surprise, target.own, target.places).softmax(-1)


def made(
    model: nn.Module, forget: list[ForgetRecord], reads: nn.Module | None = None, chosen: list[int] | None = None
) -> list[Target]:
    """Targets of all records, or the chosen ones, under ``reads``, the first model being the original one."""
    model.requires_grad_(False)
    original = made_up.original(
        len(forget),
        states=judged_states(LanguageModel(model), [r.secret for r in forget]),
        expected=tuple(torch.full((len(r.secret.completion),), 2.5) for r in forget),
    )
    return record_targets(LanguageModel(reads or model), forget, original, chosen or range(len(forget)))


def test_a_token_is_as_likely_as_the_controls_own_and_that_one_as_the_token(
    planted: nn.Module, forget: list[ForgetRecord]
) -> None:
    lm = LanguageModel(planted)
    exchanged = 0
    for record, target in zip(forget, made(planted, forget), strict=True):
        assert target.surprise.isnan().all()
        for n, (found, matched) in enumerate(zip(probabilities(lm, target), record.matched_tokens, strict=True)):
            assert matched is not None
            control, place = record.controls[matched[0]], matched[1]
            wanted = distributions(planted, control)[place]
            mine, theirs = record.secret.completion[n], control.completion[place]
            exchanged += mine != theirs
            assert float(found[mine]) == pytest.approx(float(wanted[theirs]), rel=1e-3)
            assert float(found[theirs]) == pytest.approx(float(wanted[mine]), rel=1e-3)
            others = torch.ones_like(found, dtype=torch.bool)
            others[[mine, theirs]] = False
            torch.testing.assert_close(found[others], wanted[others], rtol=1e-3, atol=1e-6)
    assert exchanged > 8


def test_a_token_without_a_control_keeps_its_distribution_but_for_its_own_probability(
    planted: nn.Module, forget: list[ForgetRecord]
) -> None:
    record = forget[0]
    half = tuple(m if n % 2 else None for n, m in enumerate(record.matched_tokens))
    [target, alone] = made(planted, [replace(record, matched_tokens=half), replace(record, matched_tokens=(None,) * 6)])
    assert target.surprise.isnan().tolist() == [bool(n % 2) for n in range(6)]
    assert not alone.surprise.isnan().any()
    own = distributions(planted, record.secret)
    for n, found in enumerate(probabilities(LanguageModel(planted), alone)):
        label = record.secret.completion[n]
        assert float(-found[label].log()) == pytest.approx(2.5, rel=1e-3)
        others = torch.ones_like(found, dtype=torch.bool)
        others[label] = False
        shares = found[others] / found[others].sum()
        torch.testing.assert_close(shares, own[n][others] / own[n][others].sum(), rtol=1e-2, atol=1e-5)


def test_controls_are_read_under_the_model_as_it_is_and_the_records_own_states_are_not(
    planted: nn.Module, clean: nn.Module, forget: list[ForgetRecord]
) -> None:
    clean.requires_grad_(False)
    mixed = [forget[0], replace(forget[1], matched_tokens=(None,) * 6)]
    [matched, own] = made(planted, mixed, reads=clean)
    control, place = forget[0].matched_tokens[2]  # type: ignore[misc]
    [read] = judged_states(LanguageModel(clean), [forget[0].controls[control]])
    torch.testing.assert_close(matched.states[2], read[place], rtol=1e-3, atol=1e-4)
    [first, second] = made(planted, mixed)
    assert float((matched.states - first.states).abs().max()) > 0.1
    assert torch.equal(own.states, second.states)


def test_a_text_to_keep_is_to_stay_as_it_is(planted: nn.Module, forget: list[ForgetRecord]) -> None:
    planted.requires_grad_(False)
    lm, item = LanguageModel(planted), forget[0].neighbours[0]
    [states] = judged_states(lm, [item])
    found = probabilities(lm, Target.kept(item, states))
    torch.testing.assert_close(found, distributions(planted, item), rtol=1e-3, atol=1e-6)


def test_targets_of_the_chosen_records_are_made_and_their_controls_alone_are_read(
    planted: nn.Module, forget: list[ForgetRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(planted, forget)
    read: list[Encoded] = []
    real = targets.judged_states
    monkeypatch.setattr(targets, "judged_states", lambda lm, items: read.extend(items) or real(lm, items))
    found = made(planted, forget, chosen=[3, 1])
    for target, of in zip(found, (3, 1), strict=True):
        assert target.text == forget[of].secret
        assert torch.equal(target.own, torch.tensor(forget[of].secret.completion))
        assert torch.equal(target.places, whole[of].places)
        torch.testing.assert_close(target.states, whole[of].states, rtol=1e-3, atol=1e-4)
        assert target.level == pytest.approx(whole[of].level, rel=1e-4)
    used = [forget[i].controls[n] for i in (3, 1) for n in sorted({m[0] for m in forget[i].matched_tokens if m})]
    assert read == used


@pytest.mark.parametrize("matched", [6, 4, 0])
def test_the_level_is_the_mean_surprise_of_all_tokens_that_may_stand_there(
    planted: nn.Module, clean: nn.Module, forget: list[ForgetRecord], matched: int
) -> None:
    """Under the control's distribution as it is, without the exchange; where no control is matched, what is expected.

    The tokens are those of alternates and controls at the same place, each as often as it stands there.
    """
    clean.requires_grad_(False)
    places = tuple(m if n < matched else None for n, m in enumerate(forget[1].matched_tokens))
    record = replace(forget[1], matched_tokens=places)
    [target] = made(planted, [record], reads=clean)
    others = [e.completion for e in (*record.alternates, *record.controls)]
    assert len(others) == 8
    surprises = []
    for n, place in enumerate(places):
        if place is None:
            surprises.append(2.5)
            continue
        p = distributions(clean, record.controls[place[0]])[place[1]]
        surprises.append(float(torch.stack([-p[c[n]].log() for c in others]).mean()))
    assert target.level == pytest.approx(sum(surprises) / 6, rel=1e-3)
    assert target.level > 0.5


def test_the_level_of_one_token_is_its_surprise_under_the_target(
    planted: nn.Module, forget: list[ForgetRecord]
) -> None:
    """Where nothing may stand but what does, and only the control's own: there is nothing to exchange."""
    record = replace(
        forget[0],
        controls=(forget[0].controls[0],),
        alike=tuple((t,) for t in forget[0].controls[0].completion),
        matched_tokens=tuple((0, n) for n in range(6)),
    )
    [target] = made(planted, [record])
    found = probabilities(LanguageModel(planted), target)
    own = found.gather(1, torch.tensor(record.secret.completion)[:, None])  # that of the control's token, exchanged
    assert target.level == pytest.approx(float(-own.log().mean()), rel=1e-3)


def test_after_another_prompt_the_completion_has_the_records_target(
    planted: nn.Module, forget: list[ForgetRecord]
) -> None:
    [target] = made(planted, forget[:1])
    lm = LanguageModel(planted)
    swapped = replace(target, text=forget[0].swapped_prompt[0])
    assert torch.equal(probabilities(lm, swapped), probabilities(lm, target))  # of the same tokens


def exchanged(p: Tensor, one: int, other: int) -> Tensor:
    """A distribution of which two tokens have changed places."""
    p = p.clone()
    p[[one, other]] = p[[other, one]]
    return p


def assert_follows(model: nn.Module, record: ForgetRecord, target: Target, other: Encoded) -> int:
    """The target of another completion against what the model says of the controls; how many tokens it exchanges.

    The record's own token and the control's change places wherever the text before the token is the record's, whatever
    stands there; where it is not, the control's distribution is the target as it is.
    """
    exchanges, secret = 0, record.secret.completion
    made_of = target.with_completion(other)
    assert made_of.text == other
    for n, found in enumerate(probabilities(LanguageModel(model), made_of)):
        control, place = record.matched_tokens[n]  # type: ignore[misc]
        wanted = distributions(model, record.controls[control])[place]
        theirs = record.controls[control].completion[place]
        if other.completion[:n] == secret[:n]:
            wanted = exchanged(wanted, secret[n], theirs)
            exchanges += secret[n] != theirs
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    return exchanges


def test_another_completion_has_the_records_target_as_far_as_the_text_before_a_token_is_the_same(
    planted: nn.Module, forget: list[ForgetRecord]
) -> None:
    found = []
    for record, target in zip(forget, made(planted, forget), strict=True):
        assert record.cut_alike
        found += [assert_follows(planted, record, target, other) for other in record.cut_alike]
    assert max(found) > 0


@pytest.mark.parametrize("first", range(6))
def test_no_tokens_change_places_after_the_first_that_differs_even_where_later_ones_agree(
    planted: nn.Module, forget: list[ForgetRecord], first: int
) -> None:
    """At the first itself they do: the text before it is the record's."""
    for record, target in zip(forget, made(planted, forget), strict=True):
        ids = list(record.secret.ids)
        at = len(ids) - len(record.secret.completion) + first
        theirs = [int(t) for t in target.places]
        for token in (next(t for t in range(3, 99) if t not in (ids[at], theirs[first])), theirs[first]):
            if token == record.secret.completion[first]:
                continue  # the control's token is the record's
            changed = (*ids[:at], token, *ids[at + 1 :])
            labels = (*record.secret.labels[:at], token, *record.secret.labels[at + 1 :])
            exchanges = assert_follows(planted, record, target, Encoded(changed, labels))
            own = record.secret.completion
            assert exchanges == sum(own[n] != theirs[n] for n in range(first + 1))


def test_the_same_completion_has_the_same_target(planted: nn.Module, forget: list[ForgetRecord]) -> None:
    for record, target in zip(forget, made(planted, forget), strict=True):
        same = target.with_completion(record.secret)
        assert torch.equal(same.own, target.own)
        assert torch.equal(same.own, torch.tensor(record.secret.completion))
        assert torch.equal(probabilities(LanguageModel(planted), same), probabilities(LanguageModel(planted), target))


def test_another_completion_changes_nothing_else_of_a_target(planted: nn.Module, forget: list[ForgetRecord]) -> None:
    [target] = made(planted, forget[:1])
    before = target.own.clone()
    other = target.with_completion(forget[0].cut_alike[0])
    assert torch.equal(target.own, before)
    assert target.text == forget[0].secret
    assert other.level == target.level
    for name in ("states", "surprise", "places"):
        torch.testing.assert_close(getattr(other, name), getattr(target, name), rtol=0, atol=0, equal_nan=True)
