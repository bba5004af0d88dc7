"""One model's switch: what was set, what a layer reads, and what goes on around a forward pass.

    set_alpha(model, ...)        the persistent value
    with alpha(model, ...):      a context, see :mod:`libortho.core.switch.scope`
    model(...)                   the guard around ``forward``: finds the alpha once, fits it to the batch, holds it
                                 while the pass runs, and compares and stamps what is carried to the next one

The guard stands around every transformers model that holds a split layer, the body below the head as well. It takes
the place of ``forward`` on the instance: unlike a hook, it is left by every exception.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from libortho.core.errors import AlphaContextError, AlphaError
from libortho.core.models import allow_stock_save
from libortho.core.switch import carried
from libortho.core.switch.guard import Guard, Keeper, carries, check_layout, family, guard, unguard
from libortho.core.switch.scope import Entry, Scope
from libortho.core.switch.state import AlphaSpec, AlphaState, AlphaValue, fit, is_off, normalise, tokens_each_row

_NOTE = "_libortho_pass"
_TWO = (
    "a layer is recomputed during the backward of forward passes under more than one alpha, so its own is unknown; "
    "call backward once per alpha, or turn gradient checkpointing off"
)
_KEEPS_STATE = frozenset({"recurrent_gemma"})
"""Families that keep their recurrent state in the model itself, where it belongs to nobody's request."""


class _Pass:
    """A forward pass: its state, after expansion to the batch at hand, and whether it still runs."""

    __slots__ = ("runs", "state")

    def __init__(self, state: AlphaState) -> None:
        self.state, self.runs = state, True


# The model forward pass that is running here.
_RUNNING: ContextVar[Mapping[Switch, _Pass]] = ContextVar("libortho_alpha_forward", default=MappingProxyType({}))
# Switches by the number that compiled graphs know them by.
_SWITCHES: weakref.WeakValueDictionary[int, Switch] = weakref.WeakValueDictionary()


def switch_of(number: int) -> Switch:
    """The switch that a compiled graph means.

    Raises:
        AlphaError: if its model is gone, or belongs to another process.
    """
    switch = _SWITCHES.get(number)
    if switch is None:
        raise AlphaError(
            "the model that this graph was compiled or exported from is gone, or belongs to another process; compile "
            "the model in use"
        )
    return switch


