"""Tasks of the LM evaluation harness (the extra ``eval``)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from libortho.core.errors import LibOrthoError


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
