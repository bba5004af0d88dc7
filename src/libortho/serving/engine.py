"""What answers: a protocol that the gateway speaks, whoever runs the model.

A row is one answer to be given: a prompt, an alpha for each stream, and how tokens are drawn. Rows of one batch need
not share any of them. A row ends by itself, or when its reader goes away.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from libortho.core.errors import LibOrthoError

Finish = Literal["stop", "length"]


class EngineError(LibOrthoError):
    """The engine cannot answer: it is down, or a forward pass failed."""


class BusyError(EngineError):
    """So many rows wait that another one would wait too long."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a row are drawn.

    Attributes:
        max_tokens: The most that are said.
        temperature: 0 takes the likeliest token.
        top_p: Share of the probability from which tokens are drawn, the likeliest first.
        seed: Of the draws of this row alone; None draws one from the system.
        stop: Texts before which the answer ends.
        logprobs: Likeliest other tokens that are told with each; None tells no probabilities.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Row:
    """One answer to be given.

    Attributes:
        prompt: Token ids.
        alpha: Every stream of the model, and its share.
        sampling: How tokens are drawn.
    """

    prompt: tuple[int, ...]
    alpha: Mapping[str, float]
    sampling: Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability in nats, and the likeliest in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text that is certain by now, tokens that were said, and why it ended, in the last one."""

    text: str = ""
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


class Engine(Protocol):
    """What runs the model.

    Attributes:
        streams: Names of the streams that requests can ask for, and a hash of what each holds.
        context: Most tokens of a prompt with its answer; None for no limit.
    """

    streams: Mapping[str, str]
    context: int | None

    async def start(self) -> None:
        """Be ready for rows.

        Raises:
            EngineError: if that cannot be.
        """

    def generate(self, rows: Sequence[Row]) -> list[AsyncIterator[Piece]]:
        """The answers to these rows, piece by piece. A row whose iterator is closed ends at once.

        Raises:
            BusyError: if too many rows wait.
            EngineError: if the engine is down; so do the iterators.
        """

    def load(self) -> tuple[int, int]:
        """Rows that are being answered, and rows that wait."""

    async def close(self) -> None:
        """Let the rows that are being answered end, and free what the engine holds."""
