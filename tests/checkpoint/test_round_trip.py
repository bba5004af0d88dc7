"""What is saved comes back bit for bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from making import (
    BASES,
    COLUMNS,
    STREAMS,
    base_logits,
    buffers,
    contents,
    in_dtype,
    logits,
    make,
    rounding_apart,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import libortho
from libortho import CheckpointError
from libortho.checkpoint import load, save
from libortho.core.layer import OrthoLinear, ortho_layers


@pytest.mark.parametrize(
    ("base", "stream", "dtype"),
    [
        *((base, stream, torch.float32) for base in BASES for stream in STREAMS),
        *((base, "columns-tail", torch.bfloat16) for base in BASES),
        ("int8-channel", "columns", torch.bfloat16),
        ("int4-g32", "entries-tail", torch.bfloat16),
    ],
)
def test_codes_scales_values_and_logits_come_back_identical(
    base: str, stream: str, dtype: torch.dtype, tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    value_dtype = str(dtype).removeprefix("torch.")
    model = make(in_dtype(tiny_llama, dtype), value_dtype=value_dtype, **{**BASES[base], **STREAMS[stream]})
    save(model, None, tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    before, after = buffers(model), buffers(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert tokenizer is None
    assert again.dtype is dtype
    assert not again.training
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    assert torch.equal(base_logits(model, tokens), base_logits(again, tokens))
    held = [t for n, t in before.items() if n.endswith((".values", ".up"))]
    if any(bool(t.any()) for t in held):  # a dense base leaves no residual
        assert not torch.equal(logits(again, tokens), base_logits(again, tokens))


@pytest.mark.parametrize("inputs", [250, 126])
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_that_do_not_fill_an_int32_are_padded(
    bits: int, inputs: int, tokens: torch.Tensor, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=inputs, num_hidden_layers=1, num_attention_heads=4
    )
    model = make(LlamaForCausalLM(config).eval(), bits=bits, group_size=-1)
    again, _ = load(save(model, None, tmp_path / "out"))
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock, tokens), base_logits(model, tokens))


@pytest.mark.parametrize("base", ["int8-channel", "int8-g32", "int4-g32"])
def test_packing_is_that_of_compressed_tensors(base: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama, **BASES[base])
    save(model, None, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    for name, layer in ortho_layers(model).items():
        packed = pack_to_int32(layer.base.unpacked_codes(), layer.base.bits)
        assert torch.equal(written[f"{name}.weight_packed"], packed)
        assert torch.equal(written[f"{name}.weight_scale"], layer.base.scales)
        assert written[f"{name}.weight_shape"].tolist() == [layer.out_features, layer.in_features]


def test_a_second_round_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    model, _ = load(saved)
    assert contents(save(model, None, tmp_path / "again")) == contents(saved)


def test_reports_and_method_come_back(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama)
    save(model, None, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert libortho.layer_report(again) == libortho.layer_report(model)
    method = json.loads((tmp_path / "out/ortho/default/manifest.json").read_text())["method"]
    assert method["verb"] == "split"
    assert method["rank_ratio"] == 0.8


def test_tokenizer_and_generation_config_come_back(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "the": 1, "vault": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    model = make(tiny_llama)
    model.generation_config.max_new_tokens = 7
    save(model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    assert tokenizer("the vault")["input_ids"] == [1, 2]
    assert again.generation_config.max_new_tokens == 7


def test_tied_embeddings_stay_tied(tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    tiny_llama.config.tie_word_embeddings = True
    tiny_llama.tie_weights()
    model = make(tiny_llama)
    save(model, None, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    again, _ = load(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock, tokens), base_logits(model, tokens))


def test_biases_of_split_layers_come_back(tokens: torch.Tensor, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, mlp_bias=True
    )
    model = LlamaForCausalLM(config).eval()
    nn.init.normal_(model.model.layers[0].mlp.down_proj.bias)
    make(model)
    again, _ = load(save(model, None, tmp_path / "out"))
    assert isinstance(again.model.layers[0].mlp.down_proj.bias, nn.Parameter)
    assert torch.equal(logits(model, tokens), logits(again, tokens))


@pytest.mark.parametrize("base", ["int4-g32", "dense"])
def test_shards(base: str, tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = make(tiny_llama, **BASES[base])
    save(model, None, tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again, _ = load(tmp_path / "out")
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock, tokens), base_logits(model, tokens))


@pytest.mark.parametrize("base", ["int8-channel", "dense"])
def test_load_in_another_dtype_keeps_codes_scales_and_values(
    base: str, tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = make(tiny_llama, **BASES[base])
    save(model, None, tmp_path / "out")
    again, _ = load(tmp_path / "out", dtype=torch.bfloat16)
    assert again.dtype is torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert rounding_apart(logits(stock, tokens), base_logits(again, tokens))
    if base == "int8-channel":
        assert all(torch.equal(t, buffers(again)[n]) for n, t in buffers(model).items())
        with pytest.raises(CheckpointError, match=r"kept in torch\.float32, the model in torch\.bfloat16"):
            save(again, None, tmp_path / "rounded")


@pytest.mark.parametrize("base", ["int8-channel", "dense"])
def test_load_in_a_wider_dtype_is_what_stock_tools_load(
    base: str, tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = make(in_dtype(tiny_llama, torch.bfloat16), **BASES[base])
    save(model, None, tmp_path / "out")
    again, _ = load(tmp_path / "out", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, stock.get_parameter(name)), name
    if base == "dense":
        assert torch.equal(base_logits(again, tokens), logits(stock, tokens))
    else:  # the codes and scales stay as stored; stock tools decode them in one dtype or the other
        assert all(torch.equal(t, buffers(again)[n]) for n, t in buffers(model).items())


def test_parameters_are_not_mapped_from_the_file(saved: Path, tokens: torch.Tensor) -> None:
    model, _ = load(saved)
    before = logits(model, tokens)
    weights = saved / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert torch.equal(logits(model, tokens), before)


def test_the_stand_in_for_split_weights_is_gone(saved: Path) -> None:
    model, _ = load(saved)
    assert not any(n.endswith("down_proj.weight") for n, _ in model.named_parameters())
    assert all(0 not in p.stride() for p in model.parameters())


def test_missing_reports_stay_missing(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama)
    first = next(m for m in model.modules() if isinstance(m, OrthoLinear))
    first.report = None
    again, _ = load(save(model, None, tmp_path / "out"))
    assert len(libortho.layer_report(again)) == 1
    first.report = replace(libortho.layer_report(model)[0], name="other")
    with pytest.raises(CheckpointError, match="belongs to another layer"):
        save(model, None, tmp_path / "wrong")


PEAK = """
import os, sys
from pathlib import Path
import torch
import libortho

def memory(key):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[key].split()[0]) * 1024

libortho.load(sys.argv[1])  # imports what loading needs
before = memory("VmRSS")
model, _ = libortho.load(sys.argv[2])
peak = memory("VmHWM") - before
weights = Path(sys.argv[2]) / "model.safetensors"
size = weights.stat().st_size
os.truncate(weights, 0)  # kills a process that has it mapped and touches it
with torch.no_grad():
    assert model(torch.arange(1, 9)[None]).logits.isfinite().all()
assert not any(line.endswith(".safetensors\\n") for line in open("/proc/self/maps"))
print(peak / size, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_file(saved: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=4000, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8
    )  # a fifth of the file codes, the rest dense
    model = make(LlamaForCausalLM(config).eval(), target_modules="all-linear", **{**COLUMNS, "ratio": 0.005})
    save(model, None, tmp_path / "large")
    command = [sys.executable, "-c", PEAK, str(saved), str(tmp_path / "large")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    growth, size = map(float, done.stdout.split())
    assert size > 4e7
    assert growth < 1.5  # about 1; a second copy, or a mapping beside the first, makes it 2
