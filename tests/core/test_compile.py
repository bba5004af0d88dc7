"""Compiled layers: one graph, every alpha."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.library import opcheck
from transformers import OPTConfig, OPTForCausalLM

import libortho
from libortho import SplitConfig, alpha, set_alpha, split
from libortho.core.ops import library
from libortho.core.streams import BaseStream, Entries
from libortho.core.switch.alpha import get_switch

KINDS = {
    "columns": {"structure": "columns"},
    "entries": {"structure": "unstructured"},
    "tail": {"use_low_rank": True, "structure": "columns"},
    "int4": {"bits": 4},
    "dense": {"bits": None},
}
ALPHAS = [1.0, 0.0, 0.5, [1.0, 0.0, 0.25], [0.0, 0.0, 0.0], 0.1]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def split_pair(kind: str = "columns", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)
    options = {"target_modules": ["0"], "use_low_rank": False, "ratio": 0.05, **KINDS[kind]}
    split(model, SplitConfig(**options))
    if kind == "dense":  # its residual is zero
        model[0].streams["default"].support.values.normal_()
    return model


def counting(graphs: list[torch.fx.GraphModule]):
    """A backend that runs what it is given and remembers it."""

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_serves_every_alpha(kind, dtype):
    model = split_pair(kind, dtype)
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(model[0], backend=counting(graphs), fullgraph=True)
    x = torch.randn(3, 5, 64, dtype=dtype)
    for value in ALPHAS:
        with alpha(model, value):
            expected, found = model[0](x), compiled(x)
        torch.testing.assert_close(found, expected, atol=0.02 if dtype is torch.bfloat16 else 1e-5, rtol=0.02)
    assert len(graphs) == 1
    with alpha(model, 1.0):
        on = compiled(x)
    with alpha(model, 0.0):
        assert not torch.equal(compiled(x), on)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_of_a_compiled_layer_are_those_of_the_eager_one(kind):
    model = split_pair(kind)
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    for value in (0.0, 0.6, [1.0, 0.0, 0.25]):
        eager_x = torch.randn(3, 5, 64, requires_grad=True)
        traced_x = eager_x.detach().clone().requires_grad_()
        with alpha(model, value):
            model[0](eager_x).square().sum().backward()
            compiled(traced_x).square().sum().backward()
        torch.testing.assert_close(traced_x.grad, eager_x.grad, atol=1e-4, rtol=1e-4)


def test_the_persistent_alpha_is_read_when_the_graph_runs():
    model = split_pair()
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 64)
    for value in (1.0, 0.0, 0.3):
        set_alpha(model, value)
        torch.testing.assert_close(compiled(x), model[0](x))


def test_a_compiled_layer_refuses_values_for_another_batch():
    model = split_pair()
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    with alpha(model, [1.0, 0.0]), pytest.raises(libortho.AlphaError, match="names 2 sequences"):
        compiled(torch.randn(3, 5, 64))


def test_a_copy_has_a_switch_of_its_own():
    model = split_pair()
    twin = copy.deepcopy(model)
    compiled, compiled_twin = (torch.compile(m[0], backend="aot_eager", fullgraph=True) for m in (model, twin))
    x = torch.randn(2, 64)
    set_alpha(model, 0.0)
    torch.testing.assert_close(compiled(x), model[0](x))
    torch.testing.assert_close(compiled_twin(x), twin[0](x))
    assert not torch.equal(compiled(x), compiled_twin(x))


def test_a_graph_whose_model_is_gone_says_so():
    model = split_pair()
    number = get_switch(model).number
    del model
    with pytest.raises(libortho.AlphaError, match="is gone"):
        torch.ops.libortho.alpha(torch.randn(2, 64), number, "default")


def test_exported_programs_keep_the_switch():
    model = split_pair()
    x = torch.randn(2, 64)
    program = torch.export.export(model, (x,)).module()
    for value in (0.0, 1.0):
        with alpha(model, value):
            torch.testing.assert_close(program(x), model(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@inductor_config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1})  # or it compiles more to find out what it may
def test_inductor():
    model = split_pair("columns", torch.bfloat16)
    compiled = torch.compile(model, fullgraph=False)
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    for value in (1.0, 0.0, [1.0, 0.0, 0.5]):
        with alpha(model, value):
            torch.testing.assert_close(compiled(x), model(x), atol=0.02, rtol=0.02)


def test_the_operators_describe_themselves_correctly():
    base = BaseStream.from_weight(torch.randn(48, 64), 8)
    x, y = torch.randn(6, 64, requires_grad=True), torch.randn(6, 48, requires_grad=True)
    opcheck(library.base_linear, (x, base.codes, base.scales, 8))
    packed = BaseStream.from_weight(torch.randn(48, 64), 4, 32)
    opcheck(library.base_linear, (x, packed.codes, packed.scales, 4))
    weights = torch.tensor([0.5, 0.0, 1.0])
    index = torch.tensor([1, 5], dtype=torch.int32)
    opcheck(library.add_columns, (y, x, index, torch.randn(2, 48), weights))
    opcheck(library.add_factors, (y, x, torch.randn(3, 64), torch.randn(48, 3), weights))
    residual = torch.randn(48, 64)
    entries = Entries.from_mask(residual, residual > 1, torch.float32)
    opcheck(library.add_entries, (y, x, entries.rows, entries.columns, entries.values, weights))
    model = split_pair()
    opcheck(library.alpha, (torch.randn(3, 5, 64), get_switch(model).number, "default"))


def test_compiled_int4_decodes_from_the_packed_layout_and_follows_a_change():
    base = BaseStream.from_weight(torch.randn(48, 64, dtype=torch.bfloat16), 4, 32)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    first = library.base_linear(x, base.codes, base.scales, 4)
    assert torch.equal(first, base(x))
    base.codes.copy_(BaseStream.from_weight(torch.randn(48, 64, dtype=torch.bfloat16), 4, 32).codes)
    second = library.base_linear(x, base.codes, base.scales, 4)
    assert torch.equal(second, base(x))
    assert not torch.equal(first, second)


def test_a_compiled_layer_rounds_inputs_only_where_no_gradient_is_wanted():
    model = split_pair("columns", torch.bfloat16)
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    exact = model[0](x)
    libortho.quantise_activations(model)
    assert not torch.equal(compiled(x), exact)
    torch.testing.assert_close(compiled(x.clone().requires_grad_()).detach(), exact, atol=1e-2, rtol=1e-2)
    libortho.quantise_activations(model, None)
    with pytest.raises(libortho.ConfigError, match="expected 8 or None"):
        libortho.quantise_activations(model, 4)


def test_a_graph_of_another_model_is_refused():
    model = split_pair()
    with pytest.raises(libortho.AlphaError, match="serve the process that made them"):
        torch.ops.libortho.alpha(torch.randn(2, 64), get_switch(model).number, "hr")


def test_compiled_layers_see_flattened_tokens_of_their_sequences():
    config = OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, init_std=0.2,
    )  # fmt: skip
    options = {"bits": 4, "rank_ratio": 0.5, "max_low_rank_error": 1.0, "ratio": 0.1, "structure": "columns"}
    model = split(OPTForCausalLM(config).eval(), SplitConfig(**options))
    tokens = torch.randint(2, 128, (2, 5))
    values = ([1.0, 0.0], 1.0, 0.0)

    def logits(value):
        with torch.no_grad(), alpha(model, value):
            return model(tokens, use_cache=False).logits

    eager = [logits(v) for v in values]
    layer = model.model.decoder.layers[0]
    layer.forward = torch.compile(layer.forward, backend="aot_eager")
    for value, expected in zip(values, eager, strict=True):
        torch.testing.assert_close(logits(value), expected)
    torch.testing.assert_close(logits(values[0])[0], eager[1][0])
    torch.testing.assert_close(logits(values[0])[1], eager[2][1])
