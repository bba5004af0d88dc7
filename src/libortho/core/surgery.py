"""Put split layers in the place of linear ones, and take their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from libortho.core.errors import ConfigError, TargetError
from libortho.core.layer import LayerReport, OrthoLinear, ortho_layers
from libortho.core.models import refuse_stock_save
from libortho.core.streams import BaseStream, OrthoStream
from libortho.core.switch.alpha import alpha
from libortho.core.switch.guard import TOKENS_FIRST, family
from libortho.core.switch.switch import Switch
from libortho.core.targets import routed


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out_features, in_features); GPT-2's Conv1D stores the transpose."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, split or not."""
    if isinstance(module, OrthoLinear):
        return module.out_features, module.in_features
    rows, columns = linear_weight(module).shape
    return rows, columns


def stream_names(model: nn.Module) -> list[str]:
    """Names of the streams that a model has, sorted."""
    return sorted({n for m in ortho_layers(model).values() for n in (*m.switch.streams, *m.streams)})


def earlier_switch(model: nn.Module, stream: str) -> Switch | None:
    """The switch of a model that is split already, which ``stream`` is to join; None for a dense model.

    Raises:
        TargetError: if parts of the model have switches of their own.
        ConfigError: if the name is taken.
    """
    switches = {id(m.switch): m.switch for m in ortho_layers(model).values()}
    if len(switches) > 1:
        raise TargetError(f"{len(switches)} parts of this model were split apart; start from the original model")
    if stream in (existing := stream_names(model)):
        raise ConfigError(f"stream {stream!r} exists already; streams are {existing}, give another name")
    return next(iter(switches.values()), None)


def install(model: nn.Module, layers: dict[str, OrthoLinear], switch: Switch) -> None:
    """Put finished layers in the place of others and attach the switch, if it controls any stream.

    ``save_pretrained`` of the model raises from then on.

    A model that is split already keeps the switch that it has, which takes over the streams of ``switch`` with the
    alphas that they stand at; its own streams stand where they stood.
    """
    own = next((m.switch for m in ortho_layers(model).values()), None)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer.train(getattr(owner, leaf).training)
        layer.sorted_rows = not routed(name) and family(model) not in TOKENS_FIRST
        setattr(owner, leaf, layer)
        if own is not None:
            layer.switch = own
    if own is not None:
        for stream, value in switch.persistent.items():
            own.add_stream(stream, value)
        switch = own
    if switch.streams:
        switch.attach(model)
    refuse_stock_save(model)


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error ``|A - W| / |W|``; 0 for a zero reference."""
    return float((approximation - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float32).tiny))


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias of a linear layer, or None."""
    return module.bias if isinstance(module.bias, nn.Parameter) else None


def assemble(
    name: str,
    weight: Tensor,
    base: BaseStream,
    stream: OrthoStream,
    bias: nn.Parameter | None,
    switch: Switch,
    stream_name: str,
    rank: int | None = None,
    low_rank_error: float | None = None,
    earlier: Mapping[str, OrthoStream] | None = None,
) -> OrthoLinear:
    """A finished layer with its report; errors are measured on the tensors as stored.

    Args:
        name: Dotted path.
        weight: fp32 weight (out_features, in_features) that the streams stand for.
        base: The base stream.
        stream: The ortho stream.
        bias: Bias of the layer.
        switch: Switch of the model.
        stream_name: Name of the ortho stream.
        rank: Singular directions that the base was made from; None where the weight was not truncated.
        low_rank_error: Error of the truncation that was tried, if any.
        earlier: Streams that the layer has already.
    """
    streams = {**(earlier or {}), stream_name: stream}
    approximation = base.dense(torch.float32)
    base_error = relative_error(approximation, weight)
    for part in streams.values():
        part.add_to(approximation)
    report = LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        rank=min(weight.shape) if rank is None else rank,
        used_low_rank=rank is not None,
        low_rank_error=low_rank_error,
        base_error=base_error,
        final_error=relative_error(approximation, weight),
        ortho_density=sum(s.support_size for s in streams.values()) / weight.numel(),
        tail_rank=sum(s.tail.rank for s in streams.values() if s.tail is not None),
        tail_density=sum(s.tail_size for s in streams.values()) / weight.numel(),
        base_bytes=base.nbytes,
        ortho_bytes=sum(s.nbytes for s in streams.values()),
    )
    layer = OrthoLinear(base, bias, switch, report)
    for key, part in streams.items():
        layer.add_stream(key, part)
    return layer


def with_stream(
    name: str, module: nn.Module, base: BaseStream, stream: OrthoStream, switch: Switch, stream_name: str
) -> OrthoLinear:
    """The layer that ``module``, split or not, becomes over this base and with another stream; ``switch`` is its own.

    The report of a layer that is split already goes on to say how its base was made.
    """
    bias = bias_of(module)
    if not isinstance(module, OrthoLinear):
        return assemble(name, linear_weight(module).float(), base, stream, bias, switch, stream_name)
    streams = {n: s for n, s in module.streams.items() if isinstance(s, OrthoStream)}
    layer = assemble(name, module.dense_weight(1.0), base, stream, bias, switch, stream_name, earlier=streams)
    if layer.report is not None and (before := module.report) is not None:
        layer.report = replace(
            layer.report, rank=before.rank, used_low_rank=before.used_low_rank, low_rank_error=before.low_rank_error
        )
    return layer


@contextmanager
def frozen(model: nn.Module, earlier: Switch | None) -> Iterator[None]:
    """Evaluation mode, no gradients of parameters, and earlier streams off; afterwards all is what it was."""
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    training = {m: m.training for m in model.modules()}
    model.eval().requires_grad_(False)
    try:
        with nullcontext() if earlier is None else alpha(model, 0.0):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the one with its dotted name."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
