"""Whom the audit measures: the model at alpha = 0, and the controls that its figures stand beside.

    alpha = 0           the audited one
    alpha = 1           the memory switched on
    original            the dense model before isolation, where it is given
    plain quantised     the same base without any edit: what rounding alone forgets
    random columns      the same edit, applied to other columns of the same layers, chosen at random (full)
    largest columns     the same edit, applied to the columns of largest norm (full)
    never trained       a reference model that never saw the forget set, where it is given

A control that is a changed base is put in place by exchanging the layers' base streams inside a context.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libortho.auditing.schema import MAGNITUDE, MODEL, OFF, ON, ORIGINAL, QUANTISED, RANDOM, REFERENCE, Role
from libortho.checkpoint.packing import encode_base, scheme_of
from libortho.checkpoint.tensor_files import sha256_of
from libortho.core.errors import CheckpointError
from libortho.core.layer import OrthoLinear, ortho_layers, touched
from libortho.core.streams import BaseStream, OrthoStream
from libortho.core.surgery import bias_of
from libortho.core.switch.alpha import Switch, alpha
from libortho.lm.model import LanguageModel


@dataclass(frozen=True)
class Subject:
    """One model under one setting.

    Attributes:
        key: Short name in the report.
        label: What readers see.
        role: What it is beside the audited model.
        model: The model that is run inside ``enter()``.
        enter: Makes the context in which ``model`` is this subject.
    """

    key: str
    label: str
    role: Role
    model: nn.Module
    enter: Callable[[], AbstractContextManager[Any]]

    def language_model(self) -> LanguageModel:
        """Decoder and head of the model; to be called inside ``enter()``."""
        return LanguageModel(self.model)


def subjects_of(
    model: nn.Module,
    *,
    original: nn.Module | None,
    reference: nn.Module | None,
    others: Mapping[str, nn.Module],
    seed: int,
    other_columns: bool = True,
) -> list[Subject]:
    """The audited subject first, then its controls.

    Args:
        model: A split model, or any causal LM (then it is audited as it is, without switch and controls).
        original: The dense model before isolation.
        reference: A model of the same architecture that was never trained on the forget set.
        others: Further models to stand beside, by label.
        seed: Seed of the random columns.
        other_columns: Whether the edit at other columns stands beside.
    """
    layers = ortho_layers(model)
    found: list[Subject] = []
    if layers:
        found.append(at(model, 0.0, OFF, "audited"))
        if any(layer.streams for layer in layers.values()):  # not a base alone
            found.append(at(model, 1.0, ON, "switch on"))
    else:
        found.append(Subject(MODEL, "model", "audited", model, contextlib.nullcontext))
    if original is not None:
        found.append(Subject(ORIGINAL, "original", "control", original, contextlib.nullcontext))
    if any(bool(touched(m).any()) for m in layers.values()):
        generator = torch.Generator().manual_seed(seed)
        bases: dict[str, tuple[str, Callable[[OrthoLinear], BaseStream]]] = {QUANTISED: ("plain quantised", plain_base)}
        if other_columns:
            bases |= {
                RANDOM: ("random columns", lambda layer: moved_edit(layer, _random_order(layer, generator))),
                MAGNITUDE: ("largest columns", lambda layer: moved_edit(layer, _largest_order(layer))),
            }
        for key, (label, make) in bases.items():
            made = {n: make(m) for n, m in layers.items()}
            found.append(Subject(key, label, "control", model, _exchanged(model, made)))
    found += [Subject(n, n, "other", m, contextlib.nullcontext) for n, m in others.items()]
    if reference is not None:
        found.append(Subject(REFERENCE, "never trained", "reference", reference, contextlib.nullcontext))
    return found


def at(model: nn.Module, value: float, key: str | None = None, role: Role = "control") -> Subject:
    """A split model under one alpha for all streams."""
    label = f"alpha = {value:g}"
    return Subject(key or label, label, role, model, lambda: alpha(model, value, allow_extrapolation=value > 1))


def _exchanged(model: nn.Module, bases: Mapping[str, BaseStream]) -> Callable[[], AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        layers = ortho_layers(model)
        kept = {n: layers[n].base for n in bases}
        try:
            for name, base in bases.items():
                layers[name].base = base
            with alpha(model, 0.0):
                yield
        finally:
            for name, base in kept.items():
                layers[name].base = base

    return enter


def plain_base(layer: OrthoLinear) -> BaseStream:
    """The base as it would be without the edit: where a support is, the sum of the streams on the base's own grid."""
    supports = [s.support for s in layer.streams.values() if isinstance(s, OrthoStream) and s.support is not None]
    if not supports:
        return layer.base
    return _requantised(layer.base, layer.dense_weight(1.0) - _tail(layer), touched(layer))


