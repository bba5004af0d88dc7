"""The page is looked at through a parser, as a browser would, not through its source."""

import copy
import itertools
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import example_report
import pytest

from libortho.auditing.page import charts
from libortho.auditing.page.glossary import MEMORY
from libortho.auditing.page.marks import Band, Dot, Level, Line, Row, nice_ticks, spread
from libortho.auditing.page.page import render
from libortho.auditing.page.text import cell, number, target, visible
from libortho.core.errors import DataError

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr", "col"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></script><!-- {{ 7*7 }} \u202e\x00\u200b"


class Page(HTMLParser):
    """What a browser would make of the text: elements in order, checked for balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.comments = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len({k for k, _ in attrs}) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        self.comments += 1

    def handle_data(self, data: str) -> None:
        self.inside.setdefault(self.open[-1] if self.open else "", []).append(data)
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


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
    off["unseen"] = None
    del on["privacy"]["attacks"]["reference"]
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


@pytest.mark.parametrize(("value", "digits", "signed", "text"), [
    (None, 3, False, "\u2013"), (math.nan, 3, False, "\u2013"), (0.0, 3, False, "0.000"), (-0.0, 3, True, "0.000"),
    (0.5, 3, True, "+0.500"), (-0.25, 2, False, "\u22120.25"), (3.2e-9, 3, False, "3.2e\u22129"), (17, 3, False, "17"),
    (6144, 0, False, "6,144"), (1234.5, 1, False, "1,234.5"), (4.2e7, 2, False, "4.2e7"), (True, 3, False, "yes"),
])  # fmt: skip
def test_numbers(value: Any, digits: int, signed: bool, text: str) -> None:
    assert number(value, digits, signed) == text


def test_cells_hold_the_interval() -> None:
    metric = next(m for m in MEMORY if m.key == "greedy_extraction")
    wide = Page(f"<p>{cell({'value': 0.1234, 'low': 0.01, 'high': 0.31, 'n': 17}, metric)}</p>")
    assert wide.text.split() == ["0.123", "0.01", "to", "0.31"]
    assert {"title": "n = 17", "class": "value"} in wide.all("span")
    narrow = Page(f"<p>{cell({'value': 0.1234, 'low': 0.122, 'high': 0.125, 'n': 9}, metric)}</p>")
    assert narrow.text.split() == ["0.123", "0.122", "to", "0.125"]
    assert Page(f"<p>{cell(None, metric)}</p>").text.strip() == "\u2013"


def test_unseen_characters_and_masks_are_seen() -> None:
    page = Page("<p>" + str(visible("a\u202eb Y0\u2022\u2022")) + "</p>")
    assert page.text.replace(" ", "") == "aU+202EbY0\u2022\u2022"
    assert [a["class"] for a in page.all("span")] == ["unseen", "mask"]
    assert target("<= -0.5") == "\u2264\u00a0\u22120.5"


# Charts


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
        charts.bars("k", evil, evil, [1.0], x_label=evil, unit=evil, style=evil),
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


# Style


def schemes() -> dict[str, dict[str, str]]:
    css = resources.files("libortho.auditing.page").joinpath("report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    variables = {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for name, block in (("light", light), ("dark", dark))
    }
    assert variables["dark"].keys() == variables["light"].keys()
    return variables


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str) -> None:
    colours = schemes()[scheme]
    texts = (
        "ink",
        "soft",
        "pass",
        "fail",
        "held",
        "off",
        "on",
        "reference",
        "original",
        "quantised",
        "random",
        "magnitude",
    )
    pairs = [(text, ground) for text in texts for ground in ("paper", "card")]
    pairs += [("ink", "wash"), ("soft", "wash"), ("on-status", "pass"), ("on-status", "fail"), ("ink", "mask")]
    for text, ground in pairs:
        a, b = sorted((luminance(colours[text]), luminance(colours[ground])))
        assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)
