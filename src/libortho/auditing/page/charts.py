"""Charts of an audit report as inline SVG: numbers in, text out.

Each chart is one pure function that returns a complete ``<svg role="img">`` with ``<title>`` and ``<desc>``. It holds
no colour: a mark takes ``currentColor`` from the class ``s-<style>`` of its group, so that the page's style sheet
decides (light, dark, print). A style also fixes dash and marker, so that lines can be told apart in grey. All text is
escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Band", "Dot", "Level", "Line", "Row", "bars", "dots", "histograms", "lines", "nice_ticks", "spread"]

WIDTH = 360  # about a phone's text column, so that labels are never scaled below their nominal 11 px
_CHARACTER = 5.9  # mean width of a character at 11 px, for layout only
_DASH = {
    "off": "",
    "on": "7 3",
    "reference": "2 3",
    "original": "10 3 2 3",
    "quantised": "4 2",
    "random": "1 2",
    "magnitude": "8 2 2 2 2 2",
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
    style: str = "reference"


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
    style: str = "off"


@dataclass(frozen=True)
class _Scale:
    """Data to pixels, linear or logarithmic; values outside are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
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


def lines(
    key: str,
    title: str,
    description: str,
    series: Sequence[Line],
    *,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    bands: Sequence[Band] = (),
    levels: Sequence[Level] = (),
    log: bool = False,
    diagonal: bool = False,
    legend: bool = False,
    whole: bool = False,
    format_x: Callable[[float], str] | None = None,
    format_y: Callable[[float], str] | None = None,
) -> str:
    """Lines over a common x.

    Args:
        key: Unique in the page; ids are made of it.
        title: Accessible name.
        description: What the chart shows, in words.
        series: The lines; labelled at their right end, or in a legend above with ``legend``.
        x_label: Name and unit of x. The name of y belongs in the caption.
        x_range: Default: the data's.
        y_range: Default: round numbers around the data.
        bands: Shaded intervals of x.
        levels: Values of y to compare with.
        log: Both axes logarithmic; smaller values are drawn at the edge.
        diagonal: Also y = x.
        legend: See ``series``.
        whole: x counts something: no ticks between whole numbers.
        format_x: Tick label of x.
        format_y: Tick label of y.
    """
    ticks_x: list[float] | None = None
    show_x, show_y = format_x or _short, format_y or _short
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points if y is not None] + [level.value for level in levels]
    x_low, x_high = x_range or _widened(min(xs, default=0.0), max(xs, default=1.0))
    if y_range is None:
        ticks = nice_ticks(*_widened(min(ys, default=0.0), max(ys, default=1.0)), 6)
        y_range = ticks[0], ticks[-1]
    head, key_rows = _legend([(line.style, line.label) for line in series], WIDTH) if legend else ("", 0)
    named = [line.label for line in series if not legend and len(series) > 1]
    right = WIDTH - (16 + max(map(len, named)) * _CHARACTER if named else 14)
    top = 12 + 17 * key_rows + 12 * any(band.label for band in bands)
    height = 212 + top
    bottom = height - 36
    left = 12 + _CHARACTER * max((len(show_y(t)) for t in _Scale(*y_range, bottom, top, log).ticks(6)), default=2)
    x, y = _Scale(x_low, x_high, left, right, log), _Scale(*y_range, bottom, top, log)
    if whole:
        ticks_x = [t for t in x.ticks(6) if t == int(t)]
    parts = [head]
    for band in bands:
        a, b = x(band.low), x(band.high)
        parts.append(
            f'<rect class="band" x="{_n(a)}" y="{_n(top)}" width="{_n(max(b - a, 2))}" height="{_n(bottom - top)}"/>'
        )
        parts.append(f'<path class="band-edge" d="M{_n(b)} {_n(top)}V{_n(bottom)}M{_n(a)} {_n(top)}V{_n(bottom)}"/>')
    parts += [_y_axis(y, left, right, show_y), _x_axis(x, bottom, height, show_x, x_label, ticks_x)]
    if diagonal:
        steps = [x_low * (x_high / x_low) ** (i / 20) if log else x_low + (x_high - x_low) * i / 20 for i in range(21)]
        path = "M" + "L".join(f"{_n(x(t))} {_n(y(t))}" for t in steps if t >= y_range[0])
        parts.append(f'<path class="rule" d="{path}"/>')
    for level in levels:
        at = y(level.value)
        above = at - 5 if at - 16 > top else at + 13
        parts.append(
            f'<g class="s-{escape(level.style)}"><path class="level" d="M{_n(left)} {_n(at)}H{_n(right)}"/>'
            f'<text class="label halo" x="{_n(right - 3)}" y="{_n(above)}" '
            f'text-anchor="end">{escape(level.label)}</text></g>'
        )
    ends: list[tuple[float, str, str]] = []
    for line in series:
        parts.append(_draw(line, x, y, show_x, show_y))
        last = next((v for _, v in reversed(line.points) if v is not None), None)
        if named and last is not None:
            ends.append((y(last), line.label, line.style))
    for at, (_, label, style) in zip(spread([e[0] for e in ends], 13, top + 4, bottom), ends, strict=True):
        parts.append(
            f'<text class="label s-{escape(style)}" x="{_n(right + 8)}" y="{_n(at + 4)}" '
            f'fill="currentColor">{escape(label)}</text>'
        )
    for band in bands:
        if band.label:
            a, b = x(band.low), x(band.high)
            room = len(band.label) * _CHARACTER
            at = min(max((a + b) / 2, left + room / 2), right - room / 2)
            parts.append(
                f'<text class="note" x="{_n(at)}" y="{_n(top - 5)}" text-anchor="middle">{escape(band.label)}</text>'
            )
    return _svg(key, title, description, height, parts)


