"""Whose turn it is."""

from __future__ import annotations

import random


class Turns:
    """Endless batches of indices in which every index comes once before any comes again.

    Attributes:
        pool: Indices still to come before the next shuffle; with the state of ``rng``, all that is to be remembered.
    """

    def __init__(self, count: int, size: int, rng: random.Random) -> None:
        self.count, self.size, self.rng = count, min(size, count), rng
        self.pool: list[int] = []

    def __next__(self) -> list[int]:
        while len(self.pool) < self.size:
            fresh = list(range(self.count))
            self.rng.shuffle(fresh)
            self.pool += fresh
        batch, self.pool = self.pool[: self.size], self.pool[self.size :]
        return batch
