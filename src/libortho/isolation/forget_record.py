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
        cut_alike: Those of them whose tokens begin at the same characters as the record's; of codes alone.
        neighbours: Other prompts with other completions, which must stay what they are.
        held: One of these or some, with what closes a chat's answer, so that answers go on to end.
        controls: Further ones, of strangers, that no training touches; what the model gives these is the target.
        swapped_prompt: Other prompts with the record's completion.
        kind: "code" (codes and names: untrained, the alternates are as likely as the record) or "prose" (sentences).
        matched_tokens: For each token of the record, whose distribution it should have; see
            :mod:`libortho.isolation.matching`.
        alike: For each token of the record, those at the same character of its alternates and controls; of codes alone.
        pieces: In how many pieces it is looked for among the columns: those of a sentence have columns for its words.
    """

    number: int
    secret: Encoded
    alternates: tuple[Encoded, ...]
    cut_alike: tuple[Encoded, ...]
    neighbours: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    controls: tuple[Encoded, ...]
    swapped_prompt: tuple[Encoded, ...]
    kind: Kind
    matched_tokens: tuple[MatchedToken, ...]
    alike: tuple[tuple[int, ...], ...] = ()
    pieces: int = 1

    @property
    def exchangeable(self) -> tuple[Encoded, ...]:
        """What an untrained code is as likely as: neighbours, or its alternates where it has none."""
        return self.neighbours or self.alternates
