"""``libortho``: the same verbs on the command line. Everything that is printed is printed here."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from libortho import tables
from libortho.alpha import AlphaSpec, alpha
from libortho.config import DTYPES, AuditConfig, IsolateConfig, SplitConfig
from libortho.errors import CheckpointError, ConfigError, LibOrthoError

app = typer.Typer(
    help="Put what a language model memorised behind a switch.", no_args_is_help=True, pretty_exceptions_enable=False
)

Tell = Callable[[str, int, int], None]
Model = Annotated[str, typer.Argument(help="Hub id or path of a dense causal language model.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; an earlier checkpoint there is replaced.")]
Device = Annotated[str, typer.Option(help="Where to run, for example cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Targets = Annotated[
    list[str] | None, typer.Option("--target-modules", help="Suffix, re:<pattern>, mlp-out or all-linear; repeatable.")
]
Ratio = Annotated[float, typer.Option(help="Budget of the ortho stream as a fraction of the split weights.")]
Bits = Annotated[int, typer.Option(help="Integer width of the base: 8, 4, or 0 to keep it dense.")]
GroupSize = Annotated[int | None, typer.Option(help="Inputs per scale; -1 for one scale per output channel.")]
Checkpoint = Annotated[Path, typer.Argument(help="Directory that split, isolate or detach wrote.")]
PassphraseEnv = Annotated[
    str | None, typer.Option("--passphrase-env", help="Environment variable with the passphrase; else it is asked for.")
]
Stream = Annotated[str, typer.Option(help="Name of the ortho stream.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar per phase with the time it will still take, on standard error, so that standard output stays clean."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def tell(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)

        yield tell


def _dtype(name: str) -> torch.dtype | str:
    if name != "auto" and name not in DTYPES:
        raise ConfigError(f"--dtype is {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES.get(name, name)


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device is {name!r}; expected cpu, or a device that torch finds here ({reason})"
        ) from error
    return name


def _targets(names: list[str] | None) -> dict[str, Any]:
    return {} if not names else {"target_modules": names[0] if len(names) == 1 else tuple(names)}


def _check_saveable(net: Any, config: SplitConfig | IsolateConfig, out: Path) -> None:
    """Refuse now what ``save`` would refuse when all the work is done."""
    from libortho.checkpoint.checks import check_room, check_saveable
    from libortho.checkpoint.stream_files import check_rank
    from libortho.layer import ortho_layers
    from libortho.select.scores import column_count
    from libortho.split import linear_shape
    from libortho.targets import find_targets

    targets = find_targets(net, config.target_modules, again=True)
    check_room(out, check_saveable(net, targets | dict(ortho_layers(net)), config.bits))
    if isinstance(config, SplitConfig) and config.structure == "columns":  # isolate takes no more than can be saved
        for name, module in targets.items():
            check_rank(f"stream {config.stream!r} of {name}", column_count(config.ratio, linear_shape(module)[1]), 0)


def _emit(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Hub id or path of a Llama-family model.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 if this processor has it), bfloat16 or float32.")] = "auto",
    text: Annotated[Path | None, typer.Option(help="File of general text for the perplexity column.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the models and the records here, for audit and generate.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plant 17 secrets in a real model, split it both ways, and show which way forgets."""
    from libortho.demo.demo import run

    asked = _dtype(dtype)
    with _progress() as tell:
        report = run(
            model=model,
            seed=seed,
            device=_device(device),
            text=text,
            dtype=asked if isinstance(asked, torch.dtype) else None,
            out=out,
            tell=tell,
        )
    if as_json:
        _emit(report.to_dict())
    else:
        tables.show_demo(report, Console())
        if out is not None:
            tables.note(
                Console(), f"Audit it: libortho audit {out}/isolated --forget {out}/forget.jsonl "
                f"--holdout {out}/holdout.jsonl --reference {out}/never_trained --html audit.html",
            )  # fmt: skip


