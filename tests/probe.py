"""A small split model whose answers tell the alpha that they were computed under."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import libortho
from libortho.core.errors import AlphaContextError
from libortho.core.layer import ortho_layers
from libortho.core.switch.alpha import get_switch

VALUES = (0.0, 0.5, 1.0)
RAISED = "raised"


def small() -> nn.Module:
    """A split model whose forward pass takes no time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Identity())
    config = libortho.SplitConfig(target_modules="0", use_low_rank=False, structure="columns", ratio=0.2)
    libortho.split(model, config)
    for layer in ortho_layers(model).values():
        layer.streams["default"].support.values.normal_()
    return model


class Probe:
    """A model, and what its answer says of the alpha that it ran under."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = small() if model is None else model
        self.x = torch.randn(2, 16)
        self.answers = {}
        for value in VALUES:
            with torch.no_grad(), libortho.alpha(self.model, value):
                self.answers[value] = self.model(self.x)

    def __call__(self, model: Callable[..., Any] | None = None) -> float | str:
        try:
            with torch.no_grad():
                answer = (model or self.model)(self.x)
        except AlphaContextError:
            return RAISED
        return next(v for v, known in self.answers.items() if torch.allclose(answer, known, atol=1e-5))

    def stream(self, value: float) -> Iterator[float | str]:
        with libortho.alpha(self.model, value):
            while True:
                yield self()


def in_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join(timeout=30)
    return found[0]


def persistent(probe: Probe) -> float:
    return get_switch(probe.model).persistent["default"]  # type: ignore[return-value]


def unknown(probe: Probe) -> float | str:
    """What a call whose alpha is not known does: it is never on."""
    return RAISED if persistent(probe) else 0.0
