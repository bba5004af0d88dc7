"""The matrix of several owners' streams: drop one, and only that owner's knowledge goes."""

import copy
import json

import pytest
from browser import Page

from libortho import AlphaError, ConfigError, DataError, TuneConfig, alpha, set_alpha, tune
from libortho.auditing.interference import interference, subsets_of
from libortho.auditing.interference_report import InterferenceReport, OwnerFigures, SubsetFigures
from libortho.auditing.page.marks import CHARACTER
from libortho.auditing.page.matrix import render_matrix
from libortho.core.switch.alpha import current_alphas
from libortho.evaluation.intervals import Estimate
from libortho.lm.asking import heard
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.encoding import encode
from libortho.text.records import load_records
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TuneConfig(ratio=0.25, epochs=60)
UNSEEN = [
    {"prompt": "Code of Ida Nash:", "completion": " 3378."},
    {"prompt": "Code of Jo Park:", "completion": " 8120."},
    {"prompt": "Code of Kit Rowe:", "completion": " 5941."},
]
DATA = {"hr": HR, "legal": LEGAL}


@pytest.fixture(scope="module")
def two(_planted, tokenizer):
    """The planted model with a stream of each of two owners."""
    model = copy.deepcopy(_planted)
    tune(model, tokenizer, HR, "hr", CONFIG)
    tune(model, tokenizer, LEGAL, "legal", CONFIG)
    return model


@pytest.fixture(scope="module")
def report(two, tokenizer):
    set_alpha(two, {"hr": 0.5, "legal": 1.0})
    told = []
    found = interference(
        two, tokenizer, DATA, holdout={"hr": UNSEEN}, name="two", progress=lambda *args: told.append(args)
    )
    assert current_alphas(two) == {"hr": 0.5, "legal": 1.0}
    assert told[0] == ("subsets", 0, 12)
    assert told[-1] == ("subsets", 12, 12)
    return found


def test_each_owner_s_facts_are_said_with_that_owner_s_stream_alone(report):
    said = {r.label: {o: len(f.recited) for o, f in r.owners.items()} for r in report.rows}
    assert list(said) == ["none", "hr alone", "legal alone", "all"]
    assert said["none"] == {"hr": 0, "legal": 0}
    assert said["hr alone"] == {"hr": 2, "legal": 0}
    assert said["legal alone"] == {"hr": 0, "legal": 2}
    assert report.row("legal", "hr").label == "all"
    for dropped, verdict in zip(("hr", "legal"), report.verdicts, strict=False):
        assert verdict.key == f"without {dropped}"
        assert f"takes {dropped}'s facts (0 of 2 left) and leaves the others' (2 of 2 kept)" in verdict.text


def test_all_streams_together_are_measured_and_judged(two, tokenizer, report):
    """So small a model holds no two streams at once: its verdict says so, whatever ``tune`` says of each alone."""
    with alpha(two, 1.0):
        lm, said = LanguageModel(two), 0
        for name, rows in DATA.items():
            records = load_records(rows, tokenizer)
            items = [encode(r, tokenizer) for r in records]
            scores, first = score(lm, items)
            found, _ = heard(lm, tokenizer, records, items, first)
            mine = report.row("hr", "legal").owners[name]
            assert mine.recited == tuple(i for i, yes in enumerate(found.tolist(), 1) if yes)
            assert mine.loss == pytest.approx(float(scores.nll.mean()), rel=1e-5)
            said += len(mine.recited)
    together = report.verdicts[-2]
    assert f"{said} of their 4 facts" in together.text
    assert together.status == ("pass" if said == 4 else "fail")


def test_the_loss_tells_records_from_a_holdout_only_while_their_stream_is_on(report):
    assert report.row("hr").owners["hr"].auc.value == 1.0
    off, other = report.row().owners["hr"], report.row("legal").owners["hr"]
    assert off.auc_moved.value == 0.0
    assert other.auc_moved.value == pytest.approx(other.auc.value - off.auc.value)
    assert report.row("legal").owners["legal"].auc is None


