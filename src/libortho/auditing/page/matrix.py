"""The report of ``interference`` as one HTML page with one heat map, under the rules of :mod:`.page`.

No script runs, nothing is fetched, and every name is treated as hostile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from libortho.auditing.page.marks import CHARACTER, cut, px
from libortho.auditing.page.text import UNSEEN, embedded_json, number, prose, target, visible
from libortho.auditing.schema import OFF, ON
from libortho.auditing.thresholds import KL

_WIDE, _LINE, _HEAD = 132, 15, 26
"""Pixels: width of a column, height of a line in a cell, and of the head."""
_NAME, _ROW_NAME = 16, 30
"""Most characters of a name over a column and beside a row; the whole name is in the tooltip."""
_DARKEST = 0.42
"""Opacity of the fullest cell, at which ink on it is still read."""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map.

    Attributes:
        texts: Its lines, the main number first.
        share: From 0 to 1, how dark it is.
        style: Subject key, which fixes its colour.
        framed: Whether it has a frame.
    """

    texts: Sequence[str]
    share: float
    style: str = OFF
    framed: bool = False


def heat_map(
    key: str,
    title: str,
    description: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Cell]],
) -> str:
    """A table of numbers as a complete ``<svg role="img">``, whose shades say no more than its numbers.

    Args:
        key: Unique in the page; ids are made from it.
        title: Accessible name.
        description: What it shows, in words.
        columns: Name of each column.
        rows: Name of each row, to a cell for each column.
    """
    left = 20 + CHARACTER * max(len(cut(n, _ROW_NAME)) for n in rows)
    tall = 10 + _LINE * max(len(c.texts) for cells in rows.values() for c in cells)
    width, height = left + _WIDE * len(columns) + 2, _HEAD + tall * len(rows) + 2
    parts = [
        f'<text class="label" x="{px(left + _WIDE * (i + 0.5))}" y="{_HEAD - 9}" text-anchor="middle">'
        f"<title>{escape(name)}</title>{escape(cut(name, _NAME))}</text>"
        for i, name in enumerate(columns)
    ]
    for row, (name, cells) in enumerate(rows.items()):
        top = _HEAD + tall * row
        parts.append(
            f'<text class="label" x="0" y="{px(top + tall / 2 + 4)}"><title>{escape(name)}</title>'
            f"{escape(cut(name, _ROW_NAME))}</text>"
        )
        for i, cell in enumerate(cells):
            x, box = left + _WIDE * i, f'width="{_WIDE - 4}" height="{tall - 4}"'
            at = f'x="{px(x + 2)}" y="{px(top + 2)}" {box}'
            words = f"{name}, {columns[i]}: {', '.join(cell.texts)}"
            lines = "".join(
                f'<text class="{"beside" if n else "main"}" x="{px(x + _WIDE / 2)}" y="{px(top + 18 + _LINE * n)}" '
                f'text-anchor="middle">{escape(text)}</text>'
                for n, text in enumerate(cell.texts)
            )
            shade = _DARKEST * min(1.0, max(0.0, cell.share))
            parts.append(
                f'<g class="s-{escape(cell.style)}"><title>{escape(words)}</title>'
                f'<rect class="heat" {at} fill-opacity="{shade:.3f}"/>'
                f'<rect class="{"own" if cell.framed else "cell"}" {at}/>{lines}</g>'
            )
    ids = escape(f"chart-{key}")
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {px(width)} {px(height)}" width="{px(width)}" '
        f'height="{px(height)}" aria-labelledby="{ids}-title {ids}-desc"><title id="{ids}-title">{escape(title)}'
        f'</title><desc id="{ids}-desc">{escape(description)}</desc>{"".join(parts)}</svg>'
    )


def render_matrix(report: Mapping[str, Any]) -> str:
    """What ``InterferenceReport.to_dict()`` returns, as a complete page; the same for the same report."""
    template, css = _sources()
    failed = [v["key"] for v in report["verdicts"] if v["status"] == "fail"]
    open_ = [v["key"] for v in report["verdicts"] if v["status"] == "withheld"]
    headline = (
        f"Not clean: {', '.join(failed)}." if failed
        else f"Not judged: {', '.join(open_)}." if open_
        else "Each owner can be dropped, and only that owner's knowledge goes."
    )  # fmt: skip
    chart = heat_map(
        "matrix",
        "What is recited under each subset of streams",
        "Rows are the streams that are on. Columns are owners, with the records said of each, and general text.",
        [*report["owners"], "general text"],
        {
            row["label"]: [*(_owner_cell(o, row) for o in report["owners"]), _general_cell(row)]
            for row in report["rows"]
        },
    )
    page = template.render(
        report=report, css=css, title=report["name"] or "unnamed model", headline=headline, chart=Markup(chart),
        data=embedded_json(report),
    )  # fmt: skip
    page = UNSEEN.sub(lambda m: f"U+{ord(m[0]):04X}", page)
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _owner_cell(owner: str, row: Mapping[str, Any]) -> Cell:
    found = row["owners"][owner]
    said, records = len(found["recited"]), found["records"]
    texts = [f"{said} of {records}", f"{number(found['loss'])} nats"]
    if found["auc"] is not None:
        low, high = found["auc"]["low"], found["auc"]["high"]
        ends = "" if low is None else f" ({number(low, 2)}\u2013{number(high, 2)})"
        texts.append(f"AUC {number(found['auc']['value'], 2)}{ends}")
    return Cell(texts, said / records, framed=owner in row["on"])


def _general_cell(row: Mapping[str, Any]) -> Cell:
    texts = [f"\u00d7 {number(row['perplexity_ratio'])}", f"ppl {number(row['perplexity'])}", f"KL {number(row['kl'])}"]
    return Cell(texts, (row["kl"] or 0.0) / (2 * KL), ON)


@cache
def _sources() -> tuple[Template, Markup]:
    """The page's template, and the style sheet of the audit's page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "visible": visible, "prose": prose, "target": target}
    here = resources.files("libortho.auditing.page")
    template = environment.from_string(here.joinpath("matrix.html.j2").read_text(encoding="utf-8"))
    return template, Markup(here.joinpath("report.css").read_text(encoding="utf-8"))
