"""What is kept of requests: a line for each, and counts of all together.

No count is kept by stream, alpha or key: who reads the counts is not to learn who asks for what.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from errno import ENOSPC
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from libortho.core.errors import ConfigError
from libortho.serving.errors import ApiError

logger = logging.getLogger("libortho.serving.audit")


class AuditLog:
    """A line of JSON for each request, written before it is answered.

    Args:
        path: The file; None for the log of the process.

    Raises:
        ConfigError: if it cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self._file, self._cut = None, False
        if path is not None:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                raise ConfigError(f"audit_log {path} cannot be opened: {error.strerror}") from error

    def write(self, line: Mapping[str, Any], *, needed: bool) -> None:
        """Write one line.

        Args:
            line: What is to be kept.
            needed: Whether the request may not be answered without it.

        Raises:
            ApiError: 503 if it is needed and cannot be written.
        """
        text = json.dumps({"time": round(time.time(), 3), **line}, separators=(",", ":"))
        if self._file is None:
            logger.info("%s", text)
            return
        data = (b"\n" if self._cut else b"") + text.encode() + b"\n"
        try:
            written = os.write(self._file, data)
            self._cut = written < len(data)
            if self._cut:
                raise OSError(ENOSPC, "a part of a line was written")
        except OSError as error:
            logger.error("an audit line cannot be written: %s", error)
            if needed:
                raise ApiError(503, "requests for streams cannot be recorded now", retry_after=30) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Counts:
    """Figures for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "libortho_requests", "Requests, by what they were answered with", ["status"], registry=self.registry
        )
        self.tokens = Counter("libortho_tokens", "Tokens, read and said", ["kind"], registry=self.registry)
        self.first = Histogram(
            "libortho_first_token_seconds", "From a request to its first text", registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )  # fmt: skip
        self.running = Gauge("libortho_rows_running", "Answers that are given now", registry=self.registry)
        self.waiting = Gauge("libortho_rows_waiting", "Answers that wait", registry=self.registry)

    def page(self, load: tuple[int, int]) -> bytes:
        """All of them, as Prometheus reads them; ``load`` is what the engine says of itself."""
        self.running.set(load[0])
        self.waiting.set(load[1])
        return generate_latest(self.registry)
