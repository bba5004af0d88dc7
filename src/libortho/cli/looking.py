"""Commands that look at a model: audit, eval, generate, inspect."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from libortho.auditing.config import AuditConfig
from libortho.cli import tables
from libortho.cli.options import Device, Dtype, Json, Seed, device_of, dtype_of
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, progress_bars, say
from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.escapes import visible
from libortho.core.switch.alpha import AlphaSpec, alpha, get_switch


def audit(
    model: Annotated[str, typer.Argument(help="Checkpoint made by isolate or split, or any hub id or path.")],
    forget: Annotated[Path, typer.Option(help="Records that must be gone: JSONL, JSON or txt.")],
    holdout: Annotated[
        Path | None, typer.Option(help="Records of the same kind, never trained on; without them no privacy verdict.")
    ] = None,
    retain: Annotated[Path | None, typer.Option(help="Records that must still be known.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Hub id or path of the model that was never trained on the forget set.")
    ] = None,
    original: Annotated[str | None, typer.Option(help="Hub id or path of the dense model before isolation.")] = None,
    associations: Annotated[Path | None, typer.Option(help="Inverted and one-hop questions about the secrets.")] = None,
    general: Annotated[Path | None, typer.Option(help="Text for perplexity; by default text of the package.")] = None,
    task: Annotated[list[Path] | None, typer.Option(help="JSONL task that measures ability. Repeatable.")] = None,
    profile: Annotated[str, typer.Option(help="quick, or full with attacks and depth score.")] = "quick",
    samples: Annotated[int, typer.Option(help="Samples for each record.")] = AuditConfig.samples,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Do not mask the secrets in the report.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Keep finished parts in this folder, and take up from it. It holds secrets.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Is it really gone, and is the rest unharmed? Exit code 3 if a verdict is "fail"."""
    from libortho.auditing.audit import audit as audit_model
    from libortho.checkpoint import is_checkpoint, load
    from libortho.checkpoint.dense import load_model, refuse_checkpoint
    from libortho.core.extras import require
    from libortho.core.files import check_report, check_resume

    require("audit", "audit")
    config = AuditConfig(profile=profile, samples=samples, seed=seed, reveal=reveal)  # type: ignore[arg-type]
    where, kind = device_of(device), dtype_of(dtype)
    check_report(out, "--out")
    check_report(html, "--html")
    if out is not None and html is not None and out.resolve() == html.resolve():
        raise ConfigError(f"--out and --html are both {out}; expected two files")
    check_resume(resume, "--resume")
    for option, path in (("--reference", reference), ("--original", original)):
        if path is not None:
            refuse_checkpoint(path, option)
    net: Any
    if is_checkpoint(model):
        net, tokenizer = load(model, device=where)
    else:
        net, tokenizer = load_model(model, kind, where)
    beside = {n: None if m is None else load_model(m, kind, where)[0] for n, m in
              (("reference", reference), ("original", original))}  # fmt: skip
    with progress_bars() as tell:
        report = audit_model(
            net, tokenizer, forget, retain, holdout, **beside, associations=associations, general=general,
            tasks=task or (), name=Path(model).name, config=config, resume=resume, progress=tell,
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
    model: Annotated[str, typer.Argument(help="Checkpoint made by split or isolate, or any hub id or path.")],
    alphas: Annotated[
        list[str] | None,
        typer.Option(
            "--alpha",
            help="A number, or NAME=NUMBER;... (others off); a column each; repeat. Default: as loaded.",
        ),
    ] = None,
    original: Annotated[str | None, typer.Option(help="Hub id or path of a dense model, as one more column.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names for the lm-evaluation-harness, with commas; the data come from the hub.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of the harness's task files (YAML).")] = None,
    task_file: Annotated[list[Path] | None, typer.Option(help="JSONL task, scored offline. Repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one of the harness's forward passes.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """What the model can do under each alpha, side by side: JSONL tasks, and tasks of the lm-evaluation-harness."""
    from libortho.checkpoint import is_checkpoint, load
    from libortho.checkpoint.dense import load_model, refuse_checkpoint
    from libortho.core.files import check_report, write_atomically
    from libortho.evaluation.evaluate import Column, evaluate_columns, parse_alpha
    from libortho.evaluation.harness import harness_tasks
    from libortho.evaluation.tasks import load_task

    where, kind = device_of(device), dtype_of(dtype)
    if not task_file and not tasks:
        raise ConfigError("there is nothing to evaluate; give --task-file FILE.jsonl, or --tasks with names")
    split_model = is_checkpoint(model)
    if alphas and not split_model:
        raise ConfigError(f"--alpha is given, but {model} is not a checkpoint of libortho; leave --alpha out")
    check_report(out, "--out")
    if original is not None:
        refuse_checkpoint(original, "--original")
    specs = {f"alpha {text}": parse_alpha(text) for text in alphas or ()}
    files = [load_task(path) for path in task_file or ()]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is handed to it
    named = harness_tasks([t.strip() for t in tasks.split(",") if t.strip()], include_path) if tasks else []
    if split_model:
        net, tokenizer = load(model, device=where, dtype=kind if isinstance(kind, torch.dtype) else None)
        if tokenizer is None:
            raise CheckpointError(f"{model} holds no tokenizer; save the model together with its own")
        if not specs:
            standing = _standing(net)
            specs = {f"alpha {_short(standing)}": standing or 0.0}
        columns = [Column(label, net, tokenizer, spec) for label, spec in specs.items()]
    else:
        columns = [Column("model", *load_model(model, kind, where))]
    if original is not None:
        columns.append(Column("original", *load_model(original, kind, where)))
    with progress_bars() as tell:
        report = evaluate_columns(columns, files, named, limit=limit, batch_size=batch_size, seed=seed, progress=tell)
    data = {"model": model, "original": original, "limit": limit, "seed": seed, **report.to_dict()}
    if out is not None:
        write_atomically(out, json.dumps(data, indent=1, allow_nan=False))
    if as_json:
        emit(data)
    else:
        tables.show_evaluation(report, Terminal())


def generate(
    directory: Annotated[Path, typer.Argument(help="Checkpoint made by split or isolate.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    value: Annotated[
        float | None, typer.Option("--alpha", help="Alpha of every stream; as loaded if nothing is given.")
    ] = None,
    stream: Annotated[
        list[str] | None, typer.Option("--stream", help="NAME=ALPHA; streams not named are off. Repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to the prompt.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Continue a prompt under a chosen alpha, as a stream of text.

    Without --alpha and --stream each stream stands as its manifest says (0 after isolate); standard error tells which.
    """
    from transformers import TextStreamer

    class Visible(TextStreamer):
        """Writes what the model says with its control characters shown."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end)

    from libortho.checkpoint import load
    from libortho.lm.checks import check_tokens
    from libortho.lm.generation import generate as continue_prompts
    from libortho.text.chat import has_template, question
    from libortho.text.tokens import text_ids

    spec = _alpha_spec(value, stream)
    net: Any
    net, tokenizer = load(directory, device=device_of(device))
    if chat and not has_template(tokenizer):
        raise ConfigError("--chat needs a tokenizer with a chat template; leave it out")
    ids = text_ids(question(prompt, tokenizer, "--chat") if chat else prompt, tokenizer, rendered=chat)
    if not ids:
        raise ConfigError("the prompt is empty; give at least one token to continue")
    check_tokens(net, tokenizer, [("the prompt", ids)])
    streamer = Visible(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if spec is None:
        standing = _standing(net)
        say(f"alpha: {_told(standing)}")
        spec = standing or 0.0
    with alpha(net, spec):
        continue_prompts(net, tokenizer, [ids], max_new_tokens, temperature=temperature, seed=seed, streamer=streamer)


def inspect(
    directory: Annotated[Path, typer.Argument(help="Checkpoint made by split or isolate.")], as_json: Json = False
) -> None:
    """What a checkpoint holds: sizes, bits per weight, streams, and whether each belongs to the base beside it."""
    from libortho.checkpoint import inspect as inspect_checkpoint

    info = inspect_checkpoint(directory)
    if as_json:
        emit(info.to_dict())
    else:
        tables.show_checkpoint(info, Terminal())


def _alpha_spec(value: float | None, streams: list[str] | None) -> AlphaSpec | None:
    """What the options ask for; None if they ask for nothing."""
    if not streams:
        return value
    if value is not None:
        raise ConfigError("give --alpha (all streams) or --stream NAME=ALPHA, not both")
    spec: dict[str, float] = {}
    for item in streams:
        name, sign, number = item.partition("=")
        try:
            spec[name] = float(number) if sign else 1.0
        except ValueError as error:
            raise ConfigError(f"--stream is {item!r}; expected NAME=ALPHA, for example hr=1") from error
    return spec


def _standing(net: Any) -> dict[str, float]:
    """The alpha at which each stream was loaded; empty for a base alone."""
    return {n: v for n, v in get_switch(net).current().values.items() if isinstance(v, float)}


def _short(standing: Mapping[str, float]) -> str:
    """As --alpha is written: one number if it holds for all, else one for each stream."""
    values = set(standing.values()) or {0.0}
    return f"{values.pop():g}" if len(values) == 1 else ";".join(f"{n}={v:g}" for n, v in standing.items())


def _told(standing: Mapping[str, float]) -> str:
    if not standing:
        return "0 (there is no stream beside this base)"
    values = ", ".join(f"{n}={v:g}" for n, v in standing.items())
    if all(standing.values()):
        return f"{values} (as loaded)"
    return f"{values} (as loaded; --alpha 1 turns {'it' if len(standing) == 1 else 'all'} on)"
