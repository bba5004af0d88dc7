"""The C++ kernels, built once for all tests, against products in fp64 and against torch's path."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.cpp_extension import get_cxx_compiler
from typer.testing import CliRunner

from libortho import SplitConfig, alpha, cli, split
from libortho.core.errors import KernelError
from libortho.core.ops import native
from libortho.core.ops.base import base_linear
from libortho.core.ops.ortho import add_columns
from libortho.core.streams import BaseStream, Columns

SHAPES = [(1, 1), (3, 7), (5, 16), (16, 33), (7, 64), (33, 100), (70, 129), (130, 65), (64, 576)]
ALPHAS = [0.0, 0.3, 1.0, "per token"]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, str]:
    if shutil.which(get_cxx_compiler()) is None:
        pytest.skip("no C++ compiler")
    before = native.kernels()
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBORTHO_CACHE", cache)
        native.build()
    module = native.kernels()
    assert module is not None
    native.use(before)
    return module, cache


@pytest.fixture
def kernels(built: tuple[ModuleType, str]) -> Iterator[ModuleType]:
    """The kernels in use, at the best level; afterwards whatever was in use before."""
    before = native.kernels()
    native.use(built[0])
    yield built[0]
    built[0].use_level(built[0].levels()[-1])
    native.use(before)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def at_level(request: pytest.FixtureRequest, kernels: ModuleType) -> ModuleType:
    """The kernels at one instruction set; those that this processor lacks do not run at all."""
    if request.param not in kernels.levels():
        pytest.skip(f"this processor has no {request.param}")
    kernels.use_level(request.param)
    assert kernels.level() == request.param
    return kernels


def drawn(tokens: int, rows: int, columns: int, k: int = 3) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(tokens, columns).bfloat16(),
        "codes": torch.randint(-128, 128, (rows, columns), dtype=torch.int8),
        "scales": torch.rand(rows, 1).bfloat16() / 64,
        "y": torch.randn(tokens, rows).bfloat16(),
        "index": torch.randint(0, columns, (k,), dtype=torch.int32),
        "values": torch.randn(k, rows).bfloat16(),
    }


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    """Half a unit of bf16's last place, and fp32 sums of terms of that ``size``."""
    assert found.dtype is torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + size * 1e-6 + 1e-38).all()


@pytest.mark.parametrize("rows_columns", SHAPES)
def test_the_product_is_exact_but_for_one_rounding(at_level, rows_columns):
    for tokens in range(1, 9):
        for scale_dtype in (torch.bfloat16, torch.float32):
            given = drawn(tokens, *rows_columns)
            x, codes, scales = given["x"], given["codes"], given["scales"].to(scale_dtype)
            weight = codes.double() * scales.double()
            y = at_level.int8_linear(x, codes, scales)
            assert_rounded_once(y, x.double() @ weight.T, x.double().abs() @ weight.abs().T)


@pytest.mark.parametrize("value", ALPHAS)
@pytest.mark.parametrize("rows", [1, 7, 16, 63, 64, 65, 200])
def test_columns_are_added_with_one_rounding(at_level, rows, value):
    for tokens in range(1, 9):
        for k in (1, 2, 9):
            given = drawn(tokens, rows, 40, k)
            share = torch.linspace(0, 1, tokens).unsqueeze(1) if value == "per token" else value
            y, x, index, values = (given[n] for n in ("y", "x", "index", "values"))
            exact = y.double() + share * (x[:, index].double() @ values.double())
            size = y.double().abs() + x[:, index].double().abs() @ values.double().abs()
            before, version = y.clone(), y._version
            assert at_level.add_columns_(y, x, index, values, share) is y
            assert_rounded_once(y, exact, size)
            assert y._version > version
            if value == 0.0:
                assert torch.equal(y, before)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 3e38])
