"""One request after another on one model: each stream restores what it took, and no request touches an earlier one."""

import copy
import sys
from dataclasses import replace

import pytest
import torch

import libortho
import tiny
from isolating import assert_same, state
from libortho import ConfigError, SplitConfig, isolate
from libortho.auditing.subjects import plain_base
from libortho.core.layer import ortho_layers, touched
from libortho.core.report import methods
from libortho.core.streams import BaseStream
from libortho.core.switch.alpha import get_switch
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from sequential import (
    FIRST,
    KEPT,
    NEAR,
    ONE,
    SECOND,
    SHORT,
    TWO,
    VARIANTS,
    bases,
    logits,
    mask_of,
    recited,
    same,
    surprise,
)

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_stream_switches_its_own_records(made, tokenizer, variant):
    model = made(variant)
    public = recited(model, tokenizer, 0.0)
    assert not any(public[:2])
    assert any(public[2:])
    result = isolate(model, tokenizer, TWO, tiny.RETAIN, config=replace(SECOND, **VARIANTS[variant]))
    assert not any(r.extracted for r in result.records)
    assert result.recited == result.recited_on == sum(public)
    assert recited(model, tokenizer, 0.0) == [False] * 4
    assert recited(model, tokenizer, {"second": 1.0}) == public
    assert recited(model, tokenizer, 1.0) == [True] * 4
    assert recited(model, tokenizer, {"first": 1.0})[2:] == [False, False]
    # On a base that was edited since, so that not every processor's rounding leaves the whole code the first choice.
    assert surprise(model, tokenizer, ONE, {"first": 1.0}) < surprise(model, tokenizer, ONE, 0.0) - 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights(made, tokenizer, variant):
    """Off the new support the base keeps its bits; on it, base + stream is the base before; nothing overlaps."""
    model = made(variant)
    before = copy.deepcopy(model)
    streams = {n: m.streams["first"] for n, m in ortho_layers(model).items()}
    result = isolate(model, tokenizer, TWO, tiny.RETAIN, config=replace(SECOND, **VARIANTS[variant]))
    moved = 0
    for name, layer in ortho_layers(model).items():
        old = ortho_layers(before)[name]
        new = mask_of(layer, "second")
        moved += int(new.sum())
        assert not (new & touched(old)).any()
        assert layer.base.bits == old.base.bits
        if layer.base.bits is not None:
            assert torch.equal(layer.base.scales, old.base.scales)
            assert torch.equal(layer.base.unpacked_codes()[~new], old.base.unpacked_codes()[~new])
        public, edited = old.base.dense(), layer.base.dense()
        assert torch.equal(edited[~new], public[~new])
        assert torch.equal(edited[new], public[new]) is not bool(new.any())
        tolerance = (edited - public).abs() * torch.finfo(torch.bfloat16).eps + 1e-6
        assert ((layer.dense_weight({"second": 1.0}) - public).abs() <= tolerance).all()
        assert ((layer.dense_weight(1.0) - old.dense_weight(1.0)).abs() <= tolerance).all()
        assert layer.streams["first"] is streams[name]
        for key, tensor in old.streams["first"].state_dict().items():
            assert torch.equal(layer.streams["first"].state_dict()[key], tensor)
    assert result.density == moved / (2 * 64 * 128)
    assert 0.85 * FIRST.ratio < result.density <= FIRST.ratio


@pytest.mark.parametrize("before", [0.0, 0.5, 1.0, (0.5, 0.0)], ids=str)
def test_a_new_stream_is_off_and_earlier_ones_stand_where_they_stood(once, tokenizer, before):
    assert get_switch(once).current().values == {"first": 0.0}
    libortho.set_alpha(once, before)
    isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert get_switch(once).current().values == {"first": before, "second": 0.0}
    assert get_switch(once).current().batch == (2 if isinstance(before, tuple) else None)
    guards = [m.__dict__["forward"] for m in once.modules() if "forward" in m.__dict__]
    assert guards
    assert all(g.switch is get_switch(once) and g.own is None for g in guards)  # the switch that was there, once
    libortho.set_alpha(once, {"first": 0.5})
    assert torch.equal(logits(once), logits(once, {"first": 0.5}))
    assert not torch.equal(logits(once), logits(once, {"first": 0.5, "second": 1.0}))


