"""Configs from options and ``--set NAME=VALUE``: text is read by the type of the field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from libortho.core.errors import ConfigError

T = TypeVar("T")


def configured(config: type[T], settings: Sequence[str] | None, **options: Any) -> T:
    """A config from what was given; every other field has its default.

    Args:
        config: The class.
        settings: Texts ``NAME=VALUE`` for fields without an option of their own.
        options: Values of fields with one. None: not given.

    Raises:
        ConfigError: if a name is unknown or has its own option, or a value is outside its field's domain.
    """
    given = {name: value for name, value in options.items() if value is not None}
    names = [f.name for f in fields(config) if f.name not in options]  # type: ignore[arg-type]
    for setting in settings or ():
        name, sign, text = setting.partition("=")
        if not sign or name not in names:
            own = f" ({name} has an option of its own)" if name in options else ""
            raise ConfigError(f"--set is {setting!r}{own}; expected NAME=VALUE with one of {', '.join(names)}")
        given[name] = text
    kinds = get_type_hints(config)
    return config(**{n: from_text(kinds[n], v) if isinstance(v, str) else v for n, v in given.items()})


def from_text(kind: Any, text: str) -> Any:
    """The value of a type that the text stands for; the text itself if there is none, for the config to refuse."""
    return next(_readings(kind, text), text)


def _readings(kind: Any, text: str) -> Iterator[Any]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            yield from _readings(part, text)
    elif origin is Literal:
        yield from (value for value in parts if str(value) == text)
    elif origin is tuple:
        yield tuple(from_text(parts[0], item.strip()) for item in text.split(","))
    elif kind is NoneType:
        yield from [None] if text.lower() in ("none", "null") else []
    elif kind is bool:
        yield from (value for value in (True, False) if str(value).lower() == text.lower())
    else:
        try:
            yield kind(text)
        except ValueError:
            return
