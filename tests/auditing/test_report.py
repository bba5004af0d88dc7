import math

import pytest

from libortho.auditing.report import AuditReport, Verdict, at_least, at_most, json_ready


@pytest.mark.parametrize(("value", "possibly", "ok"), [(0.1, False, True), (0.1, True, True), (0.3, True, None)])
def test_a_check_beyond_its_bound_is_open_where_the_interval_holds_good_values(value, possibly, ok):
    check = at_most("share", value, 0.2, ".2f", possibly=possibly)
    assert (check.target, check.ok) == ("<= 0.20", ok)
    mirrored = at_least("share", -value, -0.2, possibly=possibly)
    assert (mirrored.target, mirrored.ok) == (">= -0.2", ok)
    assert at_most("share", 0.3, 0.2).ok is False
    assert at_most("share", 0.2, 0.2).ok is at_least("share", 0.2, 0.2).ok is True


def test_json_has_no_number_that_is_not_finite():
    given = {1: (math.nan, math.inf, 1.5), "text": {"none": None, "flag": True, "whole": 3}}
    assert json_ready(given) == {"1": [None, None, 1.5], "text": {"none": None, "flag": True, "whole": 3}}


@pytest.mark.parametrize(
    ("changed", "passed"),
    [({}, True), ({"attacks": "withheld"}, True), ({"attacks": "fail"}, False), ({"privacy": "withheld"}, False)],
)
def test_an_audit_passes_without_a_failure_if_the_main_questions_are_answered(changed, passed):
    status = {**dict.fromkeys(("memory", "privacy", "utility", "attacks"), "pass"), **changed}
    report = AuditReport({}, tuple(Verdict(k, s, "") for k, s in status.items()))
    assert report.passed is passed
    assert report.verdict("memory") == Verdict("memory", "pass", "")
    assert report.verdict("depth") is None


def test_a_verdict_becomes_json():
    check = at_most("share", 0.3, 0.2)
    assert Verdict("memory", "fail", "No.", (check,)).to_dict() == {
        "key": "memory", "status": "fail", "text": "No.",
        "checks": [{"name": "share", "value": 0.3, "target": "<= 0.2", "ok": False}],
    }  # fmt: skip
