"""Depth: a score with known ends, patches that agree with a loop of hooks, a lens that ends at the output."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM

import libortho
import tiny
from libortho.auditing.measures import depth
from libortho.auditing.measures.depth import decoder_layers, depth_scores, logit_lens, unlearning_depth
from libortho.auditing.subjects import Subject, at
from libortho.core.errors import DataError, TargetError
from libortho.lm.token_statistics import token_statistics
from libortho.text.encoding import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = [
    tiny.FORGET[0],
    {"prompt": "Longer than the others, and not a code at all:", "completion": " yes, 12."},
    *tiny.FORGET[1:],
]
SPLIT = libortho.SplitConfig(
    bits=4, rank_ratio=0.2, max_low_rank_error=1.0, ratio=0.5, structure="columns", value_dtype="float32"
)


def dense(model: nn.Module, key: str = "dense") -> Subject:
    return Subject(key, key, "control", model, contextlib.nullcontext)


def mean_nll(subject: Subject, items: list[Encoded]) -> float:
    with subject.enter():
        return sum(s.nll for s in token_statistics(subject.language_model(), items)) / len(items)


@pytest.fixture
def split_model(planted) -> nn.Module:
    """At alpha = 0 a coarse base that lost a part of what was planted."""
    return libortho.split(planted, SPLIT)


@pytest.fixture
def trio(split_model, clean) -> tuple[Subject, Subject, Subject]:
    return at(split_model, 1.0, "on"), at(split_model, 0.0, "off"), dense(clean, "reference")


def by_hooks(full: Subject, source: Subject, item: Encoded, layer: int) -> tuple[float, float]:
    """One record, one layer: log p of the full model, plain and patched, from whole logits and a hook of its own."""
    ids = torch.tensor([item.ids])
    first = next(i for i, label in enumerate(item.labels) if label != -100)
    where = range(first - 1, len(item.ids) - 1)
    kept: list[Tensor] = []

    def log_p() -> float:
        rows = full.model(input_ids=ids).logits[0].float().log_softmax(-1)
        return sum(float(rows[i, item.ids[i + 1]]) for i in where) / len(where)

    def replace(module, args, output):
        output = output.clone()
        for i in where:
            output[0, i] = kept[0][0, i]
        return output

    with torch.no_grad():
        with source.enter():
            states = source.model(input_ids=ids, output_hidden_states=True).hidden_states
        if layer + 1 < len(states) - 1:  # transformers' last one is after the norm
            kept.append(states[layer + 1])
        else:
            handle = source.model.model.norm.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
            with source.enter():
                source.model(input_ids=ids)
            handle.remove()
        with full.enter():
            plain = log_p()
            handle = full.model.model.layers[layer].register_forward_hook(replace)
            patched = log_p()
            handle.remove()
    return plain, patched


def test_score_is_the_papers_formula():
    d1 = torch.tensor([[0.04, 1.0, 3.0, -2.0], [0.01, 0.05, -1.0, 0.0]])
    d2 = torch.tensor([[9.00, 0.5, 4.0, 5.00], [1.00, 1.00, 1.0, 1.0]])
    # Layers 0 and 3 do not encode the first record; layer 2's ratio is cut at 1.
    assert depth_scores(d1, d2) == [pytest.approx((1.0 * 0.5 + 3.0 * 1.0) / 4.0), None]
    assert depth_scores(d1, -d2) == [0.0, None]
    assert depth_scores(d1, d2, tau=2.0)[0] == 1.0
    assert depth_scores(d1[:1], d2[:1], tau=0.0)[0] == pytest.approx((0.04 + 0.5 + 3.0) / 4.04)


def test_zero_for_the_full_model_and_one_for_the_retain_model(trio, tokenizer):
    full, off, retain = trio
    items = tiny.encoded(tokenizer)
    assert unlearning_depth(full, full, retain, items).uds == (0.0,) * len(items)
    assert unlearning_depth(full, retain, retain, items).uds == (1.0,) * len(items)
    between = unlearning_depth(full, off, retain, items)
    assert 0.1 < between.mean < 0.9
    assert between.values == list(between.uds)


@pytest.mark.parametrize("layer", [0, 1])
def test_drops_agree_with_one_record_and_one_hook(trio, tokenizer, layer):
    full, off, retain = trio
    item = tiny.encoded(tokenizer)[2]
    found = unlearning_depth(full, off, retain, [item])
    for drop, source in ((found.retain_drop, retain), (found.audited_drop, off)):
        plain, patched = by_hooks(full, source, item, layer)
        assert drop[layer] == pytest.approx(plain - patched, abs=1e-5)
        assert abs(plain - patched) > 0.02


def test_last_layer_gives_the_sources_own_output(trio, tokenizer):
    """Above it are only the norm and the head, which both alphas share, so the patch is the whole answer."""
    full, off, retain = trio
    items = tiny.encoded(tokenizer, MIXED)
    drops = unlearning_depth(full, off, retain, items).audited_drop
    assert drops[-1] == pytest.approx(mean_nll(off, items) - mean_nll(full, items), abs=1e-5)


def test_records_do_not_depend_on_their_batch(trio, tokenizer, monkeypatch):
    items = tiny.encoded(tokenizer, MIXED)
    together = unlearning_depth(*trio, items)
    alone = [unlearning_depth(*trio, [item]) for item in items]
    assert together.uds == pytest.approx([a.uds[0] for a in alone], abs=1e-5)
    assert len(set(together.uds)) > 2  # so the order is tested (several may be cut at 1)
    turned = unlearning_depth(*trio, items[::-1])
    assert turned.uds[::-1] == pytest.approx(together.uds, abs=1e-5)
    monkeypatch.setattr(depth, "PASS_TOKENS", 2 * max(len(e.ids) for e in items))
    seen: list[tuple[str, int, int]] = []
    batched = unlearning_depth(*trio, items, progress=lambda *call: seen.append(call))
    assert batched.uds == pytest.approx(together.uds, abs=1e-5)
    assert batched.retain_drop == pytest.approx(together.retain_drop, abs=1e-5)
    assert seen == [("depth", 1, 2), ("depth", 2, 2)]


def test_record_that_nobody_learned_has_no_score(clean, tokenizer):
    """Full and retain model are the same, so no layer encodes anything."""
    found = unlearning_depth(dense(clean), dense(clean), dense(copy.deepcopy(clean)), tiny.encoded(tokenizer))
    assert found.uds == (None,) * 4
    assert (found.values, found.mean, found.unscored) == ([], None, 4)
    assert found.to_dict() == {"layers": [{"layer": i, "full": 0.0, "off": 0.0} for i in range(2)]}


def test_lens_ends_at_the_models_own_log_p(trio, tokenizer, monkeypatch):
    items = tiny.encoded(tokenizer, MIXED)
    for subject in trio:
        lens = logit_lens(subject, items)
        assert lens[-1] == pytest.approx(-mean_nll(subject, items), abs=1e-5)
        assert len(lens) == 2
    full = trio[0]
    whole = logit_lens(full, items)
    monkeypatch.setattr(depth, "PASS_TOKENS", 1)
    assert logit_lens(full, items) == pytest.approx(whole, abs=1e-5)


def test_lens_is_the_norm_and_the_head(tiny_gpt2, tokenizer):
    """GPT-2 calls its parts otherwise, and is read without knowing their names."""
    tiny_gpt2.resize_token_embeddings(len(tokenizer))
    item = tiny.encoded(tokenizer)[0]
    with torch.no_grad():
        states = tiny_gpt2(input_ids=torch.tensor([item.ids]), output_hidden_states=True).hidden_states
        rows = tiny_gpt2.lm_head(tiny_gpt2.transformer.ln_f(states[1]))[0].log_softmax(-1)
    wanted = [float(rows[i - 1, y]) for i, y in enumerate(item.labels) if y != -100]
    assert logit_lens(dense(tiny_gpt2), [item])[0] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_layers_that_return_tuples(tokenizer):
    """BLOOM's give (states, attention weights)."""
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=3, n_head=2, initializer_range=0.2)
    full, other = (dense(BloomForCausalLM(config).eval(), key) for key in ("full", "other"))
    other.model.lm_head.weight.data.copy_(full.model.lm_head.weight)  # the embeddings too: they are tied
    kinds: list[type] = []
    handle = full.model.transformer.h[0].register_forward_hook(lambda m, args, output: kinds.append(type(output)))
    full.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    handle.remove()
    assert kinds == [tuple]
    items = tiny.encoded(tokenizer, MIXED)
    nll = [mean_nll(s, items) for s in (full, other)]
    found = unlearning_depth(full, other, full, items)
    assert found.audited_drop[-1] == pytest.approx(nll[1] - nll[0], abs=1e-4)
    assert found.retain_drop == (0.0,) * 3
    assert logit_lens(other, items)[-1] == pytest.approx(-nll[1], abs=1e-4)


