"""Commands that make split models: demo, split, isolate."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from libortho.cli import tables
from libortho.cli.options import (  # fmt: skip
    Bits,
    Device,
    Dtype,
    GroupSize,
    Json,
    Model,
    Out,
    Ratio,
    Seed,
    Stream,
    Targets,
    bits_of,
    device_of,
    dtype_of,
    share,
    targets_of,
)
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, note, progress_bars
from libortho.core.errors import CheckpointError, ConfigError
from libortho.isolation.config import IsolateConfig
from libortho.splitting.config import SplitConfig


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

    asked = dtype_of(dtype)
    with progress_bars() as tell:
        report = run(
            model=model,
            seed=seed,
            device=device_of(device),
            text=text,
            dtype=asked if isinstance(asked, torch.dtype) else None,
            out=out,
            tell=tell,
        )
    if as_json:
        emit(report.to_dict())
    else:
        tables.show_demo(report, Terminal())
        if out is not None:
            note(
                f"Audit it: libortho audit {out}/isolated --forget {out}/forget.jsonl "
                f"--holdout {out}/holdout.jsonl --reference {out}/never_trained --html audit.html",
            )  # fmt: skip


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
    from libortho.checkpoint.dense import load_model, refuse_checkpoint
    from libortho.core.report import layer_report
    from libortho.splitting.split import split as split_model

    own: dict[str, Any] = dict(  # validated by the config itself
        ratio=ratio, rank_ratio=share("--rank-ratio", rank_ratio), use_low_rank=low_rank, bits=bits_of(bits),
        group_size=group_size, score=score, structure=structure, keep_tail=tail, stream=stream,
        **targets_of(target_modules),
    )  # fmt: skip
    config = SplitConfig(**own)
    refuse_checkpoint(model)
    check_destination(out, [config.stream])
    net, tokenizer = load_model(model, dtype_of(dtype), device_of(device))
    _check_saveable(net, config, out)
    with progress_bars() as tell:
        split_model(net, config, progress=tell)
        tell("save", 0, 1)
        save(net, tokenizer, out)
    report = layer_report(net)
    if as_json:
        emit({"out": str(out), **report.to_dict()})
    else:
        tables.show_layers(report, Terminal())
        note(f"Saved to {out}. A weights-only split compresses; it claims no forgetting.")


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
    from libortho.checkpoint.dense import load_model
    from libortho.core.files import check_resume
    from libortho.isolation.isolate import isolate as isolate_records

    own: dict[str, Any] = {  # validated by the config itself
        "ratio": share("--ratio", ratio), "bits": bits_of(bits), "group_size": group_size, "structure": structure,
        "objective": objective, "max_steps": max_steps, "stream": stream, "seed": seed,
        "gradient_checkpointing": gradient_checkpointing, "allow_unknown": allow_unknown,
        "target_modules": IsolateConfig.target_modules, **targets_of(target_modules),
    }  # fmt: skip
    config = IsolateConfig(**own, **_others(others, own))
    earlier = stream_names(Path(model)) if is_checkpoint(model) else []
    check_destination(out, [*earlier, config.stream])
    check_resume(resume, "--resume", out)
    net: Any
    if is_checkpoint(model):
        if dtype != "auto":
            raise ConfigError(f"--dtype is {dtype!r}, but {model} is a checkpoint of libortho, which keeps its own")
        net, tokenizer = load(model, device=device_of(device))
        if tokenizer is None:
            raise CheckpointError(f"{model} holds no tokenizer; save the model together with its own")
    else:
        net, tokenizer = load_model(model, dtype_of(dtype), device_of(device))
    _check_saveable(net, config, out)
    with progress_bars() as tell:
        result = isolate_records(net, tokenizer, forget, retain, config=config, resume=resume, progress=tell)
        tell("save", 0, 1)
        save(net, tokenizer, out)
    if as_json:
        emit({"out": str(out), **result.to_dict()})
    else:
        tables.show_isolate(result, Terminal())
        note(f"Saved to {out}. {_standing(out, config.stream, earlier)}")
        if resume is not None:
            note(f"{resume} still holds what it took to get there: delete it, as it holds secrets.")
    if not result.succeeded:
        raise typer.Exit(3)


def _standing(out: Path, stream: str, earlier: Sequence[str]) -> str:
    """That the new stream is off, and how it is turned on."""
    one = f"--stream {stream}=1" if earlier else "--alpha 1"
    return (
        f"The stream {stream} is off (alpha = 0) until somebody turns it on: libortho generate {out} PROMPT {one}; "
        f"libortho.set_alpha(model, {{{stream!r}: 1.0}}) in Python."
    )


def _check_saveable(net: Any, config: SplitConfig | IsolateConfig, out: Path) -> None:
    """Refuse now what ``save`` would refuse when all the work is done."""
    from libortho.checkpoint.checks import check_room, check_saveable
    from libortho.checkpoint.stream_files import check_rank
    from libortho.core.layer import ortho_layers
    from libortho.core.surgery import linear_shape
    from libortho.core.targets import find_targets
    from libortho.selection.scores import column_count

    targets = find_targets(net, config.target_modules, again=True)
    check_room(out, check_saveable(net, targets | dict(ortho_layers(net)), config.bits))
    if isinstance(config, SplitConfig) and config.structure == "columns":  # isolate takes no more than can be saved
        for name, module in targets.items():
            check_rank(f"stream {config.stream!r} of {name}", column_count(config.ratio, linear_shape(module)[1]), 0)


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
