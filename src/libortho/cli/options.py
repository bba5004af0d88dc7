"""What several commands take, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from libortho.core.config import StreamConfig, ValueDtype
from libortho.core.errors import AlphaError, CheckpointError, ConfigError
from libortho.core.field_docs import fields_help
from libortho.core.files import check_report

if TYPE_CHECKING:
    import torch


def field_option(config: type[Any], name: str, **more: Any) -> Any:
    """An option for a field of a config, with the field's own documentation; None stands for the field's default."""
    return typer.Option(f"--{name.replace('_', '-')}", help=fields_help(config)[name], show_default=False, **more)


Model = Annotated[str, typer.Argument(help="Hub id or path of a dense causal language model.")]
AnyModel = Annotated[str, typer.Argument(help="Checkpoint made by split or isolate, or any hub id or path.")]
Checkpoint = Annotated[Path, typer.Argument(help="Directory that split, isolate or detach wrote.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; an earlier checkpoint there is replaced.")]
Device = Annotated[str, typer.Option(help="Where to run, for example cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help=f"auto (as stored), {', '.join(get_args(ValueDtype))}.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Resume = Annotated[
    Path | None,
    typer.Option(help="Keep finished work in this folder, and take up from it. It holds secrets."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any of the settings below; repeatable."),
]
Targets = Annotated[list[str] | None, field_option(StreamConfig, "target_modules", metavar="NAME")]
Bits = Annotated[str | None, field_option(StreamConfig, "bits", metavar="8|4|none")]
Stream = Annotated[str | None, field_option(StreamConfig, "stream", metavar="NAME")]
Alphas = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha", metavar="NUMBER|NAME=NUMBER,...",
        help="Of all streams, or of those named (the others are off), such as 0 or hr=1,legal=0.5. Repeat it to see "
        "the model under each. Default: as loaded.",
    ),
]  # fmt: skip
PassphraseEnv = Annotated[
    str | None,
    typer.Option(
        "--passphrase-env", metavar="NAME", help="Environment variable with the passphrase; else it is asked for."
    ),
]


def alphas_of(texts: Sequence[str] | None, directory: str | Path) -> dict[str, float | dict[str, float]]:
    """What each ``--alpha`` means, by its text, after a look at the streams of the checkpoint; nothing is loaded.

    Raises:
        AlphaError: if one is no alpha, is out of range, names a stream that is not there, or is given twice.
        ConfigError: if one is given for a model without a switch.
    """
    from libortho.checkpoint import is_checkpoint, stream_names
    from libortho.core.switch.state import parse_alpha
    from libortho.core.switch.switch import Switch

    if not texts:
        return {}
    if not is_checkpoint(directory):
        raise ConfigError(f"--alpha is given, but {directory} is not a checkpoint of libortho; leave --alpha out")
    switch, names = Switch(), stream_names(Path(directory))
    for name in names:
        switch.add_stream(name)
    found = {text: parse_alpha(text, names) for text in texts}
    for spec in found.values():
        switch.build(spec, base=None, extrapolate=False)
    if len(found) < len(texts):
        raise AlphaError(f"--alpha is {', '.join(texts)}, where one is given twice; expected each once")
    return found


def dtype_of(name: str) -> torch.dtype | str:
    """The dtype of that name; ``auto`` stays a word.

    Raises:
        ConfigError: if no dtype has the name.
    """
    if name == "auto":
        return name
    if name not in get_args(ValueDtype):
        raise ConfigError(f"--dtype is {name!r}; expected auto, {', '.join(get_args(ValueDtype))}")
    from libortho.core.dtypes import DTYPES

    return DTYPES[name]


def check_reports(out: Path | None, html: Path | None) -> None:
    """Refuse now reports that could not be written when all the work is done.

    Raises:
        ConfigError: if one cannot be written, or both are one file.
    """
    check_report(out, "--out")
    check_report(html, "--html")
    if out is not None and html is not None and out.resolve() == html.resolve():
        raise ConfigError(f"--out and --html are both {out}; expected two files")


def device_of(name: str) -> str:
    """The name of a device, after a look whether torch finds it.

    Raises:
        ConfigError: if it does not.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device is {name!r}; expected cpu, or a device that torch finds here ({reason})"
        ) from error
    return name


def size_of(model: Any) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def open_model(model: str, dtype: torch.dtype | str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint of this library, or of any causal language model.

    Raises:
        CheckpointError: if a checkpoint is damaged or holds no tokenizer.
        LibOrthoError: if the model cannot be loaded.
    """
    from libortho.checkpoint import is_checkpoint, load
    from libortho.checkpoint.dense import load_model

    if not is_checkpoint(model):
        return load_model(model, dtype, device)
    net, tokenizer = load(model, device=device, dtype=None if isinstance(dtype, str) else dtype)
    if tokenizer is None:
        raise CheckpointError(f"{model} holds no tokenizer; save the model together with its own")
    return net, tokenizer
