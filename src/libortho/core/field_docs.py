"""Documentation of dataclass fields: the string literal below each field, as ``help(cls)`` and ``--help`` show it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def documented(cls: type[T]) -> type[T]:
    """Add an "Attributes:" section with every field, inherited ones included, to the docstring of a dataclass."""
    docs = getattr(cls, "__field_docs__", {}) | _literals(cls)
    cls.__field_docs__ = docs  # type: ignore[attr-defined]
    entries = [
        textwrap.fill(f"{name}: {text}", 110, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, text in fields_help(cls).items()
    ]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *entries])
    return cls


def fields_help(cls: type[Any]) -> dict[str, str]:
    """Name of each field of a documented dataclass to its documentation, with the default at the end."""
    docs: dict[str, str] = cls.__field_docs__
    defaults = {f.name: "" if f.default is None else f" Default: {f.default!r}." for f in fields(cls)}
    return {name: (docs.get(name, "") + default).strip() for name, default in defaults.items()}


def _literals(cls: type[Any]) -> dict[str, str]:
    """Name of each field that the class itself declares to the string literal below it, as one paragraph.

    Empty where the source is not at hand, as in a frozen program.
    """
    try:
        source = inspect.getsource(cls)
    except OSError:
        return {}
    [definition] = ast.parse(textwrap.dedent(source)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found
