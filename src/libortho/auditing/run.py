"""``audit``: run every measurement on every subject, and draw the conclusions.

memory, privacy, utility      all subjects, on the same records (controls on fewer of them)
alpha curve                   the same figures over a grid of alpha
attacks, depth                profile "full"
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from libortho.auditing.assemble import report_data
from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import load_inputs
from libortho.auditing.plan import Plan
from libortho.auditing.report import AuditReport
from libortho.auditing.schema import SCHEMA
from libortho.auditing.subjects import subjects_of
from libortho.auditing.verdicts import verdicts
from libortho.core.models import plain_torch, unwrapped
from libortho.core.progress import Progress
from libortho.core.run_cache import RunCache, run_key
from libortho.lm.checks import check_causal, check_tokens
from libortho.lm.generation import token_limit
from libortho.text.records import Source


@plain_torch()
def run(
    model: nn.Module,
    tokenizer: Any,
    forget: Source,
    retain: Source | None,
    holdout: Source | None,
    *,
    reference: nn.Module | None,
    original: nn.Module | None,
    others: Mapping[str, nn.Module],
    associations: Source | None,
    question_sets: Mapping[str, Source] | None,
    general: str | Path | None,
    tasks: Sequence[str | Path],
    name: str | None,
    config: AuditConfig,
    resume: Path | None,
    progress: Progress | None,
) -> AuditReport:
    """The work behind :func:`libortho.audit`, whose arguments these are."""
    model = unwrapped(model)
    reference, original = (m if m is None else unwrapped(m) for m in (reference, original))
    others = {n: unwrapped(m) for n, m in others.items()}
    models = [m for m in (model, original, reference, *others.values()) if m is not None]
    for each in models:
        check_causal(each)
    inputs = load_inputs(
        tokenizer,
        forget,
        retain=retain,
        holdout=holdout,
        associations=associations,
        question_sets=question_sets,
        general=None if general is None else Path(general),
        tasks=tasks,
        limit=token_limit(model, config.max_length),
        config=config,
    )
    for each in models:
        check_tokens(each, tokenizer, inputs.texts())
    subjects = subjects_of(model, original=original, reference=reference, others=others, seed=config.seed)
    flags = [(m, m.training) for s in subjects for m in s.model.modules()]
    try:
        for subject in subjects:
            subject.model.eval()
        plan = Plan(subjects, inputs, config, _cache(resume, run_key(SCHEMA, config.to_dict(), inputs.digest())))
        seconds = plan.found.seconds
        total = sum(s.cost for s in plan.steps)
        done = 0.0
        for step in plan.steps:
            began = time.monotonic()
            step.run()
            done += step.cost
            seconds[step.name] = seconds.get(step.name, 0.0) + time.monotonic() - began
            if progress is not None:
                progress("audit", int(done), int(total))
    finally:
        for module, flag in flags:
            module.training = flag
    data = report_data(model, subjects, inputs, config, plan.found, name)
    found = verdicts(data)
    data["verdicts"] = [v.to_dict() for v in found]
    return AuditReport(data, found, plan.found.seconds)


def _cache(resume: Path | None, key: str) -> RunCache:
    """What is kept of this audit: a folder for it within ``resume``, which may serve several."""
    if resume is None:
        return RunCache()
    resume.mkdir(parents=True, exist_ok=True, mode=0o700)
    return RunCache(resume / key[:32], key)
