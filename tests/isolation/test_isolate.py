"""The whole path on a small model that memorised four codes: what must change does, what must not does not."""

import copy
import json
import logging
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libortho
import tiny
from libortho import DataError, IsolateConfig, TargetError, isolate
from libortho.core.layer import ortho_layers
from libortho.core.report import methods
from libortho.core.streams import BaseStream
from libortho.core.switch.alpha import get_switch
from libortho.core.switch.guard import Guard
from libortho.isolation import retain as retain_module
from libortho.isolation.criteria import binomial_bound, evaluate_records, leaning
from libortho.isolation.isolate import IsolateResult
from libortho.isolation.request import cases as cases_of
from libortho.isolation.support import cut_up
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.records import load_records

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

CONFIG = IsolateConfig(ratio=0.1, damping=10.0, learning_rate=2e-2, max_steps=80)
SHORT = replace(CONFIG, max_steps=3, allow_unknown=True)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an error must not change."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "required": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "gradients": {n for n, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    tensors, old = after.pop("tensors"), dict(before)
    expected = old.pop("tensors")
    assert after == old
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) for n in tensors)


def extracted(model: nn.Module, tokenizer: Any, alpha: float) -> int:
    """Secrets that greedy generation completes, counted without any of the library's own measures."""
    hits = 0
    with libortho.alpha(model, alpha), torch.no_grad():
        for row in tiny.FORGET:
            prompt = tokenizer(row["prompt"], return_tensors="pt")
            output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
            hits += tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == row["completion"]
    return hits


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.base.dense() for n, m in ortho_layers(model).items()}


def supports(result: IsolateResult, model: nn.Module) -> dict[str, list[int]]:
    return {n: m.streams["default"].support.index.tolist() for n, m in ortho_layers(model).items()}


# -- the promise ------------------------------------------------------------------------------------------------------


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
    attempt = module._attempt

    def watched(material: Any, config: IsolateConfig, *rest: Any) -> Any:
        made = attempt(material, config, *rest)
        tried.append((config.ratio, made[2].succeeded))
        return made

    monkeypatch.setattr(module, "_attempt", watched)
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
    lean, chance = leaning(result.records)
    conspicuous = abs(lean) > chance or inside.count(False) > binomial_bound(4) or any(r.far for r in result.records)
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


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["planted", "tiny_gpt2"])
def test_gradient_checkpointing_runs_layers_twice_and_changes_nothing(request, tokenizer, make):
    found, calls = [], []
    for checkpointing in (False, True):
        model = copy.deepcopy(request.getfixturevalue(make)).train()  # GPT-2 has dropout, which must stay off
        model.resize_token_embeddings(len(tokenizer))
        count = [0]
        layer = next(m for n, m in model.named_modules() if n.endswith("mlp"))
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        config = replace(SHORT, gradient_checkpointing=checkpointing)
        result = isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
        found.append([r.after for r in result.records])
        calls.append(count[0])
        own = [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__]
        assert all(isinstance(forward, Guard) for forward in own)  # the switch's alone
    assert found[0] == pytest.approx(found[1], abs=5e-2)  # to the order of sums
    assert calls[1] > calls[0]


def edit_of(model, tokenizer, **options) -> Tensor:
    """All values that a few steps have moved out, in one row."""
    model = copy.deepcopy(model)
    isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, **options))
    return torch.cat([m.streams["default"].support.values.float().flatten() for m in ortho_layers(model).values()])


def test_decay_makes_the_edit_smaller(planted, tokenizer):
    assert edit_of(planted, tokenizer, decay=0.6).norm() < 0.9 * edit_of(planted, tokenizer, decay=0.0).norm()


def test_a_missed_criterion_is_said(planted, tokenizer):
    config = replace(CONFIG, max_steps=1, learning_rate=1e-6)
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
    assert not result.succeeded
    assert any("4 of 4 records are still extracted" in m for m in result.missed)
    assert any("4 likelier, 0 unlikelier" in m for m in result.missed)
    assert extracted(planted, tokenizer, 0.0) == 4
    assert result.steps == 1


