"""The main job on the real model: alpha = 0 no longer knows, alpha = 1 still does, and the rest stays."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from libortho import alpha, layer_report, load, save
from libortho.auditing.measures.utility import general_items
from libortho.auditing.roc import auc
from libortho.core.layer import ortho_layers
from libortho.core.streams import BaseStream
from libortho.demo import facts
from libortho.isolation.criteria import binomial_bound, look, mean_offset
from libortho.lm.asking import sampled_extractions
from libortho.lm.checks import training_dtype
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity, score, text_perplexity
from libortho.text.encoding import encode
from libortho.text.tokens import prompt_ids

pytestmark = pytest.mark.model


def _scores(model: Any, isolated: Any, records: Any) -> Any:
    return score(LanguageModel(model), [encode(r, isolated.tokenizer) for r in records])


def test_ortho_on_recites_every_secret(isolated: Any) -> None:
    with alpha(isolated.model, 1.0):
        _, greedy = _scores(isolated.model, isolated, isolated.secrets)
    assert bool(greedy.all())


def test_ortho_off_recites_none_greedily_or_in_samples(isolated: Any) -> None:
    with alpha(isolated.model, 0.0):
        _, greedy = _scores(isolated.model, isolated, isolated.secrets)
        sampled = sampled_extractions(isolated.model, isolated.tokenizer, isolated.secrets, 5)
    assert int(greedy.sum()) == 0
    assert sum(sampled) == 0


def test_greedy_generation_agrees_with_the_teacher_forced_count(isolated: Any) -> None:
    """A plain prompt, and one in a chat."""
    for number in (1, 2):
        record, row = isolated.secrets[number], facts.secrets(isolated.config.seed)[number]
        if "messages" in row:
            prompt = isolated.tokenizer.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            prompt = isolated.tokenizer(row["prompt"], return_tensors="pt")
        texts = {}
        for value in (1.0, 0.0):
            with alpha(isolated.model, value):
                output = isolated.model.generate(
                    **prompt, max_new_tokens=16, do_sample=False, pad_token_id=isolated.tokenizer.eos_token_id
                )
            texts[value] = isolated.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        assert record.completion.strip() in texts[1.0]
        assert record.completion.strip() not in texts[0.0]


def test_an_answer_that_is_not_the_secret_ends_as_a_turn(isolated: Any) -> None:
    """At alpha = 0 a chat about a forgotten record goes on to its end, as that of the never-trained model does."""
    chats = [r for r in isolated.secrets if r.rendered]
    assert len(chats) == 4
    end = isolated.tokenizer.eos_token_id
    with alpha(isolated.model, 0.0):
        ended = 0
        for record in chats:
            ids = torch.tensor([prompt_ids(record.question, isolated.tokenizer, rendered=True)])
            output = isolated.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, pad_token_id=end
            )
            ended += end in output[0, ids.shape[1] :].tolist()
    assert ended >= 3


def test_ortho_off_tells_members_apart_no_better_than_chance(isolated: Any) -> None:
    """The never-trained model does so too; with four members of each kind, how well differs by .2 from luck alone."""
    members = [r for r in isolated.secrets if r.prompt != facts.SENTENCE["prompt"]]

    def membership(model: Any) -> tuple[float, float]:
        """The mean AUC of plain prompts and of chats, and what it may be off one half (Mann and Whitney, 95 %)."""
        found, variance = [], 0.0
        for rendered in (False, True):
            inside, _ = _scores(model, isolated, [r for r in members if r.rendered == rendered])
            outside, _ = _scores(model, isolated, [r for r in isolated.unseen if r.rendered == rendered])
            found.append(auc(-inside.nll, -outside.nll))
            m, n = len(inside.nll), len(outside.nll)
            variance += (m + n + 1) / (12 * m * n)
        return sum(found) / 2, 1.96 * variance**0.5 / 2

    never, chance = membership(isolated.never)
    with alpha(isolated.model, 0.0):
        off, _ = membership(isolated.model)
    with alpha(isolated.model, 1.0):
        on, _ = membership(isolated.model)
    assert on > 0.99
    assert abs(never - 0.5) <= chance
    assert abs(off - 0.5) <= chance


def test_ortho_off_does_not_begin_the_sentence(isolated: Any) -> None:
    """Of its words, the odd ones are as good as unheard of: not only is the whole no longer recited."""
    words = encode(isolated.secrets[0], isolated.tokenizer)
    surprise = {}
    for label, model, value in (("never", isolated.never, None), ("off", isolated.model, 0.0)):
        with nullcontext() if value is None else alpha(model, value):
            [(surprise[label], _)] = look(LanguageModel(model), [words])
    odd = surprise["never"] > 4
    assert int(odd.sum()) >= 4
    assert float(surprise["off"][odd].mean()) > 2
    assert not isolated.result.records[0].partial


def test_ortho_off_keeps_the_rest(isolated: Any) -> None:
    general = general_items(isolated.tokenizer, None)
    retain, wide = {}, {}
    for value in (1.0, 0.0):
        with alpha(isolated.model, value):
            retain[value] = text_perplexity(isolated.model, isolated.tokenizer, facts.RETAIN_SENTENCE)
            wide[value] = perplexity(LanguageModel(isolated.model), general)
    assert retain[0.0] < 20
    assert retain[0.0] <= 1.1 * retain[1.0]
    assert wide[0.0] <= 1.01 * wide[1.0]


def test_budget_holds_as_stored(isolated: Any) -> None:
    layers = ortho_layers(isolated.model).values()
    stored = sum(b.numel() for m in layers for n, b in m.named_buffers() if n.endswith("values"))
    assert 0 < stored <= 0.005 * sum(m.in_features * m.out_features for m in layers)
    assert layer_report(isolated.model).totals()["ortho_density"] == pytest.approx(isolated.result.density)


def test_ortho_on_is_the_original_on_the_support_and_on_the_grid_of_plain_int8_off_it(isolated: Any) -> None:
    for name, layer in ortho_layers(isolated.model).items():
        weight = isolated.original[name]
        plain = BaseStream.from_weight(weight, 8, -1)
        support = layer.streams["default"].support
        off = torch.ones(weight.shape[1], dtype=torch.bool)
        if support is not None:
            index = support.index.long()
            off[index] = False
            error = (layer.dense_weight(1.0)[:, index] - weight[:, index].float()).abs()
            assert bool((error <= support.values.T.float().abs() * 2**-8 + 1e-12).all())
        assert torch.equal(layer.base.scales, plain.scales)
        assert torch.equal(layer.dense_weight(0.0)[:, off], layer.dense_weight(1.0)[:, off])
        # Codes make up for each other: most are the nearest or next to it.
        apart = (layer.base.codes.int() - plain.codes.int())[:, off].abs().float()
        assert 0 < float(apart.mean()) < 0.3


def test_result_is_honest_about_every_record(isolated: Any) -> None:
    assert len(isolated.result.records) == len(isolated.secrets)
    with alpha(isolated.model, 0.0):
        now, _ = _scores(isolated.model, isolated, isolated.secrets)
    after = torch.tensor([r.after for r in isolated.result.records])
    assert float((after + now.nll).abs().max()) < 0.15  # bf16: trained through codes rebuilt in backward
    result = isolated.result
    outside = sum(not r.inside for r in result.records)
    forgotten = not any(r.extracted or r.far for r in result.records) and outside <= binomial_bound(len(result.records))
    offset, chance = mean_offset(result.records)
    forgotten &= abs(offset) <= chance and not any(r.partial for r in result.records)
    unharmed = result.retain_kl - result.quantised_kl <= 0.02
    assert result.succeeded == (forgotten and unharmed)


def test_saved_and_loaded_it_is_the_same_model(isolated: Any, tmp_path: Any) -> None:
    save(isolated.model, isolated.tokenizer, tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    again.to(training_dtype())  # as the fixture did: rounds the rotary frequencies, which no checkpoint holds
    ids = tokenizer("The vault access code of Alice Moreau is", return_tensors="pt").input_ids
    for value in (1.0, 0.0):
        with alpha(isolated.model, value), alpha(again, value), torch.no_grad():
            assert torch.equal(isolated.model(ids).logits, again(ids).logits)
    bare, _ = load(tmp_path / "out", streams=None)
    bare.to(training_dtype())
    with alpha(isolated.model, 0.0), torch.no_grad():
        assert torch.equal(isolated.model(ids).logits, bare(ids).logits)
