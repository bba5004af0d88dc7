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
        self._sources: tuple[weakref.ref[Tensor], ...] = ()
        self._versions: tuple[int, ...] = ()
        self._made: T | None = None

    def get(self, make: Callable[..., T], *sources: Tensor) -> T | None:
        """``make(*sources)``, or None if a change of the sources could not be noticed (inference tensors)."""
        if any(s.is_inference() for s in sources):
            return None
        known = len(sources) == len(self._sources) and all(map(_same, sources, self._sources))
        if known and self._versions == tuple([s._version for s in sources]):
            return self._made
        self._sources, self._versions = tuple(map(weakref.ref, sources)), tuple([s._version for s in sources])
        self._made = make(*sources)
        return self._made

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Derived, ())


def _same(tensor: Tensor, reference: weakref.ref[Tensor]) -> bool:
    return reference() is tensor
