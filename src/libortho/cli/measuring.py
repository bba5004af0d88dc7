"""Commands that measure a model: audit, eval."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from libortho.auditing.config import AuditConfig
from libortho.cli import tables
from libortho.cli.kept_runs import Keep, kept_run
from libortho.cli.options import (
    Alphas,
    AnyModel,
    Device,
    Dtype,
    Json,
    Resume,
    Seed,
    Settings,
    alphas_of,
    check_reports,
    device_of,
    dtype_of,
    field_option,
    open_model,
    size_of,
)
from libortho.cli.owners import HoldoutStreams, Streams, audit_streams
from libortho.cli.settings import configured
from libortho.cli.sources import AsChat, Blocks, Completion, Prompt, Reading, read_sources, say_running_text
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, progress_bars, say, say_verdict
from libortho.core.errors import ConfigError
from libortho.core.extras import require
from libortho.core.files import check_report, check_resume, write_atomically


def audit(
    model: AnyModel,
    forget: Annotated[
        Path | None, typer.Option(help="Records that must be gone: JSONL, JSON, CSV or txt; or give --streams.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option(help="Records of the same kind, never trained on; without them no privacy verdict.")
    ] = None,
    retain: Annotated[Path | None, typer.Option(help="Records that must still be known.")] = None,
    prompt: Prompt = None,
    completion: Completion = None,
    chat: AsChat = False,
    blocks: Blocks = False,
    reference: Annotated[
        str | None, typer.Option(help="Hub id or path of the model that was never trained on the forget set.")
    ] = None,
    original: Annotated[str | None, typer.Option(help="Hub id or path of the dense model before isolation.")] = None,
    associations: Annotated[Path | None, typer.Option(help="Inverted and one-hop questions about the secrets.")] = None,
    general: Annotated[Path | None, typer.Option(help="Text for perplexity; by default text of the package.")] = None,
    task: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="JSONL task that measures ability. Repeatable.")
    ] = None,
    streams: Streams = None,
    holdout_streams: HoldoutStreams = None,
    profile: Annotated[str | None, field_option(AuditConfig, "profile", metavar="quick|full")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    reveal: Annotated[bool | None, field_option(AuditConfig, "reveal")] = None,
    settings: Settings = None,
    resume: Resume = None,
    keep: Keep = True,
    seed: Annotated[int | None, field_option(AuditConfig, "seed")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure whether records are gone and the rest is unharmed.

    With --streams: what each subset of several owners' streams says. Exit code 3 if a verdict is "fail".
    """
    reading = Reading(prompt, completion, chat, blocks)
    if streams:
        audit_streams(
            model, streams, holdout_streams, reading, general=general, out=out, html=html, seed=seed or 0,
            device=device, dtype=dtype, as_json=as_json, others={
                "--forget": forget, "--holdout": holdout, "--retain": retain, "--reference": reference,
                "--original": original, "--associations": associations, "--task": task, "--profile": profile,
                "--reveal": reveal, "--set": settings, "--resume": resume,
            },
        )  # fmt: skip
        return
    if forget is None:
        raise ConfigError(
            "there is nothing to audit; give --forget FILE with the records that must be gone, or --streams NAME=FILE "
            "for each owner of a stream"
        )
    if holdout_streams:
        raise ConfigError("--holdout-streams is given without --streams; --holdout goes with --forget")
    from libortho.auditing.audit import audit as audit_model
    from libortho.checkpoint.dense import load_model, refuse_checkpoint

    require("audit", "audit")
    config = configured(AuditConfig, settings, profile=profile, reveal=reveal, seed=seed)
    check_reports(out, html)
    check_resume(resume, "--resume")
    kind, where = dtype_of(dtype), device_of(device)
    for option, path in (("--reference", reference), ("--original", original)):
        if path is not None:
            refuse_checkpoint(path, option)
    rows = read_sources(reading, forget=forget, retain=retain, holdout=holdout)
    say_running_text("general", general)
    net, tokenizer = open_model(model, kind, where)
    beside = {n: None if m is None else load_model(m, kind, where)[0] for n, m in
              (("reference", reference), ("original", original))}  # fmt: skip
    run = (model, rows, reference, original, associations, general, task, config, dtype, device)
    with kept_run("audit", resume, keep, size_of(net), *run) as kept, progress_bars() as progress:
        report = audit_model(
            net, tokenizer, rows["forget"], rows["retain"], rows["holdout"], **beside, associations=associations,
            general=general, tasks=task or (), name=Path(model).name, config=config, resume=kept, progress=progress,
            on_verdict=say_verdict,
        )  # fmt: skip
    if out is not None:
        report.to_json(out)
    if html is not None:
        report.to_html(html)
    if as_json:
        emit(report.to_dict())
    else:
        tables.show_audit(report, Terminal())
    if any(v.status == "fail" for v in report.verdicts):
        raise typer.Exit(3)


def evaluate(
    model: AnyModel,
    alphas: Alphas = None,
    original: Annotated[str | None, typer.Option(help="Hub id or path of a dense model, as one more column.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names for the lm-evaluation-harness, with commas; the data come from the hub.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of the harness's task files (YAML).")] = None,
    task_file: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="JSONL task, scored offline. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one of the harness's forward passes.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure tasks under each --alpha, side by side.

    Tasks are JSONL files, or names of the lm-evaluation-harness.
    """
    from libortho.checkpoint import is_checkpoint
    from libortho.checkpoint.dense import load_model, refuse_checkpoint
    from libortho.core.switch.alpha import current_alphas
    from libortho.evaluation.evaluate import Column, evaluate_columns
    from libortho.evaluation.harness import harness_tasks
    from libortho.evaluation.tasks import load_task

    if not task_file and not tasks:
        raise ConfigError("there is nothing to evaluate; give --task-file FILE.jsonl, or --tasks with names")
    check_report(out, "--out")
    kind, where = dtype_of(dtype), device_of(device)
    split_model = is_checkpoint(model)
    specs = {f"alpha {text}": spec for text, spec in alphas_of(alphas, model).items()}
    if original is not None:
        refuse_checkpoint(original, "--original")
    files = [load_task(path) for path in task_file or ()]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is handed to it
    if tasks:
        require("eval", "--tasks")
    if tasks and include_path is None:
        say("reading the lm-evaluation-harness's index of tasks, which takes half a minute")
    named = harness_tasks([t.strip() for t in tasks.split(",") if t.strip()], include_path) if tasks else []
    net, tokenizer = open_model(model, kind, where)
    if not split_model:
        columns = [Column("model", net, tokenizer)]
    else:
        if not specs:
            loaded = current_alphas(net)
            specs = {f"alpha {_short(loaded)}": loaded or 0.0}
        columns = [Column(label, net, tokenizer, spec) for label, spec in specs.items()]
    if original is not None:
        columns.append(Column("original", *load_model(original, kind, where)))
    with progress_bars() as progress:
        report = evaluate_columns(
            columns, files, named, limit=limit, batch_size=batch_size, seed=seed, progress=progress
        )
    data = {"model": model, "original": original, "limit": limit, "seed": seed, **report.to_dict()}
    if out is not None:
        write_atomically(out, json.dumps(data, indent=1, allow_nan=False))
    if as_json:
        emit(data)
    else:
        tables.show_evaluation(report, Terminal())


def _short(loaded: Mapping[str, float]) -> str:
    """The loaded alphas in the form of --alpha: one number if all are equal, else one for each stream."""
    values = set(loaded.values()) or {0.0}
    return f"{values.pop():g}" if len(values) == 1 else ",".join(f"{n}={v:g}" for n, v in loaded.items())
