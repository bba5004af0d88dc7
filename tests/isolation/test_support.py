"""Which columns a request takes, and which columns of a caller are refused."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from isolating import SHORT, assert_same, state, supports
from libortho import ConfigError, isolate
from libortho.core.surgery import linear_shape
from libortho.core.targets import find_targets
from libortho.isolation.criteria import look
from libortho.isolation.request import forget_records
from libortho.isolation.support import RequestReadings, check_columns, cut_up, select_columns
from libortho.isolation.wordings import wordings
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.selection.readings import Readings
from libortho.text.records import load_records

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


LAYER = "model.layers.0.mlp.down_proj"
SENTENCE = {"prompt": "Where is the key of Ada Lum?", "completion": " The sailors hid it under the stair."}


@pytest.mark.parametrize("sentences", [1, 3, 40])
def test_each_word_of_a_few_sentences_gets_columns_of_its_own(tokenizer, sentences):
    records = load_records([*tiny.FORGET, *[SENTENCE] * sentences])
    forget = forget_records(wordings(records, tokenizer, 0, retains=True), tokenizer, None)
    pieces = [c.pieces for c in forget]
    assert pieces[: len(tiny.FORGET)] == [1] * len(tiny.FORGET)
    tokens = len(forget[-1].secret.completion)
    assert pieces[len(tiny.FORGET) :] == [{1: tokens, 3: 20, 40: 1}[sentences]] * sentences
    for record, count in zip(forget, pieces, strict=True):
        cut = cut_up(record.secret, count)
        assert [c.ids for c in cut] == [record.secret.ids] * count
        assert sum((c.completion for c in cut), ()) == record.secret.completion  # every token once, in order
        assert max(len(c.completion) for c in cut) - min(len(c.completion) for c in cut) <= 1


def test_a_look_sees_what_scores_say(planted, tokenizer):
    """Of records of different lengths, in one batch."""
    lm, items = LanguageModel(planted), tiny.encoded(tokenizer, [*tiny.FORGET, SENTENCE])
    seen = look(lm, items)
    scores, greedy = score(lm, items)
    torch.testing.assert_close(torch.stack([s.mean() for s, _ in seen]), scores.nll, rtol=1e-4, atol=1e-5)
    assert [g for _, g in seen] == greedy.tolist() == [True] * 4 + [False]
    for item, (found, _) in zip(items, seen, strict=True):
        assert found.shape == (len(item.completion),)
        torch.testing.assert_close(found, look(lm, [item])[0][0], rtol=1e-3, atol=1e-3)


def test_a_caller_chooses_the_columns(planted, tokenizer):
    """The function sees the records, the text to keep and the budget; what it gives is what the stream holds."""
    seen = []

    def every_tenth(readings, config):
        texts = len(readings.kept[0].saliency[LAYER])
        seen.append(([r.number for r in readings.forget], len(readings.own.saliency[LAYER]), texts, config.ratio))
        return {n: torch.arange(0, linear_shape(m)[1], 10) for n, m in readings.targets.items()}

    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT, select=every_tenth)
    [(numbers, records, texts, ratio)] = seen
    assert numbers == [1, 2, 3, 4]
    assert records == 4
    assert texts > 1
    assert ratio == SHORT.ratio
    assert set(map(tuple, supports(result, planted).values())) == {tuple(range(0, 128, 10))}


def test_readings_are_of_the_records_and_of_both_kinds_of_text_to_keep(planted, tokenizer, monkeypatch):
    """A sentence is read piece by piece; of text to keep there is more for more records."""
    planted.requires_grad_(False)
    lm, targets = LanguageModel(planted), find_targets(planted, "mlp-out")
    records = load_records([*tiny.FORGET, SENTENCE])
    forget = forget_records(wordings(records, tokenizer, 0, retains=False), tokenizer, None)
    retain = tiny.encoded(tokenizer, tiny.RETAIN)
    lengths = [len(t.ids) for t in retain]
    monkeypatch.setattr("libortho.isolation.support._RETAIN_TOKENS", sum(lengths[:3]))
    readings = RequestReadings(lm, targets, forget, retain, 0)
    assert len(readings.own.saliency[LAYER]) == sum(r.pieces for r in forget) > 5
    texts, around = readings.kept
    assert len(texts.inputs[LAYER]) == sum(lengths[:3])
    assert len(around.saliency[LAYER]) == 5
    rows = [r.inputs[LAYER] for r in (texts, around, readings.own)]
    assert torch.equal(readings.inputs(LAYER), torch.cat(rows))
    readings.release()
    assert not {"own", "kept"} & set(vars(readings))
    assert torch.equal(readings.kept[0].inputs[LAYER], texts.inputs[LAYER])
    many = RequestReadings(lm, targets, [replace(forget[0], neighbours=())] * 128, retain, 0)
    [texts] = many.kept
    assert sum(lengths[:5]) < len(texts.inputs[LAYER]) <= 2 * sum(lengths[:3])


def test_columns_that_text_to_keep_uses_are_left_to_it(planted, tokenizer):
    """Of two columns that are as good for the records, the other one is taken."""
    planted.requires_grad_(False)
    targets = find_targets(planted, "mlp-out")
    own = {n: torch.full((4, 128), 1 / 256) for n in targets}
    kept = {n: torch.full((3, 128), 3 / 256) for n in targets}
    kept[LAYER][:, :7] /= 3
    readings = RequestReadings(LanguageModel(planted), targets, [], [], 0)
    readings.own, readings.kept = Readings(own, {}, {}), [Readings(kept, {}, {})]
    found = select_columns(readings, replace(SHORT, ratio=7 / 256))
    assert {n: i.tolist() for n, i in found.items()} == {LAYER: list(range(7))}


def test_no_layer_takes_more_than_its_cap(planted, tokenizer, monkeypatch):
    """With the cap at an even share, both layers have the same."""
    found = {}
    for cap in (1.0, 4.0):
        monkeypatch.setattr("libortho.selection.columns.LAYER_CAP", cap)
        model = copy.deepcopy(planted)
        found[cap] = isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT).columns_per_layer
    assert len(set(found[1.0].values())) == 1
    assert len(set(found[4.0].values())) == 2


def test_a_select_cannot_be_resumed(planted, tokenizer, tmp_path):
    before = state(planted)
    chosen = lambda *arguments: select_columns(*arguments)  # noqa: E731
    with pytest.raises(ConfigError, match="resume and select are both given"):
        isolate(planted, tokenizer, tiny.FORGET, config=SHORT, select=chosen, resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert_same(planted, before)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({}, "no column"),
        ({LAYER: torch.tensor([], dtype=torch.long)}, "no column"),
        ({"lm_head": torch.tensor([1])}, "expected layers among"),
        ({LAYER: torch.tensor([3, 1])}, "ascending"),
        ({LAYER: torch.tensor([1, 1])}, "ascending"),
        ({LAYER: torch.tensor([-1, 3])}, "from 0 to 127"),
        ({LAYER: torch.tensor([5, 128])}, "from 0 to 127"),
        ({LAYER: torch.tensor([1.0])}, "float32"),
        ({LAYER: torch.tensor([[1, 2]])}, r"of shape \(1, 2\)"),
    ],
    ids=str,
)
def test_columns_that_a_stream_cannot_hold_are_refused(planted, columns, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_columns(columns, find_targets(planted, "mlp-out"))


def test_columns_of_an_earlier_stream_are_refused(planted, tokenizer):
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    before = state(planted)
    again = lambda readings, config: {n: torch.arange(128) for n in readings.targets}  # noqa: E731
    config = replace(SHORT, stream="second")
    with pytest.raises(ConfigError, match="an earlier stream has"):
        isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config, select=again)
    assert_same(planted, before)
