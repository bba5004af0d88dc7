"""Streams as LoRAs and LoRAs as streams."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_tune import logits

import libortho
from libortho import CheckpointError, ConfigError, TargetError, load, save, set_alpha
from libortho.core.layer import ortho_layers
from libortho.core.report import methods
from libortho.integrations.peft import from_peft
from loras import MLP, lora, moved

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

SETTINGS = {
    "plain": {},
    "scaled": {"lora_alpha": 32},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "lora_alpha": 3,
        "rank_pattern": {"down_proj": 6, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"gate_proj": 9, "layers.0.mlp.down_proj": 1},
    },
    "attention": {"target_modules": "all-linear", "lora_dropout": 0.5},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("how", ["folder", "memory", "itself"])
def test_a_lora_becomes_a_stream_that_computes_the_same(tiny_llama, tmp_path, settings, how):
    before = logits(tiny_llama)
    plain = copy.deepcopy(tiny_llama)
    wrapped = lora(tiny_llama, **settings)
    wanted = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    given = tmp_path / "adapter" if how == "folder" else wrapped
    model = from_peft(wrapped if how == "itself" else plain, given, "hr")
    assert torch.equal(logits(model), before)
    set_alpha(model, {"hr": 1.0})
    assert moved(model, wanted) < 1e-5
    assert moved(model, before) > 0.1
    assert all(s.support is None for layer in ortho_layers(model).values() for s in layer.streams.values())
    save(model, None, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert torch.equal(logits(again), before)
    set_alpha(again, 1.0)
    assert torch.equal(logits(again), logits(model))
    manifest = (tmp_path / "out" / "ortho" / "hr" / "manifest.json").read_text()
    assert json.loads(manifest)["method"]["verb"] == "from_peft"
    assert str(tmp_path) not in manifest


def test_a_conv1d_with_a_bias_is_the_same_bit_for_bit(tiny_gpt2, tmp_path):
    for name, parameter in tiny_gpt2.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter.data)
    before = logits(tiny_gpt2)
    wrapped = lora(copy.deepcopy(tiny_gpt2), target_modules=["c_attn", "c_proj", "c_fc"])
    wrapped.save_pretrained(tmp_path)
    from_peft(tiny_gpt2, tmp_path, "hr")
    assert torch.equal(logits(tiny_gpt2), before)
    set_alpha(tiny_gpt2, 1.0)
    assert moved(tiny_gpt2, logits(wrapped)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_halves(tiny_llama, dtype):
    model = tiny_llama.to(dtype)
    wrapped = lora(copy.deepcopy(model)).to(dtype)
    wanted = logits(wrapped).float()
    from_peft(model, wrapped)
    assert {b.dtype for s in ortho_layers(model).values() for b in s.streams.buffers()} == {dtype}
    set_alpha(model, 1.0)
    near = float((logits(model).float() - wanted).abs().max() / wanted.std())
    assert near < (0.2 if dtype is torch.bfloat16 else 0.03)


def test_two_adapters_are_two_streams(tiny_llama):
    first, second = (lora(copy.deepcopy(tiny_llama), seed) for seed in (1, 2))
    before = logits(tiny_llama)
    from_peft(tiny_llama, first, "hr")
    from_peft(tiny_llama, second, "legal")
    assert torch.equal(logits(tiny_llama), before)
    for name, other in (("hr", first), ("legal", second)):
        with libortho.alpha(tiny_llama, {name: 1.0}):
            assert moved(tiny_llama, logits(other)) < 1e-5


def test_rows_with_one_input_are_columns_and_others_directions(tiny_llama):
    wrapped = lora(copy.deepcopy(tiny_llama), target_modules=["down_proj"], r=5, lora_alpha=10)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            down = module.lora_A["default"].weight.data
            down[:3] = 0
            down[0, 9], down[1, 4], down[2, 9] = 1.0, -0.5, 2.0  # out of order, scaled, twice
    down[4] = 0  # empty
    wanted = logits(wrapped)
    from_peft(tiny_llama, wrapped)
    set_alpha(tiny_llama, 1.0)
    assert moved(tiny_llama, wanted) < 1e-5
    parts = [layer.streams["default"] for layer in ortho_layers(tiny_llama).values()]
    assert [p.support.index.tolist() for p in parts] == [[4, 9], [4, 9]]
    assert [p.tail.rank for p in parts] == [2, 1]


def test_a_lora_joins_the_streams_of_a_checkpoint(checkpoint, tmp_path):
    model, _ = load(checkpoint)
    off = logits(model)
    with libortho.alpha(model, {"hr": 1.0}):
        on = logits(model)
    dense = copy.deepcopy(model)
    for name, layer in ortho_layers(dense).items():  # what the adapter is trained on: the alpha = 0 model
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data = layer.dense_weight(0.0)
        parent, _, leaf = name.rpartition(".")
        setattr(dense.get_submodule(parent), leaf, linear)
    wrapped = lora(dense, target_modules=["down_proj"])
    wrapped.save_pretrained(tmp_path)
    from_peft(model, tmp_path, "style")
    assert torch.equal(logits(model), off)
    set_alpha(model, {"hr": 1.0, "style": 0.0})
    assert torch.equal(logits(model), on)
    set_alpha(model, {"hr": 0.0, "style": 1.0})
    assert moved(model, logits(wrapped)) < 1e-3
    assert set(methods(model)) == {"hr", "style"}


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "bias": ({"bias": "all"}, "bias=all"),
    "lora_bias": ({"lora_bias": True, "target_modules": ["c_fc"]}, "lora_bias=True"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "embedding": ({"target_modules": ["embed_tokens", "wte"]}, "holds the tensor .*embed_tokens|lora_embedding"),
    "alora": ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"], "target_modules": []}, "target_parameters"),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("folder", [True, False])
def test_what_no_stream_can_hold_is_refused_by_name(untouched, tiny_gpt2, tmp_path, settings, words, folder):
    other = tiny_gpt2 if "c_fc" in settings.get("target_modules", ()) else copy.deepcopy(untouched)
    wrapped = lora(other, **settings)
    if folder:
        wrapped.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        from_peft(untouched, tmp_path if folder else wrapped)
    assert not ortho_layers(untouched)


def test_other_methods_and_several_adapters_are_refused(untouched, tmp_path):
    prefix = get_peft_model(copy.deepcopy(untouched), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="PEFT type PREFIX_TUNING"):
        from_peft(untouched, prefix)
    wrapped = lora(copy.deepcopy(untouched))
    wrapped.add_adapter("legal", LoraConfig(target_modules=MLP))
    with pytest.raises(ConfigError, match="the adapters 'default', 'legal'; expected one"):
        from_peft(untouched, wrapped)
    wrapped.delete_adapter("legal")
    wrapped.merge_adapter()
    with pytest.raises(ConfigError, match="is merged"):
        from_peft(untouched, wrapped)
    with pytest.raises(ConfigError, match="every lora_B is zero"):
        from_peft(untouched, get_peft_model(copy.deepcopy(untouched), LoraConfig(target_modules=MLP)))
    with pytest.raises(ConfigError, match="adapter is a NoneType"):
        from_peft(untouched, None)


def test_adapters_of_other_models_are_refused(untouched, tiny_gpt2):
    with pytest.raises(TargetError, match=r"transformer\.h\.0\.mlp\.c_fc, which this LlamaForCausalLM has not"):
        from_peft(untouched, lora(tiny_gpt2, target_modules=["c_fc"]))
    wide = type(untouched)(type(untouched.config)(**{**untouched.config.to_dict(), "intermediate_size": 96}))
    with pytest.raises(TargetError, match=r"\(96, 64\), and the model has \(128, 64\)"):
        from_peft(untouched, lora(wide))
    with pytest.raises(ConfigError, match=r"directions in .*; a stream holds at most 512"):
        from_peft(untouched, lora(copy.deepcopy(untouched), r=513, target_modules=["up_proj"]))
    with pytest.raises(ConfigError, match="stream name 'a b'"):
        from_peft(untouched, lora(copy.deepcopy(untouched)), "a b")


def test_a_name_that_is_taken_is_refused_and_the_adapter_stays_where_it_is(tiny_llama):
    wrapped = lora(copy.deepcopy(tiny_llama), target_modules=["up_proj"])
    model = from_peft(tiny_llama, wrapped, "hr")
    with pytest.raises(ConfigError, match="stream 'hr' exists already"):
        from_peft(model, lora(copy.deepcopy(wrapped.unload())), "hr")
    again = lora(_dense(), target_modules=["lm_head"])
    wanted = logits(again)
    with pytest.raises(TargetError, match="lm_head makes the logits"):
        from_peft(again, again)
    assert torch.equal(logits(again), wanted)


def _dense():
    torch.manual_seed(1)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval()


DAMAGE = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "as a pickle, which can run code and is not read",
    ),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 12), "cannot read"),
    "rank": (lambda f: _rewrite(f, r=5), "the configuration says rank 5"),
    "zero rank": (lambda f: _rewrite(f, r=0), "the rank 0"),
    "alpha": (lambda f: _rewrite(f, lora_alpha="much"), "lora_alpha of .* is 'much'"),
    "pattern": (lambda f: _rewrite(f, rank_pattern={"(": 2}), "rank_pattern cannot be read"),
    "half": (lambda f: _drop(f), "lacks a factor of"),
    "nan": (lambda f: _drop(f, float("nan")), "no finite numbers"),
}


def _rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop(folder, value=None):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[min(tensors)]
    else:
        tensors[min(tensors)][0, 0] = value
    save_file(tensors, path)


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(untouched, tmp_path, damage, words):
    lora(copy.deepcopy(untouched)).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        from_peft(untouched, tmp_path)


# -- a stream that another trainer trains ------------------------------------------------------------------------------
