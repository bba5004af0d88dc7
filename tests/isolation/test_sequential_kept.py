"""A second request on disk, interrupted, refused, and on the command line."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import libortho
import tiny
from isolating import assert_same, state
from libortho import CheckpointError, ConfigError, SplitConfig, TargetError, cli, isolate
from libortho.checkpoint import attach, detach, load, save, verify_certificate
from libortho.core.layer import ortho_layers, touched
from libortho.core.report import methods
from libortho.core.streams import Columns
from libortho.core.switch.alpha import get_switch
from libortho.lm.checks import fingerprint
from sequential import FIRST, ONE, SECOND, SHORT, TWO, assert_untouched, bases, everything, logits, same

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


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


@pytest.mark.parametrize("moment", ["original", "columns", "steps"])
def test_an_interruption_leaves_the_model_as_it_was(once, tokenizer, moment):
    once.train()
    libortho.set_alpha(once, 0.25)
    before = everything(once)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == moment and done == (2 if phase == "steps" else total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT, progress=stop)
    assert_untouched(once, before)
    isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)  # and it can be tried again
    assert all(m.training for m in once.modules())


@pytest.mark.parametrize("place", ["preconditioners", "EditLinear", "install", "finished_layer", "outcomes"])
def test_a_failure_between_the_phases_leaves_the_model_as_it_was(once, tokenizer, monkeypatch, place):
    def fail(*args: Any, **options: Any) -> Any:
        raise MemoryError(place)

    before = everything(once)
    module = "isolate" if place == "install" else "attempt"
    monkeypatch.setattr(sys.modules[f"libortho.isolation.{module}"], place, fail)
    with pytest.raises(MemoryError):
        isolate(once, tokenizer, TWO, tiny.RETAIN, config=SHORT)
    assert_untouched(once, before)


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
    """The first stream was deleted; its name is free, its columns are as good as any."""
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


class Stop(Exception):
    pass


def test_an_interrupted_request_goes_on(made, tokenizer, tmp_path):
    config = replace(SECOND, max_steps=9)
    whole, parts = made(), made()
    expected = isolate(whole, tokenizer, TWO, config=config)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "steps" and done == 4:
            raise Stop

    before = everything(parts)
    with pytest.raises(Stop):
        isolate(parts, tokenizer, TWO, config=config, resume=tmp_path / "run", progress=stop)
    assert_untouched(parts, before)
    steps: list[int] = []
    found = isolate(
        parts, tokenizer, TWO, config=config, resume=tmp_path / "run",
        progress=lambda phase, done, total: steps.append(done) if phase == "steps" else None,
    )  # fmt: skip
    assert steps[0] == 4  # what is kept is of every third step
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
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
