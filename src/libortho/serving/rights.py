"""Which alphas a request gets: those that it asks for, if its key allows each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from libortho.serving.errors import ApiError, invalid
from libortho.serving.keys import Key


def asked_alphas(model: str, name: str, alpha: Any, field: str = "alpha") -> dict[str, float]:
    """The streams of a request, by the name of its model (``name+hr+legal``: each at 1) or by this field.

    Raises:
        ApiError: 404 for another model; 400 for alphas that are no numbers in [0, 1].
    """
    base, *streams = model.split("+")
    if base != name:
        raise ApiError(404, "the model does not exist", param="model", code="model_not_found")
    found = dict.fromkeys(streams, 1.0)
    if alpha is None:
        return found
    if found:
        raise invalid(field, f"both the model and {field} name streams; ask for {name!r} with {field}")
    if not isinstance(alpha, Mapping):
        raise invalid(field, f'{field} is no object; expected {{"stream": number in [0, 1]}}')
    for stream, value in alpha.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:  # nor NaN
            raise invalid(field, f"{field} of {stream[:64]!r} is no number in [0, 1]")
    return {str(n): float(v) for n, v in alpha.items()}


def granted(key: Key, asked: Mapping[str, float], streams: Iterable[str], field: str = "alpha") -> dict[str, float]:
    """The alpha of every stream of the model: what was asked for, and 0.

    Raises:
        ApiError: 403 if the key does not allow it. Whether a stream exists does not show.
    """
    known = set(streams)
    for name, value in asked.items():
        # A share of 0 is refused like any other: it would tell that the stream exists.
        if name not in known or name not in key.streams or value > key.streams[name]:
            raise ApiError(403, "this key may not ask for these streams", param=field, code="stream_not_allowed")
    return {n: asked.get(n, 0.0) for n in known}
