"""Commands that make split models and talk to them: demo, split, isolate, generate."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libortho.cli import tables
from libortho.cli.kept_runs import Keep, kept_run
from libortho.cli.options import (
    Alphas,
    Bits,
    Checkpoint,
    Device,
    Dtype,
    Json,
    Model,
    Out,
    Resume,
    Seed,
    Settings,
    Stream,
    Targets,
    alphas_of,
    device_of,
    dtype_of,
    field_option,
    open_model,
    size_of,
)
from libortho.cli.settings import configured
from libortho.cli.sources import AsChat, Blocks, Completion, Prompt, Reading, is_chat, read_sources, say_running_text
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, note, progress_bars, say, say_verdict
from libortho.core.errors import ConfigError
from libortho.core.escapes import visible
from libortho.core.extras import require
from libortho.core.files import check_resume
from libortho.isolation.config import IsolateConfig
from libortho.splitting.config import SplitConfig

if TYPE_CHECKING:
    from libortho.core.config import StreamConfig


def demo(
    model: Annotated[str | None, typer.Option(help="Hub id or path of a Llama-family model.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 if this processor has it), bfloat16 or float32.")] = "auto",
    text: Annotated[Path | None, typer.Option(help="File of general text for the perplexity column.")] = None,
    out: Annotated[
        Path, typer.Option(help="Keeps the models and the records; a second run takes up the planted model.")
    ] = Path("libortho-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="17 secrets and not nine, the whole quick audit, more splits by weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Plant secrets in a real model, and show which split forgets."""
    from libortho.demo.demo import run

    if model is None:
        require("demo", "the demonstration")
    require("audit", "the audit of the demonstration")
    kind, where = dtype_of(dtype), device_of(device)
    say_running_text("text", text)
    with progress_bars() as progress:
        report = run(
            model=model, seed=seed, device=where, text=text, dtype=None if isinstance(kind, str) else kind, out=out,
            full=full, progress=progress, on_verdict=say_verdict,
        )  # fmt: skip
    if as_json:
        emit(report.to_dict())
    else:
        tables.show_demo(report, Terminal(), full=full)
        made = out / "isolated"
        beside: list[str | Path] = ["--holdout", out / "holdout.jsonl", "--reference", out / "never_trained"]
        next_commands(
            ["generate", made, report.generations[0].prompt, "--alpha", "1"],
            ["audit", made, "--forget", out / "forget.jsonl", *beside, "--html", out / "audit.html"],
            ["detach", made, "--out", out / "base"],
        )


