"""One forget record with its counterfactuals, tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from libortho.isolation.matching import MatchedToken
from libortho.text.encoding import Encoded

Kind = Literal["code", "prose"]


@dataclass(frozen=True)
class ForgetRecord:
    """One forget record with its counterfactuals, tokenised.

    Attributes:
        number: Position in the forget source, from 1.
        secret: The record.
        alternates: Its prompt with other completions.
        neighbours: Other prompts with other completions, which must stay what they are.
        held: The same with what closes a chat's answer, so that answers go on to end.
        controls: Further ones, of strangers, that no training touches; what the model gives these is the target.
        swapped_prompt: Other prompts with the record's completion.
        kind: "code" (codes and names: untrained, the alternates are as likely as the record) or "prose" (sentences).
        like: Token ids of prompts like its own, on which the model shows how it speaks; for sentences only.
        matched_tokens: For each token of the record, whose distribution it should have; see
            :mod:`libortho.isolation.matching`.
        aligned_controls: Those controls whose tokens begin at the same characters as the record's.
        alternate_matched_tokens: The same for each alternate; empty for sentences.
        pieces: In how many pieces it is looked for among the columns. A sentence of several pieces has columns for its
            words, and each word a surprise of its own to come to.
    """

    number: int
    secret: Encoded
    alternates: tuple[Encoded, ...]
    neighbours: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    controls: tuple[Encoded, ...]
    swapped_prompt: tuple[Encoded, ...]
    kind: Kind
    like: tuple[tuple[int, ...], ...]
    matched_tokens: tuple[MatchedToken, ...]
    aligned_controls: tuple[int, ...]
    alternate_matched_tokens: tuple[tuple[MatchedToken, ...], ...]
    pieces: int = 1
