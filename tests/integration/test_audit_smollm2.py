"""The audit on the real model: it sees what isolation does, and what the controls do not do."""

from __future__ import annotations

from typing import Any

import pytest

from libortho import AuditConfig, AuditReport, audit
from libortho.auditing.subjects import subjects_of
from libortho.lm.scoring import score
from libortho.text.encoding import encode

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def report(isolated: Any) -> AuditReport:
    config = AuditConfig(
        samples=2, fillings=24, general_sequences=2, task_rows=4, alphas=(0.0, 1.0), seed=isolated.config.seed
    )
    return audit(
        isolated.model, isolated.tokenizer, isolated.secrets, holdout=isolated.unseen[:40], reference=isolated.never,
        config=config,
    )  # fmt: skip


def _memory(report: AuditReport, figure: str) -> dict[str, float]:
    return {s["key"]: s["memory"][figure]["value"] for s in report.data["subjects"] if s["memory"][figure]}


def test_only_the_edit_where_it_was_made_forgets(report: AuditReport) -> None:
    extracted = _memory(report, "greedy_extraction")
    assert extracted["off"] == extracted["reference"] == 0
    for control in ("on", "quantised"):
        assert extracted[control] > 0.8, control


def test_the_same_edit_at_other_columns_forgets_nothing(isolated: Any) -> None:
    items = [encode(r, isolated.tokenizer) for r in isolated.secrets]
    found = subjects_of(isolated.model, original=None, reference=None, others={}, seed=0)
    for subject in (s for s in found if s.key in ("random", "magnitude")):
        with subject.enter():
            _, greedy = score(subject.language_model(), items)
        assert greedy.float().mean() > 0.8, subject.key


def test_exposure_falls_from_the_ceiling_to_near_the_never_trained(report: AuditReport) -> None:
    bits = _memory(report, "exposure")
    assert bits["on"] > 15
    assert bits["off"] < bits["on"] / 3
    assert "reference" not in bits  # the quick audit compares with unseen records


def test_membership_is_certain_with_the_switch_on_and_not_with_it_off(report: AuditReport) -> None:
    auc = {s["key"]: s["privacy"]["attacks"]["loss"]["auc"]["value"] for s in report.data["subjects"]}
    assert auc["on"] > 0.99
    # Eight members in two strata, 20 others in each: by chance up to .22 off one half (95 %), as the reference is too.
    assert abs(auc["off"] - 0.5) < 0.22
    assert abs(auc["reference"] - 0.5) < 0.22
    assert report.data["subjects"][0]["privacy"]["stratified"]


def test_the_rest_is_unharmed(report: AuditReport) -> None:
    by_key = {s["key"]: s["utility"] for s in report.data["subjects"]}
    assert by_key["off"]["perplexity"]["value"] <= 1.02 * by_key["on"]["perplexity"]["value"]
    assert by_key["off"]["kl"] < 0.02
    assert by_key["off"]["top1_agreement"] > 0.9


def test_the_curve_falls_and_the_page_is_whole(report: AuditReport) -> None:
    low, high = report.data["curve"]
    assert (low["alpha"], high["alpha"]) == (0.0, 1.0)
    assert low["nll"] > high["nll"] + 2
    page = report.to_html()
    assert all(s["label"] in page for s in report.data["subjects"])
    codes = [r["completion"] for r in report.data["records"]][1:]
    assert all("\u2022" in c for c in codes)
