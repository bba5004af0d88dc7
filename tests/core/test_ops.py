import pytest
import torch
import torch.nn.functional as F

from libortho.core.ops import add_columns, add_factors, add_sparse, base_linear
from libortho.core.ops.base import round_activations
from libortho.core.ops.cpu import DECODE_TOKENS, few, int4_layout
from libortho.core.ops.ortho import SparseProduct, wants_wide
from libortho.core.ops.quantisation import choose_scales, dequantise, pack_int4, quantise, unpack_int4
from libortho.core.streams import BaseStream, Columns, Entries
from libortho.selection.scores import SCORES, top_columns, top_entries

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    weight[0, 3] = 40.0  # a "super weight": the early down projections carry a few of these
    return weight


def sparse_matrix(rows: int = 12, columns: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=dtype) * (torch.rand(rows, columns) < 0.2)


def per_entry(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)


def test_int4_bytes_round_trip():
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype is torch.uint8
    assert packed.shape == (5, 6)
    assert torch.equal(unpack_int4(packed), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [-1, 32])
def test_int8_rounds_every_weight_by_at_most_half_a_step(dtype, group):
    weight = heavy_tailed(16, 64).to(dtype)
    scales = choose_scales(weight, 8, group, dtype)
    stored = dequantise(quantise(weight, scales, 8), scales, torch.float32)
    assert ((weight.float() - stored).abs() <= per_entry(scales, weight) * 0.501).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_keeps_the_largest_weight(dtype):
    weight = heavy_tailed(16, 64).to(dtype)
    stored = BaseStream.from_weight(weight, 8).dense()
    assert stored[0, 3] == pytest.approx(40.0, rel=0.005)


@pytest.mark.parametrize("group", [-1, 32])
def test_int8_never_saturates_a_row(group):
    weight = torch.randn(16, 64)
    codes = quantise(weight, choose_scales(weight, 8, group, weight.dtype), 8)
    per_group = codes.reshape(16, -1, 64 if group == -1 else group).abs()
    assert (per_group.amax(-1) == 127).all()
    assert ((per_group == 127).sum(-1) <= 2).all()


@pytest.mark.parametrize("group", [-1, 32])
def test_int4_scale_search_is_never_worse_than_the_largest_weight(group):
    weight = heavy_tailed(16, 64)

    def error(scales: torch.Tensor) -> torch.Tensor:
        return (dequantise(quantise(weight, scales, 4), scales, torch.float32) - weight).square().sum(1)

    searched = choose_scales(weight, 4, group, weight.dtype)
    largest = weight.reshape(16, -1, 64 if group == -1 else group).abs().amax(-1) / 7
    assert (error(searched) <= error(largest) * (1 + 1e-5)).all()
    assert error(searched)[1:].sum() < 0.95 * error(largest)[1:].sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_weights_stay_zero(bits):
    stored = BaseStream.from_weight(torch.zeros(4, 32), bits)
    assert (stored.scales > 0).all()
    assert not stored.dense().any()


def test_dequantise_rounds_once():
    codes, scales = torch.tensor([[127, 3]], dtype=torch.int8), torch.tensor([[0.0123]])
    expected = (codes.float() * scales).to(torch.bfloat16)
    assert torch.equal(dequantise(codes, scales, torch.bfloat16), expected)


