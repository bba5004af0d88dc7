"""What callers choose: frozen dataclasses, validated when they are built.

Every class raises :class:`~libortho.core.errors.ConfigError` when a field is outside its domain.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from libortho.core.errors import ConfigError
from libortho.core.field_docs import documented

Structure = Literal["unstructured", "columns"]
ValueDtype = Literal["bfloat16", "float16", "float32"]
TargetModules = str | tuple[str, ...] | list[str]

MLP_OUT = "mlp-out"
ALL_LINEAR = "all-linear"
_STREAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_stream_name(name: str) -> str:
    """Return ``name`` if it can serve as a module name and a directory name; raise ConfigError otherwise."""
    if not isinstance(name, str) or not _STREAM_NAME.fullmatch(name):
        raise ConfigError(f"stream name {name!r}: expected 1-64 letters, digits, '-' or '_', beginning with no sign")
    from torch import nn  # imported here, so that a command's --help does not wait for torch

    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"stream name {name!r} is taken by torch's module containers; choose another")
    return name


@documented
@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Fields that ``split`` and ``isolate`` share."""

    target_modules: TargetModules = MLP_OUT
    """Suffixes of dotted module paths, ``re:`` full matches, or the reserved ``"mlp-out"`` and ``"all-linear"``."""
    bits: Literal[8, 4] | None = 8
    """Integer width of the base stream; None keeps it dense, in the model's dtype."""
    group_size: int | None = None
    """Inputs per scale. None: one scale per output channel for INT8, 32 for INT4. -1: per output channel."""
    value_dtype: ValueDtype = "bfloat16"
    """Storage of the ortho values; rounding happens when the stream is built, not when it is saved."""
    stream: str = "default"
    """Name of the ortho stream."""

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        targets = self.target_modules
        if not isinstance(targets, str | tuple) or not all(isinstance(t, str) for t in targets):
            raise ConfigError(f"target_modules is {targets!r}; expected a name, a list of names, or 're:<pattern>'")
        if not targets:
            raise ConfigError("target_modules is empty; name at least one module")
        one_of("bits", self.bits, (8, 4, None))
        size = self.group_size
        if size is not None and size != -1 and (not isinstance(size, int) or size < 1 or size % 2):
            raise ConfigError(f"group_size is {size!r}; expected an even number of inputs, -1 (per channel) or None")
        one_of("value_dtype", self.value_dtype, get_args(ValueDtype))
        check_stream_name(self.stream)

    @property
    def resolved_group_size(self) -> int:
        """Inputs per scale, with -1 for one scale per output channel."""
        if self.group_size is not None:
            return self.group_size
        return 32 if self.bits == 4 else -1

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


def is_number(value: Any) -> bool:
    """True for a finite int or float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fraction(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} is {value!r}; expected a number in (0, 1]")


def positive(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is a number above 0."""
    if not is_number(value) or value <= 0:
        raise ConfigError(f"{name} is {value!r}; expected a positive number")


def positive_int(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")


def whole(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected a whole number")


def flag(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected True or False")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ConfigError unless the value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