def dots(
    key: str,
    title: str,
    description: str,
    rows: Sequence[Row],
    *,
    x_label: str,
    x_range: tuple[float, float],
    level: float | None = None,
    format_x: Callable[[float], str] | None = None,
) -> str:
    """Values with intervals, one group of dots a row (a forest plot).

    Args:
        key: Unique in the page.
        title: Accessible name.
        description: What the chart shows, in words.
        rows: Each with its dots; the legend names every style once.
        x_label: Name and unit of x.
        x_range: Ends of x.
        level: A value of x to compare with, drawn dotted.
        format_x: Tick label of x.
    """
    show = format_x or _short
    seen = {dot.style: dot.label for row in rows for dot in row.dots}
    head, key_rows = _legend(list(seen.items()), WIDTH)
    left = min(22 + max((len(row.label) for row in rows), default=0) * _CHARACTER, WIDTH * 0.4)
    top = 12 + 17 * key_rows
    heights = [12 + 11 * max(len(row.dots), 1) for row in rows]
    bottom = top + sum(heights)
    height = bottom + 36
    x = _Scale(*x_range, left, WIDTH - 14)
    parts = [head]
    for t in x.ticks(6):
        parts.append(f'<path class="grid" d="M{_n(x(t))} {_n(top)}V{_n(bottom)}"/>')
    if level is not None:
        parts.append(f'<path class="rule" d="M{_n(x(level))} {_n(top)}V{_n(bottom)}"/>')
    at = float(top)
    for row, size in zip(rows, heights, strict=True):
        parts.append(
            f'<text class="tick" x="{_n(left - 10)}" y="{_n(at + size / 2 + 4)}" '
            f'text-anchor="end">{escape(_cut(row.label, 20))}</text>'
        )
        for i, dot in enumerate(row.dots):
            y = at + 6 + 11 * (i + 0.5)
            interval = ""
            if dot.low is not None and dot.high is not None:
                interval = f'<path class="whisker" d="M{_n(x(dot.low))} {_n(y)}H{_n(x(dot.high))}"/>'
            text = f"{row.label}, {dot.label}: {show(dot.value)}"
            if dot.low is not None and dot.high is not None:
                text += f" ({show(dot.low)} to {show(dot.high)})"
            mark = _marker(dot.style, x(dot.value), y)
            parts.append(f'<g class="s-{escape(dot.style)}"><title>{escape(text)}</title>{interval}{mark}</g>')
        at += size
        parts.append(f'<path class="grid" d="M{_n(left)} {_n(at)}H{_n(WIDTH - 14)}"/>')
    parts.append(_x_axis(x, bottom, height, show, x_label))
    return _svg(key, title, description, height, parts)


