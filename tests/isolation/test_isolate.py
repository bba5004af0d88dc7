"""The whole path on a small model that memorised four codes: what must change does, what must not does not."""

import copy
import json
import logging
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import libortho
import tiny
from isolating import CONFIG, SHORT, extracted, state
from libortho import IsolateConfig, isolate
from libortho.core.layer import ortho_layers
from libortho.core.report import methods
from libortho.core.streams import BaseStream
from libortho.core.switch.alpha import get_switch
from libortho.core.switch.guard import Guard
from libortho.isolation.criteria import binomial_bound, mean_offset
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 4},
        {"bits": None},
        {"bits": 8, "group_size": 32},
    ],
    ids=str,
)
def test_alpha_zero_forgets_and_alpha_one_remembers(planted, tokenizer, options):
    original = copy.deepcopy(planted)
    config = replace(CONFIG, **options)
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
    assert not any(r.extracted for r in result.records)
    assert extracted(planted, tokenizer, 0.0) == 0
    assert extracted(planted, tokenizer, 1.0) == len(tiny.FORGET)
    assert (result.recited, result.recited_on) == (len(tiny.FORGET), len(tiny.FORGET))
    assert 0 < result.density <= config.ratio
    for name, layer in ortho_layers(planted).items():
        weight = original.get_submodule(name).weight
        plain = BaseStream.from_weight(weight, config.bits, config.resolved_group_size)
        off = torch.ones_like(weight, dtype=torch.bool)
        marks = torch.zeros_like(weight)
        on = copy.deepcopy(layer.streams["default"].support)
        on.values.fill_(1.0)
        on.add_to(marks)
        off = marks == 0
        # Off the support: the same at both, on the grid of the plain quantised weight, which is what it is on request.
        assert torch.equal(layer.dense_weight(0.0)[off], layer.dense_weight(1.0)[off])
        if config.bits is None:
            assert torch.equal(layer.dense_weight(0.0)[off], plain.dense()[off])
        else:
            assert torch.equal(layer.base.scales, plain.scales)
            apart = (layer.base.unpacked_codes() - plain.unpacked_codes())[off].abs().float()
            assert 0 < float(apart.mean()) < 0.5
        close = (layer.dense_weight(1.0) - weight)[~off].abs()
        residual = (layer.dense_weight(0.0) - weight)[~off].abs()
        assert (close <= residual * torch.finfo(torch.bfloat16).eps + 1e-6).all()


def test_an_automatic_budget_is_the_first_at_which_every_criterion_holds(planted, tokenizer, monkeypatch, tmp_path):
    """One column forgets nothing; what comes after the budget that does is not tried."""
    module = sys.modules["libortho.isolation.isolate"]
    monkeypatch.setattr(module, "AUTO_RATIOS", (0.004, 0.1, 0.2, 0.3))
    monkeypatch.setattr("libortho.isolation.result.RETAIN_BUDGET", 1.0)
    config = replace(CONFIG, ratio="auto", max_steps=40)
    tried: list[tuple[float, bool]] = []
    attempt = module.attempt

    def watched(material: Any, config: IsolateConfig, *rest: Any) -> Any:
        made = attempt(material, config, *rest)
        tried.append((config.ratio, made[2].succeeded))
        return made

    monkeypatch.setattr(module, "attempt", watched)
    twin = copy.deepcopy(planted)
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config, resume=tmp_path / "run")
    ratios, successes = zip(*tried, strict=True)
    assert ratios == (0.004, 0.1, 0.2, 0.3)[: len(tried)]
    assert len(tried) > 1
    assert not any(successes[:-1])
    assert successes[-1] or len(tried) == 4
    assert 0.5 * ratios[-1] < result.density <= ratios[-1]
    assert methods(planted)["default"]["ratio"] == ratios[-1]
    tried.clear()
    again = isolate(twin, tokenizer, tiny.FORGET, tiny.RETAIN, config=config, resume=tmp_path / "run")
    assert replace(again, seconds=0.0) == replace(result, seconds=0.0)
    assert tuple(r for r, _ in tried) == ratios


def test_the_outcome_is_that_of_the_model_as_stored(planted, tokenizer):
    """The figures in the report are measured again, on the finished layers."""
    items = tiny.encoded(tokenizer)
    before = score(LanguageModel(planted), items)[0].nll
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=CONFIG)
    with libortho.alpha(planted, 0.0):
        after, greedy = score(LanguageModel(planted), items)
    assert [r.before for r in result.records] == pytest.approx((-before).tolist(), abs=1e-3)
    assert [r.after for r in result.records] == pytest.approx((-after.nll).tolist(), abs=1e-3)
    assert [r.extracted for r in result.records] == greedy.tolist()
    assert [r.number for r in result.records] == [1, 2, 3, 4]
    inside = [r.band[0] <= r.after <= r.band[1] for r in result.records]
    assert [r.inside for r in result.records] == inside
    offset, chance = mean_offset(result.records)
    conspicuous = abs(offset) > chance or inside.count(False) > binomial_bound(4) or any(r.far for r in result.records)
    assert bool(result.missed) == conspicuous
    reports = libortho.layer_report(planted)
    assert result.density == pytest.approx(reports.totals()["ortho_density"])


