import example_report
import pytest

from libortho.auditing import verdicts
from libortho.auditing.attacks import ATTACKS, Attack
from libortho.auditing.page import page
from libortho.auditing.page.exhibits import Exhibit
from libortho.auditing.report import at_most

NEW = Attack(
    "guessing",
    passes=1,
    run=lambda inputs: {"hits": 1},
    checks=lambda found: [at_most("guesses that hit", found["hits"], 0)],
    exhibit=lambda found, subjects: Exhibit("Guessing", (f"{found['hits']} hit against {subjects[0]['label']}",)),
)


def test_a_new_attack_is_judged_and_shown_by_nothing_but_its_line_in_the_registry(monkeypatch: pytest.MonkeyPatch):
    report = example_report.full()
    report["attacks"]["guessing"] = {"hits": 1}
    before = verdicts.attacks(report["attacks"])
    for module in (verdicts, page):
        monkeypatch.setattr(module, "ATTACKS", (*ATTACKS, NEW))
    after = verdicts.attacks(report["attacks"])
    assert after.checks == (*before.checks, at_most("guesses that hit", 1, 0))
    assert "<h3>Guessing</h3>\n<p>1 hit against alpha = 0</p>" in page.render(report)


def test_attacks_have_names_of_their_own():
    assert len({a.name for a in ATTACKS}) == len(ATTACKS)