def histograms(
    key: str, title: str, description: str, rows: Sequence[Row], *, x_label: str, bins: int = 12, unit: str = ""
) -> str:
    """One small histogram a row, over common bins; the median is marked and written out.

    Args:
        key: Unique in the page.
        title: Accessible name.
        description: What the chart shows, in words.
        rows: Each with its values, at least one.
        x_label: Name and unit of x.
        bins: How many at most; bin edges are round numbers.
        unit: Written behind the median.
    """
    everything = [v for row in rows for v in row.values]
    edges = nice_ticks(*_widened(min(everything), max(everything)), bins + 1)
    counts = [[0] * (len(edges) - 1) for _ in rows]
    for row, count in zip(rows, counts, strict=True):
        for value in row.values:
            count[min(sum(value >= e for e in edges[1:]), len(edges) - 2)] += 1
    tallest = max(max(c) for c in counts)
    left, right, size, height = 30, WIDTH - 14, 70, 70 * len(rows) + 40
    x = _Scale(edges[0], edges[-1], left, right)
    parts = []
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        base = (i + 1) * size
        y = _Scale(0, tallest, base, base - size + 26)
        group = [f'<path class="axis" d="M{left} {base}H{right}"/>']
        for a, b, c in zip(edges, edges[1:], count, strict=False):
            if c:
                group.append(
                    f'<rect class="fill p-{escape(row.style)}" x="{_n(x(a) + 0.5)}" y="{_n(y(c))}" '
                    f'width="{_n(x(b) - x(a) - 1)}" height="{_n(base - y(c))}">'
                    f"<title>{escape(row.label)}: {c} between {_short(a)} and {_short(b)}</title></rect>"
                )
        middle = _median(row.values)
        group.append(f'<path class="median" d="M{_n(x(middle))} {_n(base - size + 22)}V{base}"/>')
        group.append(
            f'<text class="label" x="{left}" y="{_n(base - size + 16)}" fill="currentColor">{escape(row.label)}'
            f'<tspan class="note"> median {_short(middle)}{escape(unit)}, n = {len(row.values)}</tspan></text>'
        )
        parts.append(f'<g class="s-{escape(row.style)}">{"".join(group)}</g>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{_n(y(tallest) + 4)}" text-anchor="end">{tallest}</text>')
    parts.append(_x_axis(x, size * len(rows), height, _short, x_label))
    return _svg(key, title, description, height, parts)


def bars(
    key: str, title: str, description: str, values: Sequence[float], *, x_label: str, unit: str = "", style: str = "off"
) -> str:
    """One vertical bar for each index 0, 1, 2, ...; the highest is labelled.

    Args:
        key: Unique in the page.
        title: Accessible name.
        description: What the chart shows, in words.
        values: Not negative; at least one.
        x_label: Name of the index.
        unit: Written behind a value.
        style: Subject key.
    """
    ticks = nice_ticks(0, max(max(values), 1e-9), 4)
    height, top = 200, 22
    bottom, right = height - 36, WIDTH - 10
    left = 14 + _CHARACTER * max(len(_short(t)) for t in ticks)
    y = _Scale(0, ticks[-1], bottom, top)
    step = (right - left) / len(values)
    x = _Scale(-0.5, max(len(values) - 0.5, 0.5), left, right)
    parts = [_y_axis(y, left, right, _short), f'<g class="s-{escape(style)}">']
    for i, value in enumerate(values):
        parts.append(
            f'<rect class="fill p-{escape(style)}" x="{_n(left + i * step + step * 0.12)}" y="{_n(y(value))}" '
            f'width="{_n(step * 0.76)}" '
            f'height="{_n(bottom - y(value))}"><title>{escape(x_label)} {i}: '
            f"{_short(value)}{escape(unit)}</title></rect>"
        )
    best = max(range(len(values)), key=lambda i: values[i])
    anchor = "start" if best < 2 else "end" if best > len(values) - 3 else "middle"
    parts.append(
        f'</g><text class="label halo" x="{_n(left + (best + 0.5) * step)}" y="{_n(y(values[best]) - 5)}" '
        f'text-anchor="{anchor}">'
        f"{_short(values[best])}{escape(unit)} in {escape(x_label)} {best}</text>"
    )
    whole = [t for t in nice_ticks(0, max(len(values) - 1, 1), 6) if t == int(t) and t < len(values)]
    parts.append(_x_axis(x, bottom, height, _short, x_label, whole))
    return _svg(key, title, description, height, parts)


def _svg(key: str, title: str, description: str, height: float, parts: Sequence[str]) -> str:
    name = escape(f"chart-{key}")
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" height="{_n(height)}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{"".join(parts)}</svg>'
    )


