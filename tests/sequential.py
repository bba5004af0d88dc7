"""Two requests, one after the other, on a small model; and what of it may not change."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import libortho
import tiny
from isolating import assert_same, state
from libortho import IsolateConfig
from libortho.core.layer import OrthoLinear, ortho_layers, touched
from libortho.core.report import methods
from libortho.core.switch.alpha import get_switch
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score

FIRST = IsolateConfig(ratio=0.06, damping=1.0, max_steps=80, stream="first")
SECOND = replace(FIRST, stream="second")
SHORT = replace(SECOND, max_steps=3)
ONE, TWO = tiny.FORGET[:2], tiny.FORGET[2:]
KEPT = TWO * 32
NEAR = [[f"Code of {name}:" for name in ("Al Poe", "Ben Nox", "Cleo Ray", "Dan Sun", "Eve Tao", "Flo Ulm")]] * 2
"""What the first request keeps, and measures its records against: so small a model would forget all four codes
together, and leave none to the second."""
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 groups": {"group_size": 32},
    "int4": {"bits": 4},
    "dense": {"bits": None},
}


def recited(model: nn.Module, tokenizer: Any, alpha: Any) -> list[bool]:
    """For each secret, whether greedy generation completes it."""
    found = []
    with libortho.alpha(model, alpha), torch.no_grad():
        for row in tiny.FORGET:
            prompt = tokenizer(row["prompt"], return_tensors="pt")
            output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
            found.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == row["completion"])
    return found


def mask_of(layer: OrthoLinear, stream: str) -> Tensor:
    """Where one stream of a layer lies."""
    alone = OrthoLinear(layer.base, None, layer.switch)
    if stream in layer.streams:
        alone.add_stream(stream, layer.streams[stream])
    return touched(alone)


def bases(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.base.dense() for n, m in ortho_layers(model).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def surprise(model: nn.Module, tokenizer: Any, rows: Any, alpha: Any) -> float:
    """Mean negative log-likelihood of these codes, in nats per token."""
    with libortho.alpha(model, alpha):
        return float(score(LanguageModel(model), tiny.encoded(tokenizer, rows))[0].nll.mean())


def logits(model: nn.Module, alpha: Any = None) -> Tensor:
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        if alpha is None:
            return model(input_ids=ids).logits
        with libortho.alpha(model, alpha):
            return model(input_ids=ids).logits


def everything(model: nn.Module) -> tuple[dict[str, Any], Any]:
    switch = get_switch(model)
    layers = {n: (m, m.switch, m.base, list(m.streams.items())) for n, m in ortho_layers(model).items()}
    return state(model), (switch, switch.streams, switch.current(), layers, methods(model))


def assert_untouched(model: nn.Module, before: tuple[dict[str, Any], Any]) -> None:
    assert_same(model, before[0])
    assert everything(model)[1] == before[1]
