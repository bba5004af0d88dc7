"""What a model carries from one forward pass to the next, and the alpha that it was computed under.

A KV cache, a recurrent state, the memories of XLNet: whatever a model returns and takes again is stamped with its
alpha. It may be continued under that alpha only. Where alphas differ within a batch, the stamp also holds some numbers
of every row, by which rows are known again after a beam search or a caller has reordered, repeated or dropped them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from libortho.core.errors import AlphaContextError
from libortho.core.switch.state import AlphaState, show

NAMES = frozenset({"past_key_values", "cache", "cache_params", "state", "mems", "past_buckets_states", "layer_past"})
"""What releases and families of transformers call it, among the arguments and the outputs of a model."""
_ENCODED = "encoder_outputs"
_STATES = ("last_hidden_state", "encoder_last_hidden_state")
_NO_STATE = frozenset({"inputs_embeds", "attention_mask", "position_ids", "labels", "loss", "logits"})
_STAMP = "_libortho_alpha"
_SIMPLE = (int, float, str, type(None))  # bool is an int
_PLAIN = (*_SIMPLE, Tensor)
_HALVES = ("self_attention_cache", "cross_attention_cache")
_MANY = 100_000  # objects in a cache; one with more is not looked through


@dataclass(frozen=True)
class _Stamp:
    """The alpha of a carried object, marks of its rows, and its size; neither while a forward pass changes it.

    Attributes:
        state: The alpha.
        rows: Index of a token to (batch, bytes).
        size: See :func:`_size`.
    """

    state: AlphaState
    rows: Mapping[int, Tensor] | None = None
    size: int | None = None

    def grown(self, carried: Any) -> bool:
        """True if something else than a forward pass of the model has added tokens."""
        return self.size is not None and _size(carried) > self.size


def given(parameters: Sequence[str], names: frozenset[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list:
    """The carried objects among the arguments of a forward pass.

    Args:
        parameters: Names of the parameters of ``forward``, in their order.
        names: Those under which the model takes what it carries.
        args: Positional arguments.
        kwargs: Named arguments.
    """
    found: list[Any] = []
    if len(args) > 1:
        kwargs = {**dict(zip(parameters, args, strict=False)), **kwargs}
    for name, value in kwargs.items():
        if value is None:
            continue
        if name in names:
            found.extend(_leaves(value))
        elif name == _ENCODED:
            found.extend(leaf for leaf in _leaves(value) if _stamp(leaf) is not None)
        elif not isinstance(value, _PLAIN) and hasattr(value, _STAMP):
            found.append(value)
    return found


def returned(parameters: Iterable[str], output: Any, encodes: bool = False) -> tuple[frozenset[str], list[Any]]:
    """The carried objects among the outputs of a forward pass, and the names of those with names.

    Args:
        parameters: Names of the parameters of ``forward``.
        output: What it returned.
        encodes: Whether the model has an encoder, whose states its decoder takes.
    """
    if isinstance(output, Mapping):
        taken = {n for n in output if n in NAMES or (n in parameters and n not in _NO_STATE)}
        states = _STATES if encodes else ()
        return frozenset(taken), [leaf for n in (*taken, *states) for leaf in _leaves(output.get(n))]
    if isinstance(output, tuple | list):
        nested = [v for v in output if not isinstance(v, _PLAIN)]
        return frozenset(), [leaf for v in nested for leaf in _leaves(v)]
    return frozenset(), []


def foreign(carried: Any, state: AlphaState) -> bool:
    """True if other passes have stamped the object than that of this state, which is running."""
    stamp = _stamp(carried)
    return stamp is not None and stamp.state is not state


def watched(carried: Any, state: AlphaState) -> bool:
    """True if the pass of this state, which is running, has stamped the object."""
    stamp = _stamp(carried)
    return stamp is not None and stamp.state is state


def stamped(carried: Any) -> AlphaState | None:
    """The alpha under which a cache was computed; None where nobody knows, or where somebody else has changed it since.

    Raises:
        AlphaContextError: if its rows were changed, and cannot be told apart.
    """
    stamp = _stamp(carried)
    if stamp is None or stamp.size is None or not _own_layers(carried, stamp.state) or stamp.grown(carried):
        return None
    return stamp.state if stamp.state.batch is None else _followed(stamp, carried)


def _stamp(carried: Any) -> _Stamp | None:
    """The stamp of an object, or of the tensor that it is a view of."""
    stamp: _Stamp | None = getattr(carried, _STAMP, None)
    if stamp is None and isinstance(carried, Tensor) and carried._is_view():
        stamp = getattr(carried._base, _STAMP, None)
        if stamp is not None and stamp.state.batch is not None:
            return None  # which rows it views is not known
    return stamp


def proceed(state: AlphaState, carried: Any) -> tuple[AlphaState, bool]:
    """The state under which a carried object may be continued, and whether it holds anything.

    Raises:
        AlphaContextError: if it was computed under another alpha, or nobody knows under which.
    """
    stamp = _stamp(carried)
    if stamp is None:
        if _blank(carried):
            return state, False
        raise AlphaContextError(
            "the KV cache or state was not computed by this split model (or inside a compiled graph that was not given "
            "use_cache=True), so its alpha is unknown; start the request without it"
        )
    own = stamp.size is None or _own_layers(carried, stamp.state)
    if own and stamp.state is state and state.batch is None and not stamp.grown(carried):
        return state, True
    if _blank(carried):
        return state, False
    known = stamp.state if stamp.state.batch is None else _followed(stamp, carried)
    if state.batch and known.batch and known.batch > state.batch:  # repeated for beams when the request began
        state = state.expanded(known.batch // state.batch)
    if known != state:
        raise AlphaContextError(
            f"the KV cache or state was computed under alpha {show(known)} and cannot be continued under "
            f"{show(state)}: one request, one alpha; start the request again without the cache"
        )
    if not own or stamp.grown(carried):
        what = "has grown outside the model, by a layer that was called alone" if own else "holds layers of another"
        raise AlphaContextError(
            f"the KV cache {what}, so its alpha is unknown; start the request again without the cache"
        )
    return state, True


def mark(carried: Any, state: AlphaState, finished: bool) -> None:
    """Stamp a carried object; before the forward pass that changes it as well, which may not end."""
    rows = _marks(carried, state.batch) if finished and state.batch is not None else None
    setattr(carried, _STAMP, _Stamp(state, rows, _size(carried)) if finished else _Stamp(state))
    if finished or state.batch is None:
        for layer in getattr(carried, "layers", None) or ():
            setattr(layer, _STAMP, state)


def _own_layers(carried: Any, state: AlphaState) -> bool:
    """True if every layer that holds something was computed by the passes that computed the cache."""
    for layer in getattr(carried, "layers", None) or ():
        own = getattr(layer, _STAMP, None)
        if own is not state and own != state and not (own is None and _blank_layer(layer)):
            return False
    return True


def _leaves(value: Any) -> Iterator[Any]:
    """What can hold a stamp: tensors in lists, or a cache as a whole."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif not isinstance(value, _SIMPLE):
        yield value
        if not isinstance(value, Tensor):
            for half in _HALVES:
                yield from _leaves(getattr(value, half, None))


