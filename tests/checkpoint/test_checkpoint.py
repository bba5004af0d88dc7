"""What is saved comes back bit for bit, stock tools read it, and nothing damaged is ever half loaded."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import libortho
from libortho import AlphaError, CheckpointError, SplitConfig
from libortho.checkpoint import directories, inspect, load, save, stream_files, writing
from libortho.core.dtypes import DTYPES
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.streams import BaseStream, Columns, OrthoStream

BASES = {
    "int8-channel": {"bits": 8},
    "int8-g32": {"bits": 8, "group_size": 32},
    "int4-g32": {"bits": 4},
    "int4-channel": {"bits": 4, "group_size": -1},
    "dense": {"bits": None},
}
COLUMNS = {"structure": "columns", "ratio": 0.05, "use_low_rank": False}
COLUMNS_TAIL = {"structure": "columns", "ratio": 0.05, "rank_ratio": 0.8}
ENTRIES_TAIL = {"structure": "unstructured", "ratio": 0.05, "rank_ratio": 0.8}
STREAMS = {"columns": COLUMNS, "columns-tail": COLUMNS_TAIL, "entries-tail": ENTRIES_TAIL}


def make(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return libortho.split(model, SplitConfig(**{"max_low_rank_error": 1.0, **COLUMNS_TAIL, **options}))


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As loading in ``dtype`` does it: ``model.to`` alone would round the rotary frequencies, which no file holds."""
    frequencies = {n: b.clone() for n, b in model.named_buffers()}
    model.to(dtype)
    for name, buffer in model.named_buffers():
        buffer.data = frequencies[name]
    return model


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}.{b}": t for n, layer in ortho_layers(model).items() for b, t in layer.named_buffers()}


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def base_logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with libortho.alpha(model, 0.0):
        return logits(model, tokens)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def add_stream(model: nn.Module, name: str, seed: int) -> None:
    """A second stream, in the first split layer only."""
    generator = torch.Generator().manual_seed(seed)
    layer = next(iter(ortho_layers(model).values()))
    index = torch.randperm(layer.in_features, generator=generator)[:3]
    values = torch.randn(3, layer.out_features, generator=generator)
    layer.add_stream(name, OrthoStream(Columns(index, values)))
    layer.switch.add_stream(name)


