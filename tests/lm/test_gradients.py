"""Gradient norms that can be trained: the audit's own values, and exact second derivatives."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from libortho.auditing.measures.gradients import gradient_norms
from libortho.auditing.subjects import Subject
from libortho.core.targets import find_targets
from libortho.isolation.config import IsolateConfig
from libortho.isolation.state import Training
from libortho.isolation.train import _reaction_loss
from libortho.lm.gradients import log_gradient_norms
from libortho.lm.model import LanguageModel
from libortho.training.edit import EditLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def edited(model: nn.Module, structure: str, bits: int | None) -> dict[str, EditLinear]:
    """Layers under edit in place of the model's own, moved somewhere."""
    config, layers = IsolateConfig(structure=structure, bits=bits), {}
    model.requires_grad_(False)
    for name, module in find_targets(model, "mlp-out").items():
        support = torch.tensor([1, 5, 40])
        layers[name] = EditLinear(module.weight, None, support, config)
        with torch.no_grad():
            layers[name].theta.add_(0.1 * torch.randn_like(layers[name].theta))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers


@pytest.mark.parametrize("structure", ["columns", "unstructured"])
def test_they_are_the_norms_that_the_audit_sees(clean: Any, tokenizer: Any, structure: str) -> None:
    layers = edited(clean, structure, 8)
    items = tiny.encoded(tokenizer)
    subject = Subject("one", "one", "control", clean, contextlib.nullcontext)
    expected = gradient_norms(subject, items, list(layers))
    for differentiable in (False, True):
        found = log_gradient_norms(LanguageModel(clean), layers, items, differentiable=differentiable)
        torch.testing.assert_close(found.detach().exp(), expected, rtol=1e-4, atol=1e-6)
        assert found.requires_grad is differentiable
    assert not any(m.twice or m._forward_hooks for m in layers.values())


@pytest.mark.parametrize("structure", ["columns", "unstructured"])
def test_the_second_derivative_is_exact(clean: Any, tokenizer: Any, structure: str) -> None:
    layers = edited(clean.double(), structure, None)
    items, lm = tiny.encoded(tokenizer)[:2], LanguageModel(clean)
    values = [m.theta for m in layers.values() if m.theta is not None]
    found = torch.autograd.grad(log_gradient_norms(lm, layers, items, differentiable=True).sum(), values)
    directions = [torch.randn_like(v) for v in values]

    def at(size: float) -> float:
        with torch.no_grad():
            for value, direction in zip(values, directions, strict=True):
                value.add_(direction, alpha=size)
        total = float(log_gradient_norms(lm, layers, items, differentiable=False).sum())
        with torch.no_grad():
            for value, direction in zip(values, directions, strict=True):
                value.sub_(direction, alpha=size)
        return total

    measured = (at(1e-2) - at(-1e-2)) / 2e-2
    assert float(sum((g * d).sum() for g, d in zip(found, directions, strict=True))) == pytest.approx(
        measured, rel=0.02
    )


def test_training_brings_the_reaction_to_that_of_strangers(clean: Any, tokenizer: Any) -> None:
    """Only records whose strangers were asked count, and the mean of the log norms ends where theirs is."""
    layers, lm, items = edited(clean, "columns", None), LanguageModel(clean), tiny.encoded(tokenizer)
    cases: Any = [SimpleNamespace(secret=i) for i in items]
    values = [m.theta for m in layers.values() if m.theta is not None]
    now = Training(values, len(items), [items[0]], IsolateConfig(), [None] * len(values))
    chosen = list(range(len(items)))
    assert float(_reaction_loss(lm, layers, cases, chosen, now)) == 0.0
    before = log_gradient_norms(lm, layers, items[:2], differentiable=False)
    now.reactions[:2] = before - 0.1
    optimiser = torch.optim.Adam(values, lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = _reaction_loss(lm, layers, cases, chosen, now)
        loss.backward()
        optimiser.step()
    after = log_gradient_norms(lm, layers, items[:2], differentiable=False)
    assert float((after - before).mean()) == pytest.approx(-0.1, abs=0.02)
