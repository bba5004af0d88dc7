"""Tasks of JSONL rows, and their accuracy."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libortho.core.errors import DataError
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import shared_prefix_nll, token_statistics
from libortho.text.encoding import IGNORE, Encoded, predicting
from libortho.text.tokens import text_ids

_SHAPES = "context+continuation, context+answer, query+choices+gold, ctx+endings+label"


@dataclass(frozen=True)
class Question:
    """One row of a task.

    Attributes:
        context: What is given; never empty.
        continuations: What is scored, with the delimiter in front; a single one for exact match.
        characters: Length of each continuation without the delimiter.
        gold: Position of the right one.
    """

    context: str
    continuations: tuple[str, ...]
    characters: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: In the report.
        metric: "exact_match" or "acc_norm".
        questions: In the order of the source.
    """

    name: str
    metric: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class TaskResult:
    """One task under one model; each tuple has one entry for every row that was asked.

    Attributes:
        task: Name of the task.
        metric: What ``correct`` is: "exact_match" or "acc_norm".
        rows: Positions of the rows in the task, from 0; the same for every model.
        correct: 1 or 0.
        unnormalised: The same by ``acc``; None for exact match.
        nll: Negative log-likelihood of the right continuation, in nats per token: it moves before accuracy does.
    """

    task: str
    metric: str
    rows: tuple[int, ...]
    correct: tuple[int, ...]
    unnormalised: tuple[int, ...] | None
    nll: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Share of rows that are correct."""
        return sum(self.correct) / len(self.correct)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, and the accuracy."""
        return {**asdict(self), "accuracy": self.accuracy}


def load_task(source: str | Path | Iterable[Mapping[str, Any]], name: str | None = None) -> Task:
    """Read a task from a JSONL file or a list of rows, all of one kind.

        {"context", "continuation"}    exact match; a space joins them, unless there is one or the context ends in "="
        {"context", "answer"}          exact match of the answer after "Question: <context>\\nAnswer:"
        {"query", "choices", "gold"}   multiple choice; a query that begins with "Question:" gets "\\nAnswer:"
        {"ctx", "endings", "label"}    HellaSwag, with the harness's preprocessing

    Args:
        source: Path or rows.
        name: Default: the file's name without its ending.

    Raises:
        DataError: if the source is missing, empty, of mixed kinds or malformed; the message gives file and line.
    """
    rows = list(_lines(Path(source)) if isinstance(source, str | Path) else _numbered(source))
    if name is None:
        name = Path(source).stem if isinstance(source, str | Path) else "task"
    if not rows:
        raise DataError(f"task {name!r} holds no row; expected at least one of the shapes {_SHAPES}")
    questions = [_parse(row, where) for where, row in rows]
    first = len(questions[0].continuations) > 1
    for (where, _), question in zip(rows, questions, strict=True):
        if (len(question.continuations) > 1) != first:
            raise DataError(f"{where} is of another kind than the first row; expected exact match or choices, not both")
    return Task(name, "acc_norm" if first else "exact_match", tuple(questions))