@pytest.fixture
def saved(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """INT8 per channel, columns and tail, saved."""
    return save(make(tiny_llama), None, tmp_path / "out")


@pytest.fixture
def saved_entries(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    return save(make(tiny_llama, **ENTRIES_TAIL), None, tmp_path / "out")


# -- round trip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("base", BASES)
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
    if any(
        bool(t.any()) for n, t in before.items() if n.endswith((".values", ".up"))
    ):  # a dense base leaves no residual
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
        vocab_size=4000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8
    )  # half of the file codes, half dense
    model = make(LlamaForCausalLM(config).eval(), target_modules="all-linear", **{**COLUMNS, "ratio": 0.005})
    save(model, None, tmp_path / "large")
    command = [sys.executable, "-c", PEAK, str(saved), str(tmp_path / "large")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    growth, size = map(float, done.stdout.split())
    assert size > 4e7
    assert growth < 1.5  # about 1; a second copy, or a mapping beside the first, makes it 2


def test_a_file_that_shrinks_while_it_is_read_is_named(saved: Path) -> None:
    files = writing.TensorFiles(saved)
    os.truncate(saved / "model.safetensors", 2000)
    with pytest.raises(CheckpointError, match=r"cannot read the tensor model\.norm\.weight: the file ends"):
        files.get("model.norm.weight")


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.bool, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_tensors_are_read_as_the_library_reads_them(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name in ("x", "y")}
    save_file({"odd": torch.ones(3, dtype=torch.int8), **tensors}, tmp_path / "model.safetensors")
    files = writing.TensorFiles(tmp_path)
    assert files.names() == ["odd", "x", "y"]
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        found = files.get(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_a_dtype_that_the_format_does_not_hold_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4).to(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E8M0"):
        writing.TensorFiles(tmp_path)


def test_the_stand_in_for_split_weights_is_gone(saved: Path) -> None:
    model, _ = load(saved)
    assert not any(n.endswith("down_proj.weight") for n, _ in model.named_parameters())
    assert all(0 not in p.stride() for p in model.parameters())


# -- stock tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["mlp-out", "all-linear", "layers.1.mlp.down_proj"])
@pytest.mark.parametrize("base", BASES)
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


def rounding_apart(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if two bf16 results differ by no more than a few roundings."""
    return float((found - expected).float().norm()) < 0.02 * float(expected.float().norm())


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
    assert torch.equal(logits(stock, tokens), base_logits(tiny_llama, tokens))


def test_a_dense_base_is_a_plain_model(tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = make(tiny_llama, bits=None)
    save(model, None, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not any("packed" in n for n in load_file(tmp_path / "out/model.safetensors"))


# -- streams -----------------------------------------------------------------------------------------------------------


def test_streams_are_loaded_by_name_and_summed_in_their_order(
    tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = make(tiny_llama, value_dtype="float32")
    add_stream(model, "zeta", 1)
    add_stream(model, "alpha", 2)
    save(model, None, tmp_path / "out")
    libortho.set_alpha(model, 1.0)
    everything, _ = load(tmp_path / "out", streams=["alpha", "zeta", "default"], alpha=1.0)
    assert torch.equal(logits(everything, tokens), logits(model, tokens))
    some, _ = load(tmp_path / "out", streams=["alpha"], alpha={"alpha": 1.0})
    with libortho.alpha(model, {"alpha": 1.0}):
        assert torch.equal(logits(some, tokens), logits(model, tokens))
    with pytest.raises(AlphaError, match="unknown stream 'zeta'"):
        libortho.set_alpha(some, {"zeta": 1.0})
    libortho.set_alpha(everything, {"zeta": 0.0, "default": 0.0})
    assert torch.equal(logits(everything, tokens), logits(some, tokens))


@pytest.mark.parametrize("streams", [None, []])
def test_no_stream_is_a_split_model_without_a_switch(
    streams: Any, saved: Path, tiny_llama: PreTrainedModel, tokens: torch.Tensor
) -> None:
    model, _ = load(saved, streams=streams)
    assert len(ortho_layers(model)) == 2
    assert torch.equal(logits(model, tokens), base_logits(tiny_llama, tokens))
    for value in (0, 0.0, [0.0, 0.0], torch.zeros(3), {}):
        libortho.set_alpha(model, value)
        with libortho.alpha(model, value):
            assert torch.equal(logits(model, tokens), base_logits(tiny_llama, tokens))
    for value in (1.0, 1e-9, [0.0, 1.0], {"default": 1.0}, {"default": 0.0}):
        with pytest.raises(AlphaError, match=r"no ortho stream is loaded beside this base.*libortho\.load.*attach"):
            libortho.set_alpha(model, value)
        with pytest.raises(AlphaError, match="no ortho stream"), libortho.alpha(model, value):
            pass
    for value in (float("nan"), -1, "0", True):
        with pytest.raises(AlphaError, match="expected a number"):
            libortho.set_alpha(model, value)
    report = libortho.layer_report(model)
    assert report.totals()["ortho_bytes"] == 0
    assert report[0].final_error == report[0].base_error


def test_the_base_stands_alone(saved: Path, tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    shutil.rmtree(saved / "ortho")
    model, _ = load(saved)
    assert torch.equal(logits(model, tokens), base_logits(tiny_llama, tokens))
    again, _ = load(save(model, None, tmp_path / "again"))
    assert torch.equal(logits(again, tokens), base_logits(tiny_llama, tokens))
    assert "default" not in (saved / "libortho.json").read_text()


@pytest.mark.parametrize("bits", [8, None])
def test_inspect(bits: int | None, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama, bits=bits)
    add_stream(model, "hr", 1)
    save(model, None, tmp_path / "out")
    info = inspect(tmp_path / "out")
    totals = libortho.layer_report(model).totals()
    assert (info.bits, info.group_size, info.layers) == (bits, -1, 2)
    assert info.base_bytes == totals["base_bytes"]
    assert info.bits_per_weight == (32 if bits is None else 8.25)  # 32 bits of scale per 128 codes
    default, hr = info.streams
    assert (default.name, default.kinds, default.layers) == ("default", ("columns", "tail"), 2)
    assert default.density == pytest.approx(totals["ortho_density"])
    assert default.tail_density == pytest.approx(totals["tail_density"])
    assert default.bytes_on_disk == sum(p.stat().st_size for p in (tmp_path / "out/ortho/default").iterdir())
    assert default.method is not None
    assert default.base_matches
    assert (hr.kinds, hr.layers, hr.tail_density, hr.method) == (("columns",), 1, 0.0, None)
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()
    assert (default.alpha, hr.alpha) == (1.0, 0.0)
    edit(tmp_path / "out/ortho/hr/manifest.json", lambda m: m.update(base_sha256="0" * 64))
    assert [s.base_matches for s in inspect(tmp_path / "out").streams] == [True, False]
    edit(tmp_path / "out/ortho/default/manifest.json", lambda m: m.update(rest_sha256="0" * 64))
    assert [s.base_matches for s in inspect(tmp_path / "out").streams] == [False, False]


# -- bad input ---------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def forge(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a stream's values and its manifest's hash, as somebody would who knows the format."""
    folder = directory / "ortho/default"
    path = next(folder.glob("*.safetensors"))
    rewrite(path, change)
    digest = stream_files.hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder / "manifest.json", lambda m: m.update(weights_sha256=digest))


def forge_base(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the base and both hashes."""
    path = directory / "model.safetensors"
    rewrite(path, change)
    names = [n for n in load_file(path) if n.endswith(("weight_packed", "weight_scale"))]
    digest = writing.TensorFiles(directory).sha256(names)
    for manifest in (directory / "libortho.json", directory / "ortho/default/manifest.json"):
        edit(manifest, lambda m: m.update(base_sha256=digest))


def forge_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json and its hash."""
    path = directory / "config.json"
    edit(path, change)
    digest = stream_files.hashlib.sha256(path.read_bytes()).hexdigest()
    edit(directory / "libortho.json", lambda m: m["files"].update({"config.json": digest}))


LAYER = "model.layers.0.mlp.down_proj"
A = f"base_model.model.{LAYER}.lora_A.weight"
B = f"base_model.model.{LAYER}.lora_B.weight"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def set_to(name: str, place: Any, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda t: t[name].__setitem__(place, value)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda d: (d / "libortho.json").unlink(), "libortho.json is missing"),
    "manifest is no JSON": (lambda d: (d / "libortho.json").write_text("{"), "cannot read"),
    "manifest is a list": (lambda d: (d / "libortho.json").write_text("[]"), "expected a JSON object"),
    "newer format": (lambda d: edit(d / "libortho.json", lambda m: m.update(libortho_format=2)), "update libortho"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot read"),
    "truncated weights": (lambda d: truncate(d / "model.safetensors"), "complete safetensors"),
    "flipped code": (
        lambda d: rewrite(d / "model.safetensors", set_to(f"{LAYER}.weight_packed", (0, 0), 5)),
        "split layers of .* have the hash",
    ),
    "flipped embedding": (
        lambda d: rewrite(d / "model.safetensors", set_to("model.embed_tokens.weight", (0, 0), 5)),
        "other tensors of .* have the hash",
    ),
    "scale is NaN": (
        lambda d: forge_base(d, set_to(f"{LAYER}.weight_scale", (0, 0), float("nan"))),
        "weight_scale holds NaN",
    ),
    "scale is negative": (
        lambda d: forge_base(d, set_to(f"{LAYER}.weight_scale", (0, 0), -1.0)),
        "not positive",
    ),
    "scale has another shape": (
        lambda d: forge_base(d, lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(64, 2)})),
        r"weight_scale is torch.float32 \(64, 2\), expected",
    ),
    "codes of another dtype": (
        lambda d: forge_base(d, lambda t: t.update({f"{LAYER}.weight_packed": torch.ones(64, 32)})),
        r"weight_packed is torch.float32",
    ),
    "shape tensor disagrees": (
        lambda d: forge_base(d, set_to(f"{LAYER}.weight_shape", 1, 124)),
        r"weight_shape says \[64, 124\]",
    ),
    "tensor is missing": (
        lambda d: rewrite(d / "model.safetensors", lambda t: t.pop(f"{LAYER}.weight_scale")),
        "weight_scale is missing",
    ),
    "config.json was changed": (
        lambda d: edit(d / "config.json", lambda c: c.update(rms_norm_eps=1e-4)),
        "config.json does not have the hash",
    ),
    "file list with a path": (
        lambda d: edit(d / "libortho.json", lambda m: m["files"].update({"../x": None})),
        "expected a path inside the directory",
    ),
    "status was removed": (
        lambda d: forge_config(d, lambda c: c["quantization_config"].pop("quantization_status")),
        "quantization_config does not describe",
    ),
    "another model in config.json": (
        lambda d: forge_config(d, lambda c: c.update(intermediate_size=64)),
        "no linear layer",
    ),
    "more layers in config.json": (
        lambda d: forge_config(d, lambda c: c.update(num_hidden_layers=3)),
        "do not fit the model",
    ),
    "unknown model type": (
        lambda d: forge_config(d, lambda c: c.update(model_type="../x")),
        "cannot build the model",
    ),
    "config of wrong types": (
        lambda d: forge_config(d, lambda c: c.update(hidden_size="64")),
        "cannot build the model",
    ),
    "a million layers in config.json": (
        lambda d: forge_config(d, lambda c: c.update(num_hidden_layers=10**6)),
        "num_hidden_layers is 1000000",
    ),
    "a giant vocabulary in config.json": (
        lambda d: forge_config(d, lambda c: c.update(vocab_size=10**12)),
        "describes a model of 1280",
    ),
    "no heads in config.json": (
        lambda d: forge_config(d, lambda c: c.update(num_attention_heads=0)),
        "cannot build the model",
    ),
    "no stream manifest": (lambda d: (d / "ortho/default/manifest.json").unlink(), "manifest.json is missing"),
    "stream of another base": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m.update(base_sha256="0" * 64)),
        "made for the base 000000000000",
    ),
    "hash is no hash": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m.update(base_sha256="x")),
        "expected 64 hexadecimal digits",
    ),
    "stream renamed": (lambda d: (d / "ortho/default").rename(d / "ortho/other"), "belongs to stream 'default'"),
    "folder with an impossible name": (lambda d: (d / "ortho/a b").mkdir(), "stream name 'a b'"),
    "stream file is missing": (lambda d: (d / "ortho/default/adapter_model.safetensors").unlink(), "cannot read"),
    "stream file truncated": (lambda d: truncate(d / "ortho/default/adapter_model.safetensors"), "the hash that"),
    "stream value flipped": (lambda d: flip(d / "ortho/default/adapter_model.safetensors", -1), "the hash that"),
    "A is not one-hot": (lambda d: forge(d, set_to(A, (0, slice(0, 2)), 1.0)), "not one-hot"),
    "A is scaled": (lambda d: forge(d, lambda t: t[A].mul_(2)), "not one-hot"),
    "A names nothing": (lambda d: forge(d, set_to(A, 0, 0.0)), "not one-hot"),
    "A has another width": (lambda d: forge(d, lambda t: t.update({A: t[A][:, :64].clone()})), r"lora_A.weight is"),
    "B is infinite": (lambda d: forge(d, set_to(B, (0, 0), float("inf"))), "NaN or infinite"),
    "B in another dtype": (
        lambda d: forge(d, lambda t: t.update({B: t[B].double()})),
        "lora_B.weight is torch.float64",
    ),
    "B is missing": (lambda d: forge(d, lambda t: t.pop(B)), "lora_B.weight is missing"),
    "foreign tensor": (lambda d: forge(d, lambda t: t.update(x=torch.ones(1))), "unknown tensor 'x'"),
    "adapter scale doubled": (
        lambda d: edit(d / "ortho/default/adapter_config.json", lambda c: c.update(lora_alpha=1000)),
        "does not describe the adapter",
    ),
    "rank forged": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m["layers"][LAYER].update(columns=1)),
        "lora_A.weight is",
    ),
    "negative rank": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m["layers"][LAYER].update(columns=-1)),
        "at least 0",
    ),
    "kind forged": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m.update(needs_libortho=True)),
        "needs_libortho is True",
    ),
    "report forged": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m["layers"][LAYER]["report"].update(rank="x")),
        "'rank' is 'x', expected a int",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, saved: Path) -> None:
    act, message = DAMAGE[damage]
    act(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_forging_helpers_alone_do_no_damage(saved: Path, tokens: torch.Tensor) -> None:
    forge(saved, lambda t: None)
    forge_base(saved, lambda t: None)
    load(saved)


def set_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.rows"][1] = -1


ENTRY_DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "column out of range": (set_to(f"{LAYER}.columns", 0, 128), "lie outside"),
    "negative column": (set_to(f"{LAYER}.columns", 0, -1), "lie outside"),
    "rows run backwards": (set_rows, "lie outside"),
    "rows promise more": (set_to(f"{LAYER}.rows", -1, 10**6), "lie outside"),
    "entry repeated": (lambda t: t[f"{LAYER}.columns"].fill_(3), "repeated or out of order"),
    "value is NaN": (set_to(f"{LAYER}.values", 0, float("nan")), "NaN"),
    "tail of another rank": (lambda t: t.update({f"{LAYER}.up": t[f"{LAYER}.up"][:, :1].clone()}), "up is"),
}