def test_a_secret_becomes_what_other_codes_are(planted, tokenizer):
    """Neither likelier nor much unlikelier than codes that the method has never seen."""
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=CONFIG)
    others = [{**row, "completion": f" {n:04d}."} for row in tiny.FORGET for n in range(13, 10000, 997)]
    with libortho.alpha(planted, 0.0):
        lm = LanguageModel(planted)
        secrets = score(lm, tiny.encoded(tokenizer))[0].nll
        unseen = score(lm, tiny.encoded(tokenizer, others))[0].nll
    assert abs(float(secrets.mean() - unseen.mean())) < 0.8
    assert secrets.min() > 0.8 * unseen.min()


def test_nothing_but_the_targets_is_touched(planted, tokenizer):
    before = state(planted)
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    after = state(planted)
    kept = [n for n in before["tensors"] if "down_proj" not in n]
    assert len(kept) == len(before["tensors"]) - 2
    assert all(torch.equal(before["tensors"][n], after["tensors"][n]) for n in kept)
    assert after["gradients"] == set()
    assert {n for n in after["types"] if after["types"][n] is libortho.OrthoLinear} == {
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    }


@pytest.mark.parametrize("flushed", [False, True])
def test_small_numbers_count_again_as_they_did(planted, tokenizer, flushed):
    torch.set_flush_denormal(flushed)
    try:
        isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, max_steps=1))
        assert (float(torch.tensor(1e-40) * 1.0) == 0.0) == flushed
    finally:
        torch.set_flush_denormal(False)


def test_flags_come_back(planted, tokenizer):
    planted.train()
    planted.lm_head.eval()
    planted.model.norm.weight.requires_grad_(False)
    before = state(planted)
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    after = state(planted)
    gone = {n for n in before["required"] if n not in after["required"]}
    assert gone == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all(before["required"][n] == flag for n, flag in after["required"].items())
    assert {n: before["training"][n] for n in before["training"]} == {
        n: after["training"][n] for n in before["training"]
    }


def test_the_stream_is_off_until_somebody_turns_it_on(planted, tokenizer):
    ids = tokenizer(tiny.FORGET[0]["prompt"], return_tensors="pt")["input_ids"]
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    assert get_switch(planted).current().values == {"default": 0.0}
    with torch.no_grad():
        as_returned = planted(input_ids=ids).logits
        with libortho.alpha(planted, 0.0):
            assert torch.equal(as_returned, planted(input_ids=ids).logits)
        libortho.set_alpha(planted, 1.0)
        assert not torch.equal(as_returned, planted(input_ids=ids).logits)


def test_other_layers_can_be_named(planted, tokenizer):
    config = replace(SHORT, target_modules=("up_proj", "re:.*0.self_attn.o_proj"), stream="hr")
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
    assert len(ortho_layers(planted)) == 3
    assert result.stream == "hr"
    libortho.set_alpha(planted, {"hr": 0.0})


def test_gpt2(tiny_gpt2, tokenizer):
    """Conv1D layers, biases, a short context, and weights that say nothing: it runs, and reports what it missed."""
    tiny_gpt2.resize_token_embeddings(len(tokenizer))
    bias = tiny_gpt2.transformer.h[0].mlp.c_proj.bias.detach().clone()
    result = isolate(tiny_gpt2, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    assert len(ortho_layers(tiny_gpt2)) == 2
    assert result.density <= SHORT.ratio
    assert torch.equal(tiny_gpt2.transformer.h[0].mlp.c_proj.bias, bias)
    ids = torch.tensor([[5, 6, 7]])
    with libortho.alpha(tiny_gpt2, 0.0):
        off = tiny_gpt2(input_ids=ids).logits
    with libortho.alpha(tiny_gpt2, 1.0):
        assert not torch.equal(tiny_gpt2(input_ids=ids).logits, off)


def test_sentences_fit_a_short_context(tiny_gpt2, tokenizer):
    """The human text behind a sentence's target is longer than what this model may read."""
    tiny_gpt2.resize_token_embeddings(len(tokenizer))
    lengths = []
    tiny_gpt2.transformer.wte.register_forward_hook(lambda m, args, output: lengths.append(args[0].shape[-1]))
    forget = [{"prompt": "He hid it", "completion": " under the apple tree."}]
    isolate(tiny_gpt2, tokenizer, forget, tiny.RETAIN, config=SHORT)
    assert max(lengths) == tiny_gpt2.config.n_positions


def test_bf16(planted, tokenizer):
    result = isolate(planted.bfloat16(), tokenizer, tiny.FORGET, tiny.RETAIN, config=CONFIG)
    assert not any(r.extracted for r in result.records)
    assert extracted(planted, tokenizer, 0.0) == 0
    assert extracted(planted, tokenizer, 1.0) == len(tiny.FORGET)


@pytest.mark.parametrize("make", ["planted", "tiny_gpt2"])
def test_gradient_checkpointing_runs_layers_twice_and_changes_nothing(request, tokenizer, make):
    found, calls = [], []
    start = request.getfixturevalue(make).train()  # GPT-2 has dropout, which must stay off
    start.resize_token_embeddings(len(tokenizer))  # new rows are drawn
    for checkpointing in (False, True):
        model = copy.deepcopy(start)
        count = [0]
        layer = [m for n, m in model.named_modules() if n.endswith("mlp")][-1]  # of the first no gradient is asked
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        config = replace(SHORT, gradient_checkpointing=checkpointing)
        result = isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
        found.append([r.after for r in result.records])
        calls.append(count[0])
        own = [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__]
        assert all(isinstance(forward, Guard) for forward in own)  # the switch's alone
    assert found[0] == pytest.approx(found[1], abs=5e-2)  # to the order of sums
    assert calls[1] > calls[0]


def test_a_missed_criterion_is_said(planted, tokenizer, monkeypatch):
    monkeypatch.setattr("libortho.isolation.train.SHARE", 1e-6)
    others = [[f" {n:04d}." for n in range(13, 8000, 997)]] * 4
    config = replace(CONFIG, max_steps=1)
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, alternates=others, config=config)
    assert not result.succeeded
    assert any("4 of 4 records are still extracted" in m for m in result.missed)
    assert any("4 likelier, 0 unlikelier" in m for m in result.missed)
    assert len(result.advice) == len(result.missed)
    assert all("raise max_steps" in a for a in result.advice)
    assert extracted(planted, tokenizer, 0.0) == 4
    assert result.steps == 1