def _draw(line: Line, x: _Scale, y: _Scale, show_x: Callable[[float], str], show_y: Callable[[float], str]) -> str:
    path, marks, last = "", "", None
    crowded = len(line.points) > 16
    for i, (a, b) in enumerate(line.points):
        if b is None:
            last = None
            continue
        at = x(a), y(b)
        path += (
            f"M{_n(at[0])} {_n(at[1])}"
            if last is None
            else f"H{_n(at[0])}V{_n(at[1])}"
            if line.stepped
            else f"L{_n(at[0])} {_n(at[1])}"
        )
        last = at
        if line.stepped and not (x.low < a < x.high and y.low < b):
            continue  # curves share their ends
        if not crowded or i % (len(line.points) // 6) == len(line.style) % 3:
            marks += (
                f"<g><title>{escape(f'{line.label}, {show_x(a)}: {show_y(b)}')}</title>{_marker(line.style, *at)}</g>"
            )
    return (
        f'<g class="s-{escape(line.style)}"><path class="line" '
        f'stroke-dasharray="{_DASH.get(line.style, "") or "none"}" d="{path}"/>{marks}</g>'
    )


def _marker(style: str, x: float, y: float) -> str:
    a, b = _n(x), _n(y)
    shapes = {
        "off": f'<circle cx="{a}" cy="{b}" r="3.2" class="mark"/>',
        "on": f'<rect x="{_n(x - 3)}" y="{_n(y - 3)}" width="6" height="6" class="mark"/>',
        "reference": f'<path d="M{a} {_n(y - 4)}l4 7h-8z" class="mark"/>',
        "original": f'<path d="M{a} {_n(y - 4)}l4 4l-4 4l-4 -4z" class="mark open"/>',
        "quantised": f'<circle cx="{a}" cy="{b}" r="3" class="mark open"/>',
        "random": f'<path d="M{_n(x - 3)} {_n(y - 3)}l6 6m0 -6l-6 6" class="mark open"/>',
        "magnitude": f'<path d="M{a} {_n(y - 4)}v8m-4 -4h8" class="mark open"/>',
    }
    return shapes.get(style, shapes["quantised"])


def _legend(items: Sequence[tuple[str, str]], width: float) -> tuple[str, int]:
    parts, at, row = [], 12.0, 0
    for style, label in items:
        room = 34 + len(label) * _CHARACTER + 14
        if at + room > width and at > 12:
            at, row = 12.0, row + 1
        y = 10 + 17 * row
        parts.append(
            f'<g class="s-{escape(style)}"><path class="line" stroke-dasharray="{_DASH.get(style, "") or "none"}" '
            f'd="M{_n(at)} {y}h26"/>'
            f'{_marker(style, at + 13, y)}<text class="label" x="{_n(at + 32)}" y="{y + 4}" '
            f'fill="currentColor">{escape(label)}</text></g>'
        )
        at += room
    return "".join(parts), row + 1 if items else 0


def _y_axis(y: _Scale, left: float, right: float, show: Callable[[float], str]) -> str:
    return "".join(
        f'<path class="grid" d="M{_n(left)} {_n(y(t))}H{_n(right)}"/>'
        f'<text class="tick" x="{_n(left - 6)}" y="{_n(y(t) + 4)}" text-anchor="end">{escape(show(t))}</text>'
        for t in y.ticks(6)
    )


def _x_axis(
    x: _Scale,
    bottom: float,
    height: float,
    show: Callable[[float], str],
    label: str,
    ticks: Sequence[float] | None = None,
) -> str:
    parts = [f'<path class="axis" d="M{_n(x.start)} {_n(bottom)}H{_n(x.end)}"/>']
    for t in x.ticks(6) if ticks is None else ticks:
        text = show(t)
        half = len(text) * _CHARACTER / 2
        at = min(max(x(t), half), WIDTH - half)
        parts.append(f'<path class="axis" d="M{_n(x(t))} {_n(bottom)}v4"/>')
        parts.append(
            f'<text class="tick" x="{_n(at)}" y="{_n(bottom + 16)}" text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(
        f'<text class="name" x="{_n((x.start + x.end) / 2)}" y="{_n(height - 4)}" '
        f'text-anchor="middle">{escape(label)}</text>'
    )
    return "".join(parts)


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "\u2212") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "\u2212")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
