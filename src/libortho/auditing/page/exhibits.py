"""What a section of the page can show: text, figures and tables under one heading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from libortho.auditing.page.glossary import Metric
from libortho.auditing.schema import SubjectData


class Drawn(SubjectData):
    """A subject as the page shows it: ``style`` fixes its colour, dash and marker."""

    style: str


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    caption: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class TableRow:
    """A row of a table: its label, a note under it, and its cells as they are written."""

    label: str
    cells: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column are the labels of its rows."""

    caption: str
    first: str
    columns: Sequence[Metric]
    rows: Sequence[TableRow]


@dataclass(frozen=True)
class Exhibit:
    """Paragraphs, figures and tables under one heading."""

    heading: str
    texts: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width of the page."""
        return bool(self.figures) or len(self.tables) > 1


def merged(exhibits: Iterable[Exhibit]) -> list[Exhibit]:
    """The exhibits, those that follow each other under one heading put together; a text is written once."""
    found: list[Exhibit] = []
    for exhibit in exhibits:
        if found and found[-1].heading == exhibit.heading:
            last = found.pop()
            exhibit = replace(
                last,
                texts=tuple(dict.fromkeys((*last.texts, *exhibit.texts))),
                figures=(*last.figures, *exhibit.figures),
                tables=(*last.tables, *exhibit.tables),
            )
        found.append(exhibit)
    return found
