"""The output head on a few positions at a time: a row of logits is as wide as the vocabulary."""

from __future__ import annotations

HEAD_POSITIONS = 64
"""Positions whose logits exist at one time."""


def evenly(positions: int) -> list[slice]:
    """Parts of ``HEAD_POSITIONS``, of so many positions."""
    return [slice(i, i + HEAD_POSITIONS) for i in range(0, positions, HEAD_POSITIONS)]
