"""Alpha as a value: what callers may give, and what a layer reads."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from libortho.core.errors import AlphaError

AlphaValue = float | Sequence[float] | torch.Tensor
"""One value for every sequence, or one value per sequence of the batch."""

AlphaSpec = AlphaValue | Mapping[str, AlphaValue]
"""A value for all streams, or a value per named stream."""


@dataclass(frozen=True)
class AlphaState:
    """Normalised alpha of every stream; what a layer reads.

    Attributes:
        values: Stream name to a float, or to a tuple with one float per sequence.
        batch: Number of sequences that the per-sequence values (or the caller's list) name; None for scalars.
        tokens: Tokens of each sequence in the forward pass that runs under this state; None where that is not known.
            States that differ in it alone are equal: one alpha.
        constant: Whether per-sequence values are applied even where all of them are 0, which takes the time that others
            take and changes no output. Such states are equal to those that stop after the base.
    """

    values: Mapping[str, float | tuple[float, ...]]
    batch: int | None = None
    tokens: int | None = field(default=None, compare=False)
    constant: bool = field(default=False, compare=False)

    @cached_property
    def off(self) -> bool:
        """True if no stream takes part, so that a layer may stop after its base stream."""
        return not self._on

    @cached_property
    def _on(self) -> dict[str, float | tuple[float, ...]]:
        return {n: v for n, v in self.values.items() if not is_off(v) or (self.constant and isinstance(v, tuple))}

    @cached_property
    def _tensors(self) -> dict[str, tuple[tuple[int, torch.device], torch.Tensor]]:
        return {}

    def of(self, stream: str) -> float | tuple[float, ...]:
        """Alpha of one stream, 0.0 if it is off for all sequences; so is a stream unknown to this state."""
        return self._on.get(stream, 0.0)

    def tokens_each(self, stream: str, x: torch.Tensor, sorted_rows: bool = True) -> int:
        """How many consecutive rows of a layer's input belong to each sequence, for a stream with per-sequence values.

        Args:
            stream: The stream.
            x: (batch, ..., in_features), or (batch * tokens, in_features) inside a forward pass of the model.
            sorted_rows: Whether the input holds all tokens of the batch in their order.

        Raises:
            AlphaError: for any other input; which sequence a row belongs to is never guessed.
        """
        values = self.of(stream)
        batch = len(values) if isinstance(values, tuple) else 0
        flat = x.dim() == 2
        known = sorted_rows and (self.tokens is not None if flat else x.dim() > 2)
        if not known or x.shape[0] != batch * ((self.tokens or 0) if flat else 1):
            raise AlphaError(self._misfit(batch, x, sorted_rows))
        return x.shape[:-1].numel() // max(1, batch)

    def per_token(self, stream: str, tokens: int, device: torch.device) -> torch.Tensor:
        """Per-sequence alpha of one stream, repeated over the ``tokens`` of each sequence, (batch * tokens, 1) fp32."""
        key = (tokens, device)
        held = self._tensors.get(stream)
        if held is None or held[0] != key:
            with torch.inference_mode(False):  # one made in inference mode could not serve a later gradient
                values = torch.tensor(self.of(stream), dtype=torch.float32, device=device)
                held = (key, values.repeat_interleave(tokens).unsqueeze(1))
            self._tensors[stream] = held
        return held[1]

    def _misfit(self, batch: int, x: torch.Tensor, sorted_rows: bool) -> str:
        given = f"alpha names {batch} sequences, but the layer's input has shape {tuple(x.shape)}; "
        if not sorted_rows:
            return f"{given}the layer sees the tokens in an order of its own: give one value for all sequences"
        if x.dim() != 2:
            return f"{given}per-sequence values need the batch as first dimension"
        if self.tokens is None:
            return (
                f"{given}which sequence a row belongs to is known only while the model that was split runs on input_ids"
                " or inputs_embeds: call that model (not a submodule of it), or give one value for all sequences"
            )
        return f"{given}expected {batch} x {self.tokens} rows, one for each token; give one value for all sequences"

    def sized(self, tokens: int | None) -> AlphaState:
        """The state for a forward pass over so many tokens of each sequence."""
        if self.batch is None or tokens == self.tokens:
            return self
        held = self._sized.get("last")
        if held is None or held.tokens != tokens:
            held = self._sized["last"] = replace(self, tokens=tokens)
        return held

    @cached_property
    def _sized(self) -> dict[str, AlphaState]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "batch": self.batch}

    def rows(self, index: Sequence[int]) -> AlphaState:
        """The state for a batch of these rows of the batch, in this order."""
        values = {k: tuple(v[i] for i in index) if isinstance(v, tuple) else v for k, v in self.values.items()}
        return AlphaState(values, len(index))

    def row(self, index: int) -> tuple[float, ...]:
        """Alpha of every stream for one sequence of the batch."""
        return tuple(v[index] if isinstance(v, tuple) else v for v in self.values.values())

    def within(self, other: AlphaState) -> bool:
        """True if no stream is higher for any sequence than the lowest that it is in ``other``."""
        return all(_highest(v) <= _lowest(other.values.get(k, 0.0)) for k, v in self.values.items())

    def expanded(self, factor: int) -> AlphaState:
        """The state for a batch whose sequences were each repeated ``factor`` times in a row (beams, samples)."""
        if factor == 1 or self.batch is None:
            return self
        values = {
            k: tuple(a for a in v for _ in range(factor)) if isinstance(v, tuple) else v for k, v in self.values.items()
        }
        return AlphaState(values, self.batch * factor)


def is_off(value: float | tuple[float, ...]) -> bool:
    """True if a normalised alpha is 0 for every sequence."""
    return not any(value) if isinstance(value, tuple) else value == 0.0


def _highest(value: float | tuple[float, ...]) -> float:
    return max(value) if isinstance(value, tuple) else value


def _lowest(value: float | tuple[float, ...]) -> float:
    return min(value) if isinstance(value, tuple) else value


def normalise(name: str, value: AlphaValue, extrapolate: bool) -> float | tuple[float, ...]:
    """Alpha of the stream ``name`` as a float, or as a tuple with one float per sequence.

    Raises:
        AlphaError: if it is no number in [0, 1] (with ``extrapolate``, none of at least 0) and no list of such.
    """
    if isinstance(value, str | bytes) or not isinstance(value, int | float | Sequence | torch.Tensor):
        raise AlphaError(f"alpha of stream {name!r} is {value!r}; expected a number or one number per sequence")
    if isinstance(value, torch.Tensor):
        if value.dim() > 1:
            raise AlphaError(f"alpha of stream {name!r} has shape {tuple(value.shape)}; expected () or (batch,)")
        value = value.tolist()
    items = list(value) if isinstance(value, Sequence) else [value]
    if not items:
        raise AlphaError(f"alpha of stream {name!r} is an empty list; expected one number per sequence")
    high = sys.float_info.max if extrapolate else 1.0
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float):
            raise AlphaError(f"alpha of stream {name!r} is {item!r}; expected a number in [0, 1]")
        if not 0.0 <= item <= high:  # NaN too
            hint = "" if extrapolate or item < 0 else "; pass allow_extrapolation=True to go beyond 1"
            raise AlphaError(f"alpha of stream {name!r} is {item}; expected a number in [0, 1]{hint}")
    return tuple(float(i) for i in items) if isinstance(value, Sequence) else float(items[0])


def parse_alpha(value: Any, streams: Sequence[str] = ()) -> float | dict[str, float]:
    """Alpha as it is written on a command line: a number for all streams, or ``hr=1,legal=0`` for each by name.

    A semicolon separates as a comma does, for places that split at commas themselves. Streams that are not named are
    off, as in :func:`libortho.alpha`; whether the numbers are in range is for that function to say. Mappings from name
    to number are taken as they are.

    Args:
        value: What is written.
        streams: Names that an error lists, where they are known.

    Raises:
        AlphaError: if the value is neither.
    """
    known = f"; the streams are {', '.join(streams)}" if streams else ""
    parts = value
    if isinstance(value, str) and "=" in value:
        items = [p.partition("=")[::2] for p in value.replace(";", ",").split(",") if p.strip()]
        parts = {n.strip(): a for n, a in items}
        if len(parts) < len(items):
            raise AlphaError(f"alpha is {value!r}, which names a stream twice; expected each once{known}")
    try:
        if isinstance(parts, Mapping) and parts and not any(isinstance(v, bool) for v in parts.values()):
            return {str(k): float(v) for k, v in parts.items()}
        if isinstance(parts, str | int | float) and not isinstance(parts, bool):
            return float(parts)
    except (TypeError, ValueError):
        pass
    raise AlphaError(
        f"alpha is {value!r}; expected a number in [0, 1], or one for each stream such as hr=1,legal=0{known}"
    )


def fit(state: AlphaState, inputs: torch.Tensor, live: bool) -> AlphaState:
    """Bring per-sequence values to the batch at hand; a batch is a multiple only if its rows are repeats.

    Args:
        state: A state with per-sequence values.
        inputs: What the model is given, batch first.
        live: Whether the batch continues a cache.

    Raises:
        AlphaError: if the batch has another number of sequences.
    """
    rows, named = inputs.shape[0], state.batch
    assert named is not None
    if rows == named:
        return state
    if not live and rows and rows % named == 0:
        factor = rows // named
        groups = inputs.reshape(named, factor, -1)
        if bool((groups == groups[:, :1]).all()):
            return state.expanded(factor)
    raise AlphaError(
        f"alpha names {named} sequences, the batch has {rows}; give one value per sequence (beams and returned "
        "sequences of one prompt share its value)"
    )


def tokens_each_row(inputs: torch.Tensor) -> int | None:
    """Tokens of each sequence of a model's input: (batch, tokens) ids, (batch, tokens, width), or (batch, features)."""
    if inputs.is_floating_point():
        return inputs.shape[1] if inputs.dim() == 3 else 1 if inputs.dim() == 2 else None
    return inputs.shape[1] if inputs.dim() == 2 else None


def show(state: AlphaState) -> str:
    """The alphas as text, such as ``hr=1.0, legal=0.0``."""
    return ", ".join(f"{k}={v if isinstance(v, float) else list(v)}" for k, v in state.values.items())