def test_tokens_at_alpha_0_keep_every_bit_whatever_a_stream_overflows_to(at_level, size):
    for shares in ([0.0], [1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.5], [0.0, *[1.0] * 11, 0.0, 0.0, 1.0, 0.0]):
        given = drawn(len(shares), 33, 40)
        y, x, index, values = (given[n] for n in ("y", "x", "index", "values"))
        values[1], share = size, torch.tensor(shares).unsqueeze(1)
        y[:, 3], before, off = -0.0, y.clone(), share[:, 0] == 0
        before[:, 3] = -0.0
        assert at_level.add_columns_(y, x, index, values, share) is y
        assert torch.equal(y[off].view(torch.int16), before[off].view(torch.int16))
        exact = before.double() + share * (x[:, index].double() @ values.double())
        assert torch.equal(torch.isfinite(y[~off]), torch.isfinite(exact[~off].float()))
        assert at_level.add_columns_(before, x, index, values, 0.0) is before
        assert torch.equal(before[off].view(torch.int16), y[off].view(torch.int16))


def test_no_tokens_are_no_work(at_level):
    given = drawn(0, 33, 40)
    assert at_level.int8_linear(given["x"], given["codes"], given["scales"]).shape == (0, 33)
    for share in (1.0, torch.empty(0, 1)):
        y = given["y"]
        assert at_level.add_columns_(y, given["x"], given["index"], given["values"], share) is y


def test_more_tokens_than_one_pass(at_level):
    given = drawn(19, 33, 100)
    weight = given["codes"].double() * given["scales"].double()
    x = given["x"].double()
    y = at_level.int8_linear(given["x"], given["codes"], given["scales"])
    assert_rounded_once(y, x @ weight.T, x.abs() @ weight.abs().T)
    share = torch.rand(19, 1)
    part = x[:, given["index"]]
    exact = y.double() + share * (part @ given["values"].double())
    size = y.double().abs() + part.abs() @ given["values"].double().abs()
    assert_rounded_once(at_level.add_columns_(y, given["x"], given["index"], given["values"], share), exact, size)


def test_strided_tokens_and_threads(at_level):
    """Large enough for several threads; the input's memory is transposed."""
    threads = torch.get_num_threads()
    given = drawn(3, 1000, 700)
    x = given["x"].T.contiguous().T
    assert not x.is_contiguous()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = at_level.int8_linear(x, given["codes"], given["scales"])
            at_level.add_columns_(y, x, given["index"], given["values"], 1.0)
            one = y if count == 1 else one  # noqa: F821
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(y, one)
    weight = given["codes"].double() * given["scales"].double()
    weight.index_add_(1, given["index"], given["values"].double().T)
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=0.01, atol=0.1)


def test_what_is_not_finite_stays_so(at_level):
    given = drawn(2, 40, 64)
    given["x"][1, 5] = float("nan")
    y = at_level.int8_linear(given["x"], given["codes"].fill_(1), given["scales"].fill_(1))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    given["y"].fill_(float("nan"))
    at_level.add_columns_(given["y"], given["x"][:1].expand(2, -1), given["index"], given["values"], 1.0)
    assert given["y"].isnan().all()
    given["x"].fill_(3e38)
    assert at_level.int8_linear(given["x"], given["codes"].fill_(127), given["scales"]).isinf().all()


def test_a_sequence_whose_alpha_is_zero_ignores_its_input(kernels):
    given = drawn(2, 40, 64)
    given["x"][0] = float("inf")
    before = given["y"].clone()
    kernels.add_columns_(given["y"], given["x"], given["index"], given["values"], torch.tensor([[0.0], [1.0]]))
    assert torch.equal(given["y"][0], before[0])
    assert not torch.equal(given["y"][1], before[1])


def test_empty_shapes(kernels):
    given = drawn(2, 8, 16, 0)
    before = given["y"].clone()
    assert kernels.add_columns_(given["y"], given["x"], given["index"], given["values"], 1.0) is given["y"]
    assert torch.equal(given["y"], before)
    assert kernels.int8_linear(given["x"][:0], given["codes"], given["scales"]).shape == (0, 8)
    assert not kernels.int8_linear(given["x"][:, :0], given["codes"][:, :0].contiguous(), given["scales"]).any()


