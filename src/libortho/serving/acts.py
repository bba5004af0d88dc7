"""Which layers of a model a stream acts in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.switch.alpha import alpha as under

Shares = Mapping[str, Mapping[str, float]]
"""By stream and layer."""


@torch.no_grad()
def shares(model: nn.Module, ids: Sequence[int], alpha: Mapping[str, float], streams: Sequence[str]) -> Shares:
    """||W_stream x|| / ||W_base x|| in every layer that a stream has a part in, over these tokens.

    The tokens go through the model once, as one row and without a cache.

    Args:
        model: A model with a switch.
        ids: Tokens of one text.
        alpha: Of the pass; what it is does not scale the shares, but what goes into the layers hangs on it.
        streams: Those that are told of.
    """
    squares: dict[str, dict[str, Tensor]] = {}
    optional = {"logits_to_keep": 1, "use_cache": False}
    takes = inspect.signature(model.forward).parameters
    with _watched(model, streams, squares), under(model, dict(alpha)):
        inputs = torch.tensor([list(ids)], device=next(model.parameters()).device)
        model(input_ids=inputs, **{n: v for n, v in optional.items() if n in takes})
    found: dict[str, dict[str, float]] = {n: {} for n in streams}
    for layer, parts in squares.items():
        base = parts.pop("")  # no stream has this name
        for stream, square in parts.items():
            found[stream][layer] = float((square / base).sqrt()) if base > 0 else 0.0
    return found


@contextmanager
def _watched(model: nn.Module, streams: Sequence[str], squares: dict[str, dict[str, Tensor]]) -> Iterator[None]:
    """Within, the squares of what base and streams give are added up by layer; those of the base by an empty name."""
    with ExitStack() as stack:
        for name, layer in ortho_layers(model).items():
            if set(streams) & set(layer.streams):
                handle = layer.register_forward_hook(_adding(name, streams, squares))
                stack.callback(handle.remove)
        yield


def _adding(
    name: str, streams: Sequence[str], squares: dict[str, dict[str, Tensor]]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, OrthoLinear)
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        base = layer.base(x)
        parts = {"": base}
        parts |= {n: s(torch.zeros_like(base), x, 1.0) for n, s in layer.streams.items() if n in streams}
        sums = squares.setdefault(name, {})
        for part, y in parts.items():
            sums[part] = sums.get(part, 0.0) + y.float().square().sum()

    return add
