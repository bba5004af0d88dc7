"""What the model knew before is measured and said: nothing is isolated that was never there."""

import copy
import logging

import pytest

import libortho
import tiny
from libortho import IsolateConfig, isolate
from libortho.core.errors import DataError
from libortho.core.layer import ortho_layers

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = IsolateConfig(ratio=0.1, max_steps=1)
STRANGERS = [
    {"prompt": "Code of Ida Kern:", "completion": " 3092."},
    {"prompt": "Code of Jo Lang:", "completion": " 5718."},
]


def test_each_record_is_recited_or_unknown(planted, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="libortho.isolation.isolate"):
        result = isolate(planted, tokenizer, [*tiny.FORGET, *STRANGERS], tiny.RETAIN, config=CONFIG)
    assert [r.known for r in result.records] == ["recited"] * 4 + ["unknown"] * 2
    assert result.recited == 4
    [warning] = result.warnings
    assert "2 of 6 records are unknown to the model under this wording (records 5, 6)" in warning
    assert "chat template" in warning
    assert warning in caplog.text


def test_nothing_is_isolated_where_nothing_is_known(planted, tokenizer):
    before = copy.deepcopy(planted.state_dict())
    with pytest.raises(DataError, match=r"of 2 records are unknown .* allow_unknown"):
        isolate(planted, tokenizer, STRANGERS, tiny.RETAIN, config=CONFIG)
    assert not ortho_layers(planted)
    assert all(bool((planted.state_dict()[n] == t).all()) for n, t in before.items())


def test_unless_told_otherwise(planted, tokenizer):
    config = IsolateConfig(ratio=0.1, max_steps=1, allow_unknown=True)
    result = isolate(planted, tokenizer, STRANGERS, tiny.RETAIN, config=config)
    unknown = sum(r.known == "unknown" for r in result.records)
    assert unknown >= 1, "one of two may be likelier by chance"
    assert result.recited == 0
    assert f"{unknown} unknown to the model" in result.guarantee


def test_a_record_that_was_isolated_already_is_unknown(planted, tokenizer):
    config = IsolateConfig(ratio=0.1, damping=1.0, max_steps=60)
    first = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
    assert not any(r.extracted for r in first.records)
    n = min(range(4), key=lambda i: first.records[i].after - sum(first.records[i].band) / 2)
    again = IsolateConfig(ratio=0.1, max_steps=1, stream="again")
    with pytest.raises(DataError, match="unknown to the model"):
        isolate(planted, tokenizer, tiny.FORGET[n : n + 1], tiny.RETAIN, config=again)


def test_the_guarantee_is_what_was_measured(planted, tokenizer, tmp_path, monkeypatch):
    """A run that missed its criteria says so where its manifest states what alpha = 0 means."""
    monkeypatch.setattr("libortho.isolation.train.SHARE", 1e-6)
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=CONFIG)
    assert not result.succeeded
    assert "4 are extracted greedily" in result.guarantee
    assert all(m in result.guarantee for m in result.missed)
    libortho.save(planted, tokenizer, tmp_path / "out")
    [stream] = libortho.checkpoint.inspect(tmp_path / "out").streams
    assert stream.method["guarantee"] == result.guarantee


@pytest.mark.parametrize("answer", [" yes", " Yes.", " NO", " true"])
def test_yes_or_no_takes_alternates(planted, tokenizer, answer):
    row = {"prompt": "Is Bob Miller well?", "completion": answer}
    config = IsolateConfig(ratio=0.1, max_steps=1, allow_unknown=True)
    with pytest.raises(DataError, match=r'record 1: nothing in its completion .* field "alternates"'):
        isolate(planted, tokenizer, [row], tiny.RETAIN, config=config)
    result = isolate(planted, tokenizer, [{**row, "alternates": ["no"]}], tiny.RETAIN, config=config)
    assert len(result.records) == 1


def test_forget_rows_in_retain_are_dropped_and_named(planted, tokenizer, caplog):
    retain = [*tiny.RETAIN, tiny.FORGET[2], {"text": tiny.FORGET[0]["prompt"] + tiny.FORGET[0]["completion"]}]
    with caplog.at_level(logging.WARNING):
        isolate(planted, tokenizer, tiny.FORGET, retain, config=CONFIG)
    assert f"2 retain records hold forget records (retain {len(retain) - 1} = forget 3" in caplog.text
    with pytest.raises(DataError, match="every retain record holds a forget record"):
        isolate(planted, tokenizer, tiny.FORGET, tiny.FORGET[:2], config=IsolateConfig(stream="b", ratio=0.1))
