"""Tensors that are made from buffers, for speed, and must never outlive a change of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """What was last made from some tensors, made again when they are exchanged or written to.

    It is no buffer: ``.to()``, ``state_dict``, pickles and copies leave it behind.
    """

    def __init__(self) -> None:
        self._sources: list[tuple[weakref.ref[Tensor], int]] = []
        self._made: T | None = None

    def get(self, make: Callable[..., T], *sources: Tensor) -> T | None:
        """``make(*sources)``, or None if a change of the sources could not be noticed (inference tensors)."""
        for source, (reference, version) in zip(sources, self._sources, strict=False):
            if reference() is not source or source._version != version:
                break
        else:
            if self._sources:
                return self._made
        if any(s.is_inference() for s in sources):
            return None
        self._sources, self._made = [(weakref.ref(s), s._version) for s in sources], make(*sources)
        return self._made

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Derived, ())