@pytest.mark.parametrize(
    "change",
    [
        {"x": lambda x: x.float()},
        {"x": lambda x: x[0]},
        {"x": lambda x: x[:, 1:]},
        {"x": lambda x: x.clone().requires_grad_()},
        {"x": lambda x: x.to("meta")},
        {"x": lambda x: x.to_sparse()},
        {"codes": lambda c: c.T.contiguous().T},
        {"codes": lambda c: c.int()},
        {"scales": lambda s: s[1:]},
        {"scales": lambda s: s.double()},
    ],
)  # fmt: skip
def test_the_product_declines_what_is_not_its_own(kernels, change):
    given = drawn(2, 8, 16)
    name, make = next(iter(change.items()))
    given[name] = make(given[name])
    assert kernels.int8_linear(given["x"], given["codes"], given["scales"]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"x": lambda x: x.float()},
        {"x": lambda x: x[1:]},
        {"x": lambda x: x.clone().requires_grad_()},
        {"y": lambda y: y.float()},
        {"y": lambda y: y.T.contiguous().T},
        {"y": lambda y: y.clone().requires_grad_()},
        {"index": lambda i: i.long()},
        {"index": lambda i: i[1:]},
        {"values": lambda v: v.float()},
        {"values": lambda v: v[:, 1:]},
        {"values": lambda v: v.T.contiguous().T},
        {"alpha": lambda a: torch.ones(2, 1, dtype=torch.float64)},
        {"alpha": lambda a: torch.ones(3, 1)},
    ],
)  # fmt: skip
def test_the_addition_declines_what_is_not_its_own(kernels, change):
    given = {**drawn(2, 8, 16), "alpha": 1.0}
    name, make = next(iter(change.items()))
    given[name] = make(given[name])
    before = given["y"].detach().clone()
    assert kernels.add_columns_(*(given[n] for n in ("y", "x", "index", "values", "alpha"))) is None
    assert torch.equal(given["y"].detach(), before)


def test_arguments_that_are_no_tensors_are_errors(kernels):
    given = drawn(2, 8, 16)
    with pytest.raises(TypeError, match="takes"):
        kernels.int8_linear(given["x"], given["codes"], 1.0)
    with pytest.raises(TypeError):
        kernels.add_columns_(given["y"], given["x"], given["index"], given["values"], "1")
    with pytest.raises(ValueError, match="sse9"):
        kernels.use_level("sse9")


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_modes_and_transforms_see_torchs_operators(kernels):
    """A fake tensor has no memory, and a tracer would take the result for a constant."""
    base = BaseStream.from_weight(torch.randn(8, 32).bfloat16(), 8)
    x = torch.randn(3, 32).bfloat16()
    assert kernels.int8_linear(x, base.codes, base.scales) is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert base(mode.from_tensor(x)).shape == (3, 8)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: base(x))(x)
    torch.testing.assert_close(graph(2 * x), base(2 * x), rtol=0.02, atol=0.02)
    stacked = torch.func.vmap(base)(x.expand(2, 3, 32))
    torch.testing.assert_close(stacked[1], base(x), rtol=0.02, atol=0.02)


def test_the_operators_use_them_and_agree_with_torchs(kernels):
    base = BaseStream.from_weight(torch.randn(96, 128).bfloat16(), 8)
    part = Columns(torch.tensor([3, 77]), torch.randn(2, 96).bfloat16())
    shares = torch.tensor([[0.0], [0.5], [1.0], [1.0]])
    x = torch.randn(4, 128).bfloat16()

    def run() -> torch.Tensor:
        return part(base_linear(x, base.codes, base.scales, 8), x, shares)

    called = []
    native.int8_linear, product = (lambda *a: called.append(1) or product(*a)), native.int8_linear
    native.add_columns, added = (lambda *a: called.append(2) or added(*a)), native.add_columns
    ours = run()
    assert called == [1, 2]
    native.use(None)
    torch.testing.assert_close(ours, run(), rtol=2**-6, atol=0.05)


