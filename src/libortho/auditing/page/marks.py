"""What charts are made of: data of lines and dots, scales, axes, markers and legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from libortho.auditing.schema import MAGNITUDE, OFF, ON, ORIGINAL, QUANTISED, RANDOM, REFERENCE

WIDTH = 360
"""About a phone's text column, so that labels are never scaled below their nominal 11 px."""
CHARACTER = 5.9
"""Mean width of a character at 11 px, for layout only."""
DASH = {
    OFF: "",
    ON: "7 3",
    REFERENCE: "2 3",
    ORIGINAL: "10 3 2 3",
    QUANTISED: "4 2",
    RANDOM: "1 2",
    MAGNITUDE: "8 2 2 2 2 2",
}


@dataclass(frozen=True)
class Line:
    """One line. A y of None interrupts it.

    Attributes:
        label: Written at its end, or in the legend.
        points: (x, y) in drawing order.
        style: Subject key, which fixes colour, dash and marker.
        stepped: Horizontal first, then vertical (an empirical ROC).
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    style: str
    stepped: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line at a value to compare with."""

    value: float
    label: str
    style: str = REFERENCE


@dataclass(frozen=True)
class Band:
    """A shaded interval of x."""

    low: float
    high: float
    label: str = ""


@dataclass(frozen=True)
class Dot:
    """A value with its interval."""

    style: str
    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A labelled row: of dots, or of values to count."""

    label: str
    dots: Sequence[Dot] = ()
    values: Sequence[float] = ()
    style: str = OFF


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linear or logarithmic; values outside are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value, which is cut to the scale."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About so many round numbers within the scale."""
        if not self.log:
            return [t for t in nice_ticks(self.low, self.high, count) if self.low - 1e-9 <= t <= self.high + 1e-9]
        return [
            10.0**e for e in range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        ]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    raw = (high - low) / max(count - 1, 1)
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near ``wanted``, in the same order, at least ``gap`` apart, within [low, high] where possible."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    edge = low
    for i in order:
        placed[i] = max(wanted[i], edge)
        edge = placed[i] + gap
    edge = high
    for i in reversed(order):
        placed[i] = min(placed[i], edge)
        edge = placed[i] - gap
    return placed


def marker(style: str, x: float, y: float) -> str:
    """The mark of a subject at a point."""
    a, b = px(x), px(y)
    shapes = {
        OFF: f'<circle cx="{a}" cy="{b}" r="3.2" class="mark"/>',
        ON: f'<rect x="{px(x - 3)}" y="{px(y - 3)}" width="6" height="6" class="mark"/>',
        REFERENCE: f'<path d="M{a} {px(y - 4)}l4 7h-8z" class="mark"/>',
        ORIGINAL: f'<path d="M{a} {px(y - 4)}l4 4l-4 4l-4 -4z" class="mark open"/>',
        QUANTISED: f'<circle cx="{a}" cy="{b}" r="3" class="mark open"/>',
        RANDOM: f'<path d="M{px(x - 3)} {px(y - 3)}l6 6m0 -6l-6 6" class="mark open"/>',
        MAGNITUDE: f'<path d="M{a} {px(y - 4)}v8m-4 -4h8" class="mark open"/>',
    }
    return shapes.get(style, shapes[QUANTISED])


def draw_legend(items: Sequence[tuple[str, str]], width: float) -> tuple[str, int]:
    """The legend as SVG, and its height."""
    parts, at, row = [], 12.0, 0
    for style, label in items:
        room = 34 + len(label) * CHARACTER + 14
        if at + room > width and at > 12:
            at, row = 12.0, row + 1
        y = 10 + 17 * row
        parts.append(
            f'<g class="s-{escape(style)}"><path class="line" stroke-dasharray="{DASH.get(style, "") or "none"}" '
            f'd="M{px(at)} {y}h26"/>'
            f'{marker(style, at + 13, y)}<text class="label" x="{px(at + 32)}" y="{y + 4}" '
            f'fill="currentColor">{escape(label)}</text></g>'
        )
        at += room
    return "".join(parts), row + 1 if items else 0


def y_axis(y: Scale, left: float, right: float, show: Callable[[float], str]) -> str:
    """Grid lines and labels of the vertical axis."""
    return "".join(
        f'<path class="grid" d="M{px(left)} {px(y(t))}H{px(right)}"/>'
        f'<text class="tick" x="{px(left - 6)}" y="{px(y(t) + 4)}" text-anchor="end">{escape(show(t))}</text>'
        for t in y.ticks(6)
    )


def x_axis(
    x: Scale,
    bottom: float,
    height: float,
    show: Callable[[float], str],
    label: str,
    ticks: Sequence[float] | None = None,
) -> str:
    """Grid lines, labels and title of the horizontal axis."""
    parts = [f'<path class="axis" d="M{px(x.start)} {px(bottom)}H{px(x.end)}"/>']
    for t in x.ticks(6) if ticks is None else ticks:
        text = show(t)
        half = len(text) * CHARACTER / 2
        at = min(max(x(t), half), WIDTH - half)
        parts.append(f'<path class="axis" d="M{px(x(t))} {px(bottom)}v4"/>')
        parts.append(
            f'<text class="tick" x="{px(at)}" y="{px(bottom + 16)}" text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(
        f'<text class="name" x="{px((x.start + x.end) / 2)}" y="{px(height - 4)}" '
        f'text-anchor="middle">{escape(label)}</text>'
    )
    return "".join(parts)


def widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def short(value: float) -> str:
    """A number in at most three digits."""
    return f"{value:.3g}".replace("-", "\u2212") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "\u2212")


def cut(text: str, length: int) -> str:
    """The text, cut with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def px(value: float) -> str:
    """A coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")