def _followed(stamp: _Stamp, carried: Any) -> AlphaState:
    """The state of the rows as they stand now."""
    state, batch = stamp.state, stamp.state.batch
    assert batch is not None
    now = None if stamp.rows is None else _marks(carried, None, list(stamp.rows))
    kept = [] if now is None or stamp.rows is None else [i for i in stamp.rows if i in now]
    if now is None or not kept:
        raise AlphaContextError(
            "the KV cache or state was computed under one alpha for each sequence, and its rows cannot be told apart "
            "any more; give one alpha for all sequences, or start the request again without it"
        )
    assert stamp.rows is not None
    before, after = (torch.cat([marks[i] for i in kept], 1) for marks in (stamp.rows, now))
    if before.shape == after.shape and torch.equal(before, after):
        return state
    index = []
    for row in after:
        same = (before == row).all(1).nonzero().flatten().tolist() if before.shape[1] == len(row) else []
        if len({state.row(i) for i in same}) != 1:
            raise AlphaContextError(
                "the rows of the KV cache were changed, and it is not clear under which alpha each of them was "
                "computed; start the request again without the cache"
            )
        index.append(same[0])
    return state.rows(index)


def _marks(carried: Any, batch: int | None, wanted: Sequence[int] | None = None) -> dict[int, Tensor] | None:
    """Some bytes of every row: of the last layer with keys, those of the first, a middle and the last token.

    Of what has no keys, all tensors whose first dimension is the batch. None where there are none.
    """
    for layer in reversed(getattr(carried, "layers", None) or ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() < 3 or not keys.numel():
            continue
        tokens = keys.shape[-2]
        index = wanted if wanted is not None else sorted({0, tokens // 2, tokens - 1})
        return {i: torch.cat([_bytes(t[..., i, :]) for t in (keys, values)], 1) for i in index if i < tokens}
    rows = batch if batch is not None else _rows(carried)
    found = [t for t in _tensors(carried) if rows and t.dim() and t.shape[0] == rows and t.numel()]
    return {0: torch.cat([_bytes(t) for t in found], 1)} if found else None


def _rows(carried: Any) -> int:
    return next((t.shape[0] for t in _tensors(carried) if t.dim() > 1), 0)


def _bytes(tensor: Tensor) -> Tensor:
    """(batch, bytes), a copy."""
    return tensor.detach().contiguous().flatten(1).clone().view(torch.uint8).cpu()


def _size(carried: Any) -> int:
    """Tokens in the key-value layers that grow, all layers together."""
    layers = getattr(carried, "layers", None)
    if not layers:
        return 0
    return sum(k.shape[-2] for k in [getattr(x, "keys", None) for x in layers] if isinstance(k, Tensor) and k.dim() > 1)


def _blank(carried: Any) -> bool:
    """True if nothing that an earlier forward pass computed is left."""
    layers = getattr(carried, "layers", None)
    if layers is None:
        return not any(t.numel() and bool(t.any()) for t in _tensors(carried))
    return all(_blank_layer(layer) for layer in layers)


def _blank_layer(layer: Any) -> bool:
    length = getattr(layer, "get_seq_length", None)
    if length is not None and int(length()) > 0:
        return False
    recurrent = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states")]
    if any(r is not None for r in recurrent):
        return not any(t.numel() and bool(t.any()) for r in recurrent for t in _tensors(r))
    return length is not None or not any(t.numel() and bool(t.any()) for t in _tensors(layer))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an object, its attributes and containers.

    Raises:
        AlphaContextError: if there are too many objects to look through.
    """
    waiting, seen = [value], {id(value)}
    while waiting:
        item = waiting.pop()
        inner: Iterable[Any] = ()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            inner = item.values()
        elif isinstance(item, list | tuple | set):
            inner = item
        elif not isinstance(item, type | _Stamp | AlphaState):
            slots = [n for kind in type(item).__mro__ for n in getattr(kind, "__slots__", ())]
            inner = [*getattr(item, "__dict__", {}).values(), *(getattr(item, n, None) for n in slots)]
        fresh = [i for i in inner if not isinstance(i, _SIMPLE) and id(i) not in seen]
        seen.update(map(id, fresh))
        waiting.extend(fresh)
        if len(seen) > _MANY:
            raise AlphaContextError(f"a {type(value).__name__} holds more objects than a cache; give the model none")