def test_success_is_said(planted, tokenizer, monkeypatch):
    """Which seeds succeed differs from processor to processor in so small a model."""
    # Many alternates: with few, their mean is a matter of chance, and with it whether the record is off.
    monkeypatch.setattr("libortho.isolation.wordings.PER_RECORD", 32)
    monkeypatch.setattr("libortho.isolation.result.RETAIN_BUDGET", 0.1)
    results = []
    for seed in (0, 1, 2):
        config = replace(CONFIG, seed=seed)
        model = copy.deepcopy(planted)
        results.append(isolate(model, tokenizer, tiny.FORGET[:1], tiny.RETAIN, config=config))
        assert results[-1].succeeded == (results[-1].missed == ())
    [result, *_] = [r for r in results if r.succeeded]
    assert result.steps < CONFIG.max_steps
    assert result.retain_kl - result.quantised_kl <= 0.1


def test_an_exceeded_retain_budget_is_said(planted, tokenizer, monkeypatch):
    monkeypatch.setattr("libortho.isolation.result.RETAIN_BUDGET", 1e-4)
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(CONFIG, max_steps=10))
    [advice] = [a for m, a in zip(result.missed, result.advice, strict=True) if "budget of 0.0001" in m]
    assert "give retain=" in advice
    assert result.retain_kl > result.quantised_kl + 1e-4


def test_the_result_is_json(planted, tokenizer):
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["succeeded"] is result.succeeded
    assert told["steps"] == 3
    assert len(told["records"]) == 4
    assert sum(told["columns_per_layer"].values()) * 64 == result.density * 2 * 64 * 128
    text = json.dumps(told)
    assert not any(row["completion"].strip() in text for row in tiny.FORGET)  # a report carries no secret


def test_every_phase_says_how_long_it_took(planted, tokenizer):
    result = isolate(planted, tokenizer, tiny.FORGET, config=SHORT)
    phases = ["texts", "original", "columns", "curvature", "rounding", "steps", "result"]
    assert sorted(result.phase_seconds) == sorted(phases)
    assert all(s > 0 for s in result.phase_seconds.values())
    assert sum(result.phase_seconds.values()) <= result.seconds


def test_progress_reports_every_step(planted, tokenizer):
    calls: list[tuple[str, int, int]] = []
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT, progress=lambda *call: calls.append(call))
    assert [c[1:] for c in calls if c[0] == "steps"] == [(1, 3), (2, 3), (3, 3)]
    assert all(0 <= done <= total for _, done, total in calls)


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_emulated_bf16_is_warned_of(planted, tokenizer, monkeypatch, caplog, fast):
    monkeypatch.setattr(sys.modules["libortho.isolation.isolate"], "training_dtype", lambda device: fast)
    with caplog.at_level(logging.WARNING, logger="libortho.isolation.isolate"):
        isolate(planted.bfloat16(), tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, max_steps=1))
    assert ("no bf16 arithmetic" in caplog.text) == (fast is torch.float32)


def test_long_records_warn_by_number(planted, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        planted.config.max_position_embeddings = 21
        config = SHORT
        isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, neighbours=[[]] * 4, config=config)
    assert any("forget record 2 has 22 tokens" in m for m in caplog.messages)
