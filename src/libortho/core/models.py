"""What transformers and PEFT wrap around a model, and what must be off while the library works on one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from libortho.core.errors import CheckpointError, TargetError


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it is when a process begins, whatever the caller has set; afterwards the caller's settings are back.

    Default dtype float32, default device cpu, no autocast, gradients on, no inference mode. Work inside depends on its
    inputs alone.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Count numbers too small for a full mantissa as zero inside; arithmetic on them is many times slower."""
    before = float(torch.tensor(1e-40, device="cpu") * 1.0) == 0.0  # torch has no getter
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def adapters(model: nn.Module) -> list[str]:
    """Names of the PEFT adapters that a model carries, wrapped around it or put into it, merged or not."""
    if "peft" not in sys.modules:  # then nobody can have made one
        return []
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, PeftModel):
            found |= dict.fromkeys(module.peft_config)
        elif isinstance(module, BaseTunerLayer):
            found |= dict.fromkeys(n for kind in module.adapter_layer_names for n in getattr(module, kind, None) or ())
    return list(found)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, its adapters in place; any other model itself.

    Raises:
        TargetError: for adapters that live in the wrapper (prompt and prefix tuning).
    """
    if "peft" not in sys.modules:
        return model
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if any(c.is_prompt_learning for c in model.peft_config.values()):
        raise TargetError(
            f"this {type(model).__name__} adds virtual tokens to its input ({', '.join(model.peft_config)}); expected "
            "a plain transformers model, or adapters in its layers such as LoRA"
        )
    return model.get_base_model()


def refuse_stock_save(model: nn.Module) -> None:
    """Let ``save_pretrained`` and ``push_to_hub`` of the model, and of the models inside it, raise on this instance.

    The tensors of a split layer have names that stock transformers does not know: it would load such a directory with
    fresh random weights in their place. Copies and pickles refuse as well.
    """
    for module in model.modules():
        if hasattr(type(module), "save_pretrained"):
            module.__dict__ |= {"save_pretrained": _no_save_pretrained, "push_to_hub": _no_push_to_hub}


def allow_stock_save(model: nn.Module) -> None:
    """Undo :func:`refuse_stock_save`."""
    for module in model.modules():
        for name in ("save_pretrained", "push_to_hub"):
            if module.__dict__.get(name) in (_no_save_pretrained, _no_push_to_hub):
                del module.__dict__[name]


def _no_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    raise CheckpointError(
        "save_pretrained does not know split layers: stock transformers would load what it writes with random weights "
        "in their place; use libortho.save(model, tokenizer, directory), whose base stock transformers loads"
    )


def _no_push_to_hub(*args: Any, **kwargs: Any) -> NoReturn:
    raise CheckpointError(
        "push_to_hub does not know split layers: stock transformers would load what it uploads with random weights in "
        "their place; use libortho.save(model, tokenizer, directory), then libortho.push_to_hub(directory, repo_id)"
    )