class Switch:
    """The alpha of one model. Made by ``split``, ``isolate`` and ``load``; callers use :class:`libortho.alpha`.

    Attributes:
        number: What compiled graphs know it by: random, so that another process has none of this number. A copy has
            another.
        constant: Whether streams that are off for all sequences of a batch are computed all the same, where a context
            names a value for each sequence. A server sets it, so that the time of an answer does not tell its alpha.
    """

    constant = False

    def __init__(self) -> None:
        self._persistent: dict[str, float | tuple[float, ...]] = {}
        self._batch: int | None = None
        self._init_runtime()

    def _init_runtime(self) -> None:
        self.number = secrets.randbits(62)
        _SWITCHES[self.number] = self
        self._state = AlphaState(dict(self._persistent), self._batch)
        self._scope = Scope()
        self._recompute: dict[int, AlphaState | None] = {}
        self._kept: AlphaState | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: the alpha that counts where they are made.

        Raises:
            AlphaContextError: inside a context in which a stream is higher than outside.
        """
        state = self._scope.state(self._state)
        if state != self._state and not state.within(self._state):
            raise AlphaContextError(
                "a model is copied or pickled inside an alpha context in which a stream is higher than outside, and "
                "the copy would keep that; leave the context first, and set the copy's alpha"
            )
        return {"_persistent": dict(state.values), "_batch": state.batch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that this switch controls."""
        return tuple(self._persistent)

    @property
    def persistent(self) -> Mapping[str, float | tuple[float, ...]]:
        """Alpha of every stream outside any context."""
        return MappingProxyType(self._persistent)

    def add_stream(self, name: str, alpha: float | tuple[float, ...] = 0.0) -> None:
        """Register a stream, which stands at ``alpha`` until somebody sets another."""
        self._persistent[name] = alpha
        self._state = AlphaState(dict(self._persistent), self._batch)

    def drop_stream(self, name: str) -> None:
        """Forget a stream."""
        self._persistent.pop(name, None)
        self._batch = next((len(v) for v in self._persistent.values() if isinstance(v, tuple)), None)
        self._state = AlphaState(dict(self._persistent), self._batch)

    # -- what callers set ---------------------------------------------------------------------------------------------

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
        values.update({n: normalise(n, v, extrapolate) for n, v in named.items()})
        lengths = {len(v) for v in values.values() if isinstance(v, tuple)}
        if len(lengths) > 1:
            raise AlphaError(f"per-sequence alphas of different lengths {sorted(lengths)}; one value per sequence each")
        return AlphaState(values, lengths.pop() if lengths else None, constant=self.constant)

    def set(self, spec: AlphaSpec, *, extrapolate: bool) -> None:
        """Change the persistent value."""
        state = self.build(spec, base=self._persistent, extrapolate=extrapolate)
        self._persistent, self._batch, self._state = dict(state.values), state.batch, state
        self._scope.adopt()

    def context(self, spec: AlphaSpec, frame: FrameType, holder: Any, *, extrapolate: bool) -> Context:
        """A context that is not entered yet; streams that a mapping does not name are off.

        Args:
            spec: The alpha in it.
            frame: Where its block is.
            holder: What lives as long as the block.
            extrapolate: Accept values above 1.
        """
        state = self.build(spec, base=None, extrapolate=extrapolate)
        # Without a stream there is nothing to switch, here or in another thread.
        return Context(self._scope.entry(state, frame, holder) if self._persistent else None)

    def enter(self, context: Context) -> None:
        """Enter a context."""
        running = _RUNNING.get()
        if context.entry is not None:
            self._scope.enter(context.entry)
            if self in running:  # inside a forward pass: the block has an alpha of its own
                context.interrupted = running[self]
                _RUNNING.set({k: v for k, v in running.items() if k is not self})

    def leave(self, context: Context) -> None:
        """Leave a context.

        Raises:
            AlphaContextError: if it was entered in another ``contextvars`` context.
        """
        if context.interrupted is not None and context.interrupted.runs:
            _RUNNING.set({**_RUNNING.get(), self: context.interrupted})
        if context.entry is not None:
            self._scope.leave(context.entry, self._state)

    # -- what layers read ---------------------------------------------------------------------------------------------

    def current(self) -> AlphaState:
        """The state for the forward pass that is running here.

        Raises:
            AlphaContextError: if this thread cannot know its alpha, or a tracer would freeze it.
        """
        running = _RUNNING.get().get(self)
        return running.state if running is not None and running.runs else self._resolve()

    def _resolve(self) -> AlphaState:
        task = torch._C._current_graph_task_id()
        if task != -1:  # inside backward: gradient checkpointing runs the layer once more
            return self._recorded(task)
        if _freezes():
            raise AlphaContextError(
                "torch.jit.trace, make_fx and fx tracing would freeze the alpha of this moment into their graph; use "
                "torch.compile or torch.export, whose graphs read the switch whenever they run"
            )
        return self._scope.state(self._state)

    def _recorded(self, task: int) -> AlphaState:
        if task not in self._recompute:
            raise AlphaContextError(
                "a layer is recomputed during backward, but its forward pass is not on record, so its alpha is "
                "unknown; call the model that was split (not a submodule of it) when gradient checkpointing is on"
            )
        recorded = self._recompute[task]
        if recorded is None:
            raise AlphaContextError(_TWO)
        return recorded

    # -- around a forward pass ----------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Guard the model, and every part of it that takes a cache and holds a layer of this switch."""
        for module in model.modules():
            if module is not model and not carries(module):
                continue
            if any(m.__dict__.get("switch") is self for m in module.modules()):
                guard(self, module)
                if not any(isinstance(h, Keeper) for h in module._forward_pre_hooks.values()):
                    module.register_forward_pre_hook(Keeper(self))

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Take the guards off a model whose split layers have been replaced by ordinary ones."""
        allow_stock_save(model)
        for module in model.modules():
            unguard(module)

    def passes(self, args: tuple[Any, ...]) -> bool:
        """True for a layer inside a running pass of its model, which looks at what is carried and stamps it."""
        around = _RUNNING.get().get(self)
        if around is None or not around.runs:
            return False
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self._note(args, around.state)
        return True

    def run(self, guarded: Guard, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward pass of a guarded model, nested ones included.

        Raises:
            AlphaContextError: if this thread cannot know its alpha, or something carried belongs to another.
            AlphaError: if per-sequence values do not fit the batch.
        """
        running = _RUNNING.get()
        around = running.get(self)
        outer = around.state if around is not None and around.runs else None
        again = torch._C._current_graph_task_id() != -1  # recomputed: what is carried was looked at the first time
        state = outer
        if state is None:
            state = (self._noted(args) if again else None) or self._resolve()
        given = [] if again else carried.given(guarded.parameters, guarded.names, args, kwargs)
        live = False
        if outer is not None:
            given = [v for v in given if carried.foreign(v, outer)]
        for value in given:
            state, holds = carried.proceed(state, value)
            live |= holds
        if outer is None:
            state = self._fitted(state, guarded.model, args[0] if args else kwargs.get("input_ids"), kwargs, live)
        for value in given:
            carried.mark(value, state, finished=False)
        if not again and not guarded.whole and torch.is_grad_enabled():
            self._note(args, state)
        now = _Pass(state)
        try:
            try:
                _RUNNING.set({**running, self: now})
                output = guarded.inner(*args, **kwargs)
            finally:
                now.runs = False
                _RUNNING.set(running)
        finally:
            _RUNNING.set(running)  # once more: an interrupt may have cut the line above off
        if again:
            return output
        names, made = carried.returned(guarded.parameters, output, guarded.encodes)
        guarded.names |= names
        for value in {id(v): v for v in (*given, *made)}.values():
            if outer is None or not carried.watched(value, outer):
                carried.mark(value, state, finished=True)
        if outer is None and torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad, state=state: self._remember(state))
        return output

    def _fitted(
        self, state: AlphaState, model: nn.Module, inputs: Any, kwargs: Mapping[str, Any], live: bool
    ) -> AlphaState:
        """The state for the batch at hand."""
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if not isinstance(inputs, torch.Tensor):
            return state
        tokens = tokens_each_row(inputs)
        if state.batch is not None:
            check_layout(model, inputs)
            state = fit(state, inputs, live).sized(tokens)
        if family(model) in _KEEPS_STATE and kwargs.get("use_cache") is not False:
            if tokens == 1 and self._kept is not None and self._kept != state:
                raise AlphaContextError(
                    f"{type(model).__name__} keeps its recurrent state in the model, and that was computed under "
                    "another alpha; start the request again, or pass use_cache=False"
                )
            self._kept = state
        return state

    def _note(self, args: tuple[Any, ...], state: AlphaState) -> None:
        """Note the alpha of a layer on its input, which gradient checkpointing gives it again."""
        if args and isinstance(args[0], torch.Tensor):
            known = getattr(args[0], _NOTE, {}).get(self.number, state)
            setattr(args[0], _NOTE, {self.number: state if known == state else None})

    def _noted(self, args: tuple[Any, ...]) -> AlphaState | None:
        """The alpha under which a layer saw its input before; None if nobody noted it.

        Raises:
            AlphaContextError: if it saw it under more than one.
        """
        found = getattr(args[0], _NOTE, {}) if args and isinstance(args[0], torch.Tensor) else {}
        if found.get(self.number, self) is None:
            raise AlphaContextError(_TWO)
        state: AlphaState | None = found.get(self.number)
        return state

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


class Context:
    """A context: its entry, and the forward pass that it interrupts."""

    __slots__ = ("entry", "interrupted")

    def __init__(self, entry: Entry | None) -> None:
        self.entry = entry
        self.interrupted: _Pass | None = None


def _freezes() -> bool:
    """True while something records the operations of this thread for another time."""
    if is_compiling():
        return False
    tracing = torch._C._get_tracing_state() is not None or is_fx_symbolic_tracing()
    return tracing or get_proxy_mode() is not None


def _base_alone(spec: AlphaSpec, extrapolate: bool) -> AlphaState:
    """The state of a base without any stream (detached, or loaded with ``streams=None``): alpha = 0."""
    off = not spec if isinstance(spec, Mapping) else is_off(normalise("any", spec, extrapolate))
    if not off:
        raise AlphaError(
            f"alpha is {spec!r}, but no ortho stream is loaded beside this base; expected 0. Load the checkpoint with "
            "its streams (libortho.load), or put a stream back into it first (libortho.attach, libortho attach)"
        )
    return AlphaState({})


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for value in output for t in _tensors(value)] if isinstance(output, tuple | list) else []
