"""Tables keep to the width of the terminal, with every word whole, whatever the names are."""

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from libortho.cli import tables
from libortho.core.layer import LayerReport
from libortho.core.report import LayerReports
from libortho.evaluation.evaluate import Evaluation, Figure

NAME = "people-and-places-of-the-legal-department"


def layers() -> LayerReports:
    one = LayerReport("model.layers.10.self_attn.q_proj", (576, 576), 512, False, 0.1, 0.2, 0.1, 0.01, 8, 0.02, 9, 9)
    return LayerReports([one, replace(one, name=f"model.{NAME}.down_proj", low_rank_error=None, base_error=0.75)])


def checkpoint() -> Any:
    stream = SimpleNamespace(
        name=NAME, kinds=("columns", "tail"), layers=210, density=0.005, tail_density=0.01, bytes_on_disk=10_000_000,
        needs_libortho=False, base_matches=False, missed=("4 of 4 are still extracted",),
    )  # fmt: skip
    return SimpleNamespace(
        bits=8, group_size=-1, layers=2, weights=10, base_bytes=10, bits_per_weight=8.0, streams=(stream,)
    )


def evaluation() -> Evaluation:
    columns = (f"alpha {NAME}=1", "alpha 0", "original")
    figures = tuple(Figure("arc_easy", "exact_match", c, 0.5, low=0.25, high=0.75, rows=100) for c in columns)
    change = SimpleNamespace(task="arc_easy", metric="exact_match", column="original", value=0.0, low=-0.1, high=0.1)
    return Evaluation(columns, figures, (change,))  # type: ignore[arg-type]


SHOWN: dict[str, Any] = {
    "layers": lambda c: tables.show_split(layers(), c, bits=8, stream=NAME, layers=True),
    "checkpoint": lambda c: tables.show_checkpoint(checkpoint(), c),
    "evaluation": lambda c: tables.show_evaluation(evaluation(), c),
}
WORDS: dict[str, tuple[str, ...]] = {
    "layers": ("model.layers.10.self_attn.q_proj", f"model.{NAME}.down_proj", "75.00%", "(direct)", "1.000%"),
    "checkpoint": (NAME, "ANOTHER", "MISSED", "0.500%", "10.00"),
    "evaluation": (f"{NAME}=1", "arc_easy", "exact_match", "[0.2500,", "original", "-0.1000"),
}


def shown(name: str, width: int) -> str:
    out = io.StringIO()
    SHOWN[name](Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 300])
@pytest.mark.parametrize("name", SHOWN)
def test_no_line_is_wider_and_no_word_is_cut(name, width):
    text = shown(name, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert [w for w in WORDS[name] if w not in text] == []
    assert "…" not in text


def test_a_wide_terminal_has_a_row_on_one_line_and_a_narrow_one_a_paragraph():
    [row] = [line for line in shown("checkpoint", 300).splitlines() if line.startswith(NAME)]
    assert row.rstrip().endswith("1 MISSED")
    narrow = shown("checkpoint", 60).splitlines()
    start = narrow.index(next(line for line in narrow if line.startswith(f"stream {NAME}")))
    assert [line.rstrip() for line in narrow[start + 1 : start + 3]] == [
        "  parts columns + tail, layers 210, density 0.500%,", "  tail 1.00%, on disk 10.00 MB, loads with PEFT,",
    ]  # fmt: skip
