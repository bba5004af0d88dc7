"""What a step solves, against formulas written out and gradients of plain autograd."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libortho.core.surgery import swap
from libortho.core.targets import find_targets
from libortho.isolation.equations import HELD, ODDS, Equations, Seen
from libortho.isolation.targets import Target
from libortho.lm import scoring
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import IGNORE, Encoded
from libortho.training.edit import EditLinear
from libortho.training.gauss_newton import GaussNewton

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [Encoded(tuple(range(2, n)), (IGNORE, IGNORE, *range(4, n))) for n in (9, 40, 24, 25)]


class Edited:
    """A tiny llama in the middle of an edit, and targets that it does not meet."""

    def __init__(self, model: nn.Module, width: int = 6) -> None:
        model.requires_grad_(False)
        self.model, self.lm = model, LanguageModel(model)
        states = [s * 1.1 for s in judged_states(self.lm, TEXTS)]
        targets = find_targets(model, "mlp-out")
        self.layers = {
            n: EditLinear(cast(Any, m).weight.detach(), None, torch.arange(width), 8, -1) for n, m in targets.items()
        }
        swap(model, self.layers)
        self.values = {n: cast(nn.Parameter, m.values) for n, m in self.layers.items()}
        with torch.no_grad():
            for value in self.values.values():
                value.mul_(1.5)
        plain = KroneckerPreconditioner(torch.eye(width), torch.eye(64), torch.ones(width, 64))
        self.optimiser = GaussNewton(self.values, dict.fromkeys(self.layers, plain))
        self.equations = Equations(self.lm, self.layers, self.optimiser)
        generator = torch.Generator().manual_seed(0)
        self.targets = []
        for text, found in zip(TEXTS, states, strict=True):
            surprise = torch.rand(len(found), generator=generator) * 6
            surprise[::2] = torch.nan
            own, places = torch.tensor(text.completion), torch.tensor(text.completion)
            places[::2] = (places[::2] * 7) % 120
            own[::3] = (own[::3] * 11) % 120  # with another completion, not the text's own token
            self.targets.append(Target(text, found, surprise, own, places, float(len(text.ids)) / 5))

    def logits(self, target: Target) -> tuple[Tensor, Tensor]:
        """At the positions that predict the completion, and the completion."""
        first = len(target.text.ids) - len(target.text.completion)
        logits = cast(Any, self.model)(input_ids=torch.tensor([target.text.ids])).logits[0, first - 1 : -1]
        return logits, torch.tensor(target.text.completion)

    def wanted(self, target: Target) -> Tensor:
        """The target's log-probabilities, token by token."""
        rows = []
        columns = (target.surprise.tolist(), target.own.tolist(), target.places.tolist())
        for state, surprise, own, place in zip(target.states, *columns, strict=True):
            p = cast(Any, self.model).lm_head(state).softmax(-1)
            p[[own, place]] = p[[place, own]]
            if surprise == surprise:
                q = torch.exp(torch.tensor(-surprise))
                p = p * (1 - q) / (1 - p[own])
                p[own] = q
            rows.append(p.log())
        return torch.stack(rows)

    def residuals(self, target: Target, *, records: bool) -> tuple[Tensor, Tensor]:
        """Of the divergence and of the surprise, of one text."""
        logits, labels = self.logits(target)
        log_p, wanted = logits.log_softmax(-1), self.wanted(target)
        loss = (wanted.exp() * (wanted - log_p)).sum(-1)
        q = wanted.gather(1, labels[:, None])[:, 0].exp()
        if records:
            p = log_p.gather(1, labels[:, None])[:, 0].exp()
            loss = loss + ODDS / 2 * (1 - q) * ((p / (1 - p)).log() - (q / (1 - q)).log()).square()
        nll = F.cross_entropy(logits, labels)
        return (2 * loss.mean()).sqrt(), nll + q.log().mean()

    def row(self, residual: Tensor) -> Tensor:
        """An equation: its residual, and autograd's gradient of it."""
        gradients = torch.autograd.grad(residual, list(self.values.values()), retain_graph=True)
        return torch.cat([residual.detach()[None], *(g.flatten() for g in gradients)])

    def expected(self, *, records: bool, surprise: bool) -> Tensor:
        """Every equation of the targets as a row."""
        found = [r for t in self.targets for r in self.residuals(t, records=records)[: 1 + surprise]]
        return torch.stack([self.row(r) for r in found])

    def mean_surprise(self, target: Target) -> Tensor:
        return F.cross_entropy(*self.logits(target))

    def found(self) -> Tensor:
        rows = [torch.cat(self.equations.rows[n]).flatten(1) for n in self.layers]
        return torch.cat([torch.cat(self.equations.residuals)[:, None], *rows], 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The same rows, in any order: texts of a length are read together."""
    order, same = found[:, 0].argsort(), expected[:, 0].argsort()
    torch.testing.assert_close(found[order], expected[same], rtol=2e-3, atol=1e-3 * float(expected.abs().max()))


LIMITS = pytest.mark.parametrize("limit", [1, 60, 10_000])
"""Padded tokens of a pass: each text alone, some together, all together."""


@LIMITS
@pytest.mark.parametrize("surprise", [False, True])
def test_equations_of_records_are_those_of_the_formulas(
    tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch, limit: int, surprise: bool
) -> None:
    edited = Edited(tiny_llama)
    expected = edited.expected(records=True, surprise=surprise)
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", limit)
    edited.equations.records(edited.targets, surprise=surprise)
    assert float(expected[:, 0].abs().min()) > 0.01
    assert_close(edited.found(), expected)


@LIMITS
def test_texts_to_keep_have_heavier_equations_of_their_divergence_alone(
    tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    edited = Edited(tiny_llama)
    expected = HELD * edited.expected(records=False, surprise=False)
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", limit)
    edited.equations.kept(edited.targets)
    assert float(expected[:, 0].abs().min()) > 0.01
    assert_close(edited.found(), expected)


@LIMITS
def test_the_mean_surprise_of_texts_together_is_one_equation(
    tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """As heavy as if each had one of its own that says the same: the sum of the offsets over the root of their number.

    Texts that are likelier than wanted and others that are less so make up for each other.
    """
    edited = Edited(tiny_llama)
    wanted = torch.tensor([1.0, 9.0, 2.5, 4.0])
    offsets = torch.stack([edited.mean_surprise(t) for t in edited.targets]) - wanted
    assert (offsets < 0).any()
    assert (offsets > 0).any()
    expected = edited.row(offsets.sum() / 2)[None]
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", limit)
    edited.equations.together(TEXTS, wanted)
    assert_close(edited.found(), expected)
    balanced = Equations(edited.lm, edited.layers, edited.optimiser)
    balanced.together(TEXTS, wanted + offsets.detach().mean())
    assert abs(float(torch.cat(balanced.residuals))) < 1e-3 < abs(float(expected[0, 0]))


class Recorded:
    """In place of an optimiser: it remembers what it is to solve."""

    def __init__(self, real: GaussNewton) -> None:
        self.whiten = real.whiten

    def step(self, rows: dict[str, list[Tensor]], residuals: Tensor, share: float, damping: float, pull: float) -> None:
        self.rows = {n: torch.cat(parts) for n, parts in rows.items()}
        self.residuals, self.share = residuals, share


@LIMITS
def test_the_records_share_an_equation_of_their_surprise_against_its_level(
    tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The last row; what is held to its own level beside it is none of it."""
    edited = Edited(tiny_llama)
    offsets = [edited.mean_surprise(t) - t.level for t in edited.targets]
    expected = edited.row(torch.stack(offsets).sum() / 2)
    recorded = Recorded(edited.optimiser)
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", limit)
    equations = Equations(edited.lm, edited.layers, cast(GaussNewton, recorded))
    equations.records(edited.targets, surprise=True)
    equations.kept(edited.targets[:2])
    equations.together(TEXTS[:3], torch.zeros(3))
    equations.solve(0.3)
    assert recorded.share == 0.3
    assert len(recorded.residuals) == 2 * 4 + 2 + 1 + 1
    last = torch.cat([recorded.residuals[-1:], *(recorded.rows[n][-1].flatten() for n in edited.layers)])
    assert_close(last[None], expected[None])


def test_the_records_share_no_equation_where_their_surprise_is_none(tiny_llama: nn.Module) -> None:
    edited = Edited(tiny_llama)
    recorded = Recorded(edited.optimiser)
    equations = Equations(edited.lm, edited.layers, cast(GaussNewton, recorded))
    equations.records(edited.targets, surprise=False)
    equations.solve(0.3)
    assert len(recorded.residuals) == 4


def test_a_pass_says_what_it_saw(tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = Edited(tiny_llama)
    said = list(TEXTS[1].ids[:2])
    while len(said) < len(TEXTS[1].ids):
        said.append(int(cast(Any, tiny_llama)(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    greedy = Encoded(tuple(said), (IGNORE, IGNORE, *said[2:]))
    edited.targets[1] = replace(Target.kept(greedy, edited.targets[1].states), level=2.5)
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", 60)
    found: list[Seen] = edited.equations.records(edited.targets, surprise=True)
    assert [s.greedy for s in found] == [False, True, False, False]
    assert [s.level for s in found] == [1.4, 2.5, 4.4, 4.6]
    for target, seen in zip(edited.targets, found, strict=True):
        logits, labels = edited.logits(target)
        nll = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(seen.surprise, nll.detach(), rtol=1e-3, atol=1e-4)
        wanted = -edited.wanted(target).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(seen.wanted, wanted, rtol=1e-3, atol=1e-4)


def test_what_has_not_moved_asks_for_nothing(tiny_llama: nn.Module) -> None:
    """Its residual is a small one, and its gradient is finite."""
    edited = Edited(tiny_llama)
    states = judged_states(edited.lm, TEXTS)
    kept = [Target.kept(t, s) for t, s in zip(TEXTS, states, strict=True)]
    edited.equations.kept(kept)
    assert float(edited.found()[:, 0].max()) < 0.01
    assert torch.isfinite(edited.found()).all()


def test_solving_brings_records_nearer_to_their_targets_within_the_grid(tiny_llama: nn.Module) -> None:
    edited = Edited(tiny_llama, width=64)
    before = [float(edited.residuals(t, records=True)[0].detach()) for t in edited.targets]
    for _ in range(4):
        equations = Equations(edited.lm, edited.layers, edited.optimiser)
        equations.records(edited.targets, surprise=False)
        equations.solve(0.3)
    after = [float(edited.residuals(t, records=True)[0].detach()) for t in edited.targets]
    assert sum(after) < 0.8 * sum(before)
    for layer in edited.layers.values():
        assert bool((cast(Tensor, layer.values).abs() <= cast(Tensor, layer.step) * 127 * 1.0001).all())


def test_strangers_keep_their_mean_surprise_while_records_move(tiny_llama: nn.Module) -> None:
    """They are the same texts but for one token: what makes the records unlikely makes them so too, unless held."""
    moved = []
    for held in (False, True):
        edited = Edited(copy.deepcopy(tiny_llama), width=64)
        strangers = [Encoded((*t.ids[:3], 90, *t.ids[4:]), t.labels) for t in TEXTS[1:]]
        targets = [Target.kept(t, edited.targets[0].states[:1]) for t in strangers]
        before = torch.stack([edited.mean_surprise(t).detach() for t in targets])
        records = [replace(t, surprise=torch.full_like(t.surprise, 12.0), level=12.0) for t in edited.targets[1:]]
        for _ in range(4):
            equations = Equations(edited.lm, edited.layers, edited.optimiser)
            equations.records(records, surprise=True)
            if held:
                equations.together(strangers, before)
            equations.solve(0.3)
        after = torch.stack([edited.mean_surprise(t).detach() for t in targets])
        moved.append(float((after - before).mean()))
    assert moved[0] > 0.5
    assert abs(moved[1]) < 0.3 * moved[0]