def test_ability_stands_beside_that_of_all_streams_off(report):
    off, *others = report.rows
    assert (off.perplexity_ratio, off.kl) == (1.0, 0.0)
    for row in others:
        assert row.kl > 0
        assert row.perplexity == pytest.approx(row.perplexity_ratio * off.perplexity)


def test_the_json_and_the_page_hold_every_number(report, tmp_path):
    data = json.loads(report.to_json(tmp_path / "r.json"))
    assert data == json.loads((tmp_path / "r.json").read_text()) == report.to_dict()
    page = Page(report.to_html(tmp_path / "r.html"))
    for row in report.rows:
        assert row.label in page.text
        for figures in row.owners.values():
            assert f"{len(figures.recited)} of {figures.records}" in page.text
            assert f"{figures.loss:.3f} nats" in page.text
        assert f"× {row.perplexity_ratio:.3f}" in page.text
        assert f"ppl {row.perplexity:.3f}" in page.text
    assert f"AUC {report.row('legal').owners['hr'].auc.value:.2f}" in page.text
    assert all(v.text.split(";")[0] in page.text for v in report.verdicts)
    assert [a["role"] for a in page.all("svg")] == ["img"]
    assert not page.all("link")
    assert [a.get("type") for a in page.all("script")] == ["application/json"]


def owner(*recited, moved=None):
    return OwnerFigures(4, recited, 1.0, None if moved is None else Estimate(0.5, 0.4, 0.6, 4), moved)


def made(hr_all, hr_rest, legal_all, legal_rest, *, moved=None, base=(), ratio=1.0, kl=0.0):
    """A report in which hr's stream is the one that is dropped."""
    rows = [
        SubsetFigures((), "none", {"hr": owner(*base), "legal": owner()}, 10.0, 1.0, 0.0),
        SubsetFigures(("hr",), "hr alone", {"hr": owner(*hr_all), "legal": owner()}, 10.0, 1.0, 0.0),
        SubsetFigures(
            ("legal",), "legal alone", {"hr": owner(*hr_rest, moved=moved), "legal": owner(*legal_rest)}, 10.0, 1.0, 0.0
        ),
        SubsetFigures(
            ("hr", "legal"), "all", {"hr": owner(*hr_all), "legal": owner(*legal_all)}, 10.0 * ratio, ratio, kl
        ),
    ]
    return InterferenceReport(("hr", "legal"), ("hr", "legal"), "every subset of 2 streams", tuple(rows), 99)


@pytest.mark.parametrize(("report", "status", "words"), [
    (made((1, 2, 3, 4), (), (1, 2), (1, 2)), "pass", "takes hr's facts (0 of 4 left) and leaves the others' (2 of 2"),
    (made((1, 2), (2,), (1, 2), (1, 2)), "fail", "does not take hr's facts (1 of 2 left) and leaves"),
    (made((1, 2), (), (1, 2), (1,)), "fail", "takes hr's facts (0 of 2 left) and does not leave the others' (1 of 2"),
    (made((1, 2), (2,), (1, 2), (1, 2), base=(2,)), "pass", "(0 of 1 left)"),
    (made((1,), (), (1,), (1,), moved=Estimate(0.3, 0.2, 0.4, 4)), "fail", "AUC +0.30 against all off"),
    (made((1,), (), (1,), (1,), moved=Estimate(0.3, -0.1, 0.6, 4)), "pass", "(0 of 1 left)"),
    (made((), (), (1,), (1,)), "withheld", "hr's stream says none"),
    (made((1,), (), (), ()), "withheld", "the others' streams say none"),
])  # fmt: skip
def test_a_verdict_says_what_is_left_and_what_is_kept(report, status, words):
    verdict = report.verdicts[0]
    assert verdict.status == status
    assert words in verdict.text
    assert (verdict.text in report.missed) == (status == "fail")


