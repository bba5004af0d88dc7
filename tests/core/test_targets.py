import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import libortho
from libortho.core.targets import find_targets, is_linear

DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


class Foreign(nn.Linear):
    """Stands for a layer that another library packed, such as bitsandbytes' Linear4bit."""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("down_proj", DOWN),
        ("mlp.down_proj", DOWN),
        ("layers.1.mlp.down_proj", DOWN[1:]),
        (DOWN[0], DOWN[:1]),
        ("mlp-out", DOWN),
        (r"re:.*\.0\..*down_proj", DOWN[:1]),
        ((DOWN[1], DOWN[0]), DOWN),
        (["down_proj", "mlp-out"], DOWN),
    ],
)
def test_names_match_the_dotted_path(tiny_llama, pattern, expected):
    assert list(find_targets(tiny_llama, pattern)) == expected


def test_all_linear_leaves_out_the_output_embedding(tiny_llama):
    found = find_targets(tiny_llama, "all-linear")
    assert len(found) == 14
    assert "lm_head" not in found


def test_mlp_out_knows_gpt2s_two_c_proj(tiny_gpt2):
    found = find_targets(tiny_gpt2, "mlp-out")
    assert list(found) == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert all(type(module) is Conv1D for module in found.values())


@pytest.mark.parametrize("name", ["fc2", "w2", "dense_4h_to_h"])
def test_mlp_out_in_other_families(name):
    model = nn.ModuleDict({"block": nn.ModuleDict({name: nn.Linear(4, 4), "other": nn.Linear(4, 4)})})
    assert list(find_targets(model, "mlp-out")) == [f"block.{name}"]


@pytest.mark.parametrize("pattern", ["proj", "own_proj", "re:down_proj", "re:mlp", "Down_proj", "down_proj.weight"])
def test_a_part_of_a_name_does_not_match(untouched, pattern):
    with pytest.raises(libortho.TargetError, match="no module matches"):
        libortho.replace_linear_layers(untouched, [pattern])


def test_no_match_lists_near_names(untouched):
    with pytest.raises(libortho.TargetError, match=r"'dwn_proj'; did you mean down_proj"):
        libortho.replace_linear_layers(untouched, ["dwn_proj"])


def test_no_match_far_from_any_name_lists_all(untouched):
    with pytest.raises(libortho.TargetError, match=r"down_proj, gate_proj.*v_proj"):
        libortho.replace_linear_layers(untouched, ["xyz"])


def test_one_name_of_several_without_a_match_is_refused(untouched):
    with pytest.raises(libortho.TargetError, match="wo"):
        libortho.replace_linear_layers(untouched, ["down_proj", "wo"])


@pytest.mark.parametrize("pattern", ["re:(", "re:*"])
def test_a_broken_expression_is_refused(untouched, pattern):
    with pytest.raises(libortho.TargetError, match="not a regular expression"):
        libortho.replace_linear_layers(untouched, [pattern])


@pytest.mark.parametrize("pattern", ["lm_head", "re:.*"])
def test_the_output_embedding_is_refused(untouched, pattern):
    with pytest.raises(libortho.TargetError, match=r"lm_head|expected nn.Linear"):
        libortho.replace_linear_layers(untouched, [pattern])


@pytest.mark.parametrize("pattern", ["embed_tokens", "input_layernorm", "mlp"])
def test_modules_that_are_not_linear_are_refused(untouched, pattern):
    with pytest.raises(libortho.TargetError, match=r"expected nn\.Linear or Conv1D"):
        libortho.replace_linear_layers(untouched, [pattern])


@pytest.mark.parametrize("pattern", ["down_proj", "all-linear", "mlp-out"])
def test_a_foreign_subclass_is_refused(tiny_llama, pattern):
    tiny_llama.model.layers[1].mlp.down_proj = Foreign(128, 64, bias=False)
    with pytest.raises(libortho.TargetError, match=r"layers\.1\.mlp\.down_proj is a .*Foreign"):
        libortho.replace_linear_layers(tiny_llama, [pattern])
    assert not any(isinstance(m, libortho.OrthoLinear) for m in tiny_llama.modules())


def test_integer_weights_are_refused(tiny_llama):
    layer = tiny_llama.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(torch.zeros(64, 128, dtype=torch.int8), requires_grad=False)
    with pytest.raises(libortho.TargetError, match="int8 codes"):
        libortho.split(tiny_llama)