def test_fp32_values_keep_their_path(kernels):
    part = Columns(torch.tensor([3, 7]), torch.randn(2, 8))
    x, y = torch.randn(1, 16).bfloat16(), torch.randn(1, 8).bfloat16()
    expected = y.double() + x[:, [3, 7]].double() @ part.values.double()
    torch.testing.assert_close(part(y.clone(), x, 1.0).double(), expected, rtol=0.01, atol=0.01)
    given = (x, part.index, part.values, 1.0)
    torch.testing.assert_close(add_columns(y.clone(), *given).double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("value", [0.0, 1.0, [1.0, 0.0, 0.5]])
def test_a_model_says_the_same_with_and_without(kernels, tiny_llama, tokens, value):
    model = split(tiny_llama.bfloat16(), SplitConfig(target_modules="all-linear", structure="columns", ratio=0.05))
    with torch.inference_mode(), alpha(model, value):
        ours = model(tokens[:, :1]).logits.float()
        native.use(None)
        theirs = model(tokens[:, :1]).logits.float()
    assert (ours - theirs).norm() < 0.03 * theirs.norm()
    if value == 1.0:
        with torch.inference_mode(), alpha(model, 0.0):
            assert (model(tokens[:, :1]).logits.float() - theirs).norm() > 0.05 * theirs.norm()


def test_the_int8_product_stays_torchs_without_vector_instructions(kernels):
    kernels.use_level("portable")
    native.use(kernels)
    assert native.int8_linear is None
    assert native.add_columns is not None


def test_nothing_is_loaded_where_nothing_is_built(kernels, cache):
    assert native.load() is None
    assert native.kernels() is native.int8_linear is native.add_columns is None
    assert not cache.exists()


def test_a_build_is_found_and_the_environment_leaves_it_alone(kernels, built, monkeypatch):
    monkeypatch.setenv("LIBORTHO_CACHE", built[1])
    native.use(None)
    assert native.load() is not None
    assert native.add_columns is not None
    monkeypatch.setenv("LIBORTHO_KERNELS", "torch")
    assert native.load() is None
    assert native.add_columns is None


@pytest.mark.parametrize("other", ["torch", "source"])
def test_a_build_for_another_version_is_not_loaded(kernels, built, monkeypatch, tmp_path, other):
    monkeypatch.setenv("LIBORTHO_CACHE", built[1])
    assert native.load() is not None
    if other == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        changed = tmp_path / "native.cpp"
        changed.write_text(native.SOURCE.read_text() + "// changed\n")
        monkeypatch.setattr(native, "SOURCE", changed)
    assert native.load() is None


def test_a_broken_build_is_named_and_not_used(kernels, cache):
    folder = native.build_directory()
    folder.mkdir(parents=True)
    (folder / "libortho_native.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="delete it"):
        assert native.load() is None
    with pytest.raises(KernelError, match="delete it"):
        native.build()


def test_without_a_compiler_the_error_says_so(kernels, cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match=r"no-such-compiler is not found; install .*torch's kernels are used without"):
        native.build()
    assert not list(cache.rglob("*.so"))


def test_what_the_compiler_refuses_leaves_nothing_behind(kernels, cache, monkeypatch, tmp_path):
    wrong = tmp_path / "native.cpp"
    wrong.write_text("this is not C++\n")
    monkeypatch.setattr(native, "SOURCE", wrong)
    with pytest.raises(KernelError, match="could not be built"):
        native.build()
    assert list((cache / "kernels").iterdir()) == []


def test_the_command_reports_what_is_used(kernels, built, monkeypatch):
    monkeypatch.setenv("LIBORTHO_CACHE", built[1])
    result = CliRunner().invoke(cli.app, ["kernels", "--json"])
    assert result.exit_code == 0, result.output
    assert f'"instructions": "{kernels.levels()[-1]}"' in result.stdout
    assert built[1] in result.stdout


def test_another_process_loads_the_build(built):
    code = "from libortho.core.ops import native; print(native.kernels().level())"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env={"LIBORTHO_CACHE": built[1]}, check=True)
    assert result.stdout.strip() == built[0].levels()[-1]


def test_a_column_outside_the_input_is_an_error(kernels):
    y, x = torch.zeros(1, 8).bfloat16(), torch.ones(1, 16).bfloat16()
    for index in (16, -1):
        with pytest.raises(IndexError, match="of an input with 16"):
            native.add_columns(y, x, torch.tensor([index], dtype=torch.int32), torch.ones(1, 8).bfloat16(), 1.0)
    assert not y.any()