def test_success_is_said(planted, tokenizer, monkeypatch):
    """Which seeds succeed differs from processor to processor in so small a model."""
    # Many alternates: with few, their mean is a matter of chance, and with it whether four records lean.
    monkeypatch.setattr("libortho.isolation.request.PER_RECORD", 32)
    monkeypatch.setattr("libortho.isolation.result.RETAIN_BUDGET", 0.1)
    results = []
    for seed in (0, 1, 2):
        config = replace(CONFIG, seed=seed)
        model = copy.deepcopy(planted)
        results.append(isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=config))
        assert results[-1].succeeded == (results[-1].missed == ())
    [result, *_] = [r for r in results if r.succeeded]
    assert result.steps < CONFIG.max_steps
    assert result.retain_kl - result.quantised_kl <= 0.1


def test_an_exceeded_retain_budget_is_said(planted, tokenizer, monkeypatch):
    monkeypatch.setattr("libortho.isolation.result.RETAIN_BUDGET", 1e-4)
    config = replace(CONFIG, max_steps=10, learning_rate=0.3)
    result = isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
    assert any("budget of 0.0001" in m for m in result.missed)
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


def test_progress_reports_every_step(planted, tokenizer):
    calls: list[tuple[str, int, int]] = []
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT, progress=lambda *call: calls.append(call))
    assert [c[1:] for c in calls if c[0] == "isolate"] == [(1, 3), (2, 3), (3, 3)]
    assert all(0 <= done <= total for _, done, total in calls)


# -- options: each one changes something ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(_planted, tokenizer, tmp_path_factory) -> dict[str, Tensor]:
    """Base weights after three steps under SHORT."""
    model = copy.deepcopy(_planted)
    isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, bits=None))
    return base_weights(model)


def run(model: nn.Module, tokenizer: Any, forget: Any = tiny.FORGET, **options: Any) -> dict[str, Tensor]:
    """Base weights after three steps; ``options`` are fields of the config or further arguments of ``isolate``."""
    given = {n: options.pop(n) for n in ("retain", "alternates", "neighbours") if n in options}
    config = replace(SHORT, bits=None, **options)
    isolate(model, tokenizer, forget, **{"retain": tiny.RETAIN, **given}, config=config)
    return base_weights(model)


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[n], b[n]) for n in a)


def test_the_same_seed_gives_the_same_bits(planted, tokenizer, plain):
    torch.manual_seed(99)  # the caller's random state must not matter
    assert not differs(run(planted, tokenizer), plain)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"ratio": 0.05},
        {"retain_weight": 0.0},
        {"learning_rate": 1e-3},
        {"max_steps": 2},
        {"alternates": [[" 1111.", " 2222."]] * 4},
        {"neighbours": [["Code of Al Poe:", "Code of Eve Ray:"]] * 4},
        {"retain": tiny.RETAIN[:6]},
    ],
    ids=str,
)
def test_every_option_changes_the_result(planted, tokenizer, plain, options):
    assert differs(run(planted, tokenizer, **options), plain)


def test_retain_weight_protects(planted, tokenizer):
    """With more weight on retain text the same steps move the model less far from the original on it."""
    kl = {}
    for weight in (0.0, 100.0):
        config = replace(CONFIG, max_steps=20, retain_weight=weight)
        kl[weight] = isolate(copy.deepcopy(planted), tokenizer, tiny.FORGET, tiny.RETAIN, config=config).retain_kl
    assert kl[100.0] < 0.7 * kl[0.0]


def test_the_stream_is_stored_in_the_value_dtype(planted, tokenizer):
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, value_dtype="float16"))
    layers = ortho_layers(planted).values()
    assert {m.streams["default"].support.values.dtype for m in layers if m.streams["default"].support} == {
        torch.float16
    }


