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
        forced: Tokens that the row says first, instead of drawing them; none of them ends it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    forced: tuple[int, ...] = ()


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
    """A part of an answer.

    Attributes:
        text: What is certain by now.
        tokens: How many were said, the one that ended the answer included.
        logprobs: Of these tokens, where they are wanted, but for the one that ended the answer.
        finish: Why the answer ended; None before the last piece.
        ids: Of these tokens, but for the one that ended the answer.
    """

    text: str = ""
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    ids: tuple[int, ...] = ()


class Engine(Protocol):
    """What runs the model.

    Attributes:
        streams: Names of the streams that requests can ask for, and a hash of what each holds.
        context: Most tokens of a prompt with its answer; None for no limit.
        forces: Whether rows can be forced and ``acts`` answers.
    """

    streams: Mapping[str, str]
    context: int | None
    forces: bool

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

    async def acts(self, ids: Sequence[int], alpha: Mapping[str, float]) -> Mapping[str, Mapping[str, float]]:
        """For each stream and layer, how large the stream's part of the output is beside the base's, over these tokens.

        Both are norms, the stream's as at alpha 1; what goes into a layer is what the layers before it give under
        ``alpha``.

        Raises:
            BusyError: if too many requests wait.
            EngineError: if the engine is down, or cannot tell.
        """

    def alive(self) -> bool:
        """True while rows are answered."""

    def load(self) -> tuple[int, int]:
        """Rows that are being answered, and rows that wait."""

    async def close(self) -> None:
        """Let the rows that are being answered end, and free what the engine holds."""