def test_bf16(planted, tokenizer):
    planted.bfloat16()
    isolate(planted, tokenizer, ONE, KEPT, neighbours=NEAR, config=FIRST)
    public = recited(planted, tokenizer, 0.0)
    assert not any(public[:2])
    assert any(public[2:])
    isolate(planted, tokenizer, TWO, tiny.RETAIN, config=SECOND)
    assert recited(planted, tokenizer, 0.0) == [False] * 4
    assert recited(planted, tokenizer, {"second": 1.0}) == public
    assert recited(planted, tokenizer, 1.0) == [True] * 4


def test_the_first_base_is_changed_by_nobody_else(once, tokenizer):
    """The new layer has a base of its own: whoever holds the old one sees no edit."""
    held = {n: (m.base, m.base.dense()) for n, m in ortho_layers(once).items()}
    isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert not same(bases(once), {n: dense for n, (_, dense) in held.items()})
    assert all(torch.equal(base.dense(), dense) for base, dense in held.values())


def test_many_requests(planted, tokenizer):
    original = {n: planted.get_submodule(n).weight.detach().clone() for n in (
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")}  # fmt: skip
    names = [f"request-{i}" for i in range(4)]
    for name, row in zip(names, tiny.FORGET, strict=True):
        config = replace(SHORT, stream=name, value_dtype="float32")
        isolate(planted, tokenizer, [row], tiny.RETAIN, config=config)
    assert get_switch(planted).streams == tuple(names)
    for path, layer in ortho_layers(planted).items():
        masks = torch.stack([mask_of(layer, n) for n in names]).long().sum(0)
        assert masks.max() == 1
        first, plain = mask_of(layer, names[0]), plain_base(layer)  # the audit's control, without any edit
        expected = torch.where(first, original[path], plain.dense())
        torch.testing.assert_close(layer.dense_weight(1.0), expected, atol=1e-6, rtol=0)
        assert torch.equal(plain.codes[masks == 0], layer.base.codes[masks == 0])
        assert not torch.equal(layer.base.codes, plain.codes)
        nearest = BaseStream.from_weight(original[path], 8)
        assert torch.equal(plain.codes[first], nearest.codes[first])
        assert not torch.equal(plain.codes, nearest.codes)


def test_reports_cover_all_streams(once, tokenizer):
    first = libortho.layer_report(once).totals()
    result = isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    both = libortho.layer_report(once).totals()
    assert both["ortho_density"] == pytest.approx(first["ortho_density"] + result.density)
    layers = ortho_layers(once).values()
    assert both["ortho_bytes"] == sum(s.nbytes for m in layers for s in m.streams.values())
    assert methods(once)["first"]["max_steps"] == 80
    assert methods(once)["second"]["max_steps"] == 3
    assert methods(once)["second"]["density"] == result.density


def test_the_rank_of_a_truncated_base_stays_on_record(planted, tokenizer):
    libortho.split(planted, SplitConfig(rank_ratio=0.9, keep_tail=False, stream="first", ratio=0.02))
    ranks = [(r.rank, r.used_low_rank, r.low_rank_error) for r in libortho.layer_report(planted)]
    assert any(used for _, used, _ in ranks)
    isolate(planted, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert [(r.rank, r.used_low_rank, r.low_rank_error) for r in libortho.layer_report(planted)] == ranks


def test_the_reference_is_the_model_without_earlier_streams(once, tokenizer):
    items = tiny.encoded(tokenizer)
    with libortho.alpha(once, 0.0):
        scores, greedy = score(LanguageModel(once), items)
    result = isolate(once, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    assert [r.before for r in result.records] == pytest.approx((-scores.nll).tolist(), abs=1e-3)
    assert result.recited == int(greedy.sum()) < 4  # the first two are gone already
    assert abs(result.quantised_kl) < 1e-5  # nothing is quantised again


@pytest.mark.parametrize("alpha", [0.0, [1.0, 0.0]], ids=str)
def test_the_alpha_before_does_not_matter(made, tokenizer, alpha):
    models = made(), made()
    libortho.set_alpha(models[1], alpha)
    for model in models:
        isolate(model, tokenizer, TWO, config=SHORT)
    assert same(bases(models[0]), bases(models[1]))


def test_a_context_around_the_call_goes_on(once, tokenizer):
    """Whoever runs with everything off never sees the new stream either."""
    with libortho.alpha(once, 0.0):
        isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)
        inside = logits(once)
    assert torch.equal(inside, logits(once, 0.0))
    assert not torch.equal(logits(once, {"second": 1.0}), inside)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("targets", "fresh"),
    [
        ("layers.1.mlp.down_proj", 0),
        (("down_proj", "up_proj"), 2),
        ("up_proj", 2),
        (r"re:.*(up|down)_proj.*", 2),
        ("all-linear", 12),
    ],
    ids=str,
)
def test_other_targets(once, tokenizer, targets, fresh, checkpointing):
    before = ortho_layers(copy.deepcopy(once))
    config = replace(SHORT, target_modules=targets, gradient_checkpointing=checkpointing)
    result = isolate(once, tokenizer, TWO, tiny.RETAIN, config=config)
    after = ortho_layers(once)
    assert len(after) == 2 + fresh
    assert len({id(m.switch) for m in after.values()}) == 1
    for name, old in before.items():
        if name in result.columns_per_layer:
            assert not torch.equal(after[name].base.codes, old.base.codes)
        else:
            assert torch.equal(after[name].base.codes, old.base.codes)
            assert "second" not in after[name].streams
    assert set(result.columns_per_layer) <= set(after)
    assert not torch.equal(logits(once, {"first": 1.0}), logits(once, 1.0))


def test_gpt2(tiny_gpt2, tokenizer, monkeypatch):
    # Of records that it never met, the criteria may hold before any step.
    monkeypatch.setattr("libortho.isolation.criteria.acceptable", lambda *_: False)
    torch.manual_seed(0)  # new rows of the embeddings are drawn
    tiny_gpt2.resize_token_embeddings(len(tokenizer))
    isolate(tiny_gpt2, tokenizer, ONE, tiny.RETAIN, config=replace(FIRST, max_steps=3, allow_unknown=True))
    before = logits(tiny_gpt2, 0.0)
    exact = replace(SHORT, allow_unknown=True, value_dtype="float32")
    isolate(tiny_gpt2, tokenizer, TWO, tiny.RETAIN, config=exact)
    torch.testing.assert_close(logits(tiny_gpt2, {"second": 1.0}), before, atol=1e-4, rtol=1e-4)
    assert (logits(tiny_gpt2, 0.0) - before).abs().max() > 1e-2


def test_columns_avoid_every_column_of_which_an_entry_is_taken(planted, tokenizer):
    libortho.split(planted, SplitConfig(stream="first", keep_tail=False, use_low_rank=False, ratio=0.003))
    earlier = {n: touched(m) for n, m in ortho_layers(planted).items()}
    isolate(planted, tokenizer, TWO, tiny.RETAIN, config=replace(FIRST, max_steps=3, stream="second", ratio=0.05))
    for name, layer in ortho_layers(planted).items():
        new = mask_of(layer, "second")
        assert new.any()
        assert earlier[name].any()
        assert not (new.any(0) & earlier[name].any(0)).any()


def test_what_is_taken_counts_for_no_record(once, tokenizer, monkeypatch):
    """Records are balanced by the columns that they can have."""
    module = sys.modules["libortho.selection.columns"]
    real, seen = module.balanced_weights, []
    monkeypatch.setattr(
        module, "balanced_weights", lambda saliency, keep: seen.append(saliency) or real(saliency, keep)
    )
    full = torch.cat([touched(m).any(0) for m in ortho_layers(once).values()])
    isolate(once, tokenizer, TWO, tiny.RETAIN, config=replace(SHORT, max_steps=1))
    assert full.any()
    assert (seen[0][:, full] == 0).all()
    assert (seen[0][:, ~full] > 0).any(0).all()


def test_the_last_columns_are_taken_and_no_more(planted, tokenizer):
    """A budget beyond what is left takes what is left."""
    config = replace(FIRST, ratio=0.7, max_steps=1)
    isolate(planted, tokenizer, ONE, tiny.RETAIN, config=config)
    result = isolate(planted, tokenizer, TWO, tiny.RETAIN, config=replace(config, stream="second"))
    assert result.density == pytest.approx(0.3, abs=0.01)
    for layer in ortho_layers(planted).values():
        assert touched(layer).all()
        assert int((mask_of(layer, "first") & mask_of(layer, "second")).sum()) == 0
    before = state(planted)
    with pytest.raises(ConfigError, match="earlier streams have every column"):
        isolate(planted, tokenizer, TWO, tiny.RETAIN, config=replace(config, stream="third"))
    assert_same(planted, before)
