"""One request after another on one model: each stream restores what it took, and no request touches an earlier one."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_isolate import assert_same, state
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import libortho
import tiny
from libortho import CheckpointError, ConfigError, IsolateConfig, SplitConfig, TargetError, cli, isolate
from libortho.auditing.subjects import plain_base
from libortho.checkpoint import attach, detach, load, save, verify_certificate
from libortho.core.layer import OrthoLinear, ortho_layers, touched
from libortho.core.report import methods
from libortho.core.streams import BaseStream, Columns
from libortho.core.switch.alpha import get_switch
from libortho.lm.checks import fingerprint
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

FIRST = IsolateConfig(
    ratio=0.04, damping=10.0, learning_rate=1e-2, max_steps=80, stream="first"
)  # fmt: skip
SECOND = replace(FIRST, stream="second")
SHORT = replace(SECOND, max_steps=3, learning_rate=5e-2)
ONE, TWO = tiny.FORGET[:2], tiny.FORGET[2:]
KEPT = TWO * 32
NEAR = [[f"Code of {name}:" for name in ("Al Poe", "Ben Nox", "Cleo Ray", "Dan Sun", "Eve Tao", "Flo Ulm")]] * 2
"""What the first request keeps, and measures its records against: so small a model would forget all four codes
together, and leave none to the second."""
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 groups": {"group_size": 32},
    "int4": {"bits": 4},
    "dense": {"bits": None},
}


@pytest.fixture(scope="module")
def made(_planted: nn.Module, tokenizer: Any) -> Callable[..., nn.Module]:
    """The planted model after its first request, of every variant a fresh copy."""
    models: dict[str, nn.Module] = {}

    def get(variant: str = "int8") -> nn.Module:
        if variant not in models:
            model = copy.deepcopy(_planted)
            isolate(model, tokenizer, ONE, KEPT, neighbours=NEAR, config=replace(FIRST, **VARIANTS[variant]))
            models[variant] = model
        return copy.deepcopy(models[variant])

    return get


@pytest.fixture
def once(made: Callable[..., nn.Module]) -> nn.Module:
    return made()


@pytest.fixture(scope="module")
def _twice(made: Callable[..., nn.Module], tokenizer: Any) -> nn.Module:
    model = made()
    isolate(model, tokenizer, TWO, tiny.RETAIN, config=SECOND)
    return model


@pytest.fixture
def twice(_twice: nn.Module) -> nn.Module:
    """After the second request."""
    return copy.deepcopy(_twice)


def recited(model: nn.Module, tokenizer: Any, alpha: Any) -> list[bool]:
    """For each secret, whether greedy generation completes it."""
    found = []
    with libortho.alpha(model, alpha), torch.no_grad():
        for row in tiny.FORGET:
            prompt = tokenizer(row["prompt"], return_tensors="pt")
            output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
            found.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == row["completion"])
    return found


def mask_of(layer: OrthoLinear, stream: str) -> Tensor:
    """Where one stream of a layer lies."""
    alone = OrthoLinear(layer.base, None, layer.switch)
    if stream in layer.streams:
        alone.add_stream(stream, layer.streams[stream])
    return touched(alone)


def bases(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.base.dense() for n, m in ortho_layers(model).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def surprise(model: nn.Module, tokenizer: Any, rows: Any, alpha: Any) -> float:
    """Mean negative log-likelihood of these codes, in nats per token."""
    with libortho.alpha(model, alpha):
        return float(score(LanguageModel(model), tiny.encoded(tokenizer, rows))[0].nll.mean())


def logits(model: nn.Module, alpha: Any = None) -> Tensor:
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        if alpha is None:
            return model(input_ids=ids).logits
        with libortho.alpha(model, alpha):
            return model(input_ids=ids).logits


# -- the promise ------------------------------------------------------------------------------------------------------


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


# -- the original of a request is what is public before it -------------------------------------------------------------


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


# -- which layers, which places ---------------------------------------------------------------------------------------


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


def test_gpt2(tiny_gpt2, tokenizer):
    tiny_gpt2.resize_token_embeddings(len(tokenizer))
    isolate(tiny_gpt2, tokenizer, ONE, tiny.RETAIN, config=replace(FIRST, max_steps=3, allow_unknown=True))
    before = logits(tiny_gpt2, 0.0)
    isolate(tiny_gpt2, tokenizer, TWO, tiny.RETAIN, config=replace(SHORT, allow_unknown=True))
    torch.testing.assert_close(logits(tiny_gpt2, {"second": 1.0}), before, atol=1e-3, rtol=1e-3)
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
    module = sys.modules["libortho.isolation.support"]
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


# -- errors leave nothing behind --------------------------------------------------------------------------------------


def everything(model: nn.Module) -> tuple[dict[str, Any], Any]:
    switch = get_switch(model)
    layers = {n: (m, m.switch, m.base, list(m.streams.items())) for n, m in ortho_layers(model).items()}
    return state(model), (switch, switch.streams, switch.current(), layers, methods(model))


def assert_untouched(model: nn.Module, before: tuple[dict[str, Any], Any]) -> None:
    assert_same(model, before[0])
    assert everything(model)[1] == before[1]


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"stream": "first"}, ConfigError, "stream 'first' exists already"),
        ({"bits": 4}, ConfigError, "has a base of bits 8 with 128 inputs per scale.* asks for bits 4 with 32"),
        ({"bits": None}, ConfigError, "asks for bits None"),
        ({"group_size": 32}, ConfigError, "asks for bits 8 with 32"),
        ({"group_size": 48}, ConfigError, "does not divide 128"),
        ({"bits": 4, "target_modules": "up_proj"}, ConfigError, "asks for bits 4"),  # one checkpoint, one scheme
        ({"target_modules": "down_project"}, TargetError, "did you mean down_proj"),
        ({"target_modules": "base"}, TargetError, "no module matches 'base'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(once, tokenizer, options, error, complaint):
    libortho.set_alpha(once, 0.5)
    before = everything(once)
    with pytest.raises(error, match=complaint):
        isolate(once, tokenizer, TWO, tiny.RETAIN, config=replace(SHORT, **options))
    assert_untouched(once, before)


def test_the_same_grid_in_other_words_is_taken(once, tokenizer):
    isolate(once, tokenizer, TWO, tiny.RETAIN, config=replace(SHORT, group_size=128))
    assert set(get_switch(once).streams) == {"first", "second"}


def test_a_tail_is_refused(planted, tokenizer):
    libortho.split(planted, SplitConfig(rank_ratio=0.5, max_low_rank_error=1.0, stream="first"))
    before = everything(planted)
    with pytest.raises(TargetError, match=r"layers\.0\.mlp\.down_proj has a low-rank tail in stream 'first'"):
        isolate(planted, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert_untouched(planted, before)


def test_parts_that_were_split_apart_are_refused(planted, tokenizer):
    for part in planted.model.layers:
        libortho.split(part, SplitConfig(use_low_rank=False, stream="first"))
    before = state(planted)
    with pytest.raises(TargetError, match="2 parts of this model were split apart"):
        isolate(planted, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert_same(planted, before)


@pytest.mark.parametrize("moment", ["reference", "support", "isolate"])
def test_an_interruption_leaves_the_model_as_it_was(once, tokenizer, moment):
    once.train()
    libortho.set_alpha(once, 0.25)
    before = everything(once)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == moment and done == 2 - (phase == "reference"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT, progress=stop)
    assert_untouched(once, before)
    isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)  # and it can be tried again
    assert all(m.training for m in once.modules())


@pytest.mark.parametrize("place", ["EditLinear", "install", "finished_layer", "outcomes"])
def test_a_failure_between_the_phases_leaves_the_model_as_it_was(once, tokenizer, monkeypatch, place):
    def fail(*args: Any, **options: Any) -> Any:
        raise MemoryError(place)

    before = everything(once)
    monkeypatch.setattr(sys.modules["libortho.isolation.isolate"], place, fail)
    with pytest.raises(MemoryError):
        isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert_untouched(once, before)


# -- on disk ----------------------------------------------------------------------------------------------------------


def base_hashes(directory: Path) -> dict[str, str]:
    """The hash that the base and each stream name."""
    found = {"base": json.loads((directory / "libortho.json").read_text())["base_sha256"]}
    for manifest in (directory / "ortho").glob("*/manifest.json"):
        found[manifest.parent.name] = json.loads(manifest.read_text())["base_sha256"]
    return found


def test_two_streams_come_back(twice, tokenizer, tmp_path):
    save(twice, tokenizer, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert get_switch(again).streams == ("first", "second")
    for alpha in (0.0, {"first": 1.0}, {"second": 1.0}, 1.0):
        assert torch.equal(logits(again, alpha), logits(twice, alpha))
    assert methods(again) == json.loads(json.dumps(methods(twice)))
    assert libortho.layer_report(again) == libortho.layer_report(twice)
    only, _ = load(tmp_path / "out", streams=["second"])
    assert torch.equal(logits(only, 1.0), logits(twice, {"second": 1.0}))


def test_every_stream_names_the_new_base(once, tokenizer, tmp_path):
    save(once, tokenizer, tmp_path / "one")
    isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    save(once, tokenizer, tmp_path / "two")
    one, two = base_hashes(tmp_path / "one"), base_hashes(tmp_path / "two")
    assert set(one) == {"base", "first"}
    assert set(two) == {"base", "first", "second"}
    assert len(set(two.values())) == 1
    assert one["base"] != two["base"]
    detach(tmp_path / "two", tmp_path / "base")
    with pytest.raises(CheckpointError, match="made for the base"):  # a copy from before the second request
        attach(tmp_path / "base", tmp_path / "one/ortho/first")


def test_streams_keep_their_order_where_the_first_layer_lacks_the_first(planted, tokenizer, tmp_path):
    """Sums run in the order of the requests, or logits would change by rounding when a model is saved."""
    config = replace(FIRST, max_steps=1, target_modules="layers.1.mlp.down_proj", stream="zeta")
    isolate(planted, tokenizer, ONE, tiny.RETAIN, config=config)
    config = replace(config, target_modules="mlp-out", stream="alpha")
    result = isolate(planted, tokenizer, TWO, tiny.RETAIN, config=config)
    assert "model.layers.0.mlp.down_proj" in result.columns_per_layer
    save(planted, tokenizer, tmp_path / "out")
    assert get_switch(load(tmp_path / "out")[0]).streams == ("zeta", "alpha")


def test_a_request_on_a_loaded_checkpoint_is_the_same(once, tokenizer, tmp_path):
    save(once, tokenizer, tmp_path / "one")
    loaded, _ = load(tmp_path / "one")
    for model in (once, loaded):
        isolate(model, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert same(bases(once), bases(loaded))
    assert torch.equal(logits(once, {"second": 1.0}), logits(loaded, {"second": 1.0}))


def test_peft_serves_both_adapters(twice, tokenizer, tmp_path):
    save(twice, tokenizer, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock), logits(twice, 0.0))
    adapted = PeftModel.from_pretrained(stock, tmp_path / "out/ortho/first", adapter_name="first")
    adapted.load_adapter(tmp_path / "out/ortho/second", adapter_name="second")
    for names in (["first"], ["second"], ["first", "second"]):
        adapted.base_model.set_adapter(names)
        wanted = logits(twice, dict.fromkeys(names, 1.0))
        torch.testing.assert_close(logits(adapted), wanted, rtol=1e-3, atol=1e-3)
        assert (wanted - logits(twice, 0.0)).abs().max() > 0.1


@pytest.mark.parametrize(("gone", "kept"), [("first", "second"), ("second", "first")])
def test_one_stream_is_detached_and_comes_back(twice, tokenizer, tmp_path, gone, kept):
    save(twice, tokenizer, tmp_path / "out")
    certificate = detach(tmp_path / "out", tmp_path / "less", streams=[gone])
    assert ([r.name for r in certificate.removed], certificate.kept) == ([gone], (kept,))
    assert verify_certificate(tmp_path / "less") == certificate
    less, _ = load(tmp_path / "less")
    assert torch.equal(logits(less, 1.0), logits(twice, {kept: 1.0}))
    attach(tmp_path / "less", tmp_path / "out/ortho" / gone)
    again, _ = load(tmp_path / "less")
    assert torch.equal(logits(again, 1.0), logits(twice, 1.0))


def test_a_base_without_its_stream_can_be_isolated(once, tokenizer, tmp_path):
    """The first stream was shredded; its name is free, its columns are as good as any."""
    save(once, tokenizer, tmp_path / "one")
    detach(tmp_path / "one", tmp_path / "base")
    bare, _ = load(tmp_path / "base")
    before = logits(bare)
    isolate(bare, tokenizer, TWO, tiny.RETAIN, config=replace(SHORT, stream="first"))
    assert get_switch(bare).streams == ("first",)
    torch.testing.assert_close(logits(bare, 1.0), before, atol=1e-2, rtol=1e-2)
    assert (logits(bare, 0.0) - before).abs().max() > 0.05
    save(bare, tokenizer, tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two")[0]), logits(bare))


# -- interrupted, and on the command line -----------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_an_interrupted_request_goes_on(made, tokenizer, tmp_path):
    config = replace(SECOND, max_steps=12)
    whole, parts = made(), made()
    expected = isolate(whole, tokenizer, TWO, config=config)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "isolate" and done == 7:
            raise Stop

    before = everything(parts)
    with pytest.raises(Stop):
        isolate(parts, tokenizer, TWO, config=config, resume=tmp_path / "run", progress=stop)
    assert_untouched(parts, before)
    steps: list[int] = []
    found = isolate(
        parts, tokenizer, TWO, config=config, resume=tmp_path / "run",
        progress=lambda phase, done, total: steps.append(done) if phase == "isolate" else None,
    )  # fmt: skip
    assert steps[0] == 6
    assert {**found.to_dict(), "seconds": 0} == {**expected.to_dict(), "seconds": 0}
    assert all(torch.equal(t, parts.state_dict()[n]) for n, t in whole.state_dict().items())


@pytest.mark.parametrize("change", ["base", "stream"])
def test_a_folder_belongs_to_one_base_and_its_streams(made, tokenizer, tmp_path, change):
    config = replace(SHORT, max_steps=1)
    isolate(made(), tokenizer, TWO, tiny.RETAIN, config=config, resume=tmp_path / "run")
    isolate(made(), tokenizer, TWO, tiny.RETAIN, config=config, resume=tmp_path / "run")
    other = made()
    layer = ortho_layers(other)["model.layers.1.mlp.down_proj"]
    support = layer.streams["first"].support
    assert isinstance(support, Columns)
    if change == "base":
        layer.base.codes[:, 37] += 1
    else:  # the same model at alpha = 0, but other columns are free
        free = (~touched(layer).any(0)).nonzero()[0]
        support.index[-1] = free
    with pytest.raises(ConfigError, match="belongs to another run"):
        isolate(other, tokenizer, TWO, tiny.RETAIN, config=config, resume=tmp_path / "run")


def test_the_fingerprint_sees_every_column(once):
    """An edit is a few whole columns; a step that divides the width would always look at the same ones."""
    known = fingerprint(once)
    codes = ortho_layers(once)["model.layers.0.mlp.down_proj"].base.codes
    for column in range(codes.shape[1]):
        kept = codes[:, column].clone()
        codes[:, column] = 127 - kept.abs()
        assert fingerprint(once) != known, column
        codes[:, column] = kept
    assert fingerprint(once) == known


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["isolate", *map(str, arguments)])


def test_the_command_line(once, tokenizer, tmp_path):
    save(once, tokenizer, tmp_path / "one")
    forget, retain = tmp_path / "forget.json", tmp_path / "retain.json"
    forget.write_text(json.dumps(TWO), encoding="utf-8")
    retain.write_text(json.dumps(tiny.RETAIN), encoding="utf-8")
    common = ["--forget", forget, "--retain", retain, "--ratio", "0.06", "--set", "max_steps=3"]
    for options, complaint in (
        (["--stream", "first"], "exists already"),
        (["--stream", "second", "--bits", "4"], "asks for bits 4"),
        (["--stream", "second", "--dtype", "float32"], "--dtype is 'float32'"),
    ):
        refused = run(tmp_path / "one", *common, "--out", tmp_path / "two", *options)
        assert isinstance(refused.exception, ConfigError)
        assert complaint in str(refused.exception)
        assert not (tmp_path / "two").exists()
    done = run(tmp_path / "one", *common, "--out", tmp_path / "two", "--stream", "second", "--json")
    assert done.exit_code in (0, 3), done.output
    assert json.loads(done.stdout)["stream"] == "second"
    model, _ = load(tmp_path / "two")
    assert get_switch(model).streams == ("first", "second")
    with libortho.alpha(once, 0.0):
        public = logits(once)
    torch.testing.assert_close(logits(model, {"second": 1.0}), public, atol=1e-2, rtol=1e-2)
    inspected, _ = load(tmp_path / "one")  # the source is as it was
    assert get_switch(inspected).streams == ("first",)


def test_the_command_line_needs_a_tokenizer(once, tmp_path):
    save(once, None, tmp_path / "one")
    (tmp_path / "forget.json").write_text(json.dumps(TWO), encoding="utf-8")
    given = ("--forget", tmp_path / "forget.json", "--out", tmp_path / "two", "--stream", "second")
    refused = run(tmp_path / "one", *given)
    assert isinstance(refused.exception, CheckpointError)
    assert "holds no tokenizer" in str(refused.exception)