def test_meta_weights_are_refused(tiny_llama):
    with pytest.raises(libortho.TargetError, match="meta device"):
        libortho.split(tiny_llama.to("meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_llama, value):
    tiny_llama.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(libortho.TargetError, match=r"layers\.1\.mlp\.down_proj holds NaN or infinite"):
        libortho.split(tiny_llama)
    assert not any(isinstance(m, libortho.OrthoLinear) for m in tiny_llama.modules())


def test_a_shared_weight_is_refused():
    model = Small()
    model.second.weight = model.first.weight
    with pytest.raises(libortho.TargetError, match="shares its weight"):
        find_targets(model, "first")


def test_a_layer_under_two_names_is_refused():
    model = Small()
    model.second = model.first
    with pytest.raises(libortho.TargetError, match="shares its weight"):
        find_targets(model, "all-linear")


def test_a_tied_output_embedding_is_refused_under_any_name(tiny_llama):
    tiny_llama.config.tie_word_embeddings = True
    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    with pytest.raises(libortho.TargetError, match="makes the logits"):
        libortho.replace_linear_layers(tiny_llama, ["lm_head"])
    libortho.replace_linear_layers(tiny_llama, ["all-linear"])
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight


@pytest.mark.parametrize("pattern", ["down_proj", "up_proj"])
def test_a_split_model_is_refused(split_llama, pattern):
    before = dict(split_llama.named_modules())
    with pytest.raises(libortho.TargetError, match="already split"):
        libortho.replace_linear_layers(split_llama, [pattern])
    assert dict(split_llama.named_modules()) == before


def test_a_bare_linear_layer_has_no_parent_to_be_replaced_in():
    with pytest.raises(libortho.TargetError):
        libortho.replace_linear_layers(nn.Linear(4, 4), ["all-linear"])


def test_is_linear_takes_the_two_dense_kinds_only():
    assert is_linear(nn.Linear(2, 2))
    assert is_linear(Conv1D(2, 2))
    assert not is_linear(Foreign(2, 2))
    assert not is_linear(nn.Embedding(2, 2))


# -- experts that share one parameter ---------------------------------------------------------------------------------


class Bank(nn.Module):
    """Several experts in one parameter, (experts, out_features, in_features)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 16))


class Mixture(nn.Module):
    """A block of experts beside one that all tokens pass: fused in one module, or one bank for each projection."""

    def __init__(self, banks: bool) -> None:
        super().__init__()
        if banks:
            self.experts = nn.ModuleDict({"up_proj": Bank(), "down_proj": Bank()})
        else:
            self.experts = nn.Module()
            self.experts.up_proj = nn.Parameter(torch.randn(4, 16, 8))
            self.experts.down_proj = nn.Parameter(torch.randn(4, 8, 16))
        self.shared_expert = nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)})
        self.q_proj = nn.Linear(8, 8)


@pytest.fixture(params=[False, True], ids=["fused", "banks"])
def mixture(request) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([Mixture(request.param), Mixture(request.param)])})


@pytest.mark.parametrize("pattern", ["down_proj", "mlp-out", "all-linear", ["q_proj", "down_proj"]])
def test_fused_experts_are_not_left_behind_without_a_word(mixture, pattern, caplog):
    message = r"layers\.0\.experts\.(down|up)_proj.* \(4, .*not split; .*re:\.\*shared_expert\\\.(down|up)_proj"
    for again in (False, True):
        with pytest.raises(libortho.TargetError, match=message):
            find_targets(mixture, pattern, again=again)
    found = find_targets(mixture, pattern, partial=True)  # a split is no promise that something is gone
    assert "layers.0.shared_expert.down_proj" in found
    assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"re:.*shared_expert\.down_proj", 2),
        ("shared_expert.down_proj", 2),
        ("layers.1.shared_expert.down_proj", 1),
        ("q_proj", 2),
        (r"re:.*(shared_expert\.down|q)_proj", 4),
    ],
)
def test_what_names_no_fused_expert_goes_through(mixture, pattern, expected, caplog):
    assert len(find_targets(mixture, pattern)) == expected
    assert not caplog.text


def test_experts_alone_are_no_layers(mixture):
    for block in mixture["layers"]:
        del block.shared_expert
    with pytest.raises(libortho.TargetError, match="no other layer goes by this name"):
        find_targets(mixture, "down_proj", partial=True)


def test_a_weight_that_is_read_says_that_there_is_none(tiny_llama):
    libortho.split(tiny_llama)
    layer = tiny_llama.model.layers[0].mlp.down_proj
    assert not hasattr(layer, "weight")
    with pytest.raises(libortho.TargetError, match="reads the weight of a layer instead of calling it"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="other"):
        _ = layer.other
