"""Is the rest unharmed: perplexity, agreement with the original model, and accuracy on task files.

    perplexity          exp( sum NLL / tokens ) over general text
    agreement           KL(original || subject) in nats per token, and how often both have the same most likely token
    exact match         every token of the continuation is the most likely one after the context (LAMBADA, arithmetic)
    acc_norm            argmax over choices of log p(choice | query) / characters(choice) is the right one
    acc                 the same without the division

Contexts and continuations are joined and scored as EleutherAI's lm-evaluation-harness does (``lm_eval.api.model``,
``_encode_pair``; ``lm_eval.api.task``, ``process_results``), whose ``acc`` and ``acc_norm`` these are. All subjects are
asked the same rows, and each row's result is kept, so that differences between subjects are paired.

General text is joined and cut into consecutive windows without overlap; nothing predicts the first token of a window,
which is not judged. A perplexity of this protocol compares with others of the same window length only.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libortho.core.errors import DataError, LibOrthoError, TargetError
from libortho.core.layer import OrthoLinear
from libortho.isolation.retain import chunk
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import PASS_TOKENS, by_tokens, shared_prefix_nll, token_statistics
from libortho.text.corpus import evaluation_text
from libortho.text.records import IGNORE, Encoded, collate
from libortho.text.tokens import text_ids

_ROWS = 256
"""Rows of logits held in fp32 at a time."""
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


# ---- tasks ----


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
        log_p = -means * torch.tensor([len(_judged(e)) for e in choices])
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


# ---- general text ----


def general_items(tokenizer: Any, text: str | Path | None, sequences: int = 24, tokens: int = 256) -> list[Encoded]:
    """Windows of general text, evenly spaced among all consecutive windows of it.

    Args:
        tokenizer: The model's.
        text: A file of running text (WikiText's raw test split, for example); by default the paragraphs that ship with
            the package and that ``isolate`` never sees.
        sequences: At most so many windows.
        tokens: Length of a window; the last may be shorter.

    Raises:
        DataError: if the file is missing, is not text or holds no window, or a size is too small.
    """
    if sequences < 1 or tokens < 2:
        raise DataError(f"{sequences} windows of {tokens} tokens were asked for; expected at least 1 of at least 2")
    if text is None:
        texts = list(evaluation_text())
    else:
        try:
            texts = [Path(text).read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError as error:
            raise DataError(f"general text: {text} is not UTF-8 text ({error})") from error
        except OSError as error:
            raise DataError(f"general text: {text} cannot be read ({error.strerror})") from error
    pieces = chunk(texts, tokenizer, tokens)
    if not pieces:
        raise DataError(f"general text: {text} holds no window of tokens; expected at least a sentence")
    step = max(1, len(pieces) // sequences)
    return [Encoded(tuple(p), tuple(p)) for p in pieces[::step][:sequences]]


@torch.no_grad()
def reference_states(lm: LanguageModel, items: Sequence[Encoded]) -> list[Tensor]:
    """Hidden states from which the judged tokens are predicted: for each item (tokens, width), on the CPU.

    A row of them is some hundred times smaller than the logits that ``agreement`` needs of the original model.
    """
    found: dict[int, Tensor] = {}
    for rows in by_tokens(items, PASS_TOKENS):
        batch = collate([items[i] for i in rows]).to(lm.device)
        judged = batch.labels[:, 1:] != IGNORE
        states = lm.hidden(batch)[:, :-1][judged].cpu()
        found.update(zip(rows, states.split(judged.sum(1).tolist()), strict=True))
    return [found[i] for i in range(len(items))]


@torch.no_grad()
def sequence_nll(
    lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each item in nats, (items,) float64, and its judged tokens, (items,).

    Perplexity is ``exp(nll.sum() / tokens.sum())``; items resampled with replacement give its interval.

    Args:
        lm: The model.
        items: Windows of text.
        states: The model's own ``reference_states``, where they are at hand.

    Raises:
        DataError: if there is no token to judge.
    """
    labels, tokens = _labels(items)
    rows = torch.cat(reference_states(lm, items) if states is None else list(states))
    log_p = [
        _of(lm.logits(h.to(lm.device)).log_softmax(-1), y)
        for h, y in zip(rows.split(_ROWS), labels.split(_ROWS), strict=True)
    ]
    return _summed(log_p, tokens), tokens


@dataclass(frozen=True)
class Agreement:
    """How one model's predictions differ from the original's, on each judged token.

    Attributes:
        kl: KL(original || subject), (tokens,) in nats, float64.
        same: Both have the same most likely token, (tokens,) bool.
        nll: The subject's summed negative log-likelihood of each item in nats, (items,), as ``sequence_nll`` gives it.
        tokens: Judged tokens of each item, (items,), to split ``kl`` and ``same`` by.
    """

    kl: Tensor
    same: Tensor
    nll: Tensor
    tokens: Tensor

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return float(self.kl.mean())

    @property
    def top1(self) -> float:
        """Share of tokens on which both agree."""
        return float(self.same.double().mean())


@torch.no_grad()
def agreement(
    lm: LanguageModel,
    items: Sequence[Encoded],
    states: Sequence[Tensor],
    reference: LanguageModel,
    own: Sequence[Tensor] | None = None,
) -> Agreement:
    """Compare a model with the original on the same text; the divergence is the mean of sum_v p(v) log(p(v) / q(v)).

    Args:
        lm: The subject, q, in the context of its alpha.
        items: Windows of text.
        states: ``reference_states`` of the original, p, on the same items.
        reference: The original. Only its head runs, and under the subject's alpha if they share it.
        own: The subject's ``reference_states``, where they are at hand.

    Raises:
        DataError: if ``states`` are not those of ``items``, or there is no token to judge.
        TargetError: if the original's head has an alpha of its own, which nobody knows here.
    """
    if isinstance(reference.head, OrthoLinear):
        raise TargetError("the original's output head is itself split; expected a dense model to compare with")
    labels, tokens = _labels(items)
    mine = reference_states(lm, items) if own is None else own
    if [len(h) for h in states] != tokens.tolist():
        raise DataError("the reference's hidden states are of other texts; expected reference_states of the same items")
    kl, same, own_log_p = [], [], []
    for p, q, y in zip(*(t.split(_ROWS) for t in (torch.cat([*states]), torch.cat([*mine]), labels)), strict=True):
        log_p = reference.logits(p.to(reference.device)).log_softmax(-1)
        log_q = lm.logits(q.to(lm.device)).log_softmax(-1).to(log_p.device)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())
        own_log_p.append(_of(log_q, y))
    return Agreement(torch.cat(kl), torch.cat(same), _summed(own_log_p, tokens), tokens)


