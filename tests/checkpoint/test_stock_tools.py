"""Stock transformers reads the base, and stock PEFT a stream of columns."""

import copy
import json
from pathlib import Path

import pytest
import torch
from making import (
    BASES,
    COLUMNS,
    ENTRIES_TAIL,
    base_logits,
    in_dtype,
    logits,
    make,
    rounding_apart,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from libortho.checkpoint import load, save
from libortho.core.layer import ortho_layers
from libortho.core.streams import Columns


@pytest.mark.parametrize(
    ("base", "targets"),
    [*((b, "all-linear") for b in BASES), ("int8-channel", "mlp-out"), ("int4-g32", "layers.1.mlp.down_proj")],
)
def test_stock_transformers_is_alpha_0_and_peft_is_alpha_1(
    base: str, targets: str, tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = make(tiny_llama, value_dtype="float32", target_modules=targets, **BASES[base])
    save(model, None, tmp_path / "out")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(stock, tokens), base_logits(model, tokens))
    adapted = PeftModel.from_pretrained(stock, tmp_path / "out/ortho/default")
    torch.testing.assert_close(logits(adapted, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, tokens), base_logits(model, tokens))


def test_peft_in_bf16(tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = make(in_dtype(tiny_llama, torch.bfloat16), **BASES["int4-g32"])
    save(model, None, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert rounding_apart(logits(stock, tokens), base_logits(model, tokens))
    on, off = logits(model, tokens), base_logits(model, tokens)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "out/ortho/default")
    error = (logits(adapted, tokens) - on).float().norm() / (on - off).float().norm()
    assert error < 0.05  # bf16 rounding, small beside what the stream does


def test_layers_of_different_rank_and_layers_without_support(
    tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = make(tiny_llama, target_modules="all-linear", value_dtype="float32", **COLUMNS)
    layers = ortho_layers(model)
    for i, layer in enumerate(layers.values()):
        support = layer.streams["default"].support
        if i % 3 == 0:
            layer.streams["default"].support = None
        elif i % 3 == 1:
            layer.streams["default"].support = Columns(support.index[:1], support.values[:1])
    save(model, None, tmp_path / "out")
    config = json.loads((tmp_path / "out/ortho/default/adapter_config.json").read_text())
    names = list(layers)
    assert config["target_modules"] == [n for i, n in enumerate(names) if i % 3]
    assert set(config["rank_pattern"].values()) >= {1}
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"]
    again, _ = load(tmp_path / "out")
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted = PeftModel.from_pretrained(stock, tmp_path / "out/ortho/default")
    torch.testing.assert_close(logits(adapted, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_config_targets_exactly_the_split_layers(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    def targets(model: PreTrainedModel, place: str) -> list[str]:
        config = json.loads((save(model, None, tmp_path / place) / "config.json").read_text())["quantization_config"]
        assert config["quantization_status"] == "compressed"
        assert config["dequantize"] is True
        return config["config_groups"]["group_0"]["targets"]

    assert targets(make(copy.deepcopy(tiny_llama)), "all") == [r"re:.*\.down_proj$"]
    one = make(copy.deepcopy(tiny_llama), target_modules="layers.1.mlp.down_proj")
    assert targets(one, "one") == ["model.layers.1.mlp.down_proj"]


def test_free_entries_say_that_they_need_libortho(
    saved_entries: Path, tiny_llama: PreTrainedModel, tokens: torch.Tensor
) -> None:
    folder = saved_entries / "ortho/default"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "ortho.safetensors"]
    assert json.loads((folder / "manifest.json").read_text())["needs_libortho"] is True
    kinds = {n.rpartition(".")[2] for n in load_file(folder / "ortho.safetensors")}
    assert kinds == {"rows", "columns", "values", "down", "up"}
    stock = AutoModelForCausalLM.from_pretrained(saved_entries)
    assert torch.equal(logits(stock, tokens), base_logits(make(tiny_llama, **ENTRIES_TAIL), tokens))


def test_a_dense_base_is_a_plain_model(tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = make(tiny_llama, bits=None)
    save(model, None, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not any("packed" in n for n in load_file(tmp_path / "out/model.safetensors"))
