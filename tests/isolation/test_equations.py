"""What a step solves, against formulas written out and gradients of plain autograd."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libortho.core.surgery import swap
from libortho.core.targets import find_targets
from libortho.isolation.equations import ODDS, Equations, Seen
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
            places = torch.tensor(text.completion)
            places[::2] = (places[::2] * 7) % 120
            self.targets.append(Target(text, found, surprise, places))

    def logits(self, target: Target) -> tuple[Tensor, Tensor]:
        """At the positions that predict the completion, and the completion."""
        first = len(target.text.ids) - len(target.text.completion)
        logits = cast(Any, self.model)(input_ids=torch.tensor([target.text.ids])).logits[0, first - 1 : -1]
        return logits, torch.tensor(target.text.completion)

    def wanted(self, target: Target) -> Tensor:
        """The target's log-probabilities, token by token."""
        rows = []
        for state, label, surprise, place in zip(
            target.states, target.text.completion, target.surprise.tolist(), target.places.tolist(), strict=True
        ):
            p = cast(Any, self.model).lm_head(state).softmax(-1)
            p[[label, place]] = p[[place, label]]
            if surprise == surprise:
                q = torch.exp(torch.tensor(-surprise))
                p = p * (1 - q) / (1 - p[label])
                p[label] = q
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

    def expected(self, *, records: bool, surprise: bool) -> Tensor:
        """Every equation as a row, its residual first."""
        rows = []
        for target in self.targets:
            for residual in self.residuals(target, records=records)[: 1 + surprise]:
                gradients = torch.autograd.grad(residual, list(self.values.values()), retain_graph=True)
                rows.append(torch.cat([residual.detach()[None], *(g.flatten() for g in gradients)]))
        return torch.stack(rows)

    def found(self) -> Tensor:
        rows = [torch.cat(self.equations.rows[n]).flatten(1) for n in self.layers]
        return torch.cat([torch.cat(self.equations.residuals)[:, None], *rows], 1)


@pytest.mark.parametrize("limit", [1, 60, 10_000])
@pytest.mark.parametrize(("records", "surprise"), [(True, False), (True, True), (False, False)])
def test_equations_are_those_of_the_formulas(
    tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch, limit: int, records: bool, surprise: bool
) -> None:
    edited = Edited(tiny_llama)
    expected = edited.expected(records=records, surprise=surprise)
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", limit)
    edited.equations.add(edited.targets, records=records, surprise=surprise)
    found = edited.found()
    assert float(expected[:, 0].abs().min()) > 0.01
    order, same = found[:, 0].argsort(), expected[:, 0].argsort()  # texts of a length are read together
    torch.testing.assert_close(found[order], expected[same], rtol=2e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_pass_says_what_it_saw(tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = Edited(tiny_llama)
    said = list(TEXTS[1].ids[:2])
    while len(said) < len(TEXTS[1].ids):
        said.append(int(cast(Any, tiny_llama)(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    greedy = Encoded(tuple(said), (IGNORE, IGNORE, *said[2:]))
    edited.targets[1] = Target.kept(greedy, edited.targets[1].states)
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", 60)
    found: list[Seen] = edited.equations.add(edited.targets, records=True, surprise=True)
    assert [s.greedy for s in found] == [False, True, False, False]
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
    edited.equations.add(kept, records=False, surprise=False)
    assert float(edited.found()[:, 0].max()) < 0.01
    assert torch.isfinite(edited.found()).all()


def test_solving_brings_records_nearer_to_their_targets_within_the_grid(tiny_llama: nn.Module) -> None:
    edited = Edited(tiny_llama, width=64)
    before = [float(edited.residuals(t, records=True)[0].detach()) for t in edited.targets]
    for _ in range(4):
        equations = Equations(edited.lm, edited.layers, edited.optimiser)
        equations.add(edited.targets, records=True, surprise=False)
        equations.solve(0.3)
    after = [float(edited.residuals(t, records=True)[0].detach()) for t in edited.targets]
    assert sum(after) < 0.8 * sum(before)
    for layer in edited.layers.values():
        assert bool((cast(Tensor, layer.values).abs() <= cast(Tensor, layer.step) * 127 * 1.0001).all())
