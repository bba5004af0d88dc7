"""``audit``: is it really gone, and is the rest unharmed.

The work is in :mod:`libortho.auditing.run`, which needs the extra ``audit`` (scipy, rapidfuzz, rouge-score).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from libortho.auditing.config import AuditConfig
from libortho.auditing.report import AuditReport
from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.extras import require
from libortho.core.progress import Progress
from libortho.text.records import Source


def audit(
    model: nn.Module,
    tokenizer: Any,
    forget: Source,
    retain: Source | None = None,
    holdout: Source | None = None,
    *,
    reference: nn.Module | None = None,
    original: nn.Module | None = None,
    others: Mapping[str, nn.Module] | None = None,
    associations: Source | None = None,
    question_sets: Mapping[str, Source] | None = None,
    general: str | Path | None = None,
    tasks: Sequence[str | Path] = (),
    name: str | None = None,
    config: AuditConfig | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Measure whether the forget set is gone at alpha = 0 and whether the rest is unharmed. Changes nothing.

    Args:
        model: A split model, or any transformers causal LM, which is then audited as it is.
        tokenizer: Its tokenizer.
        forget: The records that must be gone. Rows with ``perturbed_answer`` (TOFU) get truth ratios as well.
        retain: Records that must still be known.
        holdout: Records of the same kind that were never trained on. Without them there is no privacy verdict.
        reference: A model that was never trained on the forget set; the best yardstick there is.
        original: The dense model before isolation.
        others: Further models to stand beside, by label.
        associations: Questions that ask for the secrets the other way round or over one step.
        question_sets: "retain", "real_authors" and "world_facts" as TOFU's perturbed files: model utility.
        general: Text file for perplexity; by default the general text of the package that isolate never sees.
        tasks: JSONL files of tasks; see :mod:`libortho.evaluation.tasks`. Arithmetic is always measured.
        name: What the report calls the model.
        config: See :class:`~libortho.auditing.config.AuditConfig`.
        resume: Directory where finished parts are kept; a second audit of the same models with the same data and
            settings goes on from there. It holds generated text: keep it as safe as the models.
        progress: Called with (phase, done, total); total is a size of work, so that time can be estimated.

    Returns:
        Figures, controls beside them, and verdicts.

    Raises:
        DataError: if data is missing or malformed, or holdout and forget overlap; the message names the records.
        TargetError: if a model is no model in memory (a path), or not a causal LM.
        ConfigError: if there is no tokenizer.
        LibOrthoError: if the extra ``audit`` is not installed.
    """
    require("audit", "audit")
    given = {"model": model, "reference": reference, "original": original, **(others or {})}
    for key, subject in given.items():
        if subject is not None or key == "model":
            check_model(subject, key)
    check_tokenizer(tokenizer)
    from libortho.auditing.run import run

    return run(
        model,
        tokenizer,
        forget,
        retain,
        holdout,
        reference=reference,
        original=original,
        others=others or {},
        associations=associations,
        question_sets=question_sets,
        general=general,
        tasks=tasks,
        name=name,
        config=config or AuditConfig(),
        resume=None if resume is None else Path(resume),
        progress=progress,
    )