@app.command()
def split(
    model: Model,
    out: Out,
    target_modules: Targets = None,
    ratio: Ratio = 0.005,
    rank_ratio: Annotated[str, typer.Option(help="Share of the singular directions kept, or auto.")] = "0.95",
    low_rank: Annotated[bool, typer.Option("--low-rank/--no-low-rank", help="Truncate before quantising.")] = True,
    bits: Bits = 8,
    group_size: GroupSize = None,
    score: Annotated[str, typer.Option(help="absolute, relative or magnitude.")] = "absolute",
    structure: Annotated[str, typer.Option(help="unstructured or columns.")] = "unstructured",
    tail: Annotated[bool, typer.Option("--tail/--no-tail", help="Keep the discarded directions.")] = True,
    stream: Stream = "default",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Split a model by its weights alone: compression with a dial. It does not forget."""
    from libortho.checkpoint import check_destination, save
    from libortho.models import load_model, refuse_checkpoint
    from libortho.report import layer_report
    from libortho.split import split as split_model

    own: dict[str, Any] = dict(  # validated by the config itself
        ratio=ratio, rank_ratio=_share("--rank-ratio", rank_ratio), use_low_rank=low_rank, bits=_bits(bits),
        group_size=group_size, score=score, structure=structure, keep_tail=tail, stream=stream,
        **_targets(target_modules),
    )  # fmt: skip
    config = SplitConfig(**own)
    refuse_checkpoint(model)
    check_destination(out, [config.stream])
    net, tokenizer = load_model(model, _dtype(dtype), _device(device))
    _check_saveable(net, config, out)
    with _progress() as tell:
        split_model(net, config, progress=tell)
        tell("save", 0, 1)
        save(net, tokenizer, out)
    report = layer_report(net)
    if as_json:
        _emit({"out": str(out), **report.to_dict()})
    else:
        tables.show_layers(report, Console())
        tables.note(Console(), f"Saved to {out}. A weights-only split compresses; it claims no forgetting.")


@app.command()
def isolate(
    model: Annotated[
        str, typer.Argument(help="Hub id or path of a dense causal language model, or a checkpoint made by isolate.")
    ],
    forget: Annotated[Path, typer.Option(help="Records that must go: JSONL, JSON or txt.")],
    out: Out,
    retain: Annotated[Path | None, typer.Option(help="Text to keep; by default samples and shipped text.")] = None,
    target_modules: Targets = None,
    ratio: Annotated[
        str, typer.Option(help="Budget of the ortho stream as a fraction of the split weights, or auto.")
    ] = "0.005",
    bits: Bits = 8,
    group_size: GroupSize = None,
    structure: Annotated[str, typer.Option(help="columns or unstructured.")] = "columns",
    objective: Annotated[str, typer.Option(help="profile, log_odds, npo, simnpo, altpo or grad_diff.")] = "profile",
    max_steps: Annotated[int, typer.Option(help="Upper bound on optimiser steps.")] = IsolateConfig.max_steps,
    stream: Stream = "default",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Go on where the model knows none of the records.")
    ] = False,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other field of IsolateConfig, as in retain_weight=5; repeatable."
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Keep finished work in this folder, and take up from it. It holds secrets.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Put the records in a file behind the switch. Exit code 3 if a criterion is missed.

    A checkpoint is isolated further: give another --stream, and the bits and group size that it has.
    """
    from libortho.checkpoint import check_destination, is_checkpoint, load, save, stream_names
    from libortho.files import check_resume
    from libortho.isolate import isolate as isolate_records
    from libortho.models import load_model

    own: dict[str, Any] = {  # validated by the config itself
        "ratio": _share("--ratio", ratio), "bits": _bits(bits), "group_size": group_size, "structure": structure,
        "objective": objective, "max_steps": max_steps, "stream": stream, "seed": seed,
        "gradient_checkpointing": gradient_checkpointing, "allow_unknown": allow_unknown,
        "target_modules": IsolateConfig.target_modules, **_targets(target_modules),
    }  # fmt: skip
    config = IsolateConfig(**own, **_others(others, own))
    earlier = stream_names(Path(model)) if is_checkpoint(model) else []
    check_destination(out, [*earlier, config.stream])
    check_resume(resume, "--resume", out)
    net: Any
    if is_checkpoint(model):
        if dtype != "auto":
            raise ConfigError(f"--dtype is {dtype!r}, but {model} is a checkpoint of libortho, which keeps its own")
        net, tokenizer = load(model, device=_device(device))
        if tokenizer is None:
            raise CheckpointError(f"{model} holds no tokenizer; save the model together with its own")
    else:
        net, tokenizer = load_model(model, _dtype(dtype), _device(device))
    _check_saveable(net, config, out)
    with _progress() as tell:
        result = isolate_records(net, tokenizer, forget, retain, config=config, resume=resume, progress=tell)
        tell("save", 0, 1)
        save(net, tokenizer, out)
    if as_json:
        _emit({"out": str(out), **result.to_dict()})
    else:
        tables.show_isolate(result, Console())
        tables.note(Console(), f"Saved to {out}.")
        if resume is not None:
            tables.note(Console(), f"{resume} still holds what it took to get there: delete it, as it holds secrets.")
    if not result.succeeded:
        raise typer.Exit(3)


@app.command()
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
    from libortho.audit import audit as audit_model
    from libortho.checkpoint import is_checkpoint, load
    from libortho.extras import require
    from libortho.files import check_report, check_resume
    from libortho.models import load_model, refuse_checkpoint

    require("audit", "audit")
    config = AuditConfig(profile=profile, samples=samples, seed=seed, reveal=reveal)  # type: ignore[arg-type]
    where, kind = _device(device), _dtype(dtype)
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
    with _progress() as tell:
        report = audit_model(
            net, tokenizer, forget, retain, holdout, **beside, associations=associations, general=general,
            tasks=task or (), name=Path(model).name, config=config, resume=resume, progress=tell,
        )  # fmt: skip
    if out is not None:
        report.to_json(out)
    if html is not None:
        report.to_html(html)
    if as_json:
        _emit(report.to_dict())
    else:
        tables.show_audit(report, Console())
    if any(v.status == "fail" for v in report.verdicts):
        raise typer.Exit(3)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint made by split or isolate, or any hub id or path.")],
    alphas: Annotated[
        list[str] | None,
        typer.Option("--alpha", help="A number, or NAME=NUMBER;... (others off); 1 by default. A column each; repeat."),
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
    from libortho.audit.utility import harness_tasks, load_task
    from libortho.checkpoint import is_checkpoint, load
    from libortho.evaluation import Column, evaluate_columns, parse_alpha
    from libortho.files import check_report, write_atomically
    from libortho.models import load_model, refuse_checkpoint

    where, kind = _device(device), _dtype(dtype)
    if not task_file and not tasks:
        raise ConfigError("there is nothing to evaluate; give --task-file FILE.jsonl, or --tasks with names")
    split_model = is_checkpoint(model)
    if alphas and not split_model:
        raise ConfigError(f"--alpha is given, but {model} is not a checkpoint of libortho; leave --alpha out")
    check_report(out, "--out")
    if original is not None:
        refuse_checkpoint(original, "--original")
    specs = {f"alpha {text}": parse_alpha(text) for text in alphas or ["1"]}
    files = [load_task(path) for path in task_file or ()]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is handed to it
    named = harness_tasks([t.strip() for t in tasks.split(",") if t.strip()], include_path) if tasks else []
    if split_model:
        net, tokenizer = load(model, device=where, dtype=kind if isinstance(kind, torch.dtype) else None)
        if tokenizer is None:
            raise CheckpointError(f"{model} holds no tokenizer; save the model together with its own")
        columns = [Column(label, net, tokenizer, spec) for label, spec in specs.items()]
    else:
        columns = [Column("model", *load_model(model, kind, where))]
    if original is not None:
        columns.append(Column("original", *load_model(original, kind, where)))
    with _progress() as tell:
        report = evaluate_columns(columns, files, named, limit=limit, batch_size=batch_size, seed=seed, progress=tell)
    data = {"model": model, "original": original, "limit": limit, "seed": seed, **report.to_dict()}
    if out is not None:
        write_atomically(out, json.dumps(data, indent=1, allow_nan=False))
    if as_json:
        _emit(data)
    else:
        tables.show_evaluation(report, Console())


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="Checkpoint made by split or isolate.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    value: Annotated[
        float | None, typer.Option("--alpha", help="Alpha of every stream; 1 if nothing is given.")
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
    """Continue a prompt under a chosen alpha, as a stream of text."""
    from transformers import TextStreamer

    from libortho.checkpoint import load
    from libortho.lm.generation import generate as continue_prompts
    from libortho.models import check_tokens
    from libortho.text.chat import has_template, question
    from libortho.text.tokens import text_ids

    spec = _alpha_spec(value, stream)
    net: Any
    net, tokenizer = load(directory, device=_device(device))
    if chat and not has_template(tokenizer):
        raise ConfigError("--chat needs a tokenizer with a chat template; leave it out")
    ids = text_ids(question(prompt, tokenizer, "--chat") if chat else prompt, tokenizer, rendered=chat)
    if not ids:
        raise ConfigError("the prompt is empty; give at least one token to continue")
    check_tokens(net, tokenizer, [("the prompt", ids)])
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with alpha(net, spec):
        continue_prompts(net, tokenizer, [ids], max_new_tokens, temperature=temperature, seed=seed, streamer=streamer)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Checkpoint made by split or isolate.")], as_json: Json = False
) -> None:
    """What a checkpoint holds: sizes, bits per weight, streams, and whether each belongs to the base beside it."""
    from libortho.checkpoint import inspect as inspect_checkpoint

    info = inspect_checkpoint(directory)
    if as_json:
        _emit(info.to_dict())
    else:
        tables.show_checkpoint(info, Console())


@app.command()
def detach(
    directory: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="Directory to write; it must not exist.")],
    stream: Annotated[list[str] | None, typer.Option("--stream", help="Take only this one away. Repeatable.")] = None,
    report: Annotated[Path | None, typer.Option("--audit", help="JSON of libortho audit, for the certificate.")] = None,
    certificate: Annotated[bool, typer.Option(help="Write certificate.json.")] = True,
    as_json: Json = False,
) -> None:
    """Write the checkpoint without its streams, and a certificate of what is gone. The source stays as it is."""
    from libortho.checkpoint import detach as detach_streams

    result = detach_streams(directory, out, streams=stream or "all", audit=report, certificate=certificate)
    if as_json:
        _emit({"out": str(out), **result.to_dict()})
    else:
        tables.show_certificate(result, Console())
        if result.audit is not None and not result.audit["base_checked"]:
            tables.note(
                Console(), f"{report} names no base: that it is the audit of this one is not checked. Audit it again."
            )
        tables.note(
            Console(), f"Written to {out}. {directory} still holds the streams: delete it if they must be gone."
        )


