"""What every subject of one audit is asked: the same records, probes, fillings and texts for all of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from libortho.auditing import prompts
from libortho.auditing.config import AuditConfig
from libortho.auditing.measures import utility
from libortho.auditing.measures.fillings import Space, form_positions, space_of
from libortho.core.errors import DataError
from libortho.evaluation.tasks import Task, arithmetic_rows, load_task
from libortho.text.encoding import Encoded, encode
from libortho.text.overlap import overlaps
from libortho.text.records import Record, Source, load_records
from libortho.text.sources import read_rows
from libortho.text.tokens import text_ids

HOLDOUT_EXPOSURES = 12
"""Holdout records whose exposure is measured, as the level of a secret that was never seen."""
SHOWN = 16
"""Records whose generations are printed."""
FEW = 8
"""Below this many records the intervals are too wide to say much."""


@dataclass(frozen=True)
class Question:
    """A record that brings a paraphrase and wrong answers, as TOFU's perturbed files do.

    Attributes:
        answer: The record itself.
        paraphrase: The same question with the answer in other words; the answer itself where none is given.
        perturbed: The same question with wrong answers.
    """

    answer: Record
    paraphrase: Record
    perturbed: tuple[Record, ...]


@dataclass(frozen=True)
class Inputs:
    """The audit's questions.

    Attributes:
        tokenizer: Of all models.
        forget: Records that must be gone.
        holdout: Records of the same kind that nobody trained on; may be empty.
        retain: Records that must stay; may be empty.
        probed: Indices into ``forget`` of the records that samples, fillings and other prompts look at.
        prefixes: Share of the completion that is given, to (index into ``forget``, record) pairs.
        variants: Name of the changed prompt, to (index into ``forget``, record) pairs.
        fillings: For each probed record, other completions of the same shape; empty for prose.
        holdout_fillings: The same for the first holdout records.
        spaces: For each probed record, how many fillings there are, itself included; None for prose.
        holdout_spaces: The same for the records of ``holdout_fillings``.
        questions: Forget records with paraphrase and wrong answers, by index.
        question_sets: Name ("retain", "real_authors", "world_facts"), to questions that must stay.
        associations: Records that ask for the secret the other way round or over one step.
        general: Windows of general text.
        tasks: Tasks that measure ability.
        warnings: What a reader should know about the data.
        limit: Longest record in tokens; None for any length.
    """

    tokenizer: Any
    forget: tuple[Record, ...]
    holdout: tuple[Record, ...]
    retain: tuple[Record, ...]
    probed: tuple[int, ...]
    prefixes: Mapping[float, tuple[tuple[int, Record], ...]]
    variants: Mapping[str, tuple[tuple[int, Record], ...]]
    fillings: tuple[tuple[Record, ...], ...]
    holdout_fillings: tuple[tuple[Record, ...], ...]
    spaces: tuple[int | None, ...]
    holdout_spaces: tuple[int | None, ...]
    questions: Mapping[int, Question]
    question_sets: Mapping[str, tuple[Question, ...]]
    associations: tuple[Record, ...]
    general: tuple[Encoded, ...]
    tasks: tuple[Task, ...]
    warnings: tuple[str, ...]
    limit: int | None = None
    _encoded: dict[Record, Encoded] = field(default_factory=dict, repr=False, compare=False)

    def digest(self) -> str:
        """Hash of everything that is asked."""
        asked = [getattr(self, f.name) for f in fields(self) if f.name not in ("tokenizer", "_encoded")]
        return hashlib.sha256(repr([*asked, self.encode(self.forget)]).encode()).hexdigest()

    def texts(self) -> Iterator[tuple[str, str | Sequence[int]]]:
        """Every text that models are given: its name in error messages, and the text or its token ids."""
        for name in ("forget", "holdout", "retain", "associations"):
            yield from ((f"{name} record {r.number}", r.text) for r in getattr(self, name))
        for name, questions in {"forget": self.questions.values(), **self.question_sets}.items():
            for q in questions:
                yield from ((f"{name} record {r.number}", r.text) for r in (q.answer, q.paraphrase, *q.perturbed))
        for task in self.tasks:
            for i, asked in enumerate(task.questions, 1):
                yield from ((f"{task.name} row {i}", asked.context + c) for c in asked.continuations)
        yield from ((f"window {i} of the general text", window.ids) for i, window in enumerate(self.general, 1))

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Tokenise, once for each record."""
        for record in records:
            if record not in self._encoded:
                self._encoded[record] = encode(record, self.tokenizer, self.limit, name="audit")
        return [self._encoded[r] for r in records]


