"""Used by mkdocs.yml: roles of Sphinx in docstrings, such as :func:`~package.name`, become the name in plain type."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:mod|class|func|meth|data|attr|exc):`(~?)\.*([\w.]+)`")


def plain(text: str) -> str:
    """The text without roles; a tilde shortens a name, as in Sphinx."""
    return _ROLE.sub(lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", text)


class PlainRoles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
