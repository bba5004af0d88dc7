"""What an attack is: one signature for all of them, so that a new one is a file and a line in the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from libortho.auditing.page.exhibits import Drawn, Exhibit
from libortho.auditing.report import Check
from libortho.auditing.schema import REFERENCE
from libortho.auditing.subjects import Subject
from libortho.text.encoding import Encoded
from libortho.text.records import Record

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class AttackInputs:
    """What every attack is given.

    Attributes:
        subjects: All subjects of the audit, the audited one first; attacks work on copies.
        records: The forget records under attack.
        items: The same records, encoded.
        general: General text that has nothing to do with them.
        tokenizer: Of the models.
        seed: Seed of everything that the attack draws.
    """

    subjects: Sequence[Subject]
    records: Sequence[Record] = ()
    items: Sequence[Encoded]
    general: Sequence[Encoded] = ()
    tokenizer: Any = None
    seed: int = 0

    @property
    def audited(self) -> Subject:
        """The subject under attack."""
        return self.subjects[0]

    @property
    def reference(self) -> Subject | None:
        """A model that never saw the forget set, put to the same attack: what it gains is no memory."""
        return self.subject(REFERENCE)

    def subject(self, key: str) -> Subject | None:
        """The subject of a key, if it takes part."""
        return next((s for s in self.subjects if s.key == key), None)


@dataclass(frozen=True)
class Attack(Generic[Found]):
    """One way to bring the memory back, and what the verdict and the page say of it.

    Attributes:
        name: Key of its figures in the report.
        passes: Size of the work, in passes over the attacked records.
        run: From the inputs to JSON-ready figures.
        checks: Conditions of the verdict, from the figures.
        exhibit: Part of the page, from the figures and the subjects, the audited one first.
        applies: Whether the attack is possible.
    """

    name: str
    passes: float
    run: Callable[[AttackInputs], Found]
    checks: Callable[[Found], list[Check]]
    exhibit: Callable[[Found, Sequence[Drawn]], Exhibit]
    applies: Callable[[AttackInputs], bool] = lambda inputs: True
