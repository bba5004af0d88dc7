"""A KV cache whose rows come and go, each under the alpha that computed it.

        start                    end                columns from start to end are what the model sees
    row 0 |....ttttttttttttttttttt|                 t: a token; . : before the row began, masked
    row 1 |tttttttttttttttttttttt t|
    row 2 |..........ttttttttttttt|

All rows grow by one column at a time, in place. A row comes in from the cache of a pass of its own, with the alpha of
that cache's stamp, and leaves without a trace of it in others: its buffer is written over by whoever takes its place,
and what lies before a row began is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from libortho.core.errors import AlphaContextError, TargetError
from libortho.core.switch import carried
from libortho.core.switch.state import AlphaState

ROOM = 256
"""Columns by which buffers grow."""


class RowLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, columns, width), in buffers with room to grow."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.device, self.dtype = keys.device, keys.dtype
        self.is_initialized = True
        self._buffers = [t.new_zeros(0, t.shape[1], 0, t.shape[3]) for t in (keys, values)]
        self._see(0, 0, 0)

    def _see(self, rows: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        self.start, self.end = start, end
        keys, values = (b[:rows, :, start:end] for b in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    @property
    def room(self) -> int:
        """Columns that are left."""
        return self._buffers[0].shape[2] - self.end

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one more column, or several, of every row."""
        rows, more = len(key_states), key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, self.end : self.end + more] = new
        return self._see(rows, self.start, self.end + more)

    def arrange(self, kept: Sequence[int], tokens: int, new: Sequence[Tensor], longest: int, room: int) -> None:
        """Keep these rows, their last ``tokens`` columns, and put new ones below, right-aligned.

        Args:
            kept: Places of rows, ascending.
            tokens: The most that any of them holds.
            new: Keys and values, (new rows, heads, columns, width); none where nothing comes.
            longest: Columns that are seen from now on.
            room: Columns that follow before the next call.
        """
        keys, values = self._buffers
        rows = len(kept) + (len(new[0]) if new else 0)
        fits = longest <= self.end and self.end + room <= keys.shape[2] and rows <= keys.shape[0]
        end = self.end if fits else longest
        for i, buffer in enumerate((keys, values)):
            found = buffer
            if not fits:
                found = buffer.new_empty(
                    max(rows, buffer.shape[0]), buffer.shape[1], end + room + ROOM, buffer.shape[3]
                )
            if not fits or list(kept) != list(range(len(kept))):
                old = buffer[list(kept), :, self.end - tokens : self.end]  # a copy
                found[: len(kept), :, end - tokens : end] = old
            if new:
                part = new[i]
                below = found[len(kept) : rows]
                below[:, :, end - longest : end] = 0.0  # masked, and yet multiplied: it must be finite
                below[:, :, end - min(part.shape[2], longest) : end] = part[:, :, max(0, part.shape[2] - longest) :]
            if tokens < longest:
                found[: len(kept), :, end - longest : end - tokens] = 0.0
            self._buffers[i] = found
        self._see(rows, end - longest, end)


class RowCache(Cache):
    """See the module. Made empty; ``admit`` brings the first rows.

    Attributes:
        lengths: Tokens of every row.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[RowLayer] = []  # type: ignore[assignment]
        self.lengths: list[int] = []

    @property
    def state(self) -> AlphaState:
        """The alpha of every row.

        Raises:
            AlphaContextError: if a pass that would have changed them did not end.
        """
        if not self.layers:
            return AlphaState({})
        found = carried.stamped(self)
        if found is None:
            raise AlphaContextError("a forward pass over these rows has failed; start their requests again")
        return found

    def ensure(self, room: int = 1) -> None:
        """Make room for so many more tokens of every row."""
        if self.layers and self.layers[0].room < room:
            self.change(range(len(self.lengths)), room=room)

    def mask(self, more: int = 1) -> Tensor:
        """(rows, columns + more) int64: 1 where the row has a token, or will have one after the next pass."""
        longest = max(self.lengths)
        device = self.layers[0].device
        starts = torch.tensor([longest - n for n in self.lengths], device=device)
        return (torch.arange(longest + more, device=device) >= starts[:, None]).long()

    def grew(self, more: int = 1) -> None:
        """Say that a pass has added so many tokens to every row."""
        self.lengths = [n + more for n in self.lengths]

    def change(
        self, kept: Sequence[int], coming: Any = None, lengths: Mapping[int, int] | None = None, room: int = 1
    ) -> None:
        """Drop all rows but these, and take rows of another cache in.

        Args:
            kept: Places of rows that stay, ascending.
            coming: A cache that a pass of the model has just made, its rows padded at their beginning.
            lengths: Which of its rows come, and how many tokens each has.
            room: Tokens that every row has room for afterwards.

        Raises:
            AlphaContextError: if nobody knows under which alpha the other cache was computed.
            TargetError: if it holds something else than keys and values of all tokens.
        """
        before, tokens = self.state, max((self.lengths[i] for i in kept), default=0)
        which = lengths or {}
        self.lengths = [*(self.lengths[i] for i in kept), *which.values()]
        longest = max(self.lengths, default=0)
        state = before.rows(kept) if before.batch is not None else before
        parts: list[tuple[Tensor, ...]] = [() for _ in self.layers]
        if coming is not None and which:
            alphas = carried.stamped(coming)
            if alphas is None:
                raise AlphaContextError(
                    "rows of a KV cache whose alpha is unknown were to be put beside others; run the split model"
                )
            plain = [_plain(layer) for layer in coming.layers]
            if not plain:
                raise TargetError("the model has put nothing into its cache; it keeps what it has read elsewhere")
            if not self.layers:
                self.layers = [RowLayer(*p) for p in plain]
            alphas = alphas.rows(list(which)) if alphas.batch is not None else alphas
            state = _beside(state, len(kept), alphas, len(which))
            index = list(which)
            parts = [tuple(t[index] for t in p) for p in plain]
        if longest:
            for layer, new in zip(self.layers, parts, strict=True):
                layer.arrange(kept, tokens, new, longest, room)
            carried.mark(self, state, finished=True)
        else:
            self.layers = []


def _plain(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer that keeps those of all tokens.

    Raises:
        TargetError: for any other.
    """
    if type(layer) is not DynamicLayer or not isinstance(layer.keys, Tensor) or not isinstance(layer.values, Tensor):
        raise TargetError(
            f"the model keeps a {type(layer).__name__}, and rows of several requests can be put together only where a "
            "model keeps keys and values of all tokens; generate one request at a time with libortho.alpha"
        )
    return layer.keys, layer.values


def _beside(first: AlphaState, rows: int, second: AlphaState, more: int) -> AlphaState:
    """The state of the rows of the first and, below, of the second."""
    names = second.values if not rows else first.values
    if set(names) != set(second.values):
        raise AlphaContextError(
            f"rows were computed with the streams {sorted(names)}, others with {sorted(second.values)}; end those first"
        )
    if not names:
        return AlphaState({})
    values = {n: (*_each(first.values.get(n, 0.0), rows), *_each(second.values[n], more)) for n in names}
    return AlphaState(values, rows + more)


def _each(value: float | tuple[float, ...], rows: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * rows
