"""Tensors that are made from buffers, for speed, and must never outlive a change of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """The last result made from some tensors; it is made again when they are exchanged or written to.

    It is no buffer: ``.to()``, ``state_dict``, pickles and copies leave it behind. A write through ``tensor.data`` is
    the one change that torch does not count and that is therefore not noticed.
    """

    def __init__(self) -> None:
        self._held: tuple[list[tuple[weakref.ref[Tensor], int, int]], T] | None = None

    def get(self, make: Callable[..., T], *sources: Tensor) -> T | None:
        """``make(*sources)``, or None if a change of the sources could not be noticed (inference tensors)."""
        held = self._held  # read once: another thread may exchange it
        if held is not None:
            for source, (reference, version, address) in zip(sources, held[0], strict=True):
                if reference() is not source or source._version != version or source.data_ptr() != address:
                    break
            else:
                return held[1]
        if any(s.is_inference() for s in sources):
            return None
        marks = [(weakref.ref(s), s._version, s.data_ptr()) for s in sources]
        made = make(*sources)
        self._held = (marks, made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Derived, ())
