"""Gradient norms that can be trained: the audit's own values, and exact second derivatives."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from libortho.audit.gradients import gradient_norms
from libortho.audit.subjects import Subject
from libortho.config import IsolateConfig
from libortho.isolate.edit import EditLinear
from libortho.isolate.language_model import LanguageModel
from libortho.isolate.sensitivity import log_gradient_norms
from libortho.targets import find_targets

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