def load_inputs(
    tokenizer: Any,
    forget: Source,
    *,
    retain: Source | None,
    holdout: Source | None,
    associations: Source | None,
    question_sets: Mapping[str, Source] | None,
    general: Path | None,
    tasks: Sequence[str | Path],
    limit: int | None,
    config: AuditConfig,
) -> Inputs:
    """Read and check everything that an audit asks.

    Raises:
        DataError: if data is missing or malformed, or a holdout record is also in the forget set.
    """
    rows = read_rows(forget, "forget")
    records = tuple(load_records(rows, tokenizer, name="forget"))
    unseen = tuple(load_records(holdout, tokenizer, name="holdout")) if holdout is not None else ()
    _check_overlap(records, unseen)
    rng = random.Random(config.seed)
    if len(unseen) > (most := config.resolved("holdout_records")):
        unseen = tuple(unseen[i] for i in sorted(random.Random(config.seed).sample(range(len(unseen)), most)))
    size = config.resolved("probe_records")
    probed = tuple(range(len(records)) if len(records) <= size else sorted(rng.sample(range(len(records)), size)))
    spaces, unseen_spaces = _spaces(records), _spaces(unseen)[:HOLDOUT_EXPOSURES]
    count = config.resolved("fillings")

    def others(record: Record, space: Space | None) -> tuple[Record, ...]:
        return () if space is None else tuple(record.answered(t) for t in space.draw(count, rng))

    prefixes: dict[float, list[tuple[int, Record]]] = {}
    variants: dict[str, list[tuple[int, Record]]] = {}
    for i in probed:
        for share, record in prompts.prefixes(records[i]).items():
            prefixes.setdefault(share, []).append((i, record))
        own = prompts.variants(records[i], tokenizer)
        if isinstance(rows[i], Mapping):
            own |= prompts.user_variants(rows[i], tokenizer, records[i].number)
        for name, record in own.items():
            if limit is None or len(encode(record, tokenizer).ids) <= limit:
                variants.setdefault(name, []).append((i, record))
    arithmetic = arithmetic_rows(config.resolved("task_rows"), config.seed)
    fillings = tuple(others(records[i], spaces[i]) for i in probed)
    beside = list(zip(unseen, unseen_spaces, strict=False)) if any(fillings) else []
    return Inputs(
        tokenizer=tokenizer,
        forget=records,
        holdout=unseen,
        retain=tuple(load_records(retain, tokenizer, name="retain")) if retain is not None else (),
        probed=probed,
        prefixes={k: tuple(v) for k, v in sorted(prefixes.items())},
        variants={k: tuple(v) for k, v in variants.items()},
        fillings=fillings,
        holdout_fillings=tuple(others(r, s) for r, s in beside),
        spaces=tuple(None if (s := spaces[i]) is None else s.size for i in probed),
        holdout_spaces=tuple(None if s is None else s.size for _, s in beside),
        questions={i: q for i, row in enumerate(rows) if (q := _question(row, records[i], tokenizer)) is not None},
        question_sets={n: _questions(s, n, tokenizer) for n, s in (question_sets or {}).items()},
        associations=tuple(load_records(associations, tokenizer, name="associations")) if associations else (),
        general=tuple(utility.general_items(tokenizer, general, config.resolved("general_sequences"), 256)),
        tasks=(load_task(arithmetic, "arithmetic"), *(load_task(t) for t in tasks)),
        warnings=_warnings(records, unseen, tokenizer),
        limit=limit,
    )


def _spaces(records: Sequence[Record]) -> list[Space | None]:
    """The space of each record's completion, without the characters that completions of one shape share."""
    completions = [r.completion for r in records]
    return [space_of(c, form) for c, form in zip(completions, form_positions(completions), strict=True)]


def _check_overlap(forget: Sequence[Record], holdout: Sequence[Record]) -> None:
    both = [(forget[j].number, holdout[i].number) for i, j in overlaps(forget, holdout).items()]
    if both:
        shown = ", ".join(f"forget {a} = holdout {b}" for a, b in both[:5]) + (", ..." if len(both) > 5 else "")
        raise DataError(
            f"{len(both)} records are in both forget and holdout ({shown}); a holdout must hold "
            "records that were never trained on; remove them from one of the two"
        )


def _question(row: Any, record: Record, tokenizer: Any) -> Question | None:
    """The record's paraphrase and wrong answers, if its row brings them."""
    if not isinstance(row, Mapping) or "perturbed_answer" not in row or "question" not in row:
        return None
    wrong = row["perturbed_answer"]
    if not isinstance(wrong, Sequence) or isinstance(wrong, str) or not all(isinstance(w, str) for w in wrong):
        raise DataError(f"record {record.number}: 'perturbed_answer' must be a list of strings")
    answers = [row.get("paraphrased_answer", row["answer"]), *wrong]
    paraphrase, *others = load_records([{"question": row["question"], "answer": a} for a in answers], tokenizer)
    return Question(record, paraphrase, tuple(others))


def _questions(source: Source, name: str, tokenizer: Any) -> tuple[Question, ...]:
    rows = read_rows(source, name)
    records = load_records(rows, tokenizer, name=name)
    found = [_question(row, record, tokenizer) for row, record in zip(rows, records, strict=True)]
    missing = [r.number for r, q in zip(records, found, strict=True) if q is None]
    if missing:
        raise DataError(f"{name} record {missing[0]}: expected question, answer and perturbed_answer")
    return tuple(q for q in found if q is not None)


def _warnings(forget: Sequence[Record], holdout: Sequence[Record], tokenizer: Any) -> tuple[str, ...]:
    found = []
    if len(forget) < FEW:
        found.append(
            f"only {len(forget)} forget records: every interval is wide, and a verdict can rest on one of them"
        )
    if 0 < len(holdout) < FEW:
        found.append(f"only {len(holdout)} holdout records: membership figures are hardly more than noise")
    single = [r.number for r in forget if len(text_ids(r.completion.strip(), tokenizer, rendered=True)) == 1]
    if single:
        found.append(
            f"{len(single)} secrets are a single token (record {single[0]}{', ...' if len(single) > 1 else ''}): a "
            "guess can hit them, and exact memorisation, extraction strength and extraction are then one and the same"
        )
    return tuple(found)