def moved_edit(layer: OrthoLinear, order: Tensor) -> BaseStream:
    """The plain base with the layer's edit applied at other columns: the i-th touched column's to ``order[i]``."""
    mask = touched(layer).any(0)
    if not mask.any():
        return layer.base
    plain = plain_base(layer).dense(torch.float32)
    change = layer.base.dense(torch.float32) - plain
    columns = mask.nonzero()[:, 0]
    target = order[: len(columns)]
    moved = plain.clone()
    moved[:, target] += change[:, columns]
    places = torch.zeros_like(plain, dtype=torch.bool)
    places[:, target] = True
    return _requantised(plain_base(layer), moved, places)


def base_sha256(layers: Mapping[str, OrthoLinear]) -> str | None:
    """The hash of the base that ``libortho.json`` of this model names; None if no checkpoint can hold such a base."""
    if not layers:
        return None
    try:
        names = sorted(scheme_of(layers).hashed_names(layers))
    except CheckpointError:
        return None
    owners = ((name, name.rpartition(".")[0]) for name in names)
    return sha256_of((name, encode_base(owner, layers[owner].base)[name]) for name, owner in owners)


def _random_order(layer: OrthoLinear, generator: torch.Generator) -> Tensor:
    """All columns at random, those without a support first."""
    shuffled = torch.randperm(layer.in_features, generator=generator)
    taken = touched(layer).any(0).cpu()[shuffled]
    return torch.cat([shuffled[~taken], shuffled[taken]]).to(_device(layer.base))


def _largest_order(layer: OrthoLinear) -> Tensor:
    return layer.dense_weight(1.0).norm(dim=0).argsort(descending=True)


def _tail(layer: OrthoLinear) -> Tensor:
    weight = torch.zeros(layer.out_features, layer.in_features, device=_device(layer.base))
    for stream in layer.streams.values():
        if isinstance(stream, OrthoStream) and stream.tail is not None:
            stream.tail.add_to(weight)
    return weight


def _requantised(base: BaseStream, weight: Tensor, where: Tensor) -> BaseStream:
    """``base`` with the entries of ``where`` taken from ``weight``, on the base's own grid."""
    if base.bits is None:
        return BaseStream(None, weight=torch.where(where, weight, base.weight.float()).to(base.weight.dtype))
    top = 2 ** (base.bits - 1) - 1
    step = base.scales.float().repeat_interleave(base.group_size, 1)
    codes = (weight / step).round().clamp(-top, top).to(torch.int8)
    return BaseStream.from_codes(torch.where(where, codes, base.unpacked_codes()), base.scales, base.bits)


def _device(base: BaseStream) -> torch.device:
    return next(base.buffers()).device


def dense_copy(subject: Subject) -> nn.Module:
    """A copy of a subject with ordinary linear layers in place of split ones, free to train or to round.

    Weights take the dtype of the model's other parameters.
    """
    dtype = next(subject.model.parameters()).dtype
    layers = ortho_layers(subject.model)
    with subject.enter():
        dense = {n: m.dense_weight(_alphas(m)).to(dtype) for n, m in layers.items()}
    memo: dict[int, Any] = {id(m): m for m in layers.values()}  # the split layers themselves are not copied
    copied = copy.deepcopy(subject.model, memo)
    for name, weight in dense.items():
        bias = bias_of(layers[name])
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        parent, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(parent), leaf, linear)
    Switch.detach(copied)
    return copied


def _alphas(layer: OrthoLinear) -> dict[str, float]:
    """Alpha of every stream in the running context."""
    state = layer.switch.current()
    return {n: v for n in layer.switch.streams if isinstance(v := state.of(n), float)}
