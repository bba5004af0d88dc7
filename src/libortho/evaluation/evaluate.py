"""How able is a model under each alpha: figures of tasks side by side, and what changed, row by row.

    JSONL files     scored here, offline (:mod:`libortho.evaluation.tasks`); the same rows for every column, so that the
                    difference between two columns is paired: mean over rows of x_column - x_first
    task names      scored by EleutherAI's lm-evaluation-harness (extra ``eval``), with its own standard errors

A share of right answers has Wilson's interval. The difference of two has that of Agresti and Min, "Simple improved
confidence intervals for comparing matched proportions", Statistics in Medicine 24 (2005): with b rows won, c rows lost,
and half a row added to each of the four cells of the table,

    d = (b - c) / (n + 2)        interval  d +- 1.96 sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2)

which has a width even where no answer changed. Surprise (nats per token) has the bootstrap's interval, by row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from libortho.core.errors import ConfigError
from libortho.core.progress import Progress, tell
from libortho.core.switch.alpha import alpha
from libortho.evaluation.harness import lm_eval_tasks
from libortho.evaluation.intervals import Estimate, paired_difference, proportion, ratio_estimate
from libortho.evaluation.tasks import Task, TaskResult, evaluate
from libortho.lm.model import LanguageModel

_BOOTSTRAP = 1000
"""Resamples behind the harness's standard errors that have no formula."""


@dataclass(frozen=True)
class Column:
    """One model under one setting.

    Attributes:
        label: What readers see, such as "alpha 0".
        model: A causal LM.
        tokenizer: Its tokenizer.
        alpha: A number or a mapping as :func:`libortho.alpha` takes them; None for an ordinary model.
    """

    label: str
    model: Any
    tokenizer: Any
    alpha: float | Mapping[str, float] | None = None

    def enter(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model is this column."""
        return contextlib.nullcontext() if self.alpha is None else alpha(self.model, self.alpha)


@dataclass(frozen=True)
class Figure:
    """One number of the table.

    Attributes:
        task: Name of the task.
        metric: "acc", "acc_norm", "exact_match" (shares), "nll" (nats per token), or what the harness calls it.
        column: Label of the column.
        value: The figure.
        stderr: The harness's standard error, where it has one.
        low: Lower end of the 95 % interval of a JSONL task.
        high: Upper end.
        rows: Rows of a JSONL task that were asked.
    """

    task: str
    metric: str
    column: str
    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Difference:
    """What one column has more than the first, paired by row.

    Attributes:
        task: Name of the JSONL task.
        metric: As in :class:`Figure`.
        column: Label of the column.
        versus: Label of the first column.
        value: Mean over the rows of the column's minus the first column's.
        low: Lower end of the 95 % interval, None where a single row gives none.
        high: Upper end.
        rows: Rows that both were asked.
    """

    task: str
    metric: str
    column: str
    versus: str
    value: float
    low: float | None
    high: float | None
    rows: int


@dataclass(frozen=True)
class Evaluation:
    """All figures of one run.

    Attributes:
        columns: Labels, in the order of the run.
        figures: By task, metric and column.
        differences: Of the JSONL tasks; empty with one column.
    """

    columns: tuple[str, ...]
    figures: tuple[Figure, ...]
    differences: tuple[Difference, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite becomes None."""
        return {
            "columns": list(self.columns),
            "figures": [_jsonable(f) for f in self.figures],
            "differences": [_jsonable(d) for d in self.differences],
        }


def evaluate_columns(
    columns: Sequence[Column],
    tasks: Sequence[Task] = (),
    harness_tasks: Sequence[Any] = (),
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Ask every column every task.

    Args:
        columns: Models under their settings; differences are taken from the first.
        tasks: JSONL tasks, as ``libortho.evaluation.tasks.load_task`` reads them.
        harness_tasks: As ``libortho.evaluation.harness.harness_tasks`` reads them.
        limit: At most so many rows of each task: drawn by the seed from a JSONL task, the first ones of the harness's.
        batch_size: Rows of one of the harness's forward passes.
        seed: Of the rows, of the bootstrap, and of the harness's few-shot examples.
        progress: Told the phase, what is done and the total.

    Raises:
        AlphaError: if a column's alpha is out of range or names an unknown stream; before anything runs.
        ConfigError: if there is nothing to run, two columns or tasks share a name, or a number is below 1.
        DataError: if a row cannot be scored.
    """
    _check(columns, tasks, harness_tasks, limit, batch_size)
    for column in columns:
        with column.enter():
            pass
    total = len(columns) * (len(tasks) + bool(harness_tasks))
    done = 0
    results: dict[tuple[str, str], TaskResult] = {}
    theirs: dict[str, dict[str, dict[str, float]]] = {}
    for column in columns:
        with column.enter():
            lm = LanguageModel(column.model)
            for task in tasks:
                tell(progress, "evaluate", done, total)
                results[task.name, column.label] = evaluate(lm, column.tokenizer, task, limit, seed)
                done += 1
            if harness_tasks:
                tell(progress, "evaluate", done, total)
                theirs[column.label] = lm_eval_tasks(
                    column.model, column.tokenizer, harness_tasks, limit,
                    batch_size=batch_size, seed=seed, bootstrap=_BOOTSTRAP,
                )  # fmt: skip
                done += 1
    tell(progress, "evaluate", done, total)
    figures: list[Figure] = []
    differences: list[Difference] = []
    for task in tasks:
        measured = {c.label: _metrics(results[task.name, c.label]) for c in columns}
        first = columns[0].label
        for metric, values in measured[first].items():
            for label, own in measured.items():
                e = _estimate(metric, own[metric], seed)
                figures.append(Figure(task.name, metric, label, e.value, None, e.low, e.high, e.n))
                if label != first:
                    d = paired_difference(own[metric], values, seed=seed)
                    differences.append(Difference(task.name, metric, label, first, d.value, d.low, d.high, d.n))
    return Evaluation(tuple(c.label for c in columns), (*figures, *_harness_figures(theirs)), tuple(differences))


def _metrics(result: TaskResult) -> dict[str, Sequence[float]]:
    """What a JSONL task measures on each row."""
    plain = {} if result.unnormalised is None else {"acc": result.unnormalised}
    return {result.metric: result.correct, **plain, "nll": result.nll}


def _estimate(metric: str, values: Sequence[float], seed: int) -> Estimate:
    if metric == "nll":
        return ratio_estimate(values, [1.0] * len(values), seed=seed)
    return proportion(int(sum(values)), len(values))


def _harness_figures(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Figure]:
    figures: dict[tuple[str, str], list[Figure]] = {}
    for label, tasks in found.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr"):
                    own = Figure(task, metric, label, value, metrics.get(f"{metric}_stderr"))
                    figures.setdefault((task, metric), []).append(own)
    return [f for row in figures.values() for f in row]


def _check(
    columns: Sequence[Column],
    tasks: Sequence[Task],
    harness_tasks: Sequence[Any],
    limit: int | None,
    batch_size: int,
) -> None:
    if not columns or not (tasks or harness_tasks):
        raise ConfigError("there is nothing to evaluate; expected at least one model and one task")
    for what, names in (("columns", [c.label for c in columns]), ("task files", [t.name for t in tasks])):
        double = [n for n in names if names.count(n) > 1]
        if double:
            raise ConfigError(f"two {what} are named {double[0]!r}; expected each once")
    for what, number in (("limit", limit), ("batch size", batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"the {what} is {number}; expected at least 1")


def _jsonable(item: Figure | Difference) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(item).items()}
