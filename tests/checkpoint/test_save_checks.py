"""What ``save`` refuses is refused before a model is split, by the same words."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forging import LAYER
from making import COLUMNS, COLUMNS_TAIL, ENTRIES_TAIL, make
from torch import nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from typer.testing import CliRunner

import libortho
import tiny
from libortho import SplitConfig, cli
from libortho.checkpoint import check_destination, check_saveable
from libortho.core.dtypes import DTYPES
from libortho.core.errors import CheckpointError, ConfigError, TargetError
from libortho.core.layer import ortho_layers
from libortho.core.report import record_method
from libortho.core.streams import BaseStream
from libortho.core.targets import find_targets
from libortho.selection.budget import allocate

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 2,
}  # fmt: skip


def quantised(model: PreTrainedModel) -> None:
    model.config.quantization_config = {"quant_method": "gptq"}


def with_nan(model: PreTrainedModel) -> None:
    model.model.norm.weight.data[0] = float("nan")


def with_odd_generation(model: PreTrainedModel) -> None:
    model.generation_config.temperature = 0.5  # and do_sample=False, which transformers does not write


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "quantised": (quantised, "quantised by another library"),
    "NaN": (with_nan, r"model\.norm\.weight holds NaN"),
    "two dtypes": (lambda m: m.lm_head.bfloat16(), r"lm_head\.weight is kept in torch\.bfloat16"),
    "float64": (lambda m: m.double(), r"the model is in torch\.float64; expected one of"),
    "generation config": (with_odd_generation, "refuses to write the configuration"),
    "adapters": (lambda m: setattr(m, "_hf_peft_config_loaded", True), "has PEFT adapters"),
    "no data": (lambda m: m.lm_head.to("meta"), "have no data"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_is_refused_before_and_after_its_split(
    change: str, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    alter, complaint = CHANGES[change]
    config = SplitConfig(target_modules="down_proj")
    split = libortho.split(copy.deepcopy(tiny_llama), config)
    names = list(find_targets(tiny_llama, "down_proj"))
    check_saveable(tiny_llama, names, 8)
    alter(tiny_llama)
    with pytest.raises(CheckpointError, match=complaint):
        check_saveable(tiny_llama, names, 8)
    if change != "float64":  # a split layer keeps its scales
        alter(split)
        with pytest.raises(CheckpointError, match=complaint):
            libortho.save(split, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model",
    [lambda: MixtralForCausalLM(MixtralConfig(**SIZES)), lambda: Llama4ForCausalLM(Llama4TextConfig(**SIZES))],
    ids=["mixtral", "llama4"],
)
def test_fused_experts_are_refused_beside_a_packed_base_alone(model: Callable[[], Any], tmp_path: Path) -> None:
    net = model().eval()
    names = [n for n, _ in net.named_modules() if n.endswith("o_proj")]
    with pytest.raises(CheckpointError, match="such as fused experts"):
        check_saveable(net, names, 8)
    check_saveable(net, names, None)
    packed = libortho.split(copy.deepcopy(net), SplitConfig(target_modules=r"re:.*o_proj"))
    with pytest.raises(CheckpointError, match="such as fused experts"):
        libortho.save(packed, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    dense = libortho.split(net, SplitConfig(target_modules=r"re:.*o_proj", bits=None))
    libortho.load(libortho.save(dense, None, tmp_path / "out"))


def test_conv1d_and_wrapped_models(tiny_gpt2: PreTrainedModel, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(CheckpointError, match=r"mlp\.c_proj is a Conv1D"):
        check_saveable(tiny_gpt2, list(find_targets(tiny_gpt2, "mlp-out")), None)
    for model in (tiny_llama.model, nn.Sequential(tiny_llama)):
        with pytest.raises(CheckpointError, match=f"this is a {type(model).__name__}"):
            check_saveable(model, [], 8)


@pytest.mark.parametrize("bits", [8, 4, None])
def test_the_bytes_are_those_of_the_files(bits: int | None, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    names = list(find_targets(tiny_llama, "mlp-out"))
    promised = check_saveable(tiny_llama, names, bits)
    libortho.save(libortho.split(tiny_llama, SplitConfig(bits=bits)), None, tmp_path / "out")
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert 0.8 * size < promised <= size


def test_tied_embeddings_are_counted_once(tiny_llama: PreTrainedModel) -> None:
    config = copy.deepcopy(tiny_llama.config)
    config.tie_word_embeddings = True
    tied = LlamaForCausalLM(config)
    less = check_saveable(tiny_llama, [], None) - check_saveable(tied, [], None)
    assert less == tiny_llama.lm_head.weight.nbytes


def test_a_place_is_refused_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_destination(tmp_path / "deep/out", ["default"], needed=1) == tmp_path / "deep/out"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * 10**9))
    with pytest.raises(CheckpointError, match=r"needs at least 3\.00 GB, and the disk has 2\.00 GB left"):
        check_destination(tmp_path / "deep/out", ["default"], needed=3 * 10**9)
    assert not list(tmp_path.iterdir())


def test_save_and_the_check_refuse_the_same_places(split_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/file").write_text("x")
    libortho.save(split_llama, None, tmp_path / "earlier")
    for place, streams in (("file", ["default"]), ("file/out", ["default"]), ("busy", ["default"]), ("earlier", ["x"])):
        with pytest.raises(CheckpointError) as early:
            check_destination(tmp_path / place, streams)
        if streams == ["default"]:
            with pytest.raises(CheckpointError) as late:
                libortho.save(split_llama, None, tmp_path / place)
            assert str(late.value) == str(early.value)
    check_destination(tmp_path / "earlier", ["default", "another"])


def test_columns_beyond_a_lora_are_refused_first_or_not_taken(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    given = ["split", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--set", "structure=columns", "--ratio"]
    result = CliRunner().invoke(cli.app, [*given, "0.3"])
    assert isinstance(result.exception, CheckpointError)
    assert "614 columns and 0 tail directions, as a LoRA rank 614" in str(result.exception)
    assert CliRunner().invoke(cli.app, [*given, "0.2"]).exit_code == 0
    found = allocate({"a": torch.rand(2048), "b": torch.rand(2048)}, 0.3, 4.0, {"a": 1, "b": 1}, limit=512)
    assert {n: len(i) for n, i in found.items()} == {"a": 512, "b": 512}


# -- a split model ----------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_split(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no layer of this model is split"):
        libortho.save(tiny_llama, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "message"), [((4, 32), "have bits"), ((8, 32), "have group_size"), ((None, -1), "have bits")]
)
def test_mixed_schemes(
    other: tuple[int | None, int], message: str, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    model = make(tiny_llama, group_size=64)
    layer = next(iter(ortho_layers(model).values()))
    layer.base = BaseStream.from_weight(layer.base.dense(), *other)
    with pytest.raises(CheckpointError, match=message):
        libortho.save(model, None, tmp_path / "out")


def wide(columns: int, **options: Any) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4
    )
    options = {**COLUMNS_TAIL, "max_low_rank_error": 1.0, "rank_ratio": 1 - 12.5 / 64, **options}
    return libortho.split(LlamaForCausalLM(config).eval(), SplitConfig(**{**options, "ratio": columns / 1024}))


def test_ranks_over_512(tmp_path: Path) -> None:
    assert next(iter(ortho_layers(wide(499)).values())).streams["default"].tail.rank == 13
    libortho.save(wide(499), None, tmp_path / "fits")
    with pytest.raises(CheckpointError, match="500 columns and 13 tail directions, as a LoRA rank 513"):
        libortho.save(wide(500), None, tmp_path / "out")
    libortho.save(wide(600, structure="unstructured"), None, tmp_path / "entries")


def test_an_empty_stream_and_mixed_kinds(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama, **COLUMNS)
    first, second = ortho_layers(model).values()
    kept = first.streams["default"].support
    first.streams["default"].support = (
        ortho_layers(make(LlamaForCausalLM(model.config), **ENTRIES_TAIL))[LAYER].streams["default"].support
    )
    with pytest.raises(CheckpointError, match="expected one kind"):
        libortho.save(model, None, tmp_path / "out")
    first.streams["default"].support = kept.to(torch.float32)
    first.streams["default"].support = second.streams["default"].support = None
    with pytest.raises(CheckpointError, match="holds no value"):
        libortho.save(model, None, tmp_path / "out")


def test_method_must_be_json(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama)
    record_method(model, "default", {"dtype": DTYPES["float32"]})
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        libortho.save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- what is no model, and no tokenizer -------------------------------------------------------------------------------


CALLS: dict[str, Callable[[Any], Any]] = {
    "split": libortho.split,
    "replace_linear_layers": libortho.replace_linear_layers,
    "isolate": lambda m: libortho.isolate(m, None, [{"prompt": "a", "completion": "b"}]),
    "audit": lambda m: libortho.audit(m, None, [{"prompt": "a", "completion": "b"}]),
    "save": lambda m: libortho.save(m, None, "out"),
    "set_alpha": lambda m: libortho.set_alpha(m, 0.0),
    "alpha": lambda m: libortho.alpha(m, 0.0).__enter__(),
    "layer_report": libortho.layer_report,
    "quantise_activations": libortho.quantise_activations,
    "check_saveable": lambda m: check_saveable(m, [], 8),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_path_is_no_model(name: str) -> None:
    for given in ("out", Path("out")):
        with pytest.raises(TargetError, match=r"model is the path or name 'out'.*load it first.*libortho\.load"):
            CALLS[name](given)
    with pytest.raises(TargetError, match=r"libortho\.load returns"):
        CALLS[name]((nn.Linear(2, 2), None))
    with pytest.raises(TargetError, match="model is a NoneType"):
        CALLS[name](None)


def test_other_models_of_an_audit_are_no_paths_either(tiny_llama: PreTrainedModel, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    for name in ("reference", "original"):
        with pytest.raises(TargetError, match=f"{name} is the path or name 'out'"):
            libortho.audit(tiny_llama, tokenizer, rows, **{name: "out"})  # type: ignore[arg-type]


def test_a_path_is_no_tokenizer(tiny_llama: PreTrainedModel, split_llama: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda t: libortho.isolate(tiny_llama, t, rows),
        lambda t: libortho.audit(tiny_llama, t, rows),
        lambda t: libortho.save(split_llama, t, tmp_path / "out"),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="tokenizer is the path or name 'here'"):
            call("here")
    assert not list(tmp_path.iterdir())


def test_a_stray_dtype_that_transformers_itself_keeps_is_saved(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    """A few families keep some tensors in fp32 beside bf16 ones, when they are loaded as when they are saved."""
    model = tiny_llama.bfloat16()
    model._keep_in_fp32_modules_strict = {"norm.weight"}
    model.model.norm.float()
    assert check_saveable(model, list(find_targets(model, "down_proj")), 8) > 0