def split(
    model: Model,
    out: Out,
    target_modules: Targets = None,
    ratio: Annotated[str | None, field_option(SplitConfig, "ratio", metavar="NUMBER")] = None,
    bits: Bits = None,
    stream: Stream = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print a row for each layer, too.")] = False,
    settings: Settings = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Split a model by its weights alone.

    This is compression with a dial. It does not forget.
    """
    from libortho.checkpoint import check_destination, save
    from libortho.checkpoint.dense import load_model, refuse_checkpoint
    from libortho.core.report import layer_report
    from libortho.splitting.split import split as split_model

    config = configured(
        SplitConfig, settings, target_modules=targets_of(target_modules), ratio=ratio, bits=bits_of(bits), stream=stream
    )
    kind, where = dtype_of(dtype), device_of(device)
    refuse_checkpoint(model)
    check_destination(out, [config.stream])
    net, tokenizer = load_model(model, kind, where)
    check_saveable_as(net, config, out)
    with progress_bars() as progress:
        split_model(net, config, progress=progress)
        progress("save", 0, 1)
        save(net, tokenizer, out)
    report = layer_report(net)
    if as_json:
        emit({"out": str(out), **report.to_dict()})
    else:
        tables.show_split(report, Terminal(), bits=config.bits, stream=config.stream, layers=layers)
        note(f"Saved to {out}. A weights-only split compresses; it claims no forgetting.")
        next_commands(
            ["generate", out, "PROMPT", "--alpha", "1", "--alpha", "0"],
            ["eval", out, "--alpha", "1", "--alpha", "0", "--task-file", "TASK.jsonl"],
        )


def isolate(
    model: Annotated[
        str, typer.Argument(help="Hub id or path of a dense causal language model, or a checkpoint made by isolate.")
    ],
    forget: Annotated[Path, typer.Option(help="Records that must go: JSONL, JSON, CSV or txt.")],
    out: Out,
    retain: Annotated[Path | None, typer.Option(help="Text to keep; by default samples and shipped text.")] = None,
    prompt: Prompt = None,
    completion: Completion = None,
    chat: AsChat = False,
    blocks: Blocks = False,
    target_modules: Targets = None,
    ratio: Annotated[str | None, field_option(IsolateConfig, "ratio", metavar="NUMBER|auto")] = None,
    bits: Bits = None,
    stream: Stream = None,
    allow_unknown: Annotated[bool | None, field_option(IsolateConfig, "allow_unknown")] = None,
    settings: Settings = None,
    resume: Resume = None,
    keep: Keep = True,
    seed: Annotated[int | None, field_option(IsolateConfig, "seed")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Put the records in a file behind the switch.

    Exit code 3 if a criterion is missed. A checkpoint is isolated further: give another --stream, and the bits and
    group size that it has.
    """
    from libortho.checkpoint import check_destination, is_checkpoint, save, stream_names
    from libortho.isolation.isolate import isolate as isolate_records

    config = configured(
        IsolateConfig, settings, target_modules=targets_of(target_modules), ratio=ratio, bits=bits_of(bits),
        stream=stream, seed=seed, allow_unknown=allow_unknown,
    )  # fmt: skip
    reading = Reading(prompt, completion, chat, blocks)
    kind, where = dtype_of(dtype), device_of(device)
    further = is_checkpoint(model)
    earlier = stream_names(Path(model)) if further else []
    check_destination(out, [*earlier, config.stream])
    check_resume(resume, "--resume", out)
    if further and dtype != "auto":
        raise ConfigError(f"--dtype is {dtype!r}, but {model} is a checkpoint of libortho, which keeps its own")
    rows = read_sources(reading, forget=forget, retain=retain)
    net, tokenizer = open_model(model, kind, where)
    check_saveable_as(net, config, out)
    run = (model, rows, config, str(out.resolve()), dtype, device)
    with kept_run("isolate", resume, keep, size_of(net), *run) as kept, progress_bars() as progress:
        result = isolate_records(net, tokenizer, **rows, config=config, resume=kept, progress=progress)
        progress("save", 0, 1)
        save(net, tokenizer, out)
    if as_json:
        emit({"out": str(out), **result.to_dict()})
    else:
        tables.show_isolate(result, Terminal())
        note(f"Saved to {out}. The stream {config.stream} is off (alpha = 0) until somebody turns it on.")
        base, page = out.with_name(f"{out.name}-base"), out.with_name(f"{out.name}-audit.html")
        asked = ["--chat"] if any(is_chat(row) for row in rows["forget"]) else []
        next_commands(
            ["generate", out, "PROMPT", *asked, "--alpha", "0", "--alpha", "1"],
            ["audit", out, "--forget", forget, *reading.words(forget), "--holdout", "HOLDOUT.jsonl", "--html", page],
            ["detach", out, "--out", base],
        )
        note("PROMPT is a question of yours; HOLDOUT.jsonl has records of the same kind that were never trained on.")
        if resume is not None:
            note(f"{resume} still holds what it took to get there: delete it, as it holds secrets.")
    if not result.succeeded:
        raise typer.Exit(3)


def generate(
    directory: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    alphas: Alphas = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to the prompt.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Continue a prompt under each --alpha, as a stream of text.

    Without --alpha each stream has the alpha of its manifest (0 after isolate), which standard error shows. Several
    answers have their alpha above them.
    """
    from transformers import TextStreamer

    from libortho.checkpoint import is_checkpoint, load
    from libortho.core.switch.alpha import alpha, current_alphas
    from libortho.lm.checks import check_tokens
    from libortho.lm.generation import generate as continue_prompts
    from libortho.text.chat import has_template, question
    from libortho.text.tokens import text_ids

    class Visible(TextStreamer):
        """Writes what the model says with its control characters shown."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end)

    specs: dict[str, Any] = dict(alphas_of(alphas, directory)) if is_checkpoint(directory) else {}
    net: Any
    net, tokenizer = load(directory, device=device_of(device))
    if chat and not has_template(tokenizer):
        raise ConfigError("--chat needs a tokenizer with a chat template; leave it out")
    ids = text_ids(question(prompt, tokenizer, "--chat") if chat else prompt, tokenizer, rendered=chat)
    if not ids:
        raise ConfigError("the prompt is empty; give at least one token to continue")
    check_tokens(net, tokenizer, [("the prompt", ids)])
    if not specs:
        loaded = current_alphas(net)
        say(f"alpha: {_told(loaded)}")
        specs = {"": loaded or 0.0}
    for text, spec in specs.items():
        if len(specs) > 1:
            note(f"alpha {text}:")
        streamer = Visible(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with alpha(net, spec):
            continue_prompts(
                net, tokenizer, [ids], max_new_tokens, temperature=temperature, seed=seed, streamer=streamer
            )


def next_commands(*commands: Sequence[str | Path]) -> None:
    """Commands that a reader may want next, as they are typed: one line each, so that it can be copied."""
    note("Next:")
    for words in commands:
        tables.note(Terminal(soft_wrap=True), shlex.join(["libortho", *map(str, words)]))


def targets_of(names: list[str] | None) -> Any:
    """``target_modules`` of a config; None where none is named."""
    return names if names is None or len(names) > 1 else names[0]


def bits_of(text: str | None) -> str | None:
    """``bits`` of a config as text, where 0 stands for a dense base."""
    return "none" if text == "0" else text


def _told(loaded: Mapping[str, float]) -> str:
    if not loaded:
        return "0 (there is no stream beside this base)"
    values = ", ".join(f"{n}={v:g}" for n, v in loaded.items())
    if all(loaded.values()):
        return f"{values} (as loaded)"
    return f"{values} (as loaded; --alpha 1 turns {'it' if len(loaded) == 1 else 'all'} on)"


def check_saveable_as(net: Any, config: StreamConfig, out: Path) -> None:
    """Refuse now what ``save`` would refuse when all the work is done.

    Raises:
        CheckpointError: then.
    """
    from libortho.checkpoint.checks import check_saveable
    from libortho.checkpoint.directories import check_room
    from libortho.checkpoint.stream_tensors import check_rank
    from libortho.core.layer import ortho_layers
    from libortho.core.surgery import linear_shape
    from libortho.core.targets import find_targets
    from libortho.selection.scores import column_count
    from libortho.tuning.config import TuneConfig

    targets = find_targets(net, config.target_modules, again=True, tails=isinstance(config, TuneConfig))
    check_room(out, check_saveable(net, targets | dict(ortho_layers(net)), config.bits))
    if isinstance(config, SplitConfig) and config.structure == "columns":  # isolate takes no more than can be saved
        for name, module in targets.items():
            check_rank(f"stream {config.stream!r} of {name}", column_count(config.ratio, linear_shape(module)[1]), 0)