def _labels(items: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Judged tokens of all items, and how many each has."""
    labels = [_judged(e) for e in items]
    if not any(labels):
        raise DataError("the text holds no token that can be judged; expected at least two tokens")
    return torch.tensor([y for own in labels for y in own]), torch.tensor([len(own) for own in labels])


def _of(log_p: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, (tokens,), on the CPU."""
    return log_p.gather(-1, labels.to(log_p.device).unsqueeze(-1))[:, 0].cpu()


def _summed(log_p: Sequence[Tensor], tokens: Tensor) -> Tensor:
    return torch.stack([-part.double().sum() for part in torch.cat(list(log_p)).split(tokens.tolist())])


def _judged(item: Encoded) -> list[int]:
    """Labels that something predicts."""
    return [y for y in item.labels[1:] if y != IGNORE]


# ---- the harness itself ----


def harness() -> Any:
    """The module ``lm_eval``, with what it needs for models of transformers.

    Raises:
        LibOrthoError: if it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise LibOrthoError(
            f"the lm-evaluation-harness cannot be imported ({error}); install it with: pip install 'libortho[eval]'"
        ) from error
    return lm_eval


def harness_tasks(names: Sequence[Any], include_path: str | Path | None = None) -> list[Any]:
    """Read tasks of EleutherAI's lm-evaluation-harness and their data, once for any number of models.

    Naming one of the harness's own tasks makes it read its whole index, which takes half a minute; a name that is
    found under ``include_path`` does not.

    Args:
        names: Names of tasks, groups or tags ("arc_easy"), task configurations as dicts, or tasks read before.
        include_path: Directory with task configurations in YAML, read besides the harness's own.

    Returns:
        The harness's tasks and groups, in the order of the names.

    Raises:
        LibOrthoError: if the harness is not installed, does not know a task, or cannot read its configuration or data.
    """
    lm_eval = harness()
    if include_path is not None and not Path(include_path).is_dir():
        raise LibOrthoError(f"{include_path} is not a directory; expected one with task configurations in YAML")
    asked = [n for n in names if isinstance(n, str)]
    manager = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=False)
    if any(n not in manager.all_tasks for n in asked):
        manager = lm_eval.tasks.TaskManager(include_path=include_path)
    unknown = [n for n in asked if n not in manager.all_tasks]
    if unknown:
        raise LibOrthoError(f"the lm-evaluation-harness has no task {unknown[0]!r}; 'lm_eval ls tasks' lists its tasks")
    found: list[Any] = []
    for name in names:
        if isinstance(name, lm_eval.api.task.Task | lm_eval.api.group.Group):
            found.append(name)
            continue
        try:
            loaded = manager.load([dict(name) if isinstance(name, Mapping) else name])
        except Exception as error:  # the configuration's code, its data set and the network may raise anything
            shown = name if isinstance(name, str) else name.get("task")
            raise LibOrthoError(
                f"the lm-evaluation-harness cannot load the task {shown!r} ({type(error).__name__}: {error}); its data "
                "come from the hub unless its configuration names local files"
            ) from error
        group = loaded["groups"].get(name) if isinstance(name, str) else None
        found += list(loaded["tasks"].values()) if group is None else [group]
    return found


def lm_eval_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[Any],
    limit: int | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    bootstrap: int = 0,
) -> dict[str, dict[str, float]]:
    """Run tasks of EleutherAI's lm-evaluation-harness; most of them download their data.

    Probabilities are computed in fp32 (the harness's default rounds those of a bf16 model to bf16, and choices tie).

    Args:
        model: A causal LM, in the context of its alpha.
        tokenizer: Its tokenizer.
        names: What :func:`harness_tasks` takes or gives.
        limit: At most so many rows of each task, the first ones.
        batch_size: Rows of one forward pass.
        seed: Of the choice of few-shot examples.
        bootstrap: Resamples for standard errors that have no formula; at 0 there are no standard errors at all.

    Returns:
        The harness's figures by task and metric, standard errors as "<metric>_stderr".

    Raises:
        LibOrthoError: as :func:`harness_tasks`.
    """
    tasks = harness_tasks(names)
    lm_eval = harness()
    wrapped = lm_eval.models.huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32
    )
    with contextlib.redirect_stdout(sys.stderr):  # where the harness prints what it is about to do
        output = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=tasks,
            limit=limit,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            bootstrap_iters=bootstrap,
            log_samples=False,
            random_seed=None,  # the harness would seed the process's global generators
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=seed,
        )
    return {
        task: {k.partition(",")[0]: float(v) for k, v in figures.items() if "," in k and isinstance(v, int | float)}
        for task, figures in output["results"].items()
    }
