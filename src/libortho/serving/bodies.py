"""From the bytes of a request to an object that is checked once and then used: nothing is parsed twice."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from libortho.serving.errors import ApiError, invalid

Model = TypeVar("Model", bound=BaseModel)

_KINDS = re.compile(r"(constrained-)?str|(list|function-\w+)\[.*")
"""What pydantic puts between the names of fields where one can be of several kinds."""


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body.

    Raises:
        ApiError: 413 if it has more than ``most`` bytes, 408 if it takes longer than this, 415 unless it is JSON.
    """
    for name in ("authorization", "content-type", "content-length"):
        if len(request.headers.getlist(name)) > 1:
            raise invalid(None, f"the header {name} comes twice")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json")
    found = bytearray()

    async def collect() -> None:
        async for part in request.stream():
            found.extend(part)
            if len(found) > most:
                raise ApiError(413, f"the body has more than {most} bytes")

    try:
        await asyncio.wait_for(collect(), seconds)
    except TimeoutError as error:
        raise ApiError(408, "the body took too long") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client went away") from error
    return bytes(found)


def parsed(body: bytes, kind: type[Model]) -> Model:
    """The request that a body holds.

    Raises:
        ApiError: 400 if it is malformed; the message names the field.
    """
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_once)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is no valid JSON ({type(error).__name__})") from error
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(p)[:64] for p in first["loc"] if not _KINDS.fullmatch(str(p)))
        raise invalid(where or None, f"{where or 'the body'}: {first['msg']}") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in one object")
    return found
