"""The method of the library, as stored rows name it; also read where torch is not loaded."""

from __future__ import annotations

from typing import Any

METHOD: dict[str, Any] = {"objective": "gauss-newton", "gradient_weight": 0.0}
"""Stored rows of earlier methods have other values here."""
