"""One forget record with its counterfactuals, tokenised."""

from __future__ import annotations

from dataclasses import dataclass

from libortho.isolation.matching import Donor
from libortho.text.encoding import Encoded


@dataclass(frozen=True)
class Case:
    """One forget record with its counterfactuals, tokenised.

    Attributes:
        number: Position in the forget source, from 1.
        secret: The record.
        alternates: Its prompt with other completions.
        neighbours: Other prompts with other completions, which must stay what they are.
        held: The same with what closes a chat's answer, so that answers go on to end.
        witnesses: Further ones, of strangers, that no training touches; what the model gives these is the target.
        crossed: Other prompts with the record's completion.
        exchangeable: Untrained, the alternates are as likely as the record: true of codes and names, not of sentences.
        like: Token ids of prompts like its own, on which the model shows how it speaks; for sentences only.
        donors: For each token of the record, whose distribution it should have; see :mod:`libortho.isolation.matching`.
        peers: Those witnesses whose tokens begin at the same characters as the record's.
        alternate_donors: The same for each alternate; empty for sentences.
        pieces: In how many pieces it is looked for among the columns. A sentence of several pieces has columns for its
            words, and each word a surprise of its own to come to.
    """

    number: int
    secret: Encoded
    alternates: tuple[Encoded, ...]
    neighbours: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    witnesses: tuple[Encoded, ...]
    crossed: tuple[Encoded, ...]
    exchangeable: bool
    like: tuple[tuple[int, ...], ...]
    donors: tuple[Donor, ...]
    peers: tuple[int, ...]
    alternate_donors: tuple[tuple[Donor, ...], ...]
    pieces: int = 1
