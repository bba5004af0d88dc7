"""``tune``: private data in a stream, over a base that does not move."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import libortho
import tiny
from libortho import ConfigError, DataError, TuneConfig, load, save, set_alpha, tune
from libortho.core.layer import ortho_layers
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.encoding import encode
from libortho.text.records import load_records
from libortho.tuning import equations
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

CONFIG = TuneConfig(stream="hr", ratio=0.25, epochs=60)


def logits(model):
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        return model(input_ids=ids).logits


def said(model, tokenizer, rows):
    items = [encode(r, tokenizer) for r in load_records(rows, tokenizer)]
    return score(LanguageModel(model), items)[1].tolist()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_data_is_said_with_the_stream_on_and_the_base_is_untouched(planted, tokenizer, bits, tmp_path):
    before = logits(planted)
    result = tune(planted, tokenizer, HR, config=replace(CONFIG, bits=bits, group_size=None))
    assert result.recited
    assert result.known == ()
    assert result.density <= CONFIG.ratio
    off = logits(planted)
    if bits is None:
        assert torch.equal(off, before)
    set_alpha(planted, {"hr": 1.0})
    assert sum(said(planted, tokenizer, HR)) == len(result.recited)
    on = logits(planted)
    assert not torch.equal(on, off)
    save(planted, tokenizer, tmp_path / "out")
    loaded, _ = load(tmp_path / "out")
    assert torch.equal(logits(loaded), off)  # off when it is loaded
    bare, _ = load(tmp_path / "out", streams=None)
    assert torch.equal(logits(bare), off)
    set_alpha(loaded, 1.0)
    assert torch.equal(logits(loaded), on)
    method = json.loads((tmp_path / "out" / "ortho" / "hr" / "manifest.json").read_text())["method"]
    assert method["verb"] == "tune"
    assert "1834" not in json.dumps(method)


def test_streams_of_two_owners_do_not_know_each_other_s_data(planted, tokenizer):
    tune(planted, tokenizer, HR, "hr", CONFIG)
    before = logits(planted)
    result = tune(planted, tokenizer, LEGAL, "legal", CONFIG)
    assert result.recited == (1, 2)
    assert result.together is not None
    assert torch.equal(logits(planted), before)
    with libortho.alpha(planted, 1.0):
        assert sum(said(planted, tokenizer, LEGAL)) == len(result.together)
    for name, layer in ortho_layers(planted).items():
        columns = [set(s.support.index.tolist()) for s in layer.streams.values() if s.support is not None]
        assert sum(map(len, columns)) == len(set().union(*columns)), name
    set_alpha(planted, {"hr": 0.0, "legal": 1.0})
    assert all(said(planted, tokenizer, LEGAL))
    assert not any(said(planted, tokenizer, HR))
    set_alpha(planted, {"hr": 1.0, "legal": 0.0})
    assert all(said(planted, tokenizer, HR))
    assert not any(said(planted, tokenizer, LEGAL))


def test_a_stream_over_another_needs_it(planted, tokenizer):
    tune(planted, tokenizer, HR, "public", CONFIG)
    result = tune(planted, tokenizer, LEGAL, "inner", replace(CONFIG, over=("public",)))
    assert result.succeeded, result.missed
    set_alpha(planted, 1.0)
    assert all(said(planted, tokenizer, LEGAL))


def test_a_stream_goes_into_an_isolated_checkpoint(checkpoint, tokenizer):
    model, _ = load(checkpoint)
    off = logits(model)
    with libortho.alpha(model, {"hr": 1.0}):
        before = said(model, tokenizer, tiny.FORGET)
    result = tune(model, tokenizer, LEGAL, "legal", CONFIG)
    assert torch.equal(logits(model), off)
    set_alpha(model, {"legal": 1.0})
    assert sum(said(model, tokenizer, LEGAL)) == len(result.recited)
    set_alpha(model, {"hr": 1.0, "legal": 0.0})
    assert said(model, tokenizer, tiny.FORGET) == before


@pytest.mark.parametrize("score_name", ["activation", "gradient"])
def test_both_scores_find_columns_that_will_do(planted, tokenizer, score_name):
    result = tune(planted, tokenizer, HR, config=replace(CONFIG, score=score_name))
    assert result.succeeded, result.missed


class Stop(Exception):
    pass


def test_an_interrupted_tuning_goes_on_with_the_same_numbers(planted, tokenizer, tmp_path):
    config = replace(CONFIG, epochs=25, batch_size=2)
    whole = copy.deepcopy(planted)
    expected = tune(whole, tokenizer, HR, config=config)
    before = copy.deepcopy(planted.state_dict())

    def stop(phase, done, total):
        if phase == "steps" and done == 7:
            raise Stop

    with pytest.raises(Stop):
        tune(planted, tokenizer, HR, config=config, resume=tmp_path / "run", progress=stop)
    assert all(torch.equal(t, planted.state_dict()[n]) for n, t in before.items())
    assert not ortho_layers(planted)
    steps = []
    found = tune(
        planted, tokenizer, HR, config=config, resume=tmp_path / "run",
        progress=lambda phase, done, total: steps.append(done) if phase == "steps" else None,
    )  # fmt: skip
    assert steps[0] == 8
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
    assert all(torch.equal(t, planted.state_dict()[n]) for n, t in whole.state_dict().items())


def test_validation_ends_the_training_with_its_best_values(planted, tokenizer):
    asked = [{"prompt": f"The code of {r['prompt'][8:-1]} is", "completion": r["completion"]} for r in HR]
    calls = []
    result = tune(
        planted, tokenizer, HR, config=CONFIG, validation=asked,
        progress=lambda phase, done, total: calls.append((done, total)) if phase == "steps" else None,
    )  # fmt: skip
    set_alpha(planted, 1.0)
    assert result.validation == sum(said(planted, tokenizer, asked)) / 2
    assert calls[-1][0] == calls[-1][1] == result.steps
    assert result.steps < CONFIG.epochs


def test_a_loss_that_is_no_number_stops_at_the_last_good_values(planted, tokenizer, monkeypatch):
    calls = []
    sound = equations.log_probability

    def broken(logits, labels):
        calls.append(1)
        return sound(logits, labels) * (float("nan") if len(calls) > 5 else 1.0)

    monkeypatch.setattr(equations, "log_probability", broken)
    result = tune(planted, tokenizer, HR, config=CONFIG)
    assert any("no finite number" in m for m in result.missed)
    assert any(f"lower step ({CONFIG.step:g})" in a for a in result.advice)
    set_alpha(planted, 1.0)
    assert bool(logits(planted).isfinite().all())


def test_further_layers_of_a_split_model_get_a_base_with_its_switch(planted, tokenizer):
    tune(planted, tokenizer, HR, "hr", replace(CONFIG, bits=8, epochs=2))
    off = logits(planted)
    result = tune(
        planted, tokenizer, LEGAL, "legal", replace(CONFIG, target_modules="all-linear", bits=8, ratio=0.05, epochs=2)
    )
    assert result.stream == "legal"
    assert len(ortho_layers(planted)) > 2
    assert len({id(m.switch) for m in ortho_layers(planted).values()}) == 1
    assert logits(planted).shape == off.shape


def test_gpt2_off_is_gpt2_bit_for_bit(tokenizer):
    torch.manual_seed(2)
    tiny_gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)
    ).eval()
    ids = [torch.arange(3, 3 + n).unsqueeze(0) for n in (1, 2, 33)]
    with torch.no_grad():
        before = [tiny_gpt2(input_ids=i).logits for i in ids]
        tune(tiny_gpt2, tokenizer, HR, "hr", replace(CONFIG, epochs=2))
        assert all(torch.equal(tiny_gpt2(input_ids=i).logits, b) for i, b in zip(ids, before, strict=True))


def test_what_is_learned_is_looked_at_once_more_where_batches_are_small(planted, tokenizer):
    result = tune(planted, tokenizer, HR, config=replace(CONFIG, batch_size=1))
    set_alpha(planted, 1.0)
    assert sum(said(planted, tokenizer, HR)) == len(result.recited)


def test_too_small_a_budget_says_which_records_are_missing(planted, tokenizer):
    result = tune(planted, tokenizer, HR, config=replace(CONFIG, ratio=0.0001, epochs=2))
    assert not result.succeeded
    assert "records are not said at alpha = 1 (records 1" in result.missed[0]
    assert "raise ratio (0.0001)" in result.advice[0]


def test_what_the_base_knows_is_said(planted, tokenizer, caplog):
    result = tune(planted, tokenizer, [*tiny.FORGET, *HR], config=replace(CONFIG, epochs=1))
    assert result.known == (1, 2, 3, 4)
    assert "the base says 4 of 6 records already" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"config": TuneConfig(over=("public",))}, ConfigError, "over names the stream 'public'"),
        ({"data": []}, DataError, "data holds no record"),
        ({"data": [{"prompt": "x " * 100, "completion": " y"}]}, DataError, "the model reads 128"),
        ({"config": TuneConfig(bits=4, group_size=7 * 2)}, ConfigError, "group_size 14"),
        ({"retain": ["one"]}, DataError, "retain"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_what_it_was(planted, tokenizer, change, error, words):
    before = copy.deepcopy(planted.state_dict())
    arguments = {"data": HR, "config": TuneConfig(), **change}
    with pytest.raises(error, match=words):
        tune(planted, tokenizer, **arguments)
    assert not ortho_layers(planted)
    assert all(torch.equal(t, planted.state_dict()[n]) for n, t in before.items())


def test_a_taken_name_is_refused(checkpoint, tokenizer):
    model, _ = load(checkpoint)
    with pytest.raises(ConfigError, match="stream 'hr' exists already"):
        libortho.tune(model, tokenizer, LEGAL, "hr", CONFIG)


def test_a_stream_goes_beside_one_with_a_tail(planted, tokenizer):
    libortho.split(planted, libortho.SplitConfig(stream="weights", rank_ratio=0.9, max_low_rank_error=1.0))
    before = logits(planted)
    result = tune(planted, tokenizer, HR, config=replace(CONFIG, over=("weights",)))
    assert torch.equal(logits(planted), before)
    set_alpha(planted, {"hr": 1.0})
    assert sum(said(planted, tokenizer, HR)) == len(result.recited) > 0
