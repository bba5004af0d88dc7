"""Composite scores against the published leaderboard of 152 models."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from libortho.auditing.measures import composite as c
from libortho.auditing.measures import memory
from libortho.core.errors import DataError

DATA = Path(os.environ.get("LIBORTHO_DATA", Path(__file__).parents[3] / "shared" / "data"))
LEADERBOARD = DATA / "tofu" / "reference_llama32_1b_forget10.jsonl"
FULL_AFTER_5_EPOCHS = 0.7123695921340509
"""HM(model utility, fluency) of the full model as scored beside the models of five epochs.

The file has the full model as scored beside those of ten; this is what every utility of the others is divided by.
"""
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    if not LEADERBOARD.is_file():
        pytest.skip(f"{LEADERBOARD} is missing: set LIBORTHO_DATA to the directory that holds tofu/")
    return [json.loads(line) for line in LEADERBOARD.read_text(encoding="utf-8").splitlines()]


def _memory(row: dict[str, Any]) -> float:
    return c.memory_score(*(1 - row[f"one_minus_{part}"] for part in ("es", "em", "paraprob", "truth")))


def _privacy(row: dict[str, Any], uds: float | None) -> float:
    return c.privacy_score(row["s_loss"], row["s_zlib"], row["s_mink"], row["s_minkpp"], uds)


def test_the_leaderboard_follows_from_its_parts(rows: list[dict[str, Any]]) -> None:
    full = next(row for row in rows if row["model"] == "full")
    assert len(rows) == 152
    for row in rows:
        mine = (row["model_utility"], row["fluency"])
        reference = {
            "ep10": (full["model_utility"], full["fluency"]),
            "ep5": (FULL_AFTER_5_EPOCHS, FULL_AFTER_5_EPOCHS),
        }[row["epoch"]]
        utility = c.utility_score(*mine, *reference)
        assert _memory(row) == pytest.approx(row["mem"], abs=TOLERANCE), row["model"]
        assert _privacy(row, row["uds"]) == pytest.approx(row["privacy"], abs=TOLERANCE), row["model"]
        assert _privacy(row, None) == pytest.approx(row["privacy_mia"], abs=TOLERANCE), row["model"]
        assert utility == pytest.approx(row["utility_rel"], abs=TOLERANCE), row["model"]
        total = c.overall(_memory(row), _privacy(row, row["uds"]), utility)
        assert total == pytest.approx(row["overall"], abs=TOLERANCE), row["model"]
        nine = [row[f"{of}_{part}"] for of in ("retain", "ra", "wf") for part in ("q_prob", "q_rouge", "truth_ratio")]
        assert memory.model_utility(nine) == pytest.approx(row["model_utility"], abs=TOLERANCE), row["model"]


def test_scores_by_hand() -> None:
    assert c.memory_score(0.5, 0.5, 0.5, 0.5) == pytest.approx(0.5)
    assert c.memory_score(0.0, 0.0, 0.0, 0.75) == pytest.approx(4 / 7)
    assert c.memory_score(1.0, 0.0, 0.0, 0.0) == 0  # extractable: nothing makes up for it
    assert c.privacy_score(1.0, 1.0, 1.0, 1.0, 0.5) == pytest.approx(2 / 3)
    assert c.privacy_score(1.0, 1.0, 1.0, 0.25) == pytest.approx(4 / 7)
    assert c.privacy_score(1.0, 1.0, 1.0, 1.0, 0.0) == 0
    assert c.utility_score(0.6, 0.3, 0.8, 0.8) == pytest.approx(0.4 / 0.8)
    assert c.utility_score(0.9, 0.9, 0.8, 0.8) == 1  # better than the full model counts as equal
    assert c.overall(1.0, 1.0, 0.5) == pytest.approx(0.75)


def test_parts_that_are_no_shares_are_refused() -> None:
    with pytest.raises(DataError, match=r"es is 1\.2"):
        c.memory_score(1.2, 0.0, 0.0, 0.0)
    with pytest.raises(DataError, match="uds is nan"):
        c.privacy_score(1.0, 1.0, 1.0, 1.0, float("nan"))
    with pytest.raises(DataError, match="fluency is -1"):
        c.utility_score(0.5, -1, 0.5, 0.5)
    with pytest.raises(DataError, match="full model's utility is 0"):
        c.utility_score(0.5, 0.5, 0.0, 0.5)
    with pytest.raises(DataError, match="privacy is 3"):
        c.overall(1.0, 3.0, 1.0)
