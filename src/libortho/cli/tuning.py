"""The command that trains private data into a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libortho.cli import tables
from libortho.cli.kept_runs import Keep, kept_run
from libortho.cli.models import bits_of, check_saveable_as, next_commands, targets_of
from libortho.cli.options import (
    Bits,
    Device,
    Dtype,
    Json,
    Out,
    Resume,
    Settings,
    Stream,
    Targets,
    device_of,
    dtype_of,
    field_option,
    open_model,
    size_of,
)
from libortho.cli.settings import configured
from libortho.cli.sources import AsChat, Blocks, Completion, Prompt, Reading, read_sources
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, note, progress_bars
from libortho.core.errors import ConfigError
from libortho.core.files import check_resume
from libortho.tuning.config import TuneConfig

if TYPE_CHECKING:
    from libortho.tuning.result import TuneResult


def tune(
    model: Annotated[str, typer.Argument(help="Hub id or path of a dense causal language model, or a checkpoint.")],
    data: Annotated[Path, typer.Option(help="What the stream is to know: JSONL, JSON, CSV or txt.")],
    out: Out,
    retain: Annotated[Path | None, typer.Option(help="Text to keep; by default samples and shipped text.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Records that ask for the data in other words; training ends by their recall.")
    ] = None,
    prompt: Prompt = None,
    completion: Completion = None,
    chat: AsChat = False,
    blocks: Blocks = False,
    target_modules: Targets = None,
    ratio: Annotated[str | None, field_option(TuneConfig, "ratio", metavar="NUMBER")] = None,
    bits: Bits = None,
    stream: Stream = None,
    over: Annotated[list[str] | None, field_option(TuneConfig, "over", metavar="NAME")] = None,
    epsilon: Annotated[str | None, field_option(TuneConfig, "epsilon", metavar="NUMBER")] = None,
    delta: Annotated[str | None, field_option(TuneConfig, "delta", metavar="NUMBER")] = None,
    settings: Settings = None,
    resume: Resume = None,
    keep_parts: Keep = True,
    seed: Annotated[int | None, field_option(TuneConfig, "seed")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train private data into a stream over a frozen base.

    Exit code 3 if a criterion is missed. Of a checkpoint, base and earlier streams stay what they are.
    """
    from libortho.checkpoint import check_destination, is_checkpoint, save, stream_names
    from libortho.tuning.tune import tune as tune_stream

    config = configured(
        TuneConfig, settings, target_modules=targets_of(target_modules), ratio=ratio, bits=bits_of(bits),
        stream=stream, seed=seed, over=None if over is None else tuple(over),
        epsilon=epsilon, delta=delta,
    )  # fmt: skip
    reading = Reading(prompt, completion, chat, blocks)
    kind, where = dtype_of(dtype), device_of(device)
    further = is_checkpoint(model)
    check_destination(out, [*(stream_names(Path(model)) if further else []), config.stream])
    check_resume(resume, "--resume", out)
    if further and dtype != "auto":
        raise ConfigError(f"--dtype is {dtype!r}, but {model} is a checkpoint of libortho, which keeps its own")
    rows = read_sources(reading, data=data, retain=retain, validation=validation)
    net, tokenizer = open_model(model, kind, where)
    check_saveable_as(net, config, out)
    run = (model, rows, config, str(out.resolve()), dtype, device)
    keep_parts &= config.epsilon is None  # noise that a folder keeps is no noise
    with kept_run("tune", resume, keep_parts, size_of(net), *run) as kept, progress_bars() as progress:
        result = tune_stream(net, tokenizer, **rows, config=config, resume=kept, progress=progress)
        progress("save", 0, 1)
        save(net, tokenizer, out)
    _tell(result, out, data, reading.words(data), resume, as_json)


def retune(
    model: Annotated[str, typer.Argument(help="The new base: hub id or path of a dense model, or a checkpoint.")],
    old: Annotated[Path, typer.Option(help="Checkpoint of the old model, with the stream.")],
    data: Annotated[Path, typer.Option(help="Records; the old model answers those without an answer.")],
    out: Out,
    stream: Annotated[str, typer.Option(help="Name of the stream, in both.")],
    retain: Annotated[Path | None, typer.Option(help="Text to keep; by default samples and shipped text.")] = None,
    validation: Annotated[Path | None, typer.Option(help="As in tune.")] = None,
    settings: Settings = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train a stream of an old model anew, on a new base.

    Without --set, settings are those that the stream was trained with. Exit code 3 if a criterion is missed.
    """
    from libortho.checkpoint import check_destination, is_checkpoint, save, stream_names
    from libortho.tuning.retune import retune as retune_stream

    config = None if settings is None else configured(TuneConfig, settings, stream=stream)
    kind, where = dtype_of(dtype), device_of(device)
    check_destination(out, [*(stream_names(Path(model)) if is_checkpoint(model) else []), stream])
    if not is_checkpoint(old):
        raise ConfigError(f"--old is {old}, which is no checkpoint of libortho; expected one that has the stream")
    rows = {n: p for n, p in (("retain", retain), ("validation", validation)) if p is not None}
    net, tokenizer = open_model(model, kind, where)
    teacher, old_tokenizer = open_model(str(old), "auto", where)
    with progress_bars() as progress:
        result = retune_stream(
            net, tokenizer, teacher, data, stream, config, old_tokenizer=old_tokenizer, progress=progress, **rows
        )
        progress("save", 0, 1)
        save(net, tokenizer, out)
    _tell(result, out, data, (), None, as_json)


def _tell(result: TuneResult, out: Path, data: Path, words: Sequence[str], resume: Path | None, as_json: bool) -> None:
    if as_json:
        emit({"out": str(out), **result.to_dict()})
    else:
        _show(result, Terminal())
        note(f"Saved to {out}. The stream {result.stream} is off (alpha = 0) until somebody turns it on.")
        next_commands(
            ["generate", out, "PROMPT", "--alpha", f"{result.stream}=1", "--alpha", "0"],
            ["audit", out, "--forget", data, *words],
            ["detach", out, "--out", out.with_name(f"{out.name}-base"), "--stream", result.stream],
        )
        if resume is not None:
            note(f"{resume} still holds what it took to get there: delete it, as it holds secrets.")
    if not result.succeeded:
        raise typer.Exit(3)


def _show(result: TuneResult, console: Terminal) -> None:
    """What the stream knows, what it cost the rest, and the criteria that do not hold."""
    tables.note(
        console,
        f"trained stream {result.stream!r} in {result.epochs} epochs ({result.steps} steps), {result.seconds:.0f} s: "
        f"density {result.density:.3%}, {len(result.columns_per_layer)} layers touched",
    )
    tables.note(
        console,
        f"at alpha = 1: {len(result.recited)} of {result.records} records are said, other text moved by "
        f"{result.kept_kl:.4f} nats per token; at alpha = 0 the model is its base, bit for bit",
    )
    if result.together is not None:
        tables.note(console, f"with all other streams on too: {len(result.together)} of {result.records} are said")
    if result.validation is not None:
        tables.note(console, f"validation records said at alpha = 1: {result.validation:.0%}")
    if result.known:
        tables.note(console, f"the base says {len(result.known)} of them by itself; these stay where the stream is off")
    tables.show_missed(result, console)
