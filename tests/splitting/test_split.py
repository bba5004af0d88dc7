"""The weights-only split: exact budgets, errors of the tensors as stored, nothing counted twice, nothing half done."""

import copy
from typing import Any

import pytest
import torch
from one_layer import WAYS, One, decaying, report_of, split_one

import libortho
from libortho.core.layer import ortho_layers
from libortho.core.streams import Columns
from libortho.core.surgery import relative_error

DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
# -- budgets and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1e-4, 0.005, 0.0149, 0.3, 1.0])
@pytest.mark.parametrize("score", ["absolute", "relative", "magnitude"])
def test_entries_never_exceed_the_ratio(ratio, score):
    layer = split_one(torch.randn(40, 64), ratio=ratio, score=score)
    count = layer.streams["default"].support.values.numel()
    assert count == int(ratio * 40 * 64)
    assert report_of(layer).ortho_density == count / (40 * 64) <= ratio


@pytest.mark.parametrize(("ratio", "count"), [(1e-4, 1), (0.02, 1), (0.03, 2), (0.1, 6), (1.0, 64)])
def test_columns_are_rounded_and_at_least_one(ratio, count):
    layer = split_one(torch.randn(40, 64), ratio=ratio, structure="columns")
    support = layer.streams["default"].support
    assert isinstance(support, Columns)
    assert len(set(support.index.tolist())) == support.values.shape[0] == count
    assert report_of(layer).ortho_density == count / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_reported_errors_are_those_of_the_stored_tensors(options, dtype):
    weight = decaying(40, 64, 0.97).to(dtype)
    layer = split_one(weight, ratio=0.02, **options)
    report = report_of(layer)
    assert relative_error(layer.dense_weight(0.0), weight.float()) == pytest.approx(report.base_error, abs=1e-6)
    assert relative_error(layer.dense_weight(1.0), weight.float()) == pytest.approx(report.final_error, abs=1e-6)
    assert layer.base.nbytes == report.base_bytes
    assert layer.streams["default"].nbytes == report.ortho_bytes


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_streams_are_counted_once(options):
    """On the support, base + tail + sparse is the weight itself, to the precision of the values."""
    weight = decaying(40, 64, 0.97)
    layer = split_one(weight, ratio=0.05, **{**options, "value_dtype": "float32"})
    support = layer.streams["default"].support
    on = torch.zeros(40, 64)
    copy_of = copy.deepcopy(support)
    copy_of.values.fill_(1.0)
    copy_of.add_to(on)
    assert on.unique().tolist() == [0.0, 1.0]
    covered = on.bool()
    torch.testing.assert_close(layer.dense_weight(1.0)[covered], weight[covered], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_ortho_stream_only_helps(options):
    report = report_of(split_one(decaying(40, 64, 0.97), ratio=0.02, **options))
    assert report.final_error <= report.base_error


def test_a_whole_budget_restores_the_weight():
    weight = torch.randn(40, 64)
    layer = split_one(weight, ratio=1.0, value_dtype="float32", bits=4)
    torch.testing.assert_close(layer.dense_weight(1.0), weight, atol=1e-6, rtol=1e-5)


def test_a_dense_base_without_truncation_is_exact():
    weight = torch.randn(40, 64)
    report = report_of(split_one(weight, bits=None, use_low_rank=False))
    assert (report.base_error, report.final_error) == (0.0, 0.0)


def test_the_largest_weight_survives_in_the_base():
    weight = torch.randn(40, 64) * 0.02
    weight[3, 7] = 12.0
    layer = split_one(weight, use_low_rank=False)
    assert layer.dense_weight(0.0)[3, 7] == pytest.approx(12.0, rel=0.005)


def test_direct_int8_meets_its_targets():
    report = report_of(split_one(torch.randn(64, 128) * 0.1, use_low_rank=False))
    assert report.base_error < 0.013
    assert report.final_error < 0.013
    assert report.ortho_density <= 0.005


def test_low_rank_int8_meets_its_targets():
    report = report_of(split_one(torch.randn(64, 96)))
    assert report.used_low_rank
    assert report.base_error < 0.15
    assert report.final_error < 0.05


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_split_draws_nothing_from_the_global_generator(options):
    model = One(torch.randn(40, 64))
    before = torch.get_rng_state()
    libortho.split(model, libortho.SplitConfig(target_modules="layer", **options))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_zeros(options, dtype):
    layer = split_one(torch.zeros(40, 64, dtype=dtype), **options)
    assert not layer.dense_weight(1.0).any()
    report = report_of(layer)
    assert (report.base_error, report.final_error) == (0.0, 0.0)
    assert report.low_rank_error in (None, 0.0)


# -- options ----------------------------------------------------------------------------------------------------------


def test_scores_choose_different_entries():
    weight = decaying(40, 64, 0.97)
    chosen = {}
    for score in ("absolute", "relative", "magnitude"):
        support = split_one(weight, ratio=0.02, score=score).streams["default"].support
        chosen[score] = tuple(support.rows.tolist()), tuple(support.columns.tolist())
    assert len(set(chosen.values())) == 3


def test_absolute_has_the_smallest_final_error():
    weight = decaying(40, 64, 0.97)
    errors = {
        score: report_of(split_one(weight, ratio=0.05, score=score, use_low_rank=False, bits=4)).final_error
        for score in ("absolute", "relative", "magnitude")
    }
    assert min(errors, key=errors.__getitem__) == "absolute"


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
@pytest.mark.parametrize("structure", ["columns", "unstructured"])
def test_values_are_stored_in_value_dtype(name, dtype, structure):
    stream = split_one(torch.randn(40, 64), value_dtype=name, structure=structure).streams["default"]
    assert stream.support.values.dtype is stream.tail.down.dtype is stream.tail.up.dtype is dtype


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 64), (4, -1)])
def test_bits_and_group_size(bits, group):
    layer = split_one(torch.randn(40, 128), bits=bits, group_size=group)
    expected = {None: 1 if bits == 8 else 4, 32: 4, 64: 2, -1: 1}[group]
    assert layer.base.bits == bits
    assert layer.base.scales.shape == (40, expected)