@app.command()
def verify(directory: Checkpoint, as_json: Json = False) -> None:
    """Check a detached checkpoint against its certificate.json: every file, and every tensor of the base."""
    from libortho.checkpoint import verify_certificate

    result = verify_certificate(directory)
    if as_json:
        _emit(result.to_dict())
    else:
        tables.show_certificate(result, Console())
        tables.note(Console(), f"{directory} is what the certificate says.")


@app.command()
def attach(
    directory: Checkpoint,
    stream: Annotated[Path, typer.Argument(help="Folder of the stream.")],
    name: Annotated[str | None, typer.Option(help="What it is called from now on; by default its name.")] = None,
    as_json: Json = False,
) -> None:
    """Put a stream into a checkpoint, if it was made for that base."""
    from libortho.checkpoint import attach as attach_stream

    name = attach_stream(directory, stream, name=name)
    if as_json:
        _emit({"directory": str(directory), "stream": name})
    else:
        tables.note(Console(), f"{directory} now holds the stream {name}.")


@app.command()
def encrypt(
    stream: Annotated[Path, typer.Argument(help="Folder of a stream, such as DIR/ortho/NAME.")],
    out: Annotated[Path, typer.Option("--out", help="File to write; it must not exist.")],
    recipient: Annotated[
        list[str] | None, typer.Option("--recipient", "-r", help="Public key, age1... or ssh-... Repeatable.")
    ] = None,
    passphrase_env: PassphraseEnv = None,
    as_json: Json = False,
) -> None:
    """Lock a stream into one age file, for recipients, or by a passphrase (asked for)."""
    from libortho.checkpoint import encrypt as encrypt_stream
    from libortho.checkpoint.checks import check_new_place
    from libortho.extras import require

    require("vault", "encryption")
    if passphrase_env is None:
        check_new_place(out)  # before anybody types
    phrase = None if recipient and passphrase_env is None else _passphrase(passphrase_env, confirm=True)
    encrypt_stream(stream, out, recipients=recipient or None, passphrase=phrase)
    if as_json:
        _emit({"out": str(out), "bytes": out.stat().st_size})
    else:
        tables.note(Console(), f"Written to {out}. {stream} still holds the plain values: delete it when they may go.")


