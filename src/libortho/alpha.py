"""The switch: which share of each ortho stream takes part in a forward pass.

    y = W_base x + sum_s alpha_s W_ortho,s x          alpha_s in [0, 1]

One :class:`Switch` belongs to one model and is shared by all its split layers.

    set_alpha(model, 0.0)                 persistent, all streams
    set_alpha(model, {"hr": 1.0})         persistent, only the named streams change
    with alpha(model, [1.0, 0.0]):        this context only, one value per sequence in the batch

Three properties make the switch safe to rely on:

* ``alpha = 0`` is a Python branch, not a multiplication by zero: the base stream alone runs.
* ``alpha(...)`` is a context variable: concurrent threads and tasks never see each other's value. A thread that
  cannot know its value (started inside somebody's context, or running beside one without a context of its own)
  raises :class:`~libortho.errors.AlphaContextError`; it never falls back to 1. So does a gradient-checkpoint
  recomputation whose forward pass is not on record.
* A KV cache is stamped with the alpha that computed it. Continuing it under another alpha raises.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from libortho.arguments import check_model
from libortho.errors import AlphaContextError, AlphaError
from libortho.models import allow_stock_save

AlphaValue = float | Sequence[float] | torch.Tensor
"""One value for every sequence, or one value per sequence of the batch."""

AlphaSpec = AlphaValue | Mapping[str, AlphaValue]
"""A value for all streams, or a value per named stream."""

_TOKENS_FIRST = frozenset({"xlnet"})
"""Families whose layers see the tokens as first dimension, and the batch as second."""
_STAMP = "_libortho_alpha"
_ATTRIBUTE = "_libortho_switch"
_CACHES = ("cache", "past_key_values", "cache_params")
"""What releases of transformers call the cache among the arguments and outputs of a model."""


@dataclass(frozen=True)
class AlphaState:
    """Normalised alpha of every stream; what a layer reads.

    Attributes:
        values: Stream name to a float, or to a tuple with one float per sequence.
        batch: Number of sequences that the per-sequence values (or the caller's list) name; None for scalars.
        tokens: Tokens of each sequence in the forward pass that runs under this state; None where that is not known.
            States that differ in it alone are equal: one alpha.
    """

    values: Mapping[str, float | tuple[float, ...]]
    batch: int | None = None
    tokens: int | None = field(default=None, compare=False)

    @cached_property
    def off(self) -> bool:
        """True if no stream takes part, so that a layer may stop after its base stream."""
        return not self._on

    @cached_property
    def _on(self) -> dict[str, float | tuple[float, ...]]:
        return {n: v for n, v in self.values.items() if not _is_off(v)}

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
            return f"{given}an expert sees some tokens in an order of its own: give one value for all sequences"
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

    def expanded(self, factor: int) -> AlphaState:
        """The state for a batch whose sequences were each repeated ``factor`` times in a row (beams, samples)."""
        if factor == 1 or self.batch is None:
            return self
        values = {
            k: tuple(a for a in v for _ in range(factor)) if isinstance(v, tuple) else v for k, v in self.values.items()
        }
        return AlphaState(values, self.batch * factor)


def _is_off(value: float | tuple[float, ...]) -> bool:
    return not any(value) if isinstance(value, tuple) else value == 0.0


# Contexts of all switches. Immutable mappings, so that a child task cannot change its parent's.
_CONTEXTS: ContextVar[Mapping[Switch, AlphaState]] = ContextVar("libortho_alpha_contexts", default=MappingProxyType({}))
# State of the model forward pass that is running in this thread, after expansion to the batch at hand.
_FORWARD: ContextVar[Mapping[Switch, AlphaState]] = ContextVar("libortho_alpha_forward", default=MappingProxyType({}))


# Switches by the number that compiled graphs know them by.
_SWITCHES: weakref.WeakValueDictionary[int, Switch] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def switch_of(number: int) -> Switch:
    """The switch that a compiled graph means.

    Raises:
        AlphaError: if its model is gone.
    """
    switch = _SWITCHES.get(number)
    if switch is None:
        raise AlphaError("the model that this graph was compiled from is gone; compile the model in use")
    return switch


class Switch:
    """The alpha of one model. Made by ``split``, ``isolate`` and ``load``; callers use the module's functions.

    Attributes:
        number: What compiled graphs know it by; a copy has another.
    """

    def __init__(self) -> None:
        self._persistent: dict[str, float | tuple[float, ...]] = {}
        self._batch: int | None = None
        self._init_runtime()

    def _init_runtime(self) -> None:
        self.number = next(_NUMBERS)
        _SWITCHES[self.number] = self
        self._state = AlphaState(dict(self._persistent), self._batch)
        self._lock = threading.Lock()
        self._active = 0
        self._tainted: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._recompute: dict[int, AlphaState | None] = {}
        self._tokens = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"_persistent": dict(self._persistent), "_batch": self._batch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that this switch controls."""
        return tuple(self._persistent)

    def add_stream(self, name: str, alpha: float = 0.0) -> None:
        """Register a stream, which stands at ``alpha`` until somebody sets another."""
        self._persistent[name] = alpha
        self._state = AlphaState(dict(self._persistent), self._batch)

    # -- what callers set -------------------------------------------------------------------------------------------

    def build(self, spec: AlphaSpec, *, base: Mapping[str, Any] | None, extrapolate: bool) -> AlphaState:
        """Validate ``spec`` and return the state it means; ``base`` holds the streams that a mapping leaves alone."""
        if not self._persistent:
            return _base_alone(spec, extrapolate)
        if isinstance(spec, Mapping):
            unknown = [n for n in spec if n not in self._persistent]
            if unknown:
                raise AlphaError(f"unknown stream {unknown[0]!r}; this model has {sorted(self._persistent)}")
            named: dict[str, AlphaValue] = dict(spec)
        else:
            named = dict.fromkeys(self._persistent, spec)
        values: dict[str, float | tuple[float, ...]] = dict(base or dict.fromkeys(self._persistent, 0.0))
        values.update({n: _normalise(n, v, extrapolate) for n, v in named.items()})
        lengths = {len(v) for v in values.values() if isinstance(v, tuple)}
        if len(lengths) > 1:
            raise AlphaError(f"per-sequence alphas of different lengths {sorted(lengths)}; one value per sequence each")
        return AlphaState(values, lengths.pop() if lengths else None)

    def set(self, spec: AlphaSpec, *, extrapolate: bool) -> None:
        """Change the persistent value."""
        state = self.build(spec, base=self._persistent, extrapolate=extrapolate)
        self._persistent, self._batch, self._state = dict(state.values), state.batch, state

    @contextlib.contextmanager
    def context(self, spec: AlphaSpec, *, extrapolate: bool) -> Iterator[AlphaState]:
        """Run a block under ``spec``; streams that a mapping does not name are off."""
        state = self.build(spec, base=None, extrapolate=extrapolate)
        if not self._persistent:  # nothing to switch, for this thread or another
            yield state
            return
        before = set(threading.enumerate())
        with self._lock:
            self._active += 1
        token = _CONTEXTS.set({**_CONTEXTS.get(), self: state})
        try:
            yield state
        finally:
            _CONTEXTS.reset(token)
            with self._lock:
                self._active -= 1
                # Threads born meanwhile may still be running a request that was meant for this context.
                self._tainted.update(t for t in threading.enumerate() if t not in before)

    # -- what layers read -------------------------------------------------------------------------------------------

    def current(self) -> AlphaState:
        """The state for the forward pass that is running here.

        Raises:
            AlphaContextError: if this thread cannot know its alpha.
        """
        running = _FORWARD.get().get(self)
        return running if running is not None else self._resolve()

    def _resolve(self) -> AlphaState:
        task = torch._C._current_graph_task_id()
        if task != -1:  # inside backward: gradient checkpointing runs the layer once more
            if task not in self._recompute:
                raise AlphaContextError(
                    "a layer is recomputed during backward, but its forward pass is not on record, so its alpha is "
                    "unknown; call the model that was split (not a submodule of it) when gradient checkpointing is on"
                )
            recorded = self._recompute[task]
            if recorded is None:
                raise AlphaContextError(
                    "a layer is recomputed during the backward of forward passes under more than one alpha, so its own "
                    "is unknown; call backward once per alpha, or turn gradient checkpointing off"
                )
            return recorded
        own = _CONTEXTS.get().get(self)
        if own is not None:
            return own
        if self._active or threading.current_thread() in self._tainted:
            raise AlphaContextError(
                "this thread has no alpha of its own, and it was started inside (or runs beside) an alpha context; "
                "enter libortho.alpha(model, ...) in the thread itself, or start it with "
                "contextvars.copy_context().run"
            )
        return self._state

    # -- hooks on the model -----------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Register the hooks that see what a layer cannot: the batch, the KV cache and the graph of the outputs."""
        setattr(model, _ATTRIBUTE, self)
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Take the hooks and the switch off a model whose split layers have been replaced by ordinary ones."""
        allow_stock_save(model)
        model.__dict__.pop(_ATTRIBUTE, None)
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Switch)]:
                del hooks[key]
        for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_with_kwargs):
            for key in [k for k in flags if k not in model._forward_pre_hooks and k not in model._forward_hooks]:
                del flags[key]
        for key in [k for k in model._forward_hooks_always_called if k not in model._forward_hooks]:
            del model._forward_hooks_always_called[key]

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack: list[Token[Any] | None] = self._tokens.__dict__.setdefault("stack", [])
        stack.append(None)  # torch calls the after-hook even if this one raises
        state = self._resolve()
        cache = _given_cache(model, args, kwargs)
        live = cache is not None and _holds_tokens(cache)
        if live:
            state = _continue(state, getattr(cache, _STAMP, None))
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if state.batch is not None and isinstance(inputs, torch.Tensor):
            _check_layout(model)
            state = _fit(state, inputs, live).sized(_tokens_each(inputs))
        stack[-1] = _FORWARD.set({**_FORWARD.get(), self: state})

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        token = self._tokens.stack.pop()
        if token is None:
            return
        state = _FORWARD.get()[self]
        _FORWARD.reset(token)
        for cache in (_given_cache(model, args, kwargs), first_cache(output)):
            if cache is not None:
                setattr(cache, _STAMP, state)
        if torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad, state=state: self._remember(state))

    def _remember(self, state: AlphaState) -> None:
        task = torch._C._current_graph_task_id()
        if task in self._recompute:
            known = self._recompute[task]
            if known != state:
                self._recompute[task] = None
            elif known is not None and known.tokens != state.tokens:
                self._recompute[task] = known.sized(None)
            return
        self._recompute[task] = state

        def forget() -> None:
            self._recompute.pop(task, None)

        torch.autograd.Variable._execution_engine.queue_callback(forget)


def _base_alone(spec: AlphaSpec, extrapolate: bool) -> AlphaState:
    """The state of a base without any stream (detached, or loaded with ``streams=None``): alpha = 0."""
    off = not spec if isinstance(spec, Mapping) else _is_off(_normalise("any", spec, extrapolate))
    if not off:
        raise AlphaError(
            f"alpha is {spec!r}, but no ortho stream is loaded beside this base; expected 0. Load the checkpoint with "
            "its streams (libortho.load), or put a stream back into it first (libortho.attach, libortho attach)"
        )
    return AlphaState({})


def _normalise(name: str, value: AlphaValue, extrapolate: bool) -> float | tuple[float, ...]:
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


def _continue(state: AlphaState, stamp: AlphaState | None) -> AlphaState:
    """The state under which a live KV cache may be continued: the one that computed it."""
    if stamp is None:
        raise AlphaContextError(
            "the KV cache was not computed by this split model, so its alpha is unknown; start the request without a "
            "cache"
        )
    if state.batch and stamp.batch and stamp.batch > state.batch:  # repeated for beams when the request began
        state = state.expanded(stamp.batch // state.batch)
    if stamp != state:
        raise AlphaContextError(
            f"the KV cache was computed under alpha {_show(stamp)} and cannot be continued under {_show(state)}: "
            "one request, one alpha; start the request again without the cache"
        )
    return state


def _fit(state: AlphaState, inputs: torch.Tensor, live: bool) -> AlphaState:
    """Bring per-sequence values to the batch at hand; a batch is a multiple only if its rows are repeats."""
    rows, named = inputs.shape[0], state.batch
    assert named is not None
    if rows == named:
        return state
    if not live and rows % named == 0:
        factor = rows // named
        groups = inputs.reshape(named, factor, -1)
        if bool((groups == groups[:, :1]).all()):
            return state.expanded(factor)
    raise AlphaError(
        f"alpha names {named} sequences, the batch has {rows}; give one value per sequence (beams and returned "
        "sequences of one prompt share its value)"
    )


def _check_layout(model: nn.Module) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _TOKENS_FIRST:
        raise AlphaError(
            f"the layers of {type(model).__name__} see (tokens, batch, features), and per-sequence values need the "
            "batch as first dimension; give one value for all sequences"
        )


def _tokens_each(inputs: torch.Tensor) -> int | None:
    """Tokens of each sequence of a model's input: (batch, tokens) ids, (batch, tokens, width), or (batch, features)."""
    if inputs.is_floating_point():
        return {2: 1, 3: inputs.shape[1]}.get(inputs.dim())
    return inputs.shape[1] if inputs.dim() == 2 else None


def _given_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The KV cache among the arguments of a forward call, by name or by position."""
    if len(args) > 1:
        names = list(inspect.signature(model.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    return first_cache(kwargs)


def first_cache(values: Any) -> Any:
    """The cache among the keyword arguments or the outputs of a model, under any of its names; None without one."""
    found = (values.get(name) for name in _CACHES) if isinstance(values, Mapping) else ()
    return next((cache for cache in found if cache is not None), None)


def _holds_tokens(cache: Any) -> bool:
    """True if a cache is to be continued; one that does not tell is after its first forward pass."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return len(cache) > 0 if isinstance(cache, Sized) else hasattr(cache, _STAMP)
    try:
        return int(length()) > 0
    except ValueError:  # all layers keep a state of one size, whatever they have read
        state = getattr(cache, "has_previous_state", None)
        return bool(state()) if callable(state) else hasattr(cache, _STAMP)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _show(state: AlphaState) -> str:
    return ", ".join(f"{k}={v if isinstance(v, float) else list(v)}" for k, v in state.values.items())


def get_switch(model: nn.Module) -> Switch:
    """The switch of a split model (or of a wrapper around it); that of a base without streams controls none.

    Raises:
        AlphaError: if no layer of the model is split, or if parts of it were split apart.
        TargetError: if ``model`` is no model in memory.
    """
    check_model(model)
    found: list[Switch] = []
    bare: Switch | None = None
    waiting, seen = [model], set()
    while waiting:  # not modules(), which is much slower: this runs once for every request
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        if _ATTRIBUTE in own and own[_ATTRIBUTE] not in found:
            found.append(own[_ATTRIBUTE])
        layer = own.get("switch")  # of a split layer
        if isinstance(layer, Switch) and not layer.streams:
            bare = layer
        waiting.extend(m for m in own["_modules"].values() if m is not None)
    if not found and bare is not None:
        return bare
    if not found:
        raise AlphaError("this model has no ortho stream; call libortho.split, isolate or load first")
    if len(found) > 1:
        raise AlphaError(
            f"this model has more than one switch: {len(found)} parts of it were split apart; set alpha on each part, "
            "or split the whole model at once"
        )
    return found[0]


def set_alpha(model: nn.Module, value: AlphaSpec, *, allow_extrapolation: bool = False) -> None:
    """Set alpha until it is set again.

    Args:
        model: A model with split layers.
        value: A number in [0, 1]; one number per sequence of the batch; or a mapping from stream name to either.
            A mapping changes only the streams that it names. A base without any stream takes 0 alone.
        allow_extrapolation: Accept values above 1.

    Raises:
        AlphaError: if the value is not a number, out of range, or names an unknown stream. Nothing changes then.
    """
    get_switch(model).set(value, extrapolate=allow_extrapolation)


@contextlib.contextmanager
def alpha(model: nn.Module, value: AlphaSpec, *, allow_extrapolation: bool = False) -> Iterator[None]:
    """Run a block under another alpha; other threads and tasks do not see it.

    Args:
        model: A model with split layers.
        value: As in :func:`set_alpha`, but streams that a mapping does not name are off.
        allow_extrapolation: Accept values above 1.

    Raises:
        AlphaError: as :func:`set_alpha`.
    """
    with get_switch(model).context(value, extrapolate=allow_extrapolation):
        yield
