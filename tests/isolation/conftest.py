"""Isolations that several files read."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from isolating import run
from libortho import isolate
from libortho.isolation import train as trainer
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.targets import Target
from sequential import FIRST, KEPT, NEAR, ONE, SECOND, TWO, VARIANTS
from watching import CONTROLS, Watched


@pytest.fixture(scope="session")
def plain(_planted: nn.Module, tokenizer: Any) -> dict[str, Tensor]:
    """Base weights after three steps with no option changed."""
    return run(copy.deepcopy(_planted), tokenizer)


@pytest.fixture(scope="session")
def made(_planted: nn.Module, tokenizer: Any) -> Callable[..., nn.Module]:
    """The planted model after its first request, of every variant a fresh copy."""
    models: dict[str, nn.Module] = {}

    def get(variant: str = "int8") -> nn.Module:
        if variant not in models:
            model = copy.deepcopy(_planted)
            isolate(model, tokenizer, ONE, KEPT, neighbours=NEAR, config=replace(FIRST, **VARIANTS[variant]))
            models[variant] = model
        return copy.deepcopy(models[variant])

    return get


@pytest.fixture
def once(made: Callable[..., nn.Module]) -> nn.Module:
    return made()


@pytest.fixture(scope="session")
def _twice(made: Callable[..., nn.Module], tokenizer: Any) -> nn.Module:
    model = made()
    isolate(model, tokenizer, TWO, tiny.RETAIN, config=SECOND)
    return model


@pytest.fixture
def twice(_twice: nn.Module) -> nn.Module:
    """After the second request."""
    return copy.deepcopy(_twice)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(trainer, "Equations", Watched)

    def targets(lm: Any, forget: Sequence[ForgetRecord], original: Any, chosen: Sequence[int]) -> list[Target]:
        Watched.chosen.append(list(chosen))
        made = [Target.kept(forget[i].secret, torch.full((4, 2), float(i))) for i in chosen]
        return [replace(t, places=torch.full((4,), CONTROLS)) for t in made]

    monkeypatch.setattr(trainer, "record_targets", targets)
    monkeypatch.setattr(Watched, "steps", [], raising=False)
    monkeypatch.setattr(Watched, "chosen", [], raising=False)
    return Watched
