"""``audit``: is it really gone, and is the rest unharmed.

    memory, privacy, utility      all subjects, on the same records (controls on fewer of them)
    alpha curve                   the same figures over a grid of alpha
    attacks, depth                profile "full"

It needs the extra ``audit`` (scipy, rapidfuzz, rouge-score).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from libortho.auditing.assemble import report_data, subject_rows, unigram_perplexity
from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import load_inputs
from libortho.auditing.plan import Plan, Stage
from libortho.auditing.report import AuditReport, Verdict
from libortho.auditing.schema import SCHEMA, SubjectData
from libortho.auditing.subjects import Subject, subjects_of
from libortho.auditing.verdicts import attacks, verdicts
from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.errors import ConfigError
from libortho.core.extras import require
from libortho.core.models import plain_torch, unwrapped
from libortho.core.progress import Progress, expected, in_words
from libortho.core.run_cache import RunCache, run_key
from libortho.lm.checks import check_causal, check_tokens
from libortho.lm.generation import token_limit
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
    on_verdict: Callable[[Verdict], None] | None = None,
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
        on_verdict: Called with each verdict as soon as its figures are there, which is long before the end.

    Returns:
        Figures, controls beside them, and verdicts.

    Raises:
        DataError: if data is missing or malformed, or holdout and forget overlap; the message names the records.
        TargetError: if a model is no model in memory (a path), or not a causal LM.
        ConfigError: if there is no tokenizer, or ``resume`` is a file.
        LibOrthoError: if the extra ``audit`` is not installed.
    """
    require("audit", "audit")
    others = others or {}
    given = {"model": model, "reference": reference, "original": original, **others}
    for key, subject in given.items():
        if subject is not None or key == "model":
            check_model(subject, key)
    check_tokenizer(tokenizer)
    config = config or AuditConfig()
    with plain_torch():
        model, others = unwrapped(model), {n: unwrapped(m) for n, m in others.items()}
        reference, original = (m if m is None else unwrapped(m) for m in (reference, original))
        models = [m for m in (model, original, reference, *others.values()) if m is not None]
        for each in models:
            check_causal(each)
        inputs = load_inputs(
            tokenizer, forget, retain=retain, holdout=holdout, associations=associations, question_sets=question_sets,
            general=None if general is None else Path(general), tasks=tasks,
            limit=token_limit(model, config.max_length), config=config,
        )  # fmt: skip
        for each in models:
            check_tokens(each, tokenizer, inputs.texts())
        subjects = subjects_of(
            model, original=original, reference=reference, others=others, seed=config.seed,
            other_columns=config.profile == "full",
        )  # fmt: skip
        cache = _cache(resume, run_key(SCHEMA, config.to_dict(), inputs.digest()))
        with _evaluating(subjects):
            plan = Plan(subjects, inputs, config, cache)
            told: list[str] = []
            rows: dict[str, SubjectData] = {}

            def tell_new(found: Iterable[Verdict]) -> None:
                for verdict in found:
                    if on_verdict is not None and verdict.key not in told:
                        told.append(verdict.key)
                        on_verdict(verdict)

            def reached(stage: Stage) -> None:
                if stage == "yardsticks" and on_verdict is not None:
                    rows.update(subject_rows(plan.yardsticks, inputs, config, plan.found))
                    tell_new(verdicts(list(rows.values()), unigram_perplexity(inputs)))
                elif stage == "attacks":
                    tell_new([attacks(plan.found.attacks or {})])

            if expected.isEnabledFor(logging.INFO):
                expected.info("the audit takes about %s on this machine", in_words(plan.expected_seconds()))
            plan.run(progress, reached)
        data = report_data(model, subjects, inputs, config, plan.found, name, rows)
    found = verdicts(data["subjects"], data["counts"]["unigram_perplexity"], data["attacks"], data["depth"])
    tell_new(found)
    data["verdicts"] = [v.to_dict() for v in found]
    return AuditReport(data, found, plan.found.seconds)


def _cache(resume: str | Path | None, key: str) -> RunCache:
    """What is kept of this audit: a folder of its own within ``resume``, which may serve several audits."""
    if resume is None:
        return RunCache()
    folder = Path(resume)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"resume is {str(folder)!r}, a file; expected a folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return RunCache(folder / key[:32], key)


@contextlib.contextmanager
def _evaluating(subjects: Sequence[Subject]) -> Iterator[None]:
    """All models in evaluation mode; afterwards each module is in the mode that it was in."""
    flags = [(m, m.training) for s in subjects for m in s.model.modules()]
    try:
        for subject in subjects:
            subject.model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag
