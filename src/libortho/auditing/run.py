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
from libortho.auditing.plan import Plan, State, Store
from libortho.auditing.report import AuditReport
from libortho.auditing.schema import SCHEMA
from libortho.auditing.subjects import subjects_of
from libortho.auditing.verdicts import verdicts
from libortho.core.models import plain_torch, unwrapped
from libortho.core.progress import Progress
from libortho.core.version import __version__
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
    state = State()
    flags = [(m, m.training) for s in subjects for m in s.model.modules()]
    try:
        for subject in subjects:
            subject.model.eval()
        settings = f"{SCHEMA} {__version__} {config.to_dict()} {inputs.digest()}"
        steps = Plan(subjects, inputs, config, state, Store(resume, settings)).steps
        total = sum(s.cost for s in steps)
        done = 0.0
        for step in steps:
            began = time.monotonic()
            step.run()
            done += step.cost
            state.seconds[step.name] = state.seconds.get(step.name, 0.0) + time.monotonic() - began
            if progress is not None:
                progress("audit", int(done), int(total))
    finally:
        for module, flag in flags:
            module.training = flag
    data = report_data(model, subjects, inputs, config, state, name)
    found = verdicts(data)
    data["verdicts"] = [
        {"key": v.key, "status": v.status, "text": v.text, "checks": [vars(c) for c in v.checks]} for v in found
    ]
    return AuditReport(data, found, state.seconds)
