"""The pieces of the trainer that are plain arithmetic."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from libortho.core.run_cache import Entry
from libortho.isolation import control, criteria
from libortho.isolation.codes import shortness, shrunk
from libortho.isolation.config import IsolateConfig
from libortho.isolation.control import calibrate, extrapolated_residual
from libortho.isolation.criteria import (
    BAND,
    PARTIAL,
    Criteria,
    RecordOutcome,
    RecordStatistics,
    acceptable,
    binomial_bound,
    check_criteria,
    in_place,
    mean_offset,
    outcomes,
    partly_recited,
)
from libortho.isolation.forget_record import ForgetRecord, Kind
from libortho.isolation.losses import (
    forget_losses,
    keep_losses,
    profile_distance,
    profile_loss,
    sorted_assignment,
    summed_gradients,
)
from libortho.isolation.sentences import ranked_assignment
from libortho.isolation.state import RELATIVE_STEP, Epochs, Training
from libortho.lm import scoring
from libortho.lm.head import HEAD_POSITIONS
from libortho.lm.logits import Scores, profile_and_odds, record_means, token_profile
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import SCORING_TOKENS, judged_states, scoring_tokens, token_profiles
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import Encoded, batches, collate, predicting
from libortho.training.edit import EditLinear

TEXTS = [Encoded(tuple(range(64)), tuple(range(64)))] * 7


def _case(tokens: int, alternates: tuple[int, ...]) -> ForgetRecord:
    def item(count: int) -> Encoded:
        return Encoded((0, *range(count)), (-100, *range(count)))

    return ForgetRecord(1, item(tokens), tuple(item(n) for n in alternates), (), (), (), (), "code", (), (), (), ())


def test_targets_are_handed_out_in_the_order_of_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    now, target = torch.rand(9, 3, generator=generator), torch.rand(9, 3, generator=generator)
    record = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    found = sorted_assignment(now, target, record)
    for r in range(3):
        for channel in range(3):
            mine = record == r
            assert torch.equal(found[mine, channel].sort().values, target[mine, channel].sort().values)
            assert torch.equal(found[mine, channel].argsort(), now[mine, channel].argsort())
    # No other way to hand them out has a smaller total distance.
    cost = (now[:4, 0] - found[:4, 0]).abs().sum()
    assert all(cost <= (now[:4, 0] - target[list(p), 0]).abs().sum() + 1e-6 for p in permutations(range(4)))


def test_a_sentence_is_surprising_where_its_words_are() -> None:
    profile = torch.tensor([[5.0, 0.5, 50.0], [1.0, 0.1, 10.0], [3.0, 0.3, 30.0]])
    found = ranked_assignment(profile, torch.tensor([2.0, 9.0, 0.5]))
    assert torch.equal(found, profile[[2, 0, 1]])  # rows stay whole


def test_a_completion_longer_than_a_part_of_the_head_is_handed_out_as_a_whole(tiny_llama: nn.Module) -> None:
    ids = tuple(random.Random(0).choices(range(2, 120), k=2 * HEAD_POSITIONS + 9))
    secret, lm = Encoded(ids, ids), LanguageModel(tiny_llama)
    (own,) = token_profiles(lm, [secret])
    with torch.no_grad():
        backwards, other = (float(profile_loss(lm, [secret], [p], [True])) for p in (own.flip(0), own.roll(1, 1)))
    assert backwards == pytest.approx(0.0, abs=1e-4)
    assert other > 0.1


def _read_plainly(lm: LanguageModel, text: Encoded) -> tuple[torch.Tensor, ...]:
    """Logits at the positions that predict its completion, the labels, zeros as many, and the profile there."""
    places = predicting(text)
    logits = lm.logits(lm.hidden(collate([text]))[0, list(places)])
    labels = torch.tensor([text.ids[p + 1] for p in places])
    return logits, labels, torch.zeros_like(labels), token_profile(logits, labels).detach()


@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_a_step_in_parts_is_the_same_step(limit: int, tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama.requires_grad_(False)
    lm, down = LanguageModel(tiny_llama), cast(Any, tiny_llama).model.layers[0].mlp.down_proj
    config = IsolateConfig(bits=8, group_size=-1)
    layer = EditLinear(down.weight.detach(), None, torch.arange(6), 8, -1)
    cast(Any, tiny_llama).model.layers[0].mlp.down_proj = layer
    with torch.no_grad():
        cast(Any, layer.values).mul_(1.5)
    texts = [Encoded(tuple(range(2, n)), (-100, -100, *range(4, n))) for n in (9, 70, 24, 25, 80)]
    states = [s * 1.1 for s in judged_states(lm, texts)]
    wanted = [p.roll(1, 1) for p in token_profiles(lm, texts)]
    forget = [ForgetRecord(i, t, (t,), (t,), (t,), (), (), "prose", (), (), (), (), 1) for i, t in enumerate(texts)]
    before: Any = SimpleNamespace(
        profiles=[(p,) for p in wanted], leaks_to_neighbours=torch.zeros(len(texts)).bool(), neighbours=[(s,) for s in
        states],
        retain=states,
    )  # fmt: skip

    def gradients() -> list[torch.Tensor]:
        now: Any = SimpleNamespace(profiles=(), target_offset=torch.zeros(3), rng=random.Random(0))
        chosen, values = list(range(len(texts))), [cast(nn.Parameter, layer.values)]
        pull = forget_losses(lm, forget, chosen, before, now)
        keep = keep_losses(lm, forget, chosen, texts, chosen, before, config, now)
        return [*summed_gradients(pull, values), *summed_gradients(keep, values)]

    whole = gradients()
    plain = sum(
        record_means(profile_distance(*profile_and_odds(logits, labels), sorted_assignment(found, w, zero)), zero, 1)
        for t, w in zip(texts, wanted, strict=True)
        for logits, labels, zero, found in [_read_plainly(lm, t)]
    ) / len(texts)
    [expected] = torch.autograd.grad(cast(torch.Tensor, plain), cast(nn.Parameter, layer.values))
    torch.testing.assert_close(whole[0], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", limit)
    for mine, expected in zip(gradients(), whole, strict=True):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("kind", "pieces"), [("code", 1), ("prose", 1), ("prose", 4)])
def test_which_token_is_to_surprise_is_chance_but_in_a_sentence_that_has_columns_for_its_words(
    kind: Kind, pieces: int, tiny_llama: nn.Module
) -> None:
    """The loss is that of what the donors are now: none where the record has it, in any order but in that record."""
    ids = (3, 60, 2, 85, 17, 9)
    secret = Encoded(ids, (-100, -100, *ids[2:]))
    record = ForgetRecord(
        1, secret, (secret,), (), (), (), (), kind, (), (), (), ((),) if kind == "code" else (), pieces
    )
    lm = LanguageModel(tiny_llama)
    (own,) = token_profiles(lm, [secret])
    own[:, 2] = own[:, 0]  # in one order, so that a permutation of rows is one of each column
    now = SimpleNamespace(profiles=(own,), target_offset=torch.zeros(3), rng=random.Random(0))
    before: Any = SimpleNamespace(profiles=((own + 5.0,) * 2,), leaks_to_neighbours=torch.tensor([False]))

    def loss(profile: torch.Tensor) -> float:
        now.profiles = (profile,)
        return sum(float(part.detach()) for part in forget_losses(lm, [record], [0], before, cast(Any, now)))

    there = loss(own)
    permuted = loss(own[[3, 2, 1, 0]])
    assert loss(own + torch.tensor([2.0, 0.0, 0.0])) > there + 0.5  # not what they were, but what they are
    assert permuted == pytest.approx(there, abs=1e-5) if pieces == 1 else permuted > there + 0.1


def test_a_sentence_that_still_begins_as_it_did_is_recited_in_part() -> None:
    """Though its mean is what it should be: three words by heart, and two that could not be less likely."""
    expected = torch.tensor([4.0, 9.0, 1.0, 4.0, 2.0])
    begun = torch.tensor([0.1, 0.1, 0.0, 10.0, 9.8])
    elsewhere = torch.tensor([6.0, 3.5, 0.0, 8.0, 2.5])
    assert begun.mean() == elsewhere.mean() == expected.mean()
    assert in_place(begun, expected) == pytest.approx(6.2 / 20)
    assert in_place(elsewhere, expected) == pytest.approx(13.5 / 20)
    assert partly_recited([begun, elsewhere, begun], [expected, expected, torch.zeros(0)]) == [
        True, False, False,
    ]  # fmt: skip

    def holds(surprise: torch.Tensor) -> bool:
        seen = RecordStatistics(torch.full((1, 3), 4.0), torch.tensor([False]), (surprise,))
        return check_criteria(seen, torch.tensor([4.0]), torch.ones(1), [expected], 5).holds

    assert holds(elsewhere)
    assert not holds(begun)
    assert [binomial_bound(n, PARTIAL) for n in (1, 20, 200)] == [0, 3, 15]


def test_every_record_comes_once_before_any_comes_again() -> None:
    batches = Epochs(5, 2, random.Random(0))
    drawn = [i for _ in range(10) for i in next(batches)]
    for start in range(0, 20, 5):
        assert sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4]


def test_a_training_goes_on_where_it_was_put_away() -> None:
    """Seven steps at once, and three, a way through JSON, and four: the same draws and the same values."""

    def training() -> Training:
        values = [nn.Parameter(torch.linspace(-1, 1, 2 * n).view(2, n)) for n in (3, 5)]
        return Training(
            values, 5, TEXTS, config, [None, KroneckerPreconditioner.of(torch.eye(2), torch.arange(5.0).diag(), 0.1)]
        )

    def steps(training: Training, count: int) -> list[Any]:
        drawn = []
        for _ in range(count):
            drawn.append((next(training.records), next(training.texts), training.rng.random()))
            gradients = [v.detach() ** 2 + n + drawn[-1][0][0] for n, v in enumerate(training.optimiser.values)]
            training.optimiser.step(gradients, 0.5)
            training.step += 1
        return drawn

    config = IsolateConfig()
    whole, first = training(), training()
    expected = steps(whole, 7)
    begun = steps(first, 3)
    first.checks.append(Criteria(3, 1, 2, 0, 0.1, False))
    part = first.part()
    other = training()
    kept = {n: t.clone() for n, t in part.tensors.items()}
    other.take_up(Entry(kept, json.loads(json.dumps(part.data))))
    steps(first, 1)  # what was put away does not move with it
    assert begun + steps(other, 4) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.optimiser.values, other.optimiser.values, strict=True))
    assert (other.step, other.last, other.finished) == (7, config.max_steps, False)
    assert other.checks == [Criteria(3, 1, 2, 0, 0.1, False)]


def test_fewer_tokens_than_the_alternates_count_as_short() -> None:
    found = shortness([_case(7, (8, 10)), _case(9, (8, 10)), _case(11, (8, 10))])
    assert found[0] > 0
    assert found[1] == 0
    assert found[2] < 0
    assert torch.equal(shortness([_case(4, (4, 4))]), torch.zeros(1))


def test_means_shrink_as_far_as_their_spread_is_noise() -> None:
    means = torch.tensor([4.0, 5.0, 6.0])
    assert torch.equal(shrunk(means, torch.zeros(3)), means)
    assert torch.allclose(shrunk(means, torch.full((3,), 9.0)), torch.full((3,), 5.0))
    half = shrunk(means, torch.full((3,), 0.5))
    assert torch.allclose(half, torch.tensor([4.5, 5.0, 5.5]))
    assert torch.equal(shrunk(means[:1], torch.ones(1)), means[:1])


@dataclass
class _Linear:
    """Records whose distance is the mean edit minus ``root``: the factor that calibrate must find is ``root``."""

    layer: EditLinear
    root: float

    def __call__(self, *arguments: Any) -> torch.Tensor:
        assert self.layer.values is not None
        return (self.layer.values.detach() - self.layer.original).mean().reshape(1) - self.root


@pytest.mark.parametrize(("root", "found"), [(1.12, 1.12), (0.9, 0.9), (1.0, 1.0), (3.0, 1.25)])
def test_one_factor_takes_the_common_offset_out(monkeypatch: pytest.MonkeyPatch, root: float, found: float) -> None:
    weight = torch.randn(6, 8)
    layer = EditLinear(weight, None, torch.tensor([1, 4]), None, -1)
    assert layer.values is not None
    with torch.no_grad():
        layer.values += 1.0
    monkeypatch.setattr(control, "surprise_offsets", _Linear(layer, root))
    factor = calibrate(None, {"layer": layer}, [], None)  # type: ignore[arg-type]
    assert factor == pytest.approx(found, abs=0.06)
    assert torch.allclose(layer.values, layer.original + factor, atol=1e-5)


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

    def seen(lm: Any, items: Any) -> RecordStatistics:
        nll = scores(len(items)).nll
        return RecordStatistics(nll[:, None], torch.zeros(len(items), dtype=torch.bool), (torch.zeros(0),) * len(items))

    monkeypatch.setattr(criteria, "evaluate_records", seen)
    monkeypatch.setattr(criteria, "grouped_scores", lambda lm, groups: tuple(scores(len(g)) for g in groups))
    forget = [_case(4, (4,) * alternates)] * 20_000
    original: Any = SimpleNamespace(
        secret=scores(len(forget)),
        sentences=None,
        expected=(torch.zeros(0),) * len(forget),
        target=torch.zeros(len(forget)),
    )
    found = outcomes(cast(Any, None), forget, original)
    assert 0.09 < sum(not r.inside for r in found) / len(found) < 0.11
    assert sum(r.far for r in found) / len(found) < 0.003


def test_a_group_that_leans_is_not_acceptable_though_each_record_is() -> None:
    spread = torch.ones(100)
    balanced = torch.tensor([1.0, -1.0] * 50)
    assert acceptable(balanced, 10, spread)
    assert not acceptable(balanced, 16, spread)
    assert not acceptable(balanced - 0.4, 10, spread)
    assert acceptable(balanced[:4] - 0.4, 1, spread[:4])  # BAND / 2 / 2 = 0.41: by chance


def test_a_lean_is_measured_from_the_middle_of_each_band() -> None:
    def record(after: float) -> RecordOutcome:
        return RecordOutcome(1, -0.1, after, (-4 - BAND, -4 + BAND), False)  # spread 1, middle -4

    assert mean_offset([record(-3.0), record(-4.5)]) == pytest.approx((0.25, BAND / 2**0.5))
    assert mean_offset([record(-5.0)])[0] == pytest.approx(-1.0)
    assert not record(-3.0).far
    assert record(-0.5).far
    assert record(-7.5).far


def test_what_the_training_makes_up_for_by_itself_is_not_steered() -> None:
    before = torch.tensor([-2.0, -1.0, 1.0, 0.5])
    now = torch.tensor([-1.0, -0.9, 1.0, 0.6])
    found = extrapolated_residual(now, before).tolist()
    assert found[0] == 0.0  # gone in a look
    assert found[1] == pytest.approx(-0.7)  # two looks take a fifth of it
    assert found[2:] == pytest.approx([1.0, 0.8])  # stays, and grows


@pytest.mark.parametrize("metric", [None, KroneckerPreconditioner.of(torch.eye(2), torch.eye(3), 0.1)])
@pytest.mark.parametrize(
    ("records", "options", "peak"),
    [
        (12, {}, 0.5 * RELATIVE_STEP),
        (100, {}, 0.5 * RELATIVE_STEP),
        (3, {}, 0.25 * RELATIVE_STEP),  # few records all pull the same way
        (3, {"learning_rate": 0.01}, 0.01),
    ],
)
def test_a_step_of_the_training_goes_downhill_at_the_peak_rate(
    metric: KroneckerPreconditioner | None, records: int, options: dict[str, Any], peak: float
) -> None:
    value = nn.Parameter(torch.full((2, 3), 0.5))
    training = Training([value], records, TEXTS, IsolateConfig(decay=0.0, **options), [metric])
    training.optimiser.step([torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])], 0.5)
    expected = 0.5 - 0.5 * peak * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    torch.testing.assert_close(value.detach(), expected)


def test_what_nothing_asks_for_fades() -> None:
    value = nn.Parameter(torch.tensor([[0.5, 0.5]]))
    training = Training([value], 5, TEXTS, IsolateConfig(decay=0.25), [None])
    with torch.no_grad():
        value.add_(torch.tensor([[1.0, -1.0]]))
    training.optimiser.step([torch.zeros(1, 2)], 1.0)
    torch.testing.assert_close(value.detach(), torch.tensor([[1.25, -0.25]]))
    training.optimiser.step([torch.zeros(1, 2)], 0.0)  # landed
    torch.testing.assert_close(value.detach(), torch.tensor([[1.25, -0.25]]))


def test_a_gpu_reads_more_at_a_time() -> None:
    items = [TEXTS[0]] * (2 * SCORING_TOKENS // len(TEXTS[0].ids))
    passes = {d: list(batches(items, scoring_tokens(torch.device(d)))) for d in ("cpu", "cuda")}
    assert len(passes["cuda"]) == 1 < len(passes["cpu"])
    for rows in passes.values():
        assert [i for some in rows for i in some] == list(range(len(items)))
