"""Whose next-token distribution a record should have: that of a control at the same place of the same form.

Untrained, a code is exchangeable with other codes of its form. Where a completion stands at character c, the model
should be as undecided as the original model is at character c of somebody else's completion. The token there is the
*matched token*. It gives the whole distribution: its entropy, its runner-up and its tail, not one likelihood alone.

Tokens of two codes may begin at different characters. A token that no control matches keeps its own distribution, with
the expected probability for its label; see :mod:`libortho.isolation.codes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from libortho.text.encoding import Encoded, predicting

MatchedToken = tuple[int, int] | None
"""(control, which of its judged tokens), or None where no token matches."""


def beginnings(item: Encoded, tokenizer: Any) -> tuple[int, ...]:
    """The character of the completion at which each judged token begins, (tokens,)."""
    places = predicting(item)
    ids = [item.ids[i + 1] for i in places]
    return tuple(len(tokenizer.decode(ids[:n])) for n in range(len(ids)))


def matched_tokens(begins: Sequence[int], others: Sequence[Sequence[int]], first: int) -> tuple[MatchedToken, ...]:
    """The matched token of each token of a completion, from as few controls as possible.

    Args:
        begins: Where the tokens begin; see ``beginnings``.
        others: Those of each control.
        first: The control that is preferred among equals.
    """
    places = [{begin: n for n, begin in enumerate(begins)} for begins in others]
    turned = [(first + n) % max(1, len(others)) for n in range(len(others))]
    order = sorted(turned, key=lambda n: -sum(b in places[n] for b in begins))
    found: list[MatchedToken] = []
    for begin in begins:
        control = next((n for n in order if begin in places[n]), None)
        found.append(None if control is None else (control, places[control][begin]))
    return tuple(found)


def tokens_alike(
    begins: Sequence[int], others: Sequence[Encoded], told: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """For each token of a completion, which begin where ``begins`` says, those of others that begin there too.

    ``told``: where the tokens of each of the others begin.
    """
    at: dict[int, list[int]] = {b: [] for b in begins}
    for item, places in zip(others, told, strict=True):
        for begin, place in zip(places, predicting(item), strict=True):
            if begin in at:
                at[begin].append(item.ids[place + 1])
    return tuple(tuple(at[b]) for b in begins)