@pytest.mark.parametrize("damage", ENTRY_DAMAGE)
def test_damaged_entries_are_named(damage: str, saved_entries: Path) -> None:
    change, message = ENTRY_DAMAGE[damage]
    forge(saved_entries, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved_entries)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        (["hr"], r"no stream 'hr'; it has \['default'\]"),
        (["../x"], "stream name '../x'"),
        (["/etc"], "stream name '/etc'"),
        ([".."], "stream name"),
        ([3], "stream name 3"),
        ("default", r"a list such as \['default'\]"),
    ],
)
def test_unknown_and_impossible_stream_names(streams: Any, message: str, saved: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(saved, streams=streams)


def test_a_broken_stream_does_not_stop_the_base(saved: Path) -> None:
    truncate(saved / "ortho/default/adapter_model.safetensors")
    load(saved, streams=None)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "evil.bin"])
def test_an_index_cannot_name_files_elsewhere(name: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    save(make(tiny_llama), None, tmp_path / "out", max_shard_size="40KB")
    index = tmp_path / "out/model.safetensors.index.json"
    edit(index, lambda i: i["weight_map"].update({f"{LAYER}.weight_packed": name}))
    with pytest.raises(CheckpointError, match="expected a file name in the same directory"):
        load(tmp_path / "out")


def test_a_missing_shard_is_named(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    save(make(tiny_llama), None, tmp_path / "out", max_shard_size="40KB")
    next((tmp_path / "out").glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path / "out")


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"libortho\.json is missing"):
        inspect(tmp_path)


def test_dtype_must_be_a_float(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.int8"):
        load(saved, dtype=torch.int8)


# -- atomicity ---------------------------------------------------------------------------------------------------------


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise OSError("disk full")


@pytest.fixture(params=["new", "earlier"])
def place(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Iterator[Path]:
    """A place to save to, checked afterwards: as it was, and nothing left beside it."""
    target = saved if request.param == "earlier" else tmp_path / "new"
    before = contents(target)
    beside = sorted(tmp_path.iterdir())
    yield target
    assert contents(target) == before
    assert sorted(tmp_path.iterdir()) == beside


@pytest.mark.parametrize(
    ("where", "name"),
    [(os, "replace"), (stream_files, "save_file"), (os, "fsync"), (writing, "write_stream")],
)
def test_a_failure_leaves_the_old_directory(
    where: Any, name: str, place: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "swap", lambda first, second: False)  # as where the system cannot exchange names
    monkeypatch.setattr(where, name, _raise)
    with pytest.raises(OSError, match="disk full"):
        save(tiny_llama, None, place)
    monkeypatch.undo()


@pytest.mark.parametrize("place", ["earlier"], indirect=True)  # a new directory moves nothing aside
def test_a_failure_to_move_the_old_directory_aside_leaves_it(
    place: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "swap", lambda first, second: False)  # as where the system cannot exchange names
    monkeypatch.setattr(os, "rename", _raise)
    with pytest.raises(OSError, match="disk full"):
        save(tiny_llama, None, place)
    monkeypatch.undo()


def test_wrong_codes_never_get_the_final_name(
    place: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = writing.encode_base

    def wrong(name: str, base: BaseStream) -> dict[str, torch.Tensor]:
        tensors = right(name, base)
        return {k: v + 1 if k.endswith("weight_packed") else v for k, v in tensors.items()}

    monkeypatch.setattr(writing, "encode_base", wrong)
    with pytest.raises(CheckpointError, match="with other values"):
        save(tiny_llama, None, place)


def test_layers_that_stock_tools_would_not_see_never_get_the_final_name(
    place: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.Scheme, "quantization_config", lambda self, targets: {"quant_method": "none"})
    with pytest.raises(CheckpointError):
        save(tiny_llama, None, place)


def test_an_earlier_checkpoint_is_replaced_whole(
    saved: Path, tiny_llama: PreTrainedModel, tokens: torch.Tensor
) -> None:
    model, _ = load(saved)
    layer = next(iter(ortho_layers(model).values()))
    layer.streams["default"].support.values.mul_(2)
    (saved / "ortho/default/stray").write_text("")
    save(model, None, saved)
    again, _ = load(saved)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert not (saved / "ortho/default/stray").exists()
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


def test_a_symbolic_link_is_followed(saved: Path, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    assert save(tiny_llama, None, tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "link")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_split(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no layer of this model is split"):
        save(tiny_llama, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_conv1d(tiny_gpt2: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mlp\.c_proj is a Conv1D"):
        save(make(tiny_gpt2), None, tmp_path / "out")


def test_fused_experts(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = make(MixtralForCausalLM(config).eval(), target_modules="o_proj")
    with pytest.raises(CheckpointError, match="such as fused experts"):
        save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_bare_module_tree(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this is a LlamaModel"):
        save(make(tiny_llama).model, None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="this is a Sequential"):
        save(make(nn.Sequential(nn.Linear(64, 64)), target_modules="0"), None, tmp_path / "out")


@pytest.mark.parametrize(
    ("other", "message"), [((4, 32), "have bits"), ((8, 32), "have group sizes"), ((None, -1), "have bits")]
)
def test_mixed_schemes(
    other: tuple[int | None, int], message: str, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    model = make(tiny_llama, group_size=64)
    layer = next(iter(ortho_layers(model).values()))
    layer.base = BaseStream.from_weight(layer.base.dense(), *other)
    with pytest.raises(CheckpointError, match=message):
        save(model, None, tmp_path / "out")


def wide(columns: int, **options: Any) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4
    )
    options = {**COLUMNS_TAIL, "max_low_rank_error": 1.0, "rank_ratio": 1 - 12.5 / 64, **options}
    return libortho.split(LlamaForCausalLM(config).eval(), SplitConfig(**{**options, "ratio": columns / 1024}))


def test_ranks_over_512(tmp_path: Path) -> None:
    assert next(iter(ortho_layers(wide(499)).values())).streams["default"].tail.rank == 13
    save(wide(499), None, tmp_path / "fits")
    with pytest.raises(CheckpointError, match="500 columns and 13 tail directions, as a LoRA rank 513"):
        save(wide(500), None, tmp_path / "out")
    save(wide(600, structure="unstructured"), None, tmp_path / "entries")


def test_an_empty_stream_and_mixed_kinds(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama, **COLUMNS)
    first, second = ortho_layers(model).values()
    kept = first.streams["default"].support
    first.streams["default"].support = (
        ortho_layers(make(LlamaForCausalLM(model.config), **ENTRIES_TAIL))[LAYER].streams["default"].support
    )
    with pytest.raises(CheckpointError, match="expected one kind"):
        save(model, None, tmp_path / "out")
    first.streams["default"].support = kept.to(torch.float32)
    first.streams["default"].support = second.streams["default"].support = None
    with pytest.raises(CheckpointError, match="holds no value"):
        save(model, None, tmp_path / "out")


def test_a_model_that_another_library_quantised(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="quantised by another library"):
        save(model, None, tmp_path / "out")


def test_a_model_in_two_dtypes(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(in_dtype(tiny_llama, torch.bfloat16))
    model.model.norm.float()
    model.model.norm.weight.data += 1e-6
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_directory_of_somebody_else(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint of libortho"):
        save(make(tiny_llama), None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file"):
        save(tiny_llama, None, tmp_path / "out/thesis.txt")
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_an_empty_directory_is_taken(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    load(save(make(tiny_llama), None, tmp_path / "out"))


def test_what_only_the_earlier_checkpoint_holds_is_not_lost(saved: Path) -> None:
    base, _ = load(saved, streams=None)
    with pytest.raises(CheckpointError, match=r"holds the streams \['default'\]"):
        save(base, None, saved)
    whole, _ = load(saved)
    (saved / "README.md").write_text("card")
    with pytest.raises(CheckpointError, match=r"holds README\.md"):
        save(whole, None, saved)


def test_method_must_be_json(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama)
    libortho.core.report.record_method(model, "default", {"dtype": DTYPES["float32"]})
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_reports_stay_missing(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama)
    first = next(m for m in model.modules() if isinstance(m, OrthoLinear))
    first.report = None
    again, _ = load(save(model, None, tmp_path / "out"))
    assert len(libortho.layer_report(again)) == 1
    first.report = replace(libortho.layer_report(model)[0], name="other")
    with pytest.raises(CheckpointError, match="belongs to another layer"):
        save(model, None, tmp_path / "wrong")