@pytest.mark.parametrize(("bits", "group"), [(8, -1), (8, 32), (4, 32), (4, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 4, 9])
def test_base_product_equals_the_dense_product(bits, group, dtype, tokens):
    base = BaseStream.from_weight(torch.randn(48, 64).to(dtype), bits, group)
    x = torch.randn(tokens, 64, dtype=dtype)
    expected = x.float() @ base.dense().T
    y = base(x)
    assert y.dtype is dtype
    assert y.shape == (tokens, 48)
    torch.testing.assert_close(y.float(), expected, atol=0.15 if dtype is torch.bfloat16 else 1e-4, rtol=0.02)


def test_decode_kernels_are_for_few_bf16_tokens_without_gradient():
    tokens = torch.randn(4, 64, dtype=torch.bfloat16)
    assert few(tokens, 4)
    assert not few(tokens.float(), 4)
    assert not few(tokens, 3)
    assert not few(tokens.clone().requires_grad_(), 4)
    with torch.no_grad():
        assert few(tokens.clone().requires_grad_(), 4)


def test_int4_decode_reads_the_packed_codes():
    base = BaseStream.from_weight(torch.randn(48, 64, dtype=torch.bfloat16), 4, 32)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    others = BaseStream.from_weight(torch.randn(48, 64, dtype=torch.bfloat16), 4, 32)
    layout = int4_layout(others.codes, base.scales)
    y = base_linear(x, base.codes, base.scales, 4, layout).float()
    expected = x.float() @ dequantise(others.unpacked_codes(), base.scales, torch.float32).T
    torch.testing.assert_close(y, expected, atol=0.15, rtol=0.02)


@pytest.mark.parametrize(("rows", "group"), [(40, 32), (48, 16)])
def test_shapes_that_the_int4_kernel_refuses_fall_back_to_the_matrix_product(rows, group):
    base = BaseStream.from_weight(torch.randn(rows, 64, dtype=torch.bfloat16), 4, group)
    assert int4_layout(base.codes, base.scales) is None
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(base(x), F.linear(x, base.dense(torch.bfloat16)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_gradient_is_that_of_the_dense_product(bits, dtype):
    base = BaseStream.from_weight(torch.randn(48, 64).to(dtype), bits, 32 if bits == 4 else -1)
    x = torch.randn(9, 64, dtype=dtype, requires_grad=True)
    out = torch.randn(9, 48, dtype=dtype)
    (base(x) * out).sum().backward()
    torch.testing.assert_close(x.grad.float(), out.float() @ base.dense(), atol=0.3, rtol=0.03)
    if dtype is torch.float32:
        torch.testing.assert_close(x.grad, out @ base.dense(), atol=1e-4, rtol=1e-4)


def test_nothing_dense_is_kept_for_the_gradient():
    base = BaseStream.from_weight(torch.randn(48, 64), 8)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        base(torch.randn(9, 64, requires_grad=True)).sum()
    assert {t.data_ptr() for t in saved} <= {base.codes.data_ptr(), base.scales.data_ptr()}


def test_the_base_product_is_differentiable_twice():
    base = BaseStream.from_weight(torch.randn(6, 8, dtype=torch.float64), 8)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(base, (x,))
    assert torch.autograd.gradgradcheck(base, (x,))


def test_rounded_activations_keep_the_largest_of_each_token():
    x = torch.randn(5, 64) * torch.tensor([[1e-3], [1.0], [30.0], [0.0], [1e4]])
    codes, scales = round_activations(x)
    assert (codes.abs().amax(1) == torch.tensor([127, 127, 127, 0, 127])).all()
    assert ((codes * scales - x).abs() <= scales * 0.501).all()


def test_int8_activations_are_close_and_opt_in():
    base = BaseStream.from_weight(torch.randn(48, 64, dtype=torch.bfloat16), 8)
    x = torch.randn(DECODE_TOKENS[8] + 1, 64, dtype=torch.bfloat16)
    exact = base(x)
    base.activation_bits = 8
    rounded = base(x)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).float().norm() < 0.02 * exact.float().norm()


@pytest.mark.parametrize("alpha", [1.0, 0.3, torch.tensor([[0.0], [0.5], [1.0]])])
def test_few_tokens_use_the_wide_values(alpha):
    index, values = torch.tensor([2, 5, 11], dtype=torch.int32), torch.randn(3, 8, dtype=torch.bfloat16)
    x, y = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(3, 8, dtype=torch.bfloat16)
    assert wants_wide(x)
    narrow = add_columns(y.clone(), x, index, values, alpha)
    torch.testing.assert_close(add_columns(y.clone(), x, index, values, alpha, values.float()), narrow)
    doubled = add_columns(y.clone(), x, index, values, alpha, 2 * values.float())
    assert not torch.equal(doubled, narrow)


@pytest.mark.parametrize(("rows", "columns"), [(7, 30), (1, 2), (33, 100)])
def test_int8_decode_takes_any_shape(rows, columns):
    base = BaseStream.from_weight(torch.randn(rows, columns, dtype=torch.bfloat16), 8)
    x = torch.randn(2, columns, dtype=torch.bfloat16)
    torch.testing.assert_close(base(x).float(), x.float() @ base.dense().T, atol=0.15, rtol=0.02)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [2, 9])
def test_strided_tokens(bits, count):
    base = BaseStream.from_weight(torch.randn(48, 64, dtype=torch.bfloat16), bits, 32 if bits == 4 else -1)
    x = torch.randn(64, count, dtype=torch.bfloat16).T
    assert not x.is_contiguous()
    torch.testing.assert_close(base(x).float(), x.float() @ base.dense().T, atol=0.15, rtol=0.02)


@pytest.mark.parametrize("alpha", [1.0, 0.3, torch.tensor([[0.0], [0.5], [1.0]])])
def test_columns_add_their_dense_product(alpha):
    index, values = torch.tensor([2, 5, 11], dtype=torch.int32), torch.randn(3, 8)
    dense = torch.zeros(8, 16)
    Columns(index, values).add_to(dense)
    x, y = torch.randn(3, 16), torch.randn(3, 8)
    torch.testing.assert_close(add_columns(y.clone(), x, index, values, alpha), y + alpha * (x @ dense.T))


@pytest.mark.parametrize("alpha", [1.0, 0.3, torch.tensor([[0.0], [0.5], [1.0]])])
def test_factors_add_their_dense_product(alpha):
    down, up = torch.randn(4, 16), torch.randn(8, 4)
    x, y = torch.randn(3, 16), torch.randn(3, 8)
    torch.testing.assert_close(add_factors(y.clone(), x, down, up, alpha), y + alpha * (x @ (up @ down).T))


@pytest.mark.parametrize("alpha", [1.0, 0.3, torch.tensor([[0.0], [0.5], [1.0]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_add_their_dense_product(alpha, dtype):
    matrix = sparse_matrix(8, 16)
    part = Entries.from_mask(matrix, matrix != 0, torch.float32)
    x, y = torch.randn(3, 16, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    result = add_sparse(y.clone(), x, part.rows, part.columns, part.values, alpha)
    assert result.dtype is dtype
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        result.float(), y.float() + alpha * (x.float() @ matrix.T), atol=tolerance, rtol=tolerance
    )


def test_the_parts_change_the_output_in_place():
    y = torch.zeros(2, 8)
    assert add_columns(y, torch.ones(2, 16), torch.tensor([1], dtype=torch.int32), torch.ones(1, 8), 1.0) is y
    assert (y == 1).all()


def test_an_empty_support_adds_nothing():
    part = Entries.from_mask(torch.randn(8, 16), torch.zeros(8, 16, dtype=torch.bool), torch.float32)
    x = torch.randn(3, 16, requires_grad=True)
    y = part(torch.zeros(3, 8), x, 1.0)
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()


def test_sparse_gradient_is_that_of_the_dense_product():
    matrix = sparse_matrix(dtype=torch.float64)
    part = Entries.from_mask(matrix, matrix != 0, torch.float64)
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: SparseProduct.apply(x, part.rows, part.columns, part.values), (x,))
    SparseProduct.apply(x, part.rows, part.columns, part.values).square().sum().backward()
    dense = torch.autograd.grad((x @ matrix.T).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, dense)


@pytest.mark.parametrize("alpha", [0.4, torch.tensor([[0.2], [1.0], [0.0]], dtype=torch.float64)])
def test_column_and_factor_gradients(alpha):
    index, values = torch.tensor([0, 3]), torch.randn(2, 5, dtype=torch.float64)
    down, up = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: add_columns(y.clone(), x, index, values, alpha), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: add_factors(y.clone(), x, down, up, alpha), (x, y))


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 200), (0.1, 20), (0.0149, 2), (0.001, 0)])
def test_entry_budget_is_exact_and_takes_the_highest(ratio, count):
    score = torch.rand(10, 20)
    mask = top_entries(score, ratio)
    assert int(mask.sum()) == count
    if 0 < count < 200:
        assert score[mask].min() >= score[~mask].max()


