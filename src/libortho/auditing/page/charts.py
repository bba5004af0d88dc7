"""Charts of an audit report as inline SVG: numbers in, text out.

Each chart is one pure function that returns a complete ``<svg role="img">`` with ``<title>`` and ``<desc>``. All take
a key that is unique in the page, from which ids are made, an accessible name, and what they show in words. A chart
holds no colour: a mark takes ``currentColor`` from the class ``s-<style>`` of its group, so that the page's style
sheet decides (light, dark, print). A style also fixes dash and marker, so that lines can be told apart in grey. All
text is escaped here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from html import escape

from libortho.auditing.page.marks import (
    CHARACTER,
    DASH,
    WIDTH,
    Band,
    Level,
    Line,
    Row,
    Scale,
    cut,
    draw_legend,
    marker,
    nice_ticks,
    px,
    short,
    spread,
    widened,
    x_axis,
    y_axis,
)

_BINS = 18
"""Bins of a histogram at most; their edges are round numbers."""


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
    show_x, show_y = format_x or short, format_y or short
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points if y is not None] + [level.value for level in levels]
    x_low, x_high = x_range or widened(min(xs, default=0.0), max(xs, default=1.0))
    if y_range is None:
        ticks = nice_ticks(*widened(min(ys, default=0.0), max(ys, default=1.0)), 6)
        y_range = ticks[0], ticks[-1]
    head, key_rows = draw_legend([(line.style, line.label) for line in series], WIDTH) if legend else ("", 0)
    named = [line.label for line in series if not legend and len(series) > 1]
    right = WIDTH - (16 + max(map(len, named)) * CHARACTER if named else 14)
    top = 12 + 17 * key_rows + 12 * any(band.label for band in bands)
    height = 212 + top
    bottom = height - 36
    left = 12 + CHARACTER * max((len(show_y(t)) for t in Scale(*y_range, bottom, top, log).ticks(6)), default=2)
    x, y = Scale(x_low, x_high, left, right, log), Scale(*y_range, bottom, top, log)
    if whole:
        ticks_x = [t for t in x.ticks(6) if t == int(t)]
    parts = [head]
    for band in bands:
        a, b = x(band.low), x(band.high)
        parts.append(
            f'<rect class="band" x="{px(a)}" y="{px(top)}" width="{px(max(b - a, 2))}" height="{px(bottom - top)}"/>'
        )
        parts.append(f'<path class="band-edge" d="M{px(b)} {px(top)}V{px(bottom)}M{px(a)} {px(top)}V{px(bottom)}"/>')
    parts += [y_axis(y, left, right, show_y), x_axis(x, bottom, height, show_x, x_label, ticks_x)]
    if diagonal:
        steps = [x_low * (x_high / x_low) ** (i / 20) if log else x_low + (x_high - x_low) * i / 20 for i in range(21)]
        path = "M" + "L".join(f"{px(x(t))} {px(y(t))}" for t in steps if t >= y_range[0])
        parts.append(f'<path class="rule" d="{path}"/>')
    for level in levels:
        at = y(level.value)
        above = at - 5 if at - 16 > top else at + 13
        parts.append(
            f'<g class="s-{escape(level.style)}"><path class="level" d="M{px(left)} {px(at)}H{px(right)}"/>'
            f'<text class="label halo" x="{px(right - 3)}" y="{px(above)}" '
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
            f'<text class="label s-{escape(style)}" x="{px(right + 8)}" y="{px(at + 4)}" '
            f'fill="currentColor">{escape(label)}</text>'
        )
    for band in bands:
        if band.label:
            a, b = x(band.low), x(band.high)
            room = len(band.label) * CHARACTER
            at = min(max((a + b) / 2, left + room / 2), right - room / 2)
            parts.append(
                f'<text class="note" x="{px(at)}" y="{px(top - 5)}" text-anchor="middle">{escape(band.label)}</text>'
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
) -> str:
    """Values with intervals, one group of dots a row (a forest plot).

    Args:
        rows: Each with its dots; the legend names every style once.
        x_label: Name and unit of x.
        x_range: Ends of x.
        level: A value of x to compare with, drawn dotted.
    """
    seen = {dot.style: dot.label for row in rows for dot in row.dots}
    head, key_rows = draw_legend(list(seen.items()), WIDTH)
    left = min(22 + max((len(row.label) for row in rows), default=0) * CHARACTER, WIDTH * 0.4)
    top = 12 + 17 * key_rows
    heights = [12 + 11 * max(len(row.dots), 1) for row in rows]
    bottom = top + sum(heights)
    height = bottom + 36
    x = Scale(*x_range, left, WIDTH - 14)
    parts = [head]
    for t in x.ticks(6):
        parts.append(f'<path class="grid" d="M{px(x(t))} {px(top)}V{px(bottom)}"/>')
    if level is not None:
        parts.append(f'<path class="rule" d="M{px(x(level))} {px(top)}V{px(bottom)}"/>')
    at = float(top)
    for row, size in zip(rows, heights, strict=True):
        parts.append(
            f'<text class="tick" x="{px(left - 10)}" y="{px(at + size / 2 + 4)}" '
            f'text-anchor="end">{escape(cut(row.label, 20))}</text>'
        )
        for i, dot in enumerate(row.dots):
            y = at + 6 + 11 * (i + 0.5)
            interval = ""
            if dot.low is not None and dot.high is not None:
                interval = f'<path class="whisker" d="M{px(x(dot.low))} {px(y)}H{px(x(dot.high))}"/>'
            text = f"{row.label}, {dot.label}: {short(dot.value)}"
            if dot.low is not None and dot.high is not None:
                text += f" ({short(dot.low)} to {short(dot.high)})"
            mark = marker(dot.style, x(dot.value), y)
            parts.append(f'<g class="s-{escape(dot.style)}"><title>{escape(text)}</title>{interval}{mark}</g>')
        at += size
        parts.append(f'<path class="grid" d="M{px(left)} {px(at)}H{px(WIDTH - 14)}"/>')
    parts.append(x_axis(x, bottom, height, short, x_label))
    return _svg(key, title, description, height, parts)


def histograms(key: str, title: str, description: str, rows: Sequence[Row], *, x_label: str, unit: str = "") -> str:
    """One small histogram a row, over common bins; the median is marked and written out.

    Args:
        rows: Each with its values, at least one.
        x_label: Name and unit of x.
        unit: Written behind the median.
    """
    everything = [v for row in rows for v in row.values]
    edges = nice_ticks(*widened(min(everything), max(everything)), _BINS + 1)
    counts = [[0] * (len(edges) - 1) for _ in rows]
    for row, count in zip(rows, counts, strict=True):
        for value in row.values:
            count[min(sum(value >= e for e in edges[1:]), len(edges) - 2)] += 1
    tallest = max(max(c) for c in counts)
    left, right, size, height = 30, WIDTH - 14, 70, 70 * len(rows) + 40
    x = Scale(edges[0], edges[-1], left, right)
    parts = []
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        base = (i + 1) * size
        y = Scale(0, tallest, base, base - size + 26)
        group = [f'<path class="axis" d="M{left} {base}H{right}"/>']
        for a, b, c in zip(edges, edges[1:], count, strict=False):
            if c:
                text = f"{row.label}: {c} between {short(a)} and {short(b)}"
                group.append(_bar(row.style, x(a) + 0.5, y(c), x(b) - x(a) - 1, base, text))
        middle = statistics.median(row.values)
        group.append(f'<path class="median" d="M{px(x(middle))} {px(base - size + 22)}V{base}"/>')
        group.append(
            f'<text class="label" x="{left}" y="{px(base - size + 16)}" fill="currentColor">{escape(row.label)}'
            f'<tspan class="note"> median {short(middle)}{escape(unit)}, n = {len(row.values)}</tspan></text>'
        )
        parts.append(f'<g class="s-{escape(row.style)}">{"".join(group)}</g>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{px(y(tallest) + 4)}" text-anchor="end">{tallest}</text>')
    parts.append(x_axis(x, size * len(rows), height, short, x_label))
    return _svg(key, title, description, height, parts)


def bars(key: str, title: str, description: str, values: Sequence[float], *, x_label: str, unit: str = "") -> str:
    """One vertical bar for each index 0, 1, 2, ...; the highest is labelled.

    Args:
        values: Not negative; at least one.
        x_label: Name of the index.
        unit: Written behind a value.
    """
    ticks = nice_ticks(0, max(max(values), 1e-9), 4)
    height, top = 200, 22
    bottom, right = height - 36, WIDTH - 10
    left = 14 + CHARACTER * max(len(short(t)) for t in ticks)
    y = Scale(0, ticks[-1], bottom, top)
    step = (right - left) / len(values)
    x = Scale(-0.5, max(len(values) - 0.5, 0.5), left, right)
    parts = [y_axis(y, left, right, short), '<g class="s-off">']
    for i, value in enumerate(values):
        text = f"{x_label} {i}: {short(value)}{unit}"
        parts.append(_bar("off", left + i * step + step * 0.12, y(value), step * 0.76, bottom, text))
    best = max(range(len(values)), key=lambda i: values[i])
    anchor = "start" if best < 2 else "end" if best > len(values) - 3 else "middle"
    parts.append(
        f'</g><text class="label halo" x="{px(left + (best + 0.5) * step)}" y="{px(y(values[best]) - 5)}" '
        f'text-anchor="{anchor}">'
        f"{short(values[best])}{escape(unit)} in {escape(x_label)} {best}</text>"
    )
    whole = [t for t in nice_ticks(0, max(len(values) - 1, 1), 6) if t == int(t) and t < len(values)]
    parts.append(x_axis(x, bottom, height, short, x_label, whole))
    return _svg(key, title, description, height, parts)


def _bar(style: str, left: float, top: float, width: float, bottom: float, text: str) -> str:
    return (
        f'<rect class="fill p-{escape(style)}" x="{px(left)}" y="{px(top)}" width="{px(width)}" '
        f'height="{px(bottom - top)}"><title>{escape(text)}</title></rect>'
    )


def _svg(key: str, title: str, description: str, height: float, parts: Sequence[str]) -> str:
    name = escape(f"chart-{key}")
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {px(height)}" width="{WIDTH}" height="{px(height)}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{"".join(parts)}</svg>'
    )


def _draw(line: Line, x: Scale, y: Scale, show_x: Callable[[float], str], show_y: Callable[[float], str]) -> str:
    path, marks, last = "", "", None
    crowded = len(line.points) > 16
    for i, (a, b) in enumerate(line.points):
        if b is None:
            last = None
            continue
        at = x(a), y(b)
        path += (
            f"M{px(at[0])} {px(at[1])}"
            if last is None
            else f"H{px(at[0])}V{px(at[1])}"
            if line.stepped
            else f"L{px(at[0])} {px(at[1])}"
        )
        last = at
        if line.stepped and not (x.low < a < x.high and y.low < b):
            continue  # curves share their ends
        if not crowded or i % (len(line.points) // 6) == len(line.style) % 3:
            marks += (
                f"<g><title>{escape(f'{line.label}, {show_x(a)}: {show_y(b)}')}</title>{marker(line.style, *at)}</g>"
            )
    return (
        f'<g class="s-{escape(line.style)}"><path class="line" '
        f'stroke-dasharray="{DASH.get(line.style, "") or "none"}" d="{path}"/>{marks}</g>'
    )
