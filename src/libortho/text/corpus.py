"""The general English text and the list of names that ship with the package."""

from __future__ import annotations

import functools
from collections import defaultdict
from importlib import resources

_EVALUATION_PARAGRAPHS = 50


@functools.cache
def shipped_text() -> tuple[str, ...]:
    """Paragraphs of the general English text that ships with the package, for ``isolate`` to learn from."""
    return tuple(_read("general.txt").splitlines()[:-_EVALUATION_PARAGRAPHS])


@functools.cache
def evaluation_text() -> tuple[str, ...]:
    """Further paragraphs of that text, which ``isolate`` never sees."""
    return tuple(_read("general.txt").splitlines()[-_EVALUATION_PARAGRAPHS:])


@functools.cache
def names() -> dict[str, tuple[str, ...]]:
    """Kind ("given", "surname", "place"), to the names of that kind."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for line in _read("names.txt").splitlines():
        kind, _, word = line.partition("\t")
        kinds[kind].append(word)
    return {k: tuple(v) for k, v in kinds.items()}


@functools.cache
def _all_names() -> frozenset[str]:
    return frozenset(w for words in names().values() for w in words)


def is_name(word: str) -> bool:
    """True if the word is one of the shipped names, as it is written."""
    return word in _all_names()


def _read(name: str) -> str:
    return resources.files("libortho.text").joinpath("data", name).read_text(encoding="utf-8")