def test_smaller_bases_err_more():
    weight = torch.randn(64, 128)
    errors = [report_of(split_one(weight, bits=b, use_low_rank=False)).base_error for b in (None, 8, 4)]
    assert errors == sorted(set(errors))


def test_the_base_is_smaller_than_a_bf16_layer():
    layer = split_one(torch.randn(64, 128).bfloat16(), use_low_rank=False)
    report = report_of(layer)
    assert report.base_bytes + report.ortho_bytes < 0.55 * 64 * 128 * 2


def test_the_stream_takes_its_name(tiny_llama):
    libortho.split(tiny_llama, libortho.SplitConfig(stream="hr"))
    assert all(list(layer.streams) == ["hr"] for layer in ortho_layers(tiny_llama).values())
    libortho.set_alpha(tiny_llama, {"hr": 0.0})


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_original_call(tiny_llama):
    same = libortho.replace_linear_layers(
        tiny_llama, target_modules=["down_proj"], ratio=0.005, rank_ratio=0.95, use_low_rank=True
    )
    assert same is tiny_llama
    assert list(ortho_layers(tiny_llama)) == DOWN


def test_the_call_and_its_defaults_are_those_of_split(tiny_llama):
    other = copy.deepcopy(tiny_llama)
    assert libortho.split(tiny_llama) is tiny_llama
    libortho.replace_linear_layers(other)
    first, second = tiny_llama.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_further_options_reach_the_config(tiny_llama):
    libortho.replace_linear_layers(tiny_llama, bits=4, structure="columns", stream="hr", use_low_rank=False)
    layer = ortho_layers(tiny_llama)[DOWN[0]]
    assert layer.base.bits == 4
    assert isinstance(layer.streams["hr"].support, Columns)
    with pytest.raises(TypeError, match="typo"):
        libortho.replace_linear_layers(tiny_llama, typo=1)


def test_a_split_is_deterministic(tiny_llama):
    other = copy.deepcopy(tiny_llama)
    first = libortho.split(tiny_llama).state_dict()
    torch.manual_seed(123)
    second = libortho.split(other).state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_the_model_computes_nearly_the_same(family, request, tokens):
    model = request.getfixturevalue(family)
    with torch.no_grad():
        before = model(tokens).logits
        libortho.replace_linear_layers(model, "mlp-out")
        after = model(tokens).logits
    assert (after - before).norm() / before.norm() < 0.02


def test_progress_counts_layers(tiny_llama):
    seen: list[tuple[str, int, int]] = []
    libortho.split(tiny_llama, progress=lambda *step: seen.append(step))
    assert seen == [("split", 1, 2), ("split", 2, 2)]


@pytest.mark.parametrize(
    ("target", "options", "error"),
    [
        ("down_proj", {"group_size": 48}, libortho.ConfigError),
        ("down_proj", {"bits": 4, "group_size": 256}, libortho.ConfigError),
        ("all-linear", {"group_size": 128}, libortho.ConfigError),
        ("down_proj", {"ratio": 0.0}, libortho.ConfigError),
        ("down_proj", {"ratio": 1.5}, libortho.ConfigError),
        ("lm_head", {}, libortho.TargetError),
        ("nothing", {}, libortho.TargetError),
    ],
)
def test_bad_requests_leave_the_model_as_it_was(untouched, target, options, error):
    with pytest.raises(error):
        libortho.replace_linear_layers(untouched, [target], **options)
    with pytest.raises(libortho.AlphaError):
        libortho.set_alpha(untouched, 0.0)


def test_a_group_that_fits_one_layer_only_is_refused_before_any_work(untouched):
    seen: list[Any] = []
    config = libortho.SplitConfig(target_modules=["layers.0.mlp.down_proj", "layers.1.mlp.up_proj"], group_size=128)
    with pytest.raises(libortho.ConfigError, match="does not divide 64 inputs"):
        libortho.split(untouched, config, progress=lambda *step: seen.append(step))
    assert not seen


def test_an_interruption_leaves_the_model_as_it_was(untouched):
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        libortho.split(untouched, progress=stop)