def test_equal_scores_do_not_exceed_the_budget():
    assert int(top_entries(torch.ones(10, 20), 0.05).sum()) == 10


@pytest.mark.parametrize(("ratio", "count"), [(0.001, 1), (0.06, 1), (0.08, 2), (1.0, 20)])
def test_column_budget_rounds_to_at_least_one(ratio, count):
    score = torch.rand(10, 20)
    chosen = top_columns(score, ratio)
    assert len(chosen) == count
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    energy = score.square().sum(0)
    rest = [i for i in range(20) if i not in chosen.tolist()]
    assert not rest or energy[chosen].min() >= energy[rest].max()


def test_scores_rank_by_what_their_names_say():
    weight = torch.tensor([[10.0, 0.001, 1.0]])
    residual = torch.tensor([[0.3, 0.001, 0.2]])
    best = {name: int(score(residual, weight).argmax()) for name, score in SCORES.items()}
    assert best == {"absolute": 0, "magnitude": 0, "relative": 2}
    assert SCORES["magnitude"](residual, weight)[0, 1] == pytest.approx(0.001)


def test_the_relative_score_does_not_prefer_weights_near_zero():
    weight = torch.randn(32, 32)
    weight[5, 5] = 1e-12
    residual = torch.full((32, 32), 0.01)
    residual[5, 5] = 1e-3
    assert not top_entries(SCORES["relative"](residual, weight), 0.5)[5, 5]
