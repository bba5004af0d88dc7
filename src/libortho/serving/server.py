"""From a checkpoint to a server that runs."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from libortho.core.errors import ConfigError
from libortho.lm.checks import embedding_rows
from libortho.serving.app import make_app
from libortho.serving.config import ServeConfig
from libortho.serving.gateway import Gateway
from libortho.serving.local import LocalEngine
from libortho.serving.prompts import Prompts
from libortho.serving.watching import Watch

HEAD_BYTES = 64 * 2**10
"""Most bytes of a request's line and headers."""
GRACE = 30
"""Seconds that answers have to end when the server is told to stop."""


def local_app(model: Any, tokenizer: Any, config: ServeConfig, name: str, directory: Path | None = None) -> FastAPI:
    """The application over a model in this process, which follows the streams of ``directory``.

    Raises:
        ConfigError: if the name of the model holds a plus or an at sign.
    """
    if "+" in name or "@" in name:
        raise ConfigError(
            f"the model is called {name!r}; expected a name without + (streams follow it) and @: set name"
        )
    engine = LocalEngine(
        model, tokenizer, most_rows=config.most_rows, most_waiting=config.most_waiting,
        constant=config.timing == "constant",
    )  # fmt: skip
    rows = embedding_rows(model) or len(tokenizer)
    gateway = Gateway(engine, Prompts(tokenizer, rows), config, name)
    return make_app(gateway, None if directory is None else Watch(directory, engine).run)


def name_of(directory: str, config: ServeConfig) -> str:
    """What the model is called."""
    return config.name or Path(directory).resolve().name


class JsonLines(logging.Formatter):
    """A log record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        return json.dumps({**told, "message": record.getMessage()})


def check_port(config: ServeConfig) -> None:
    """Refuse an address that cannot be listened at, before a model is loaded.

    Raises:
        ConfigError: then.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
    except OSError as error:
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened at ({error.strerror}); give another --port or --host"
        ) from error


def run(app: FastAPI, config: ServeConfig, on_ready: Callable[[], None]) -> None:
    """Serve until a signal comes; answers that are being given end first.

    Args:
        app: What ``local_app`` makes.
        config: The settings.
        on_ready: Called once the engine has passed its self-test.

    Raises:
        EngineError: if the engine fails its self-test; nothing is served then.
        TargetError: if the model cannot answer several rows at a time.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("libortho")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the command line has a handler of its own
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=GRACE,
            http="h11",
        )
    )

    async def main() -> None:
        await app.state.gateway.start()  # before uvicorn, which would bury an error in a traceback
        on_ready()
        await server.serve()

    with suppress(KeyboardInterrupt):  # uvicorn raises it again once all is closed
        asyncio.run(main())
