"""The routes of the server, and how errors become answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libortho.core.version import __version__
from libortho.serving.engine import BusyError, EngineError
from libortho.serving.errors import ApiError
from libortho.serving.gateway import Gateway
from libortho.serving.page import page
from libortho.serving.records import Counts
from libortho.serving.schemas import Asked, ChatRequest, CompletionRequest, ContrastRequest

logger = logging.getLogger(__name__)


class Unexpected:
    """Answers 500 where nothing else does, and keeps what happened out of the log: it may hold a prompt."""

    def __init__(self, app: ASGIApp, counts: Counts) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if scope["type"] != "http":
                raise
            logger.error("a request failed: %s", type(error).__name__)
            self._counts.requests.labels("500").inc()
            if not begun:
                await JSONResponse(ApiError(500, "the server failed").body(), 500)(scope, receive, send)


def make_app(gateway: Gateway, background: Callable[[], Coroutine[Any, Any, None]] | None = None) -> FastAPI:
    """The application of a gateway, which it starts and closes; ``background`` runs as long as it does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        task = None if background is None else asyncio.create_task(background())
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
            await gateway.close()

    app = FastAPI(title="LibOrtho", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    app.add_middleware(Unexpected, counts=gateway.counts)

    def counted(status: int) -> None:
        gateway.counts.requests.labels(str(status)).inc()

    def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        counted(error.status)
        return JSONResponse(error.body(), error.status, headers=error.headers())

    def busy(request: Request, error: Exception) -> Response:
        return failed(request, ApiError(429, str(error), code="overloaded", retry_after=2))

    def down(request: Request, error: Exception) -> Response:
        return failed(request, ApiError(503, str(error), retry_after=5))

    def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return failed(request, ApiError(error.status_code, str(error.detail)))

    handlers: dict[type[Exception], Callable[[Request, Exception], Response]] = {
        ApiError: failed, BusyError: busy, EngineError: down, HTTPException: other,
    }  # fmt: skip
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Continue a chat."""
        found = await gateway.answer(request, ChatRequest)
        counted(200)
        return found

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completion(request: Request) -> Response:
        """Continue a text."""
        found = await gateway.answer(request, CompletionRequest)
        counted(200)
        return found

    @app.post("/v1/contrast", openapi_extra=_body_of(ContrastRequest))
    async def contrasted(request: Request) -> Response:
        """Answer one prompt under two alphas, token by token."""
        found = await gateway.contrast(request)
        counted(200)
        return found

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        """The page for people."""
        return page()

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """What the key may ask for."""
        return gateway.models(gateway.key_of(request))

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """One of them."""
        data = gateway.models(gateway.key_of(request))["data"]
        if not (found := [m for m in data if m["id"] == name]):
            raise ApiError(404, "the model does not exist", param="model", code="model_not_found")
        return dict(found[0])

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Requests are answered."""
        found = gateway.ready and gateway.engine.alive()
        return JSONResponse({"ready": found}, 200 if found else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(gateway.counts.page(gateway.engine.load()), media_type="text/plain; version=0.0.4")

    return app


def _body_of(kind: type[Asked]) -> dict[str, Any]:
    """How the description of the API shows a body; its parts stand inside of it."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, parts)}}}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A schema with its parts in the place of references to them; none of them holds itself."""
    if isinstance(schema, list):
        return [_inlined(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {k: _inlined(v, parts) for k, v in schema.items()}
