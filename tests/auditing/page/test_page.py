"""The page is looked at through a parser, as a browser would, not through its source."""

import copy
import json
import math
import re
from typing import Any

import example_report
import pytest
from browser import Page

from libortho.auditing.page.page import render
from libortho.core.errors import DataError

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></script><!-- {{ 7*7 }} \u202e\x00\u200b"


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return example_report.full()


@pytest.fixture(scope="module")
def page(full: dict[str, Any]) -> Page:
    return Page(render(full))


def replaced(value: Any, old: set[str], new: str) -> Any:
    """The same report with every string under one of the keys ``old`` made hostile."""
    if isinstance(value, dict):
        return {k: new if k in old and isinstance(v, str) else replaced(v, old, new) for k, v in value.items()}
    return [replaced(v, old, new) for v in value] if isinstance(value, list) else value


def test_every_subject_and_verdict_is_told(full: dict[str, Any], page: Page) -> None:
    for subject in full["subjects"]:
        assert subject["label"] in page.text
    for verdict in full["verdicts"]:
        assert verdict["text"].replace("`", "").replace(" ", "") in page.text.replace(" ", "")
    shown = [a["class"] for a in page.all("li") if "verdict" in (a.get("class") or "")]
    assert shown == [f"verdict {v['status']}" for v in full["verdicts"]]
    words = [w for w in page.inside["span"] if w in ("Pass", "Fail", "Withheld")]
    assert words == [v["status"].capitalize() for v in full["verdicts"]]  # never by colour alone
    for warning in full["warnings"]:
        assert warning.replace("`", "").replace(" ", "") in page.text.replace(" ", "")


def test_sections_come_in_reading_order(page: Page) -> None:
    assert [a["id"] for a in page.all("section")] == [
        "verdicts", "numbers", "alpha", "extraction", "privacy", "utility", "attacks", "depth", "layers", "generations",
        "composite", "reading", "data",
    ]  # fmt: skip
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert {a["href"] for a in page.all("a")} <= {f"#{i}" for i in ids}


@pytest.mark.parametrize(("failed", "withheld", "opening"), [
    (("attacks",), (), "This model did not pass"),
    ((), ("depth",), "Nothing that could be judged failed"),
    ((), (), "This model passed its audit."),
])  # fmt: skip
def test_the_headline_follows_the_verdicts(failed: tuple[str], withheld: tuple[str], opening: str) -> None:
    report = example_report.full()
    for v in report["verdicts"]:
        v["status"] = "fail" if v["key"] in failed else "withheld" if v["key"] in withheld else "pass"
    assert opening in Page(render(report)).text


def test_a_failed_check_is_shown_before_those_that_hold() -> None:
    report = example_report.full()
    good = [{"name": f"good {i}", "value": 0.0, "target": "<= 1", "ok": True} for i in range(30)]
    report["verdicts"][1]["checks"] = [*good, {"name": "the bad one", "value": 2.0, "target": "<= 1", "ok": False}]
    text = Page(render(report)).text
    assert text.index("the bad one") < text.index("good 0")
    assert "26 more checks, all met" in text
    assert "good 29" in text


def test_the_embedded_report_is_the_report(full: dict[str, Any], page: Page) -> None:
    assert json.loads("".join(page.inside["script"])) == json.loads(json.dumps(full))
    assert page.all("script") == [{"type": "application/json", "id": "report-json"}]


HOSTILE = {"prompt", "completion", "label", "text", "name", "best", "template", "criteria", "trained_on", "format",
           "where", "data", "off", "on", "reference", "role", "profile", "target"}  # fmt: skip


def test_hostile_strings_stay_text() -> None:
    report = replaced(example_report.full(), HOSTILE, EVIL)
    report["attacks"]["relearning"]["recovery"] = {EVIL: 0.1}
    html = render(report)
    attacked = Page(html)
    assert [t for t, _ in attacked.elements if t in ("script", "img")] == ["script"]
    assert attacked.comments == 0
    assert not [a for _, a in attacked.elements for name in a if name.startswith("on")]
    assert json.loads("".join(attacked.inside["script"])) == report
    assert not set("\x00\u202e\u200b") & set(html)
    assert "alert(1)" in attacked.text


