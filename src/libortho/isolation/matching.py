"""Whose next-token distribution a record should have: that of a neighbour at the same place of the same form.

Untrained, a code is exchangeable with other codes of its form. Where the secret of one person stands at character c of
its completion, the model should be as undecided as the original model is at character c of somebody else's. Such a
*donor* gives the whole distribution, not only the likelihood of one token: its entropy, its runner-up, its tail.

Tokens of two codes may begin at different characters. A token of the record that begins where no donor has a
beginning keeps its own distribution with the probability of its label set aside; see :mod:`libortho.isolation.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from libortho.text.encoding import Encoded, predicting

MatchedToken = tuple[int, int] | None
"""(neighbour, which of its judged tokens), or None where there is no donor."""


def beginnings(item: Encoded, tokenizer: Any) -> tuple[int, ...]:
    """The character of the completion at which each judged token begins, (tokens,)."""
    places = predicting(item)
    ids = [item.ids[i + 1] for i in places]
    return tuple(len(tokenizer.decode(ids[:n])) for n in range(len(ids)))


def donors(begins: Sequence[int], others: Sequence[Sequence[int]], first: int) -> tuple[MatchedToken, ...]:
    """A donor for each token of a completion, from as few neighbours as possible.

    Args:
        begins: Where the tokens begin; see ``beginnings``.
        others: Those of each neighbour.
        first: The neighbour that is preferred among equals.
    """
    places = [{begin: n for n, begin in enumerate(begins)} for begins in others]
    turned = [(first + n) % max(1, len(others)) for n in range(len(others))]
    order = sorted(turned, key=lambda d: -sum(b in places[d] for b in begins))
    found: list[MatchedToken] = []
    for begin in begins:
        donor = next((d for d in order if begin in places[d]), None)
        found.append(None if donor is None else (donor, places[donor][begin]))
    return tuple(found)
