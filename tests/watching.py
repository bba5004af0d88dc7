"""A training whose equations are watched: what it asks for, step by step, where the test says what it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import made_up
from isolating import CONFIG
from libortho.core.progress import Stopwatch
from libortho.core.run_cache import RunCache
from libortho.isolation.criteria import Criteria
from libortho.isolation.equations import Seen
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.targets import Target
from libortho.isolation.train import train
from libortho.text.encoding import Encoded
from libortho.training.edit import EditLinear

TEXTS = [Encoded(tuple(range(64)), tuple(range(64)))] * 7
CONTROLS = 9
"""The token with which every token of a record changes places."""


@dataclass
class Step:
    """What one step asked for: records, texts to keep, and strangers with the surprise that is wanted of them."""

    records: list[Target]
    surprise: bool
    values: Tensor
    kept: list[Target] = field(default_factory=list)
    together: list[tuple[list[Encoded], list[float]]] = field(default_factory=list)
    solved: bool = False

    @property
    def texts(self) -> list[Encoded]:
        return [t.text for t in self.records]


class Watched:
    """In place of equations: it remembers what it is asked, sees whatever the test says, and moves every value by 1."""

    steps: list[Step]
    chosen: list[list[int]]

    def __init__(self, lm: Any, layers: Any, optimiser: Any) -> None:
        [self.value] = optimiser.values.values()

    @staticmethod
    def sees(step: int, text: Encoded) -> Seen:
        return Seen(torch.full((4,), 4.0), torch.full((4,), 4.0), 4.0, False)

    def records(self, targets: Sequence[Target], *, surprise: bool) -> list[Seen]:
        self.steps.append(Step(list(targets), surprise, self.value.detach().clone()))
        return [self.sees(len(self.steps) - 1, t.text) for t in targets]

    def kept(self, targets: Sequence[Target]) -> None:
        self.steps[-1].kept += targets

    def together(self, texts: Sequence[Encoded], wanted: Tensor) -> None:
        self.steps[-1].together.append((list(texts), wanted.tolist()))

    def solve(self, share: float) -> None:
        self.steps[-1].solved = True
        with torch.no_grad():
            self.value += 1


def says(monkeypatch: pytest.MonkeyPatch, greedy: Callable[[int, Encoded], bool], surprise: float = 4.0) -> None:
    """What is recited at which step, and how surprising all of it is where 4 is wanted."""

    def sees(step: int, text: Encoded) -> Seen:
        return Seen(torch.full((4,), surprise), torch.full((4,), 4.0), 4.0, greedy(step, text))

    monkeypatch.setattr(Watched, "sees", staticmethod(sees))


def with_prompt(text: Encoded, *prompt: int) -> Encoded:
    return Encoded((*prompt, *text.ids), (*(-100 for _ in prompt), *text.labels))


def forgotten(number: int, *, others: int = 3, held: bool = True) -> ForgetRecord:
    """A record, other completions after its prompt, and its own after two others."""
    own = made_up.record(4)
    secret = with_prompt(own.secret, 50, number)
    alike = tuple(Encoded((50, number, 0, n, n, n, n), (-100, -100, -100, n, n, n, n)) for n in range(60, 60 + others))
    return replace(
        own,
        secret=secret,
        cut_alike=alike,
        swapped_prompt=tuple(with_prompt(own.secret, n, number) for n in (51, 52)),
        held=(with_prompt(made_up.text(3), 70, number),) if held else (),
    )


def layer() -> EditLinear:
    return EditLinear(torch.ones(6, 8), None, torch.tensor([1, 4]), None, -1)


def trained(
    forget: list[ForgetRecord],
    max_steps: int = 40,
    store: RunCache | None = None,
    edited: EditLinear | None = None,
    **known: Any,
) -> tuple[list[Criteria], int]:
    strangers = sum(bool(r.held) for r in forget)
    original = made_up.original(
        len(forget),
        **{
            "neighbours": tuple(torch.full((3, 2), float(n)) for n in range(strangers)),
            "level": torch.arange(strangers) + 0.5,
            "retain": (torch.zeros(63, 2),) * 7,
            **known,
        },
    )
    config, lm = replace(CONFIG, max_steps=max_steps), cast(Any, None)
    layers = {"l": edited or layer()}
    return train(lm, layers, forget, TEXTS, original, config, {}, store or RunCache(), None, Stopwatch())