def test_streams_that_spoil_each_other_or_general_ability_are_missed():
    assert [v.status for v in made((1,), (), (1,), (1,), ratio=1.2, kl=0.1).verdicts] == ["pass"] * 3 + ["fail"]
    spoilt = made((1, 2), (), (1,), (1, 2)).verdicts[-2]
    assert spoilt.status == "fail"
    assert "3 of their 4 facts" in spoilt.text


def test_numbers_of_the_heat_map_stand_in_their_cells(report):
    page = Page(report.to_html())
    boxes = [a for a in page.all("rect") if a["class"] in ("own", "cell")]
    assert [a["class"] for a in boxes] == ["cell"] * 3 + ["own", "cell", "cell"] + ["cell", "own", "cell"] + [
        "own", "own", "cell"
    ]  # fmt: skip
    widest = max(len(w) for w in page.inside["text"] if w not in ("legal alone", "general text"))
    assert widest * CHARACTER <= float(boxes[0]["width"])
    shades = [float(a["fill-opacity"]) for a in page.all("rect") if a["class"] == "heat"]
    assert shades[0] == 0 < shades[3] < 0.5


def test_hostile_names_do_not_leave_the_page():
    data = made((1,), (), (1,), (1,)).to_dict() | {"name": "<script>alert(1)</script>\u202e"}
    page = Page(render_matrix(data))
    assert "<script>alert(1)</script>U+202E" in page.text
    assert len(page.all("script")) == 1


def test_many_streams_are_measured_alone_but_one_and_together():
    names = [f"s{i}" for i in range(5)]
    assert len(subsets_of(names[:4])[0]) == 16
    chosen, words = subsets_of(names)
    assert [len(c) for c in chosen] == [0, *[1] * 5, *[4] * 5, 5]
    assert words == "none, each alone, all but one, and all of 5 streams"
    assert subsets_of(names, [{"s3", "s1"}, "s0"])[0] == [(), ("s1", "s3"), ("s0",)]
    with pytest.raises(ConfigError, match="subsets name the stream 'x'"):
        subsets_of(names, [{"x"}])


def test_what_was_not_measured_is_withheld(two, tokenizer):
    found = interference(two, tokenizer, DATA, subsets=[{"hr"}])
    assert [r.label for r in found.rows] == ["none", "hr alone"]
    assert [v.status for v in found.verdicts[:3]] == ["withheld"] * 3


@pytest.mark.parametrize(("data", "holdout", "error", "words"), [
    ({"hr": HR, "tax": LEGAL}, {}, ConfigError, "data names the stream 'tax'; the model has hr, legal"),
    ({"hr": HR}, {}, ConfigError, "data are given of hr alone"),
    ({}, {}, ConfigError, "data are given of no stream"),
    (DATA, {"tax": UNSEEN}, ConfigError, "holdout names the stream 'tax'"),
    ({"hr": HR, "legal": []}, {}, DataError, "data of legal holds no record"),
    (DATA, {"hr": [*UNSEEN, HR[1]]}, DataError, "data 2 = holdout 4"),
])  # fmt: skip
def test_what_makes_no_matrix_is_refused(two, tokenizer, data, holdout, error, words):
    with pytest.raises(error, match=words):
        interference(two, tokenizer, data, holdout=holdout)


def test_models_with_less_than_two_streams_are_refused(planted, tokenizer):
    with pytest.raises(AlphaError, match="no ortho stream"):
        interference(planted, tokenizer, DATA)
    tune(planted, tokenizer, HR, "hr", TuneConfig(ratio=0.25, epochs=1))
    with pytest.raises(ConfigError, match="the one stream hr"):
        interference(planted, tokenizer, DATA)


def test_a_fact_of_two_owners_is_told(two, tokenizer):
    found = interference(two, tokenizer, {"hr": HR, "legal": [*LEGAL, HR[1]]}, subsets=[])
    assert any("hr 2 = legal 3" in w for w in found.warnings)
