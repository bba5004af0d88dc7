"""Streams come into a model in memory, and go."""

import copy

import pytest
import torch

import libortho
from libortho import (
    AlphaContextError,
    AlphaError,
    CheckpointError,
    ConfigError,
    TuneConfig,
    add_stream,
    load,
    remove_stream,
    save,
    set_alpha,
    tune,
)
from libortho.core.layer import ortho_layers
from libortho.core.report import methods
from tiny import HR, LEGAL, RETAIN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(_planted, tokenizer, tmp_path_factory):
    model, path = copy.deepcopy(_planted), tmp_path_factory.mktemp("live") / "out"
    for name, data in (("hr", HR), ("legal", LEGAL)):
        tune(model, tokenizer, data, name, TuneConfig(ratio=0.1, bits=8, epochs=3), retain=RETAIN[:4])
    return save(model, tokenizer, path)


def logits(model, alphas):
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad(), libortho.alpha(model, alphas):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("before", [["legal"], None], ids=["beside another", "into a bare base"])
def test_a_stream_that_is_added_is_the_one_that_would_have_been_loaded(directory, before):
    whole, _ = load(directory)
    model, _ = load(directory, streams=before)
    add_stream(model, directory, "hr")
    assert torch.equal(logits(model, {}), logits(whole, {}))
    assert torch.equal(logits(model, {"hr": 0.7}), logits(whole, {"hr": 0.7}))
    assert not torch.equal(logits(model, {"hr": 0.7}), logits(whole, {}))
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(3, 30)[None]).logits, logits(whole, {}))  # off
    assert methods(model)["hr"] == methods(whole)["hr"]


def test_a_stream_that_is_removed_leaves_the_others_and_no_values(directory):
    model, _ = load(directory)
    legal, off = logits(model, {"legal": 1.0}), logits(model, {})
    values = [t for m in ortho_layers(model).values() for t in m.streams["hr"].buffers()]
    assert any(bool(v.any()) for v in values)
    set_alpha(model, {"hr": 1.0})
    remove_stream(model, "hr")
    assert not any(bool(v.any()) for v in values)
    assert torch.equal(logits(model, {"legal": 1.0}), legal)
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(3, 30)[None]).logits, off)
    with pytest.raises(AlphaError, match="unknown stream"):
        set_alpha(model, {"hr": 1.0})
    with pytest.raises(ConfigError, match="no stream 'hr'"):
        remove_stream(model, "hr")
    assert "hr" not in methods(model)
    add_stream(model, directory, "hr")
    assert torch.equal(logits(model, {}), off)


def test_a_cache_that_was_computed_with_it_is_refused(directory):
    model, _ = load(directory)
    ids = torch.arange(3, 10).unsqueeze(0)
    with torch.no_grad(), libortho.alpha(model, {"hr": 1.0}):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    remove_stream(model, "hr")
    with torch.no_grad(), pytest.raises(AlphaContextError, match="cannot be continued"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_streams_of_another_base_taken_names_and_unknown_ones_are_refused(directory, planted, tokenizer, tmp_path):
    model, _ = load(directory)
    with pytest.raises(ConfigError, match="exists already"):
        add_stream(model, directory, "hr")
    with pytest.raises(CheckpointError, match="none"):
        add_stream(model, directory, "none")
    with torch.no_grad():
        planted.model.layers[0].mlp.down_proj.weight.add_(0.01)
    tune(planted, tokenizer, HR, "hr", TuneConfig(ratio=0.1, bits=8, epochs=1), retain=RETAIN[:4])
    save(planted, tokenizer, tmp_path / "other")
    bare, _ = load(tmp_path / "other", streams=None)
    with pytest.raises(CheckpointError, match="has the base"):
        add_stream(bare, directory, "hr")
    assert not any(m.streams for m in ortho_layers(bare).values())
