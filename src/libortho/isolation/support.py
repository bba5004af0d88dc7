"""Which columns a request takes, and what the layers do on its records and on text to keep."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import nn

from libortho.core.errors import ConfigError
from libortho.core.surgery import linear_shape
from libortho.isolation.config import IsolateConfig
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.request import SALIENCY_RECORDS
from libortho.lm.model import LanguageModel
from libortho.selection.columns import best_columns, contrast, taken
from libortho.selection.readings import Readings, drawn_labels, read_layers, summed_odds
from libortho.text.encoding import IGNORE, Encoded

_RETAIN_TOKENS = 2560
"""Tokens of retain text that are read for a request of up to ``SALIENCY_RECORDS`` records, and how many times as many
for a large one: the more is to be moved, the better the curvature must be known."""
_MOST = 4.0


@dataclass
class RequestReadings:
    """What the layers do on the records, on text to keep and on neighbours; read at the first use.

    Attributes:
        lm: The model.
        targets: Its layers.
        forget: The records.
        retain: Text to keep.
        seed: Of the choice of records and neighbours, and of the labels that are drawn.
    """

    lm: LanguageModel
    targets: Mapping[str, nn.Module]
    forget: Sequence[ForgetRecord]
    retain: Sequence[Encoded]
    seed: int

    @cached_property
    def own(self) -> Readings:
        """Of the records, or pieces of them."""
        return read_layers(self.lm, self.targets, self._pieces(), summed_odds)

    @cached_property
    def kept(self) -> list[Readings]:
        """Of text to keep, and of one neighbour of each record where there are any."""
        loss = drawn_labels(self.seed)
        return [read_layers(self.lm, self.targets, items, loss) for items in self._texts() if items]

    def tokens(self) -> int:
        """Tokens of all that is read."""
        return sum(len(e.ids) for items in (self._pieces(), *self._texts()) for e in items)

    def release(self) -> None:
        """Drop what was read, the largest thing in memory; it is read anew where it is asked for again."""
        for name in ("own", "kept"):
            self.__dict__.pop(name, None)

    def _pieces(self) -> list[Encoded]:
        return self._some([piece for r in self.forget for piece in cut_up(r.secret, r.pieces)])

    def _texts(self) -> tuple[Sequence[Encoded], Sequence[Encoded]]:
        wanted = round(_RETAIN_TOKENS * min(_MOST, max(1.0, len(self.forget) / SALIENCY_RECORDS)))
        sizes = torch.tensor([len(t.ids) for t in self.retain]).cumsum(0)
        around = self._some([r.neighbours[0] for r in self.forget if r.neighbours])
        return self.retain[: int((sizes <= wanted).sum().clamp_min(1))], around

    def _some(self, items: Sequence[Encoded]) -> list[Encoded]:
        return random.Random(self.seed).sample(items, min(len(items), SALIENCY_RECORDS))

    def inputs(self, name: str) -> torch.Tensor:
        """What a layer is given, (tokens, in_features), on all of it."""
        return torch.cat([r.inputs[name] for r in (*self.kept, self.own)])


Select = Callable[[RequestReadings, IsolateConfig], dict[str, torch.Tensor]]
"""What chooses columns: a function of what the layers do on the request, and of the configuration, that gives ascending
column indices by layer."""


def select_columns(readings: RequestReadings, config: IsolateConfig) -> dict[str, torch.Tensor]:
    """The columns whose gradients are about the records and not about text to keep, within the budget.

    See :func:`~libortho.selection.columns.contrast`.
    """
    ratio, targets, kept = float(config.ratio), readings.targets, [r.saliency for r in readings.kept]
    return best_columns(contrast(readings.own.saliency, kept, taken(targets), ratio), ratio, targets)


def check_columns(support: Mapping[str, torch.Tensor], targets: Mapping[str, nn.Module]) -> None:
    """Refuse columns that a stream cannot hold.

    Args:
        support: Column indices by layer, as a ``Select`` gives them.
        targets: The layers that may give columns.

    Raises:
        ConfigError: if there is no column, a layer is no target, or its indices are not ascending, not those of columns
            that it has, or an earlier stream's.
    """
    if not any(len(index) for index in support.values()):
        raise ConfigError("select gave no column; expected column indices of at least one layer")
    held = taken(targets)
    for name, index in support.items():
        if name not in targets:
            raise ConfigError(f"select gave columns of {name!r}; expected layers among {sorted(targets)}")
        width = linear_shape(targets[name])[1]
        numbers = index.flatten().tolist()
        if index.dtype != torch.long or index.dim() != 1 or numbers != sorted({n for n in numbers if 0 <= n < width}):
            raise ConfigError(
                f"select gave {name} the columns {numbers[:8]}, {index.dtype} of shape {tuple(index.shape)}; expected "
                f"ascending indices from 0 to {width - 1} without repetition, as torch.int64"
            )
        if name in held and bool(held[name][index].any()):
            raise ConfigError(f"select gave {name} columns that an earlier stream has; expected columns that are free")


def cut_up(item: Encoded, pieces: int) -> list[Encoded]:
    """The text with the labels of one piece of its completion at a time."""
    places = [t for t, label in enumerate(item.labels) if label != IGNORE]
    ends = [round(n * len(places) / pieces) for n in range(pieces + 1)]
    return [
        Encoded(item.ids, tuple(x if t in own else IGNORE for t, x in enumerate(item.labels)))
        for own in (set(places[a:b]) for a, b in pairwise(ends))
    ]
