"""What stands in the place of ``forward`` in a split model."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

from libortho.core.errors import AlphaError, DataError, LibOrthoError
from libortho.core.switch import carried

if TYPE_CHECKING:
    from libortho.core.switch.switch import Switch

_CALLED = threading.local()
"""The copy of a model that is called by way of the model's own guard."""

TOKENS_FIRST = frozenset({"xlnet"})
"""Families whose layers see the tokens as first dimension, and the batch as second."""


class Guard:
    """What stands in the place of a model's ``forward``.

    Attributes:
        switch: The switch that it asks.
        own: A ``forward`` that the instance had already, such as that of an offloading hook; None for its class's.
        parameters: Names of the parameters of ``forward``.
        whole: Whether it is a whole transformers model, and not one of its layers.
        encodes: Whether it belongs to an encoder and a decoder.
        names: Those under which the model takes what it carries, as far as known.
    """

    __name__ = "forward"

    def __init__(self, switch: Switch, model: nn.Module, own: Any = None) -> None:
        self.switch, self.own = switch, own
        self._model = weakref.ref(model)  # a model that nobody needs is to be freed at once
        self.parameters = tuple(self.__signature__.parameters)
        self.names = carried.NAMES
        self.whole = isinstance(model, PreTrainedModel)
        self.encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = weakref.ref(state["_model"])

    @property
    def model(self) -> nn.Module:
        """The guarded model.

        Raises:
            AlphaError: if it is gone, and a shallow copy of it is called.
        """
        model = self._model()
        if model is None:
            raise AlphaError("the model that was split is gone, and this is a shallow copy of it; use copy.deepcopy")
        return model

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the guarded ``forward``: transformers reads it."""
        return inspect.signature(self.inner)

    @property
    def __code__(self) -> CodeType:
        """That of the guarded ``forward``: ``torch.export`` reads it."""
        inner = self.inner
        return (inner.func if isinstance(inner, functools.partial) else inner).__code__

    @property
    def __func__(self) -> Any:
        """The function behind the guarded ``forward``."""
        return getattr(self.inner, "__func__", self.inner)

    @property
    def __self__(self) -> nn.Module:
        """The guarded model."""
        return self.model

    @property
    def inner(self) -> Callable[..., Any]:
        """The guarded ``forward``."""
        model = self.model
        return MethodType(type(model).forward, model) if self.own is None else self.own

    def _carries(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not self.whole:  # the model around a layer looks
            return False
        named = [*zip(self.parameters, args, strict=False), *kwargs.items()]
        return any((v is not None and n in self.names) or (n == "use_cache" and v) for n, v in named)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Switch.run`.

        A compiler traces the model alone, and its graph reads the switch in every layer; but where something is carried
        from one pass to the next, the graph is broken for a look at its stamp.

        Raises:
            DataError: if the model does not take an empty batch, and is given one.
        """
        if is_compiling():
            if self._carries(args, kwargs):
                return _eagerly(self.switch, self, args, kwargs)
            model = self._model()
            assert model is not None
            return type(model).forward(model, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)
        copied = getattr(_CALLED, "module", None)
        if copied is not None:
            _CALLED.module = None
            return copied.forward(*args, **kwargs)
        if not self.whole and self.switch.passes(args):
            return self.inner(*args, **kwargs)
        try:
            return self.switch.run(self, args, kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            empty = next((v for v in given if isinstance(v, torch.Tensor) and not v.numel()), None)
            if empty is None or isinstance(error, LibOrthoError):
                raise
            raise DataError(
                f"the batch is empty, of shape {tuple(empty.shape)}, which {type(self.model).__name__} does not take "
                f"({error}); give at least one token"
            ) from error


@torch.compiler.disable(recursive=False)
def _eagerly(switch: Switch, guarded: Guard, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pass outside a graph, in whose course graphs may be entered again."""
    return switch.run(guarded, args, kwargs)


class Keeper:
    """A hook before ``forward`` that puts a guard back.

    Whoever takes the place of ``forward`` for a time (an offloading hook) may put back what was there before the guard,
    and a shallow copy of a model (a replica on another device) has the guard of the model itself.
    """

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Guard the module, if it is not."""
        if is_compiling():
            return
        found = module.__dict__.get("forward")
        guard(self.switch, module)
        if isinstance(found, Guard) and found is not module.__dict__["forward"]:
            _CALLED.module = module  # torch has chosen already what it will call


def guard(switch: Switch, module: nn.Module) -> None:
    """Guard a model, unless that is done."""
    found = module.__dict__.get("forward")
    if isinstance(found, Guard):
        if found._model() is module:
            return
        found = found.own  # of the model that this one is a copy of
    module.forward = Guard(switch, module, found)


def unguard(module: nn.Module) -> None:
    """Take the guard off, and the hook that keeps it."""
    found = module.__dict__.get("forward")
    if isinstance(found, Guard):
        del module.forward
        if found.own is not None:
            module.forward = found.own
    for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, Keeper)]:
        del module._forward_pre_hooks[key]


def carries(module: nn.Module) -> bool:
    """True for a transformers model, and for a layer that takes a cache."""
    names = inspect.signature(type(module).forward).parameters
    return isinstance(module, PreTrainedModel) or any(n in carried.NAMES for n in names)


def family(model: nn.Module) -> str | None:
    """What transformers calls the architecture; None for other models."""
    return getattr(getattr(model, "config", None), "model_type", None)


def check_layout(model: nn.Module, inputs: torch.Tensor) -> None:
    """Refuse per-sequence values where the first dimension may be the tokens.

    Raises:
        AlphaError: then.
    """
    square = inputs.dim() > 1 and inputs.shape[0] == inputs.shape[1] > 1
    if family(model) in TOKENS_FIRST or (square and not _of_transformers(model)):
        raise AlphaError(
            f"the layers of {type(model).__name__} see (tokens, batch, features), or may do so for an input of shape "
            f"{tuple(inputs.shape)}, and per-sequence values need the batch as first dimension; give one value for all "
            "sequences"
        )


def _of_transformers(model: nn.Module) -> bool:
    return any(isinstance(m, PreTrainedModel) for m in model.modules())
