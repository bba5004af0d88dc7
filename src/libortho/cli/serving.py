"""The commands that answer over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libortho.cli.options import Device, Dtype, device_of, dtype_of, open_model
from libortho.cli.terminal import note, say
from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.extras import require
from libortho.core.files import write_atomically


def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint, as save, isolate and tune write it.")],
    keys: Annotated[Path | None, typer.Option(help="File of API keys; without it every stream stays off.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; see the page on serving.")] = None,
    name: Annotated[str | None, typer.Option(help="What the model is called; the directory's name by default.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; 8000 by default.")] = None,
    audit_log: Annotated[Path | None, typer.Option(help="File that gets a line for each request.")] = None,
    require_key: Annotated[bool | None, typer.Option("--require-key", help="Refuse requests without a key.")] = None,
    timing: Annotated[
        str | None, typer.Option(metavar="plain|constant", help="constant: compute streams that are off, too.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Answer requests over HTTP, with rights to streams by key.

    The API is OpenAI's, with a field alpha.
    """
    require("serve", "serve")
    from libortho.checkpoint import is_checkpoint
    from libortho.serving.config import read_config
    from libortho.serving.server import check_port, local_app, name_of, run

    if not is_checkpoint(model):
        raise CheckpointError(f"{model} is no checkpoint; expected a directory that isolate, tune or split has written")

    settings = read_config(
        config, keys=keys, name=name, host=host, port=port, audit_log=audit_log, require_key=require_key, timing=timing
    )
    check_port(settings)
    net, tokenizer = open_model(model, dtype_of(dtype), device_of(device))
    app = local_app(net, tokenizer, settings, name_of(model, settings), Path(model))
    told = f"http://{settings.host}:{settings.port}/v1 serves {name_of(model, settings)!r}; Ctrl-C ends it"
    run(app, settings, lambda: say(told))


def serve_key(
    name: Annotated[str, typer.Argument(help="What audit lines call the key.")],
    stream: Annotated[
        list[str] | None, typer.Option(metavar="NAME=ALPHA", help="A stream, and its largest alpha; may be repeated.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Limit of its rate.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File that gets the entry; printed without it.")] = None,
) -> None:
    """Make an API key. It is printed once; the file keeps its hash alone."""
    from libortho.core.switch.state import parse_alpha
    from libortho.serving.keys import entry, new_key, parse_keys

    allowed: dict[str, float] = {}
    for given in stream or []:
        parsed = parse_alpha(given) if "=" in given else None
        if not isinstance(parsed, dict):
            raise ConfigError(f"--stream is {given!r}; expected NAME=ALPHA, such as hr=1")
        allowed |= parsed
    key, sha256 = new_key()
    text = entry(name, sha256, allowed, requests_per_minute)
    if keys is None:
        parse_keys(text, "the entry")
        note(text)
    else:
        before = keys.read_text(encoding="utf-8") if keys.exists() else ""
        if any(k.id == name for k in (parse_keys(before, str(keys)) if before.strip() else [])):
            raise ConfigError(f"{keys} has a key of the name {name!r} already; give another, or delete its entry first")
        whole = f"{before.rstrip()}\n\n{text}".lstrip()
        parse_keys(whole, str(keys))  # before anything is written
        write_atomically(keys, whole)
        say(f"{keys} has an entry for {name}; the key itself is printed this once")
    note(key)
