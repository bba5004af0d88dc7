"""Small isolations, and what about a model they must leave alone."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import libortho
import tiny
from libortho import IsolateConfig, isolate
from libortho.core.layer import ortho_layers
from libortho.isolation.isolate import IsolateResult

CONFIG = IsolateConfig(ratio=0.1, damping=1.0, max_steps=80)
SHORT = replace(CONFIG, max_steps=3, allow_unknown=True)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an error must not change."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "required": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "gradients": {n for n, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    tensors, old = after.pop("tensors"), dict(before)
    expected = old.pop("tensors")
    assert after == old
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) for n in tensors)


def extracted(model: nn.Module, tokenizer: Any, alpha: float) -> int:
    """Secrets that greedy generation completes, counted without any of the library's own measures."""
    hits = 0
    with libortho.alpha(model, alpha), torch.no_grad():
        for row in tiny.FORGET:
            prompt = tokenizer(row["prompt"], return_tensors="pt")
            output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
            hits += tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == row["completion"]
    return hits


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.base.dense() for n, m in ortho_layers(model).items()}


def supports(result: IsolateResult, model: nn.Module) -> dict[str, list[int]]:
    return {n: m.streams["default"].support.index.tolist() for n, m in ortho_layers(model).items()}


def run(model: nn.Module, tokenizer: Any, forget: Any = tiny.FORGET, **options: Any) -> dict[str, Tensor]:
    """Base weights after three steps; ``options`` are fields of the config or further arguments of ``isolate``."""
    given = {n: options.pop(n) for n in ("retain", "alternates", "neighbours") if n in options}
    config = replace(SHORT, bits=None, **options)
    isolate(model, tokenizer, forget, **{"retain": tiny.RETAIN, **given}, config=config)
    return base_weights(model)


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[n], b[n]) for n in a)
