"""The words of a field are the literal below it, where the source is at hand."""

import inspect
from dataclasses import dataclass

from libortho.core.field_docs import documented, fields_help


def test_without_the_source_fields_have_no_words_but_their_defaults(monkeypatch):
    @dataclass(frozen=True)
    class Config:
        """A config."""

        size: int = 3
        """How large."""
        name: str | None = None
        """How called."""

    assert fields_help(documented(Config)) == {"size": "How large. Default: 3.", "name": "How called."}

    def no_source(cls):
        raise OSError("source code not available")

    monkeypatch.setattr(inspect, "getsource", no_source)
    assert fields_help(documented(Config)) == {"size": "How large. Default: 3.", "name": "How called."}
    del Config.__field_docs__
    assert fields_help(documented(Config)) == {"size": "Default: 3.", "name": ""}
