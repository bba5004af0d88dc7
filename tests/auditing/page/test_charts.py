import itertools
import re

import pytest
from browser import Page

from libortho.auditing.page import charts
from libortho.auditing.page.marks import Band, Dot, Level, Line, Row, nice_ticks, spread


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0, 1, 6), (0, 0.0131, 5), (-11, -0.4, 6), (18.2, 23.9, 5), (0, 47, 4)]
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, count: int) -> None:
    ticks = nice_ticks(low, high, count)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert f"{steps.pop():e}"[0] in "125"
    assert len(ticks) <= count + 2


def test_labels_are_spread_without_changing_their_order() -> None:
    wanted = [50.0, 51.0, 52.0, 10.0, 200.0]
    placed = spread(wanted, 13, 0, 205)
    assert sorted(range(5), key=lambda i: placed[i]) == sorted(range(5), key=lambda i: wanted[i])
    ordered = sorted(placed)
    assert all(b - a >= 13 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert min(placed) >= 0
    assert max(placed) <= 205
    assert spread([10.0, 100.0], 13, 0, 205) == [10.0, 100.0]


def path_points(svg: str) -> list[tuple[float, float]]:
    path = re.search(r'class="line" stroke-dasharray="[^"]*" d="([^"]*)"', svg)
    assert path is not None
    return [(float(a), float(b)) for a, b in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]


def test_lines_are_affine_in_the_data_and_break_at_gaps() -> None:
    points = [(0.0, 0.0), (0.25, 0.5), (1.0, 1.0)]
    svg = charts.lines("k", "t", "d", [Line("a", points, "off")], x_label="x", y_range=(0.0, 1.0))
    (x0, y0), (x1, y1), (x2, y2) = path_points(svg)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.5, abs=1e-3)
    assert y2 < y0  # up is more
    broken = charts.lines("k", "t", "d", [Line("a", [(0, 1), (1, None), (2, 1)], "off")], x_label="x")
    assert re.search(r' d="M[\d. ]+M[\d. ]+"', broken)


def test_decades_are_equally_far_apart_in_a_roc() -> None:
    points = [(0.0, 0.0), (0.01, 0.01), (0.1, 0.1), (1.0, 1.0)]
    line = [Line("a", points, "off")]
    svg = charts.lines("k", "t", "d", line, x_label="x", x_range=(0.001, 1.0), y_range=(0.001, 1.0), log=True)
    xs = [x for x, _ in path_points(svg)]
    assert [b - a for a, b in itertools.pairwise(xs)] == pytest.approx([xs[1] - xs[0]] * 3, abs=0.11)


def test_a_histogram_counts_every_value() -> None:
    values = [0.0, 0.5, 1.0, 1.0, 7.3, 16.0]
    rows = [Row("one", values=values, style="off"), Row("two", values=[4.0], style="on")]
    titles = Page(charts.histograms("k", "t", "d", rows, x_label="bits")).inside["title"]
    counts = [int(t.split(": ")[1].split()[0]) for t in titles if t.startswith("one")]
    assert sum(counts) == len(values)
    assert sum("two: 1 between" in t for t in titles) == 1


def test_bars_are_as_high_as_their_values() -> None:
    svg = charts.bars("k", "t", "d", [1.0, 3.0, 0.0], x_label="layer", unit=" %")
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]
    assert heights[1] / heights[0] == pytest.approx(3, rel=0.01)
    assert heights[2] == 0
    assert "3 % in layer 1" in svg


def test_a_chart_of_one_value_or_none_is_still_a_chart() -> None:
    for series in (
        [],
        [Line("a", [(0.0, 2.0)], "off")],
        [Line("a", [(0.0, None)], "off"), Line("b", [(0.0, 2.0)], "on")],
    ):
        Page(charts.lines("k", "t", "d", series, x_label="x"))
    Page(charts.bars("k", "t", "d", [0.0], x_label="layer"))
    Page(charts.histograms("k", "t", "d", [Row("a", values=[2.0])], x_label="bits"))


def test_charts_escape_their_text() -> None:
    evil = '</svg><script>&"'
    made = [
        charts.lines("k", evil, evil, [Line(evil, [(0, 0), (1, 1)], "off"), Line(evil, [(0, 1)], evil)], x_label=evil,
                     bands=[Band(0, 1, evil)], levels=[Level(0.5, evil, evil)]),
        charts.dots("k", evil, evil, [Row(evil, [Dot(evil, evil, 0.5, 0.1, 0.9)])], x_label=evil, x_range=(0, 1)),
        charts.histograms("k", evil, evil, [Row(evil, values=[1.0], style=evil)], x_label=evil, unit=evil),
        charts.bars("k", evil, evil, [1.0], x_label=evil, unit=evil),
    ]  # fmt: skip
    for svg in made:
        page = Page(svg)
        assert "script" not in [t for t, _ in page.elements]
        assert len(page.all("svg")) == 1


def test_styles_differ_in_grey() -> None:
    styles = ("off", "on", "reference", "original", "quantised", "random", "magnitude")
    drawn = [
        charts.lines("k", "t", "d", [Line("a", [(0, 0), (1, 1)], s)], x_label="x").replace(f"s-{s}", "") for s in styles
    ]
    assert len(set(drawn)) == len(styles)


def test_layers_have_no_fractions() -> None:
    made = [Line("a", [(0.0, 1.0), (1.0, 2.0)], "off")]
    below = re.findall(r'text-anchor="middle">([^<]*)<', charts.lines("k", "t", "d", made, x_label="layer", whole=True))
    assert below == ["0", "1", "layer"]