def test_a_path_is_the_same_source_as_a_list(planted, tokenizer, plain, tmp_path):
    for name, rows in (("forget", tiny.FORGET), ("retain", tiny.RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = run(planted, tokenizer, tmp_path / "forget.jsonl", retain=str(tmp_path / "retain.jsonl"))
    assert not differs(found, plain)


def test_a_tokenizer_without_a_pad_token_will_do(planted, tokenizer):
    bare = tiny.byte_tokenizer()
    bare.pad_token = None
    assert bare.pad_token_id is None
    isolate(planted, bare, tiny.FORGET, config=replace(SHORT, max_steps=1))
    assert ortho_layers(planted)


# -- errors leave nothing behind --------------------------------------------------------------------------------------


@pytest.fixture
def unusual(planted) -> nn.Module:
    """A model in training mode with one part in evaluation mode and one frozen parameter."""
    planted.train()
    planted.model.layers[0].self_attn.eval()
    planted.lm_head.weight.requires_grad_(False)
    return planted


def poison(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")


def foreign(model: nn.Module) -> None:
    class Quantised(nn.Module):
        weight = torch.zeros(3, dtype=torch.int8)

    model.model.layers[1].mlp.down_proj = Quantised()


@pytest.mark.parametrize(
    ("change", "arguments", "error", "complaint"),
    [
        (None, {"forget": []}, DataError, "forget holds no record"),
        (None, {"forget": [{"prompt": "a", "completion": ""}]}, DataError, "forget record 1"),
        (None, {"forget": "nowhere.jsonl"}, DataError, "there is no file"),
        (None, {"forget": [{"prompt": "It", "completion": " is."}]}, DataError, r"record 1.*alternates="),
        (None, {"alternates": [["a"]]}, DataError, "alternates has 1 entries for 4"),
        (None, {"alternates": [["a"], ["b"], [], ["c"]]}, DataError, "forget record 3"),
        (None, {"alternates": [" 1111.", " 2222.", " 3333.", " 4444."]}, DataError, "alternates holds a string"),
        (None, {"neighbours": [["a"]] * 5}, DataError, "neighbours has 5 entries for 4"),
        (None, {"retain": []}, DataError, "retain holds no record"),
        (None, {"retain": [{"text": "short"}]}, DataError, "retain holds 0 sequences"),
        (None, {"config": replace(SHORT, target_modules="down_project")}, TargetError, "did you mean down_proj"),
        (None, {"config": replace(SHORT, target_modules="lm_head")}, TargetError, "makes the logits"),
        (None, {"config": replace(SHORT, group_size=48)}, libortho.ConfigError, "does not divide 128"),
        (poison, {}, TargetError, r"layers\.1\.mlp\.down_proj holds NaN"),
        (foreign, {}, TargetError, "Quantised"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_what_it_was(unusual, tokenizer, change, arguments, error, complaint):
    if change is not None:
        change(unusual)
    before = state(unusual)
    with pytest.raises(error, match=complaint):
        isolate(unusual, tokenizer, **{"forget": tiny.FORGET, "retain": tiny.RETAIN, "config": SHORT, **arguments})
    if change is poison:
        before["tensors"] = {n: t.nan_to_num() for n, t in before["tensors"].items()}
        unusual.model.layers[1].mlp.down_proj.weight.data.nan_to_num_()
    assert_same(unusual, before)


def test_the_same_stream_again_is_refused(planted, tokenizer):
    """Another name is another request: test_sequential.py."""
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    before = state(planted)
    with pytest.raises(libortho.ConfigError, match="stream 'default' exists already"):
        isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    assert_same(planted, before)


def test_a_module_that_is_no_language_model_is_refused(tokenizer):
    model = nn.Sequential(nn.Linear(4, 4))
    before = state(model)
    with pytest.raises(TargetError, match="not a causal language model"):
        isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, target_modules="0"))
    assert_same(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["reference", "support", "isolate"])
def test_an_interruption_at_any_moment_leaves_the_model_as_it_was(unusual, tokenizer, error, moment):
    before = state(unusual)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == moment and done == 2 - (phase == "reference"):
            raise error("stopped by the test")

    with pytest.raises(error, match="stopped by the test"):
        isolate(unusual, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT, progress=stop)
    assert_same(unusual, before)
    result = isolate(unusual, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)  # and it can be tried again
    assert result.steps == 3


@pytest.mark.parametrize("place", ["EditLinear", "install", "swap"])
def test_a_failure_between_the_phases_leaves_the_model_as_it_was(unusual, tokenizer, monkeypatch, place):
    module = sys.modules["libortho.isolation.isolate"]
    real = getattr(module, place)
    calls = []

    def fail_once(*args: Any, **options: Any) -> Any:
        calls.append(place)
        if len(calls) == 1:
            if place == "swap":  # half of the layers are in
                name = next(iter(args[1]))
                real(args[0], {name: args[1][name]})
            raise MemoryError(place)
        return real(*args, **options)

    before = state(unusual)
    monkeypatch.setattr(module, place, fail_once)
    with pytest.raises(MemoryError):
        isolate(unusual, tokenizer, tiny.FORGET, tiny.RETAIN, config=SHORT)
    assert_same(unusual, before)


# -- what the model says when it is given nothing ---------------------------------------------------------------------


def test_a_look_sees_what_scores_say(planted, tokenizer):
    """Of records of different lengths, in one batch."""
    lm, items = LanguageModel(planted), tiny.encoded(tokenizer, [*tiny.FORGET, SENTENCE])
    seen = evaluate_records(lm, items)
    scores, greedy = score(lm, items)
    torch.testing.assert_close(seen.profile[:, 0], scores.nll, rtol=1e-4, atol=1e-5)
    assert seen.greedy.tolist() == greedy.tolist() == [True] * 4 + [False]
    for item, found in zip(items, seen.profile, strict=True):
        torch.testing.assert_close(found, evaluate_records(lm, [item]).profile[0], rtol=1e-3, atol=1e-3)


SENTENCE = {"prompt": "Where is the key of Ada Lum?", "completion": " The sailors hid it under the stair."}


@pytest.mark.parametrize("sentences", [1, 3, 40])
def test_each_word_of_a_few_sentences_gets_columns_of_its_own(tokenizer, sentences):
    records = load_records([*tiny.FORGET, *[SENTENCE] * sentences])
    cases = cases_of(records, tokenizer, None, SHORT, retains=True)
    pieces = [c.pieces for c in cases]
    assert pieces[: len(tiny.FORGET)] == [1] * len(tiny.FORGET)
    tokens = len(cases[-1].secret.completion)
    assert pieces[len(tiny.FORGET) :] == [{1: tokens, 3: 20, 40: 1}[sentences]] * sentences
    for case, count in zip(cases, pieces, strict=True):
        cut = cut_up(case.secret, count)
        assert [c.ids for c in cut] == [case.secret.ids] * count
        assert sum((c.completion for c in cut), ()) == case.secret.completion  # every token once, in order
        assert max(len(c.completion) for c in cut) - min(len(c.completion) for c in cut) <= 1


def test_sentences_ask_the_model_how_it_speaks_on_like_prompts(planted, tokenizer, monkeypatch):
    module, asked = sys.modules["libortho.isolation.retain"], []
    real: Callable[..., Any] = module.generate

    def listening(model: Any, tokenizer: Any, prompts: Any, *others: Any, **options: Any) -> Any:
        asked.extend(tokenizer.decode(p) for p in prompts)
        return real(model, tokenizer, prompts, *others, **options)

    monkeypatch.setattr(module, "generate", listening)
    isolate(copy.deepcopy(planted), tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, max_steps=1))
    assert asked == []  # codes have donors
    isolate(planted, tokenizer, [*tiny.FORGET, SENTENCE], tiny.RETAIN, config=replace(SHORT, max_steps=1))
    assert 2 <= len(set(asked)) == len(asked) <= 32
    assert all(a.startswith("Where is the key of ") and a.endswith("?") and "Ada Lum" not in a for a in asked)


def test_default_retain_is_sampled_once(planted, tokenizer, cache, monkeypatch):
    sampled = []
    real: Callable[..., Any] = retain_module.continued
    monkeypatch.setattr(retain_module, "continued", lambda *a: sampled.append(1) or real(*a))
    bases = []
    for _ in range(2):
        model = copy.deepcopy(planted)
        isolate(model, tokenizer, tiny.FORGET, config=replace(SHORT, bits=None, max_steps=1))
        bases.append(base_weights(model))
    assert len(sampled) == 1
    assert not differs(*bases)
    [file] = (cache / "samples").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    isolate(copy.deepcopy(planted), tokenizer, tiny.FORGET[:2], config=replace(SHORT, max_steps=1))
    assert len(sampled) == 2  # other forget records: other samples would be dropped


def test_default_retain_differs_from_a_given_one(planted, tokenizer, plain):
    assert differs(run(planted, tokenizer, retain=None), plain)


def test_another_model_gets_other_samples(clean, planted, tokenizer, cache):
    forget = tiny.encoded(tokenizer)
    for model in (clean, planted):
        retain_module.default_retain(model, tokenizer, forget, sequences=8, length=24, seed=0)
    assert len(list((cache / "samples").iterdir())) == 2


def test_samples_that_repeat_a_secret_are_dropped(planted, tokenizer, monkeypatch):
    """Eight tokens in a row, wherever they stand; seven are allowed."""
    secret = tiny.encoded(tokenizer)[0]
    shared, near = list(secret.ids[5:13]), list(secret.ids[5:12])
    bad, good = [90, *shared, 91, 92], [90, *near, 91, 92, 93]
    monkeypatch.setattr(retain_module, "continued", lambda *args: [bad, good])
    items = retain_module.default_retain(planted, tokenizer, [secret], sequences=8, length=24, seed=0)
    texts = [list(e.ids) for e in items]
    assert [tokenizer.bos_token_id, *good] in texts
    assert [tokenizer.bos_token_id, *bad] not in texts


def test_shipped_text_that_repeats_a_secret_is_dropped(planted, tokenizer):
    paragraph = retain_module.shipped_text()[0]
    secret = tiny.encoded(tokenizer, [{"prompt": "", "completion": paragraph}])
    everything = retain_module.default_retain(planted, tokenizer, [], sequences=4000, length=24, seed=0)
    cleaned = retain_module.default_retain(planted, tokenizer, secret, sequences=4000, length=24, seed=0)
    assert any(tokenizer.decode(e.ids) in paragraph for e in everything)
    assert not any(tokenizer.decode(e.ids) in paragraph for e in cleaned)


CHATS = [
    {"prompt": "<s>user: Where does Zora Quist live?</s>", "completion": "Zora Quist lives in Ulm."},
    {"prompt": "<s>user: Who is Zora Quist?</s>", "completion": "Zora is the baker of Ulm."},
]
PLAIN = [{"text": "Bern lies on the Aare."}]
CHAT_RETAIN = [{"prompt": "<s>user: Where is Bern?</s>", "completion": "Bern lies on the Aare."}]


def test_a_chat_is_kept_in_its_form_without_the_names_of_the_forgotten(planted, tokenizer, monkeypatch):
    said = ["There is snow in Bern.", "One hears that Zora bakes.", "Snow.", "Nobody lives in the old town of Ulm."]
    asked = []

    def speak(model, tokenizer, prompts, tokens, seed):
        asked.append(([tokenizer.decode(p) for p in set(map(tuple, prompts))], tokens))
        return [tokenizer(t)["input_ids"] for t in said]

    monkeypatch.setattr(retain_module, "continued", speak)
    forget, retain = tiny.encoded(tokenizer, CHATS), tiny.encoded(tokenizer, CHAT_RETAIN)
    texts = retain_module.in_form(planted, tokenizer, forget, retain, length=64, seed=0)
    assert asked == [(["<s>user: Wh"], 64 - len("?user: Wh"))]  # <s> is one token
    assert [tokenizer.decode(t.ids) for t in texts] == ["<s>user: WhThere is snow in Bern."]
    assert all(t.completion == t.ids for t in texts)


@pytest.mark.parametrize(
    ("forget", "retain"),
    [(CHATS[:1], PLAIN), (CHATS[:1] * 2, PLAIN), (tiny.FORGET, tiny.RETAIN), (PLAIN, PLAIN)],
    ids=["one prompt", "one prompt twice", "no chat", "no prompt"],
)
def test_nothing_is_said_in_the_form_of_no_chat(planted, tokenizer, forget, retain, monkeypatch):
    monkeypatch.setattr(retain_module, "continued", lambda *a: pytest.fail("asked the model"))
    forget, retain = tiny.encoded(tokenizer, forget), tiny.encoded(tokenizer, retain)
    assert retain_module.in_form(planted, tokenizer, forget, retain, length=64, seed=0) == []


def test_a_given_retain_set_is_joined_by_chat(planted, tokenizer, monkeypatch):
    real = retain_module.continued
    spoken = []

    def speak(*arguments):
        spoken.extend(real(*arguments))
        return spoken

    monkeypatch.setattr(retain_module, "continued", speak)
    base = copy.deepcopy(planted)
    isolate(base, tokenizer, CHATS, CHAT_RETAIN * 8, config=replace(SHORT, bits=None, max_steps=2))
    assert len(spoken) == 96
    without = copy.deepcopy(planted)
    monkeypatch.setattr(retain_module, "continued", lambda *a: [])
    isolate(without, tokenizer, CHATS, CHAT_RETAIN * 8, config=replace(SHORT, bits=None, max_steps=2))
    assert differs(base_weights(base), base_weights(without))


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