def test_nothing_stays_on_the_model(trio, tokenizer):
    model = trio[0].model
    marker = model.model.layers[0].forward
    model.model.layers[0].forward = marker  # as accelerate does
    before = model.model.layers[1].__dict__.get("forward")
    unlearning_depth(*trio, tiny.encoded(tokenizer))
    assert model.model.layers[0].__dict__["forward"] is marker
    assert model.model.layers[1].__dict__.get("forward") is before
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_models_of_other_shapes_are_refused(trio, tokenizer, tiny_gpt2):
    full, off, _ = trio
    items = tiny.encoded(tokenizer)
    short = copy.deepcopy(full.model.base_model)
    with pytest.raises(DataError, match="no record"):
        unlearning_depth(*trio, [])
    other = tiny.small_llama(len(tokenizer))
    del other.model.layers[1]
    other.config.num_hidden_layers = 1
    with pytest.raises(TargetError, match=r"1 decoder layers of width 64, .* 2 of width 64"):
        unlearning_depth(full, off, dense(other), items)
    short.layers.append(copy.deepcopy(short.layers[0]))
    with pytest.raises(TargetError, match="num_hidden_layers is 2"):
        decoder_layers(short)
    assert decoder_layers(tiny_gpt2) is tiny_gpt2.transformer.h