def test_hostile_strings_outside_named_fields_stay_text() -> None:
    report = example_report.full()
    report["warnings"] = [EVIL]
    report["model"] |= {"name": EVIL, "streams": [EVIL]}
    report["goldilocks"]["criteria"] = EVIL
    report["depth"] |= {"uds": None, "withheld": EVIL}
    for subject in report["subjects"]:
        subject["key"] += EVIL
        subject["utility"]["tasks"] = {EVIL: example_report.estimate(0.5)}
        subject["utility"]["tofu"] = {EVIL: 0.5}
        subject["privacy"]["attacks"] = {EVIL: subject["privacy"]["attacks"]["loss"]}
    report["generations"][0]["texts"] = {EVIL: "x \ud800 y"}
    html = render(report)
    attacked = Page(html)
    assert [t for t, _ in attacked.elements if t in ("script", "img")] == ["script"]
    assert not [a for _, a in attacked.elements for name in a if name.startswith("on")]
    html.encode("utf-8")  # the lone surrogate did not survive in the page, and did in the data
    assert json.loads("".join(attacked.inside["script"]))["generations"][0]["texts"][EVIL] == "x \ud800 y"


@pytest.mark.parametrize("make", [example_report.full, example_report.minimal])
def test_nothing_is_requested_and_nothing_runs(make: Any) -> None:
    html = render(make())
    page = Page(html)
    assert not [a for _, a in page.elements if {"src", "srcset", "data", "action", "poster"} & set(a)]
    assert not [
        t for t, _ in page.elements if t in ("link", "iframe", "object", "embed", "base", "form", "image", "use")
    ]
    assert all((a["href"] or "").startswith("#") for _, a in page.elements if "href" in a)
    style = "".join(page.inside["style"])
    assert "url(" not in html
    assert "@import" not in style
    assert "http:" not in html
    assert "https:" not in html
    policy = next(a["content"] or "" for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_charts_can_be_read_without_eyes(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    svgs = page.all("svg")
    assert len(svgs) == 24
    for svg in svgs:
        assert svg["role"] == "img"
        assert set((svg["aria-labelledby"] or "").split()) <= set(ids)
        assert len((svg["aria-labelledby"] or "").split()) == 2
    assert len(page.inside["desc"]) == len(svgs)
    assert all(len(text) > 20 for text in page.inside["desc"])


def test_tables_have_captions_and_scopes(page: Page) -> None:
    heads = page.all("th")
    assert heads
    assert all(a.get("scope") in ("col", "row", "colgroup") for a in heads)
    checks = [a for a in page.all("table") if "checks" in (a.get("class") or "")]
    assert len(page.all("caption")) == len(page.all("table")) - len(checks)


@pytest.mark.parametrize("make", [example_report.full, example_report.minimal])
def test_missing_numbers_are_dashes(make: Any) -> None:
    page = Page(render(make()))
    assert not re.search(r"\b(None|nan|NaN|inf|Infinity|undefined|null)\b", page.text)
    attributes = " ".join(v or "" for _, a in page.elements for k, v in a.items() if k != "title")
    assert not re.search(r"\b(None|nan|inf)\b", attributes)
    assert "\u2013" in page.text


def test_numbers_that_are_not_finite_count_as_missing() -> None:
    report = example_report.full()
    report["curve"][2]["nll"] = math.nan
    report["subjects"][0]["memory"]["nll"]["value"] = math.inf
    page = Page(render(report))
    assert not re.search(r"\b(nan|inf)\b", page.text)
    data = json.loads("".join(page.inside["script"]), parse_constant=lambda name: pytest.fail(name))
    assert data["curve"][2]["nll"] is None


def test_a_minimal_report_says_what_is_withheld() -> None:
    page = Page(render(example_report.minimal()))
    assert page.text.count("Withheld:") == 4
    for key in ("privacy", "utility", "attacks", "depth"):
        assert f"No {key} was measured." in page.text
    assert not {"layers", "generations", "composite"} & {a["id"] for a in page.all("section")}
    assert "Nothing could be judged." in page.text


def test_withheld_is_said_once() -> None:
    report = example_report.minimal()
    for v in report["verdicts"]:
        v["text"] = "Withheld: pass holdout."
    assert "Withheld: Withheld" not in Page(render(report)).text


@pytest.mark.parametrize("name", ["relearning", "requantisation", "pruning", "noise", "prefix", "recovery"])
def test_each_attack_may_be_absent(name: str, page: Page) -> None:
    report = example_report.full()
    del report["attacks"][name]
    assert len(Page(render(report)).elements) < len(page.elements)


def test_each_part_may_be_absent() -> None:
    report = example_report.full()
    off, on = report["subjects"][:2]
    off["utility"] |= {"kl": None, "top1_agreement": None, "distinct_answers": None, "tasks": {}, "tofu": None}
    off["memory"] |= {"loose_extraction": None, "rouge_l": None, "prefix_sweep": None}
    off["privacy"] |= {"privleak": None, "gradient": None}
    off["unseen"], _ = None, on["privacy"]["attacks"].pop("reference")
    report["composite"]["off"] = None
    report["goldilocks"]["intervals"] = []
    report["attacks"]["recovery"] |= {"location_auc": None, "value_r2": None, "nll_after": None, "extraction": None}
    report["attacks"]["noise"][0]["perplexity"] = None
    report["depth"] = {"uds": None, "withheld": "no reference", "layers": [], "logit_lens": {"off": [-3.0, -2.0]}}
    page = Page(render(report))
    assert "No setting of alpha met all criteria" in page.text
    assert "no reference" in page.text
    assert not re.search(r"\bNone\b", page.text)


def test_a_model_that_was_never_split() -> None:
    report = example_report.full()
    keep = {s["key"]: s for s in report["subjects"]}
    audited = keep["off"] | {"key": "model", "label": "my model"}
    report["subjects"] = [audited, keep["original"], keep["reference"]]
    report["model"] |= {"split": False, "streams": [], "layers": 0, "bits": None, "density": None}
    report |= {"curve": [], "goldilocks": None, "layer_map": []}
    for curve in report["attacks"]["relearning"]["curves"]:
        curve["subject"] = {"off": "model", "on": "original"}.get(curve["subject"], curve["subject"])
    page = Page(render(report))
    assert "not a split model" in page.text
    assert "Attacks on my model" in page.text
    assert any(w == "my model" for w in page.inside["text"])  # it is in the charts


def test_layers_are_counted_by_name_not_by_module() -> None:
    report = example_report.full()
    report["layer_map"] = [
        {"name": f"model.layers.{layer}.mlp.{part}", "index": 2 * layer + i, "columns": 3, "share": 0.25}
        for layer in range(2)
        for i, part in enumerate(("up_proj", "down_proj"))
    ]
    titles = Page(render(report)).inside["title"]
    assert "layer 1: 50 %" in titles
    assert not [t for t in titles if t.startswith("layer 2:")]


def test_records_beyond_the_first_are_counted() -> None:
    report = example_report.full()
    report["records"] = [{**report["records"][0], "number": i + 1} for i in range(1234)]
    assert "the first 100 of 1,234" in Page(render(report)).text


def test_the_same_report_gives_the_same_bytes(full: dict[str, Any]) -> None:
    before = copy.deepcopy(full)
    assert render(full) == render(json.loads(json.dumps(full)))
    assert full == before


@pytest.mark.parametrize("bad", [{}, {"schema": "libortho-audit/2"}, [1]])
def test_another_schema_is_refused(bad: Any) -> None:
    with pytest.raises(DataError, match="expected 'libortho-audit/1'"):
        render(bad)