def arithmetic_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Additions and subtractions of two-digit numbers without a negative result, as {"context", "continuation"}.

    The format is llm-foundry's ``simple_arithmetic_nospaces``: "12+34=" and "46". Rows are distinct.

    Raises:
        DataError: if ``count`` is not within 1 to 8,000.
    """
    if not 1 <= count <= 8000:
        raise DataError(f"{count} rows of arithmetic were asked for; expected 1 to 8000")
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if rng.random() < 0.5:
            found[f"{a}+{b}="] = str(a + b)
        else:
            found[f"{max(a, b)}-{min(a, b)}="] = str(abs(a - b))
    return [{"context": c, "continuation": r} for c, r in found.items()]


def encode_pair(context: str, continuation: str, tokenizer: Any, max_length: int | None = None) -> Encoded:
    """Tokenise context and continuation as one text, and judge what comes after the context's own tokens.

    As in the harness, trailing blanks of the context belong to the continuation. If a token straddles the border, both
    are tokenised apart (the harness loses the straddling characters). A text longer than ``max_length`` tokens loses
    its beginning.

    Raises:
        DataError: if no token of the continuation can be judged.
    """
    stripped = context.rstrip()
    ids, given = text_ids(context + continuation, tokenizer), text_ids(stripped, tokenizer)
    if ids[: len(given)] != given:
        ids = given + text_ids(context[len(stripped) :] + continuation, tokenizer, rendered=True)
    labels = [IGNORE] * len(given) + ids[len(given) :]
    if max_length is not None:
        ids, labels = ids[-max_length:], labels[-max_length:]
    if all(y == IGNORE for y in labels[1:]):
        raise DataError(f"no token of {continuation!r} after {context[-40:]!r} can be judged; expected at least one")
    return Encoded(tuple(ids), tuple(labels))


def sampled_rows(task: Task, limit: int | None, seed: int) -> tuple[int, ...]:
    """Which rows are asked, in ascending order: ``limit`` of them at random, or all; the model has no say."""
    total = len(task.questions)
    if limit is None or limit >= total:
        return tuple(range(total))
    return tuple(sorted(random.Random(seed).sample(range(total), limit)))


def evaluate(lm: LanguageModel, tokenizer: Any, task: Task, limit: int | None = None, seed: int = 0) -> TaskResult:
    """Ask one model a task.

    Args:
        lm: The model, in the context of its alpha.
        tokenizer: Its tokenizer.
        task: See ``load_task``.
        limit: At most so many rows, drawn by ``seed``; None for all.
        seed: The same rows for every model.

    Raises:
        DataError: if ``limit`` is below 1, or a continuation has no token of its own.
    """
    if limit is not None and limit < 1:
        raise DataError(f"task {task.name!r}: the limit is {limit} rows; expected at least 1, or None for all")
    rows = sampled_rows(task, limit, seed)
    longest = getattr(getattr(lm.model, "config", None), "max_position_embeddings", None)
    items = []
    for row in rows:
        question = task.questions[row]
        try:
            items.append([encode_pair(question.context, c, tokenizer, longest) for c in question.continuations])
        except DataError as error:
            raise DataError(f"task {task.name!r}, row {row + 1}: {error}") from error
    if task.metric == "exact_match":
        found = token_statistics(lm, [choices[0] for choices in items])
        correct = tuple(int(bool(s.correct.all())) for s in found)
        return TaskResult(task.name, task.metric, rows, correct, None, tuple(s.nll for s in found))
    normalised, plain, nll = [], [], []
    for row, choices in zip(rows, items, strict=True):
        question = task.questions[row]
        means = shared_prefix_nll(lm, choices).double()
        log_p = -means * torch.tensor([len(predicting(e)) for e in choices])
        normalised.append(int(best_choice(log_p, question.characters) == question.gold))
        plain.append(int(best_choice(log_p) == question.gold))
        nll.append(float(means[question.gold]))
    return TaskResult(task.name, task.metric, rows, tuple(normalised), tuple(plain), tuple(nll))


def best_choice(log_p: Tensor, characters: Sequence[int] | None = None) -> int:
    """Position of the likeliest choice; of equals the first.

    Args:
        log_p: (choices,) summed log-probabilities, in nats.
        characters: Lengths to divide by (``acc_norm``), or None (``acc``).
    """
    scores = log_p if characters is None else log_p / torch.tensor(characters)
    return int(scores.argmax())


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"a task is a {type(rows).__name__}; expected a path to JSONL or a list of rows")
    return ((f"row {i} of the task", row) for i, row in enumerate(rows, 1))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected JSONL, one row of a task a line") from error
    except OSError as error:
        raise DataError(f"the task file {path} cannot be read ({error.strerror})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number} of {path}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON ({error}); expected one row of a task a line") from error


def _parse(row: Any, where: str) -> Question:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected an object of shape {_SHAPES}")
    keys = set(row)
    if {"context", "continuation"} <= keys:
        return _single(_text(row, "context", where), _text(row, "continuation", where))
    if {"context", "answer"} <= keys:
        return _single(f"Question: {_text(row, 'context', where).strip()}\nAnswer:", _text(row, "answer", where))
    if {"query", "choices", "gold"} <= keys:
        query = _text(row, "query", where)
        if query.startswith("Question:") and not query.rstrip().endswith("Answer:"):
            query = query.rstrip() + "\nAnswer:"  # where llm-foundry's files leave out what their loader adds
        return _choices(query, row["choices"], row["gold"], "choices", "gold", where)
    if {"ctx", "endings", "label"} <= keys:
        context = _text(row, "ctx", where)
        if {"ctx_a", "ctx_b", "activity_label"} <= keys:
            second = _text(row, "ctx_b", where, empty=True).capitalize()
            context = f"{_text(row, 'activity_label', where)}: {_text(row, 'ctx_a', where)} {second}"
        endings = row["endings"]
        if isinstance(endings, Sequence) and not isinstance(endings, str):
            endings = [_hellaswag(e) if isinstance(e, str) else e for e in endings]
        return _choices(_hellaswag(context), endings, row["label"], "endings", "label", where)
    raise DataError(f"{where} has the keys {sorted(map(str, row))}; expected one of the shapes {_SHAPES}")


def _text(row: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DataError(f"{where}: {key!r} is {value!r}; expected a {'' if empty else 'non-empty '}string")
    return value


def _single(context: str, continuation: str) -> Question:
    joined = context[-1].isspace() or continuation[0].isspace() or context.endswith("=")
    return Question(context, (continuation if joined else f" {continuation}",), (len(continuation),), 0)


def _choices(context: str, choices: Any, gold: Any, choices_key: str, gold_key: str, where: str) -> Question:
    good = isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 1
    if not good or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: {choices_key!r} is {choices!r}; expected a list of two or more non-empty strings")
    number = int(gold) if isinstance(gold, str) and gold.isdecimal() else gold
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
        raise DataError(f"{where}: {gold_key!r} is {gold!r}; expected a position from 0 to {len(choices) - 1}")
    return Question(context, tuple(f" {c}" for c in choices), tuple(len(c) for c in choices), number)


def _hellaswag(text: str) -> str:
    """``preprocess`` of the harness's HellaSwag: brackets are left over from WikiHow."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