@app.command()
def decrypt(
    file: Annotated[Path, typer.Argument(help="What encrypt wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    identity: Annotated[
        list[Path] | None, typer.Option("--identity", "-i", help="File with an age or SSH secret key. Repeatable.")
    ] = None,
    passphrase_env: PassphraseEnv = None,
    as_json: Json = False,
) -> None:
    """Unlock an age file into the folder of a stream, for attach."""
    from libortho.checkpoint import decrypt as decrypt_stream
    from libortho.checkpoint.checks import check_new_place
    from libortho.extras import require

    require("vault", "decryption")
    if passphrase_env is None:
        check_new_place(out)  # before anybody types
    phrase = None if identity and passphrase_env is None else _passphrase(passphrase_env, confirm=False)
    decrypt_stream(file, out, identities=[Path(i) for i in identity] if identity else None, passphrase=phrase)
    if as_json:
        _emit({"out": str(out)})
    else:
        tables.note(Console(), f"Written to {out}. Add it to its checkpoint with: libortho attach DIR {out}")


@app.command()
def kernels(as_json: Json = False) -> None:
    """Build the optional C++ kernels for few tokens on a CPU, and say what they use. They need a C++ compiler."""
    from libortho.ops import native

    path = native.build()
    module = native.kernels()
    assert module is not None
    data = {
        "path": str(path), "instructions": module.level(), "available": list(module.levels()),
        "int8_linear": native.int8_linear is not None, "add_columns": native.add_columns is not None,
    }  # fmt: skip
    if as_json:
        _emit(data)
    else:
        tables.note(Console(soft_wrap=True), f"{path}: {module.level()}, of {', '.join(module.levels())}")
        if native.int8_linear is None:
            tables.note(Console(), "the INT8 product stays torch's: without these instructions it is faster")


@app.command()
def card(
    directory: Checkpoint,
    report: Annotated[Path | None, typer.Option("--audit", help="JSON of libortho audit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write the model card, README.md, from the measured numbers in the manifests."""
    from libortho.checkpoint import model_card
    from libortho.files import check_report, write_atomically

    path = directory / "README.md"
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists; --force replaces it")
    text = model_card(directory, report)
    check_report(path, "the model card")
    write_atomically(path, text)
    if as_json:
        _emit({"out": str(path), "card": text})
    else:
        tables.note(Console(), f"Written to {path}.")


def _passphrase(variable: str | None, confirm: bool) -> str:
    """From an environment variable, or asked for; never an argument, which every process of the machine can read."""
    if variable is None:
        return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))
    if not os.environ.get(variable):
        raise ConfigError(f"--passphrase-env is {variable!r}, but that environment variable is not set or empty")
    return os.environ[variable]


def _share(option: str, text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; expected a number in (0, 1] or auto") from error


def _others(pairs: list[str] | None, taken: Container[str]) -> dict[str, Any]:
    """Fields of ``IsolateConfig`` given as ``name=value``, values as in JSON; ``taken`` have their own options."""
    names = [f.name for f in fields(IsolateConfig) if f.name not in taken]
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, sign, text = pair.partition("=")
        if not sign or name not in names:
            own = f" ({name} has an option of its own)" if name in taken else ""
            raise ConfigError(f"--set is {pair!r}{own}; expected NAME=VALUE with one of {', '.join(names)}")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text  # a word; the config says if it is none that it knows
    return found


def _bits(bits: int) -> int | None:
    return bits or None


def _alpha_spec(value: float | None, streams: list[str] | None) -> AlphaSpec:
    if not streams:
        return 1.0 if value is None else value
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


def main() -> None:
    """Entry point: errors of this library and of the disk become one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        app()
    except (LibOrthoError, OSError) as error:
        line = " ".join(str(error).splitlines())
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {line}", markup=False)
        sys.exit(2)


__all__ = ["app", "main"]
