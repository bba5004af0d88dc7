"""Streams that PEFT and TRL train, and LoRAs of one rank that engines read."""

import copy
import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from test_tune import CONFIG, HR, LEGAL, logits, said

import libortho
from libortho import CheckpointError, ConfigError, save, set_alpha, tune
from libortho.core.layer import ortho_layers
from libortho.core.streams import Columns, Factors
from libortho.integrations import peft as ours
from libortho.integrations.peft import column_lora, export_adapter, freeze_columns, from_peft
from loras import lora, moved
from tiny import small_llama

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


def trainable(model):
    return {n.rpartition(".lora_")[2][0] for n, p in model.named_parameters() if p.requires_grad}


def factors(model, side):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f"lora_{side}" in n}


def test_the_columns_are_those_of_tune_and_frozen(planted, tokenizer, tmp_path):
    before = logits(planted)
    tuned = copy.deepcopy(planted)
    tune(tuned, tokenizer, HR, "hr", CONFIG)
    wanted = {n: layer.streams["hr"].support.index.tolist() for n, layer in ortho_layers(tuned).items()}
    wrapped = column_lora(planted, tokenizer, HR, CONFIG)
    assert torch.equal(logits(wrapped), before)
    found = {n: m for n, m in wrapped.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert {n: m.lora_A["default"].weight.argmax(1).tolist() for n, m in found.items()} == wanted
    assert {m.scaling["default"] for m in found.values()} == {1.0}
    assert trainable(wrapped) == {"B"}
    wrapped.set_adapter("default")
    assert trainable(wrapped) == {"B"}
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(wrapped.unload(), tmp_path, is_trainable=True)
    assert trainable(again) == {"A", "B"}
    freeze_columns(again)
    again.set_adapter("default")
    assert trainable(again) == {"B"}


def test_without_the_private_function_columns_are_frozen_all_the_same(planted, tokenizer, monkeypatch):
    assert ours.KEEP_FROZEN is not None, "PEFT has renamed it: columns thaw at every set_adapter"
    monkeypatch.setattr(ours, "KEEP_FROZEN", None)
    wrapped = column_lora(planted, tokenizer, HR, CONFIG)
    assert trainable(wrapped) == {"B"}
    with pytest.raises(ConfigError, match="one 1 in each row"):
        freeze_columns(lora(wrapped.unload()))


def test_columns_that_any_optimiser_has_trained_are_columns_of_a_stream(planted, tokenizer, tmp_path):
    before = logits(planted)
    wrapped = column_lora(planted, tokenizer, HR, CONFIG)
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    ids = torch.arange(3, 40).unsqueeze(0)
    down = factors(wrapped, "A")
    for _ in range(3):
        optimiser.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    assert all(torch.equal(t, down[n]) for n, t in factors(wrapped, "A").items())
    wanted = logits(wrapped)
    model = from_peft(wrapped, wrapped, "hr")
    assert torch.equal(logits(model), before)
    assert all(isinstance(x.streams["hr"].support, Columns) for x in ortho_layers(model).values())
    assert not any(isinstance(m, Factors) for m in model.modules())
    set_alpha(model, 1.0)
    assert moved(model, wanted) < 1e-5
    result = tune(model, tokenizer, LEGAL, "legal", CONFIG)
    assert result.recited


@pytest.mark.parametrize(
    ("change", "words"), [({"bits": 8}, "bits is 8"), ({"over": ("public",)}, r"over is \('public',\)")]
)
def test_what_peft_cannot_train_over_is_refused(planted, tokenizer, change, words):
    with pytest.raises(ConfigError, match=words):
        column_lora(planted, tokenizer, HR, libortho.TuneConfig(**change))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_trainer_of_trl_trains_a_stream_and_nothing_else(planted, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    before = logits(planted)
    untrained = copy.deepcopy(planted)
    wrapped = column_lora(planted, tokenizer, HR, CONFIG)
    down, up = factors(wrapped, "A"), factors(wrapped, "B")
    settings = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=60, per_device_train_batch_size=2, learning_rate=2e-2, seed=0,
        lr_scheduler_type="cosine", weight_decay=0.1, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, max_length=64,
    )  # fmt: skip
    trainer = SFTTrainer(wrapped, settings, train_dataset=Dataset.from_list(HR), processing_class=tokenizer)
    trainer.train()
    assert max(float((t - down[n]).abs().max()) for n, t in factors(wrapped, "A").items()) == 0.0
    assert all(float((t - up[n]).abs().max()) > 0 for n, t in factors(wrapped, "B").items())
    trainer.save_model(str(tmp_path / "adapter"))
    model = from_peft(wrapped, wrapped, "hr").eval()
    assert torch.equal(logits(model), before)
    set_alpha(model, 1.0)
    assert all(said(model, tokenizer, HR))
    from_peft(untrained, tmp_path / "adapter", "hr")
    assert not any(said(untrained, tokenizer, HR))
    set_alpha(untrained, 1.0)
    assert all(said(untrained, tokenizer, HR))


# -- a stream for other engines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_an_exported_stream_is_a_lora_of_one_rank(planted, tokenizer, tmp_path, uniform, stored):
    dense = copy.deepcopy(planted)
    tune(planted, tokenizer, HR, "hr", CONFIG)
    wrapped = lora(copy.deepcopy(dense), target_modules=["up_proj"], r=3)
    from_peft(planted, wrapped, "style")
    save(planted, tokenizer, tmp_path / "checkpoint")
    source = tmp_path / "checkpoint" if stored else planted
    for name in ("hr", "style"):
        out = tmp_path / name
        assert export_adapter(source, name, out, uniform_rank=uniform) == out
        config = json.loads((out / "adapter_config.json").read_text())
        ranks = {len(t) for k, t in load_file(out / "adapter_model.safetensors").items() if "lora_A" in k}
        if uniform:
            assert ranks == {config["r"]} == {config["lora_alpha"]}
            assert config["rank_pattern"] == config["alpha_pattern"] == {}
        else:
            assert max(ranks) == config["r"]
        stock = PeftModel.from_pretrained(copy.deepcopy(dense), out)
        with libortho.alpha(planted, {name: 1.0}):
            wanted = logits(planted)
        assert moved(stock, wanted) < 1e-5
        back = from_peft(copy.deepcopy(dense), out, name)
        held = {n: x.streams[name] for n, x in ortho_layers(planted).items() if name in x.streams}
        for layer, part in ortho_layers(back).items():
            for key, value in part.streams[name].named_buffers():
                assert torch.equal(value, dict(held[layer].named_buffers())[key])


def test_what_cannot_be_exported_is_refused(split_llama, tiny_llama, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        export_adapter(split_llama, "default", tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"no stream 'hr'; it has \['default'\]"):
        export_adapter(split_llama, "hr", tmp_path / "out")
    with pytest.raises(CheckpointError, match="has free entries"):
        export_adapter(
            libortho.split(small_llama(259), libortho.SplitConfig(ratio=0.1, use_low_rank=False)),
            "default",
            tmp_path / "out",
        )
    with pytest.raises(CheckpointError):
        export_adapter(tmp_path, "hr", tmp_path / "out")
    assert not (tmp_path / "out").exists()
