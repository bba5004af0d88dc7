"""Triton kernels without a GPU, and on one where there is one.

Without: a second process runs this file as a script under Triton's interpreter, which executes the kernels on CPU
tensors; and the kernels, as the launchers call them, are compiled for real architectures, which needs no device.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from libortho import SplitConfig, alpha, split
from libortho.core.ops import add_columns, base_linear, triton
from libortho.core.ops.base import int8_product_takes
from libortho.core.ops.quantisation import dequantise
from libortho.core.streams import BaseStream, Columns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Largest share by which a last rounding may move a result; twice what rounding to nearest needs, since Triton's
interpreter truncates to bf16. (For fp32, what sums in another order need.)"""


def assert_close(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """One rounding of the result, and fp32 sums over terms that add up to ``size``."""
    error = (found.cpu().double() - expected).abs()
    assert found.isfinite().all()
    assert (error <= STEP[found.dtype] * expected.abs() + 1e-5 * size).all(), f"off by up to {error.max():.3g}"


def check_base(
    device: str, dtype: torch.dtype, bits: int, group: int, tokens: int, rows: int, columns: int, size: float = 1.0
) -> None:
    base = BaseStream.from_weight(torch.randn(rows, columns).to(dtype), bits, group)
    if dtype is torch.bfloat16:  # exact products with the codes, so that the weights are what the interpreter takes
        base.scales.copy_(base.scales.float().log2().round().exp2())
    x = (size * torch.randn(columns, tokens)).to(dtype).T  # strided
    weight = dequantise(base.unpacked_codes(), base.scales, torch.float64)
    if base.scales.shape[1] > 1:
        weight = weight.to(dtype).double()
    y = triton.base_linear(*(t.to(device) for t in (x, base.codes, base.scales)), bits)
    assert y.dtype is dtype
    assert_close(y, x.double() @ weight.T, x.double().abs() @ weight.abs().T)


def check_columns(
    device: str, dtype: torch.dtype, alpha: float | str, tokens: int, count: int, wider: torch.dtype | None = None
) -> None:
    rows, columns = 37, 50
    x, values = torch.randn(tokens, columns).to(wider or dtype), torch.randn(count, rows).to(dtype)
    part = Columns(torch.randperm(columns)[:count], values)
    y = torch.randn(rows, tokens).to(dtype).T  # strided
    share: Any = alpha if isinstance(alpha, float) else torch.linspace(0, 1, tokens).unsqueeze(1)
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    part.add_to(dense)
    x_seen = x.to(dtype).double()
    expected, size = y.double() + share * (x_seen @ dense.T), y.double().abs() + x_seen.abs() @ dense.abs().T
    moved = [t.to(device) for t in (y, x, part.index, part.values)]
    result = triton.add_columns(*moved, share if isinstance(share, float) else share.to(device))
    assert result is moved[0]
    if wider is not None and dtype is torch.bfloat16:  # the interpreter truncates the inputs, too
        size = 1e5 * STEP[dtype] * size
    assert_close(result, expected, size)
    unchanged = share == 0 if isinstance(share, float) else (share == 0).squeeze(1)
    assert torch.equal(result.cpu()[unchanged], y[unchanged])


def check_overflow(device: str, *, dtype: torch.dtype, size: float) -> None:
    """Tokens at alpha = 0 keep every bit, whatever the product of the stream is."""
    share = torch.tensor([1.0, 0.0, 0.5, 0.0]).unsqueeze(1)
    x, y, values = torch.randn(4, 50).to(dtype), torch.randn(4, 37).to(dtype), torch.randn(5, 37).to(dtype)
    values[2] = size
    index = torch.randperm(50)[:5].to(torch.int32)
    found = triton.add_columns(*(t.to(device) for t in (y.clone(), x, index, values, share))).cpu()
    off = share[:, 0] == 0
    assert torch.equal(found[off], y[off])
    assert not torch.isfinite(found[~off]).any()


CASES: dict[str, Callable[[str], None]] = {
    **{
        f"columns {name} that overflow to {size}": partial(check_overflow, dtype=dtype, size=size)
        for name, dtype in DTYPES.items()
        for size in (float("inf"), float("nan"))
    },
    **{
        f"base int{bits} group {group} {name} {tokens}x{columns}x{rows}": partial(
            check_base, dtype=dtype, bits=bits, group=group, tokens=tokens, rows=rows, columns=columns
        )
        for name, dtype in DTYPES.items()
        for bits, group, columns in [(8, -1, 30), (8, -1, 257), (8, 32, 160), (8, 10, 150), (4, 32, 160), (4, -1, 130)]
        for tokens, rows in [(1, 37), (16, 16), (21, 70)]
    },
    "base without tokens": partial(check_base, dtype=torch.float32, bits=8, group=-1, tokens=0, rows=4, columns=8),
    "base most tokens": partial(check_base, dtype=torch.float16, bits=4, group=10, tokens=64, rows=9, columns=90),
    "base one output": partial(check_base, dtype=torch.float32, bits=8, group=-1, tokens=1, rows=1, columns=1),
    "base fp16 whose unscaled sums leave its range": partial(
        check_base, dtype=torch.float16, bits=8, group=-1, tokens=3, rows=20, columns=257, size=60.0
    ),
    **{
        f"columns {name} alpha {alpha} {tokens} tokens {count} columns": partial(
            check_columns, dtype=dtype, alpha=alpha, tokens=tokens, count=count
        )
        for name, dtype in DTYPES.items()
        for alpha in (1.0, 0.3, 0.0, "per token")
        for tokens, count in [(1, 3), (5, 1), (21, 50), (3, 0)]
    },
    "columns whose inputs are wider, fp16": partial(
        check_columns, dtype=torch.float16, alpha="per token", tokens=5, count=7, wider=torch.float32
    ),
    "columns whose inputs are wider, bf16": partial(
        check_columns, dtype=torch.bfloat16, alpha=0.3, tokens=5, count=7, wider=torch.float32
    ),
}


def outcomes(device: str) -> dict[str, str | None]:
    """Every case by name: None, or the traceback."""
    found: dict[str, str | None] = {}
    for name, check in CASES.items():
        torch.manual_seed(0)
        try:
            check(device)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    # Triton reads the variable when its decorators run, and this process has imported it long ago.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", list(CASES))
def test_kernels_under_the_interpreter(name, interpreted):
    assert interpreted[name] is None, interpreted[name]


class Recorder:
    """Stands for a kernel: remembers how it is launched."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.calls.append((grid, arguments, constants))


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.Tensor]]:
    """Tensors that say they are on a GPU and hold nothing."""
    monkeypatch.setattr(triton, "_capable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    with FakeTensorMode(), torch.no_grad():
        yield partial(torch.empty, device="cuda")


def compiled(kernel: Any, call: tuple[Any, ...], capability: int) -> tuple[str, int]:
    """PTX and bytes of shared memory of a launch, specialised as Triton does it: on ones and multiples of 16."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
             torch.uint8: "u8", torch.int32: "i32"}  # fmt: skip
    _, arguments, constants = call
    signature, attributes = {}, {}
    constants = dict(constants)
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + names[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            constants[name] = 1
            signature[name] = "constexpr"
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    return made.asm["ptx"], made.metadata.shared


@pytest.mark.parametrize(
    ("dtype", "tokens", "capability"),
    [
        (torch.float32, 1, 80),
        (torch.float32, 40, 100),
        (torch.bfloat16, 1, 90),
        (torch.bfloat16, 40, 80),
        (torch.bfloat16, 40, 100),
        (torch.float16, 5, 80),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "int4", "columns"])
def test_kernels_compile_for_gpus(kind, dtype, tokens, capability, fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = "_columns_kernel" if kind == "columns" else "_base_kernel"
    kernel, recorder = getattr(triton, name), Recorder()
    monkeypatch.setattr(triton, name, recorder)
    x = fake_gpu(tokens, 256, dtype=dtype)
    if kind == "columns":
        alpha = 0.5 if tokens == 1 else fake_gpu(tokens, 1)
        triton.add_columns(
            fake_gpu(tokens, 96, dtype=dtype), x, fake_gpu(5, dtype=torch.int32), fake_gpu(5, 96, dtype=dtype), alpha
        )
    elif kind == "int8":
        triton.base_linear(x, fake_gpu(96, 256, dtype=torch.int8), fake_gpu(96, 1, dtype=dtype), 8)
    else:
        triton.base_linear(x, fake_gpu(96, 128, dtype=torch.uint8), fake_gpu(96, 8, dtype=dtype), 4)
    ptx, shared = compiled(kernel, recorder.calls[0], capability)
    assert shared <= 48 * 1024  # every GPU has so much
    assert ("mma" in ptx) == (dtype is not torch.float32)
    assert "tf32" not in ptx  # fp32 stays fp32


def path_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> str:
    """Which implementation ``run`` reaches: "triton", "_int_mm" or "torch"."""
    reached: list[str] = []

    def reaching(name: str) -> Callable[..., torch.Tensor]:
        def stand_in(first: torch.Tensor, second: torch.Tensor, *_: Any) -> torch.Tensor:
            reached.append(name)
            return first.new_empty(first.shape[0], second.shape[-1], dtype=torch.int32)

        return stand_in

    with monkeypatch.context() as patch:
        patch.setattr(triton, "base_linear", reaching("triton"))
        patch.setattr(triton, "add_columns", reaching("triton"))
        patch.setattr(torch, "_int_mm", reaching("_int_mm"))
        run()
    return reached[0] if reached else "torch"


@pytest.mark.parametrize(
    ("tokens", "rows", "activation_bits", "expected"),
    [
        (1, 16, None, "triton"),
        (triton.MOST_TOKENS, 12, None, "triton"),
        (triton.MOST_TOKENS + 1, 16, None, "torch"),
        (16, 16, 8, "triton"),
        (17, 16, 8, "_int_mm"),
        (17, 12, 8, "triton"),
        (65, 16, 8, "_int_mm"),
        (65, 12, 8, "torch"),
    ],
)
def test_which_base_product_a_gpu_runs(tokens, rows, activation_bits, expected, fake_gpu, monkeypatch):
    x, codes = fake_gpu(tokens, 32, dtype=torch.bfloat16), fake_gpu(rows, 32, dtype=torch.int8)
    scales = fake_gpu(rows, 1, dtype=torch.bfloat16)
    assert path_of(monkeypatch, lambda: base_linear(x, codes, scales, 8, None, activation_bits)) == expected


def test_what_a_gpu_leaves_to_torch(fake_gpu, monkeypatch):
    index, values = fake_gpu(3, dtype=torch.int32), fake_gpu(3, 8)

    def path(tokens: int = 4, dtype: torch.dtype = torch.bfloat16) -> str:
        x, y = fake_gpu(tokens, 32, dtype=dtype), fake_gpu(tokens, 8, dtype=dtype)
        return path_of(monkeypatch, lambda: add_columns(y, x, index, values.to(dtype), 0.5))

    assert path() == "triton"
    assert path(tokens=triton.MOST_TOKENS + 1) == "torch"
    assert path(dtype=torch.float64) == "torch"
    for name in ("_capable", "available"):
        with monkeypatch.context() as patch:
            patch.setattr(triton, name, lambda *_: False)
            assert path() == "torch"


def test_gradients_are_left_to_torch(fake_gpu):
    plain, wanted = fake_gpu(4, 8), fake_gpu(4, 8, requires_grad=True)
    assert triton.takes(wanted)  # of a parameter, where no gradient is recorded
    with torch.enable_grad():
        assert triton.takes(plain, plain)
        assert not triton.takes(wanted)
        assert not triton.takes(plain, wanted)


def test_a_cpu_never_reaches_the_kernels(monkeypatch):
    base = BaseStream.from_weight(torch.randn(16, 32), 8)
    part = Columns(torch.tensor([1, 3]), torch.randn(2, 16))
    x = torch.randn(4, 32)
    assert path_of(monkeypatch, lambda: part(base(x), x, 1.0)) == "torch"
    assert int8_product_takes(x, base.codes)


def test_without_triton_the_module_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    spec = importlib.util.spec_from_file_location("without_triton", triton.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert triton.available()
    assert not module.available()
    assert not module.takes(torch.zeros(1, 8))


def test_the_gpu_benchmark_refuses_politely_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    with pytest.raises(SystemExit, match="needs a CUDA GPU") as refusal:
        gpu.main([])
    assert refusal.value.code != 0


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@on_a_gpu
def test_kernels_on_a_gpu():
    assert {name: problem for name, problem in outcomes("cuda").items() if problem} == {}


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 8, "structure": "unstructured"}])
def test_a_split_layer_on_a_gpu(options, dtype):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)
    split(model, SplitConfig(target_modules=["0"], use_low_rank=False, ratio=0.05, **options))
    layer = model[0]
    weights = {value: layer.dense_weight(value).double() for value in (0.0, 0.3, 1.0)}
    bias = layer.bias.detach().double()
    model.to("cuda")
    for length in (1, 9, 70):
        x = torch.randn(3, length, 64, dtype=dtype)
        for run in (layer, torch.compile(layer, fullgraph=True)):
            for value in (1.0, 0.0, 0.3, [1.0, 0.0, 0.3]):
                with torch.no_grad(), alpha(model, value):
                    y = run(x.cuda()).cpu().double()
                for sequence, share in enumerate(value if isinstance(value, list) else [value] * 3):
                    expected = x[sequence].double() @ weights[share].T + bias
                    tolerance = 0.03 if dtype is torch.bfloat16 else 1e-5
                    torch.testing.assert_close(y[sequence], expected, atol=tolerance, rtol=tolerance)


@on_a_gpu
def test_a_split_layer_on_a_gpu_decodes_through_the_kernels_and_learns_through_torch(monkeypatch):
    layer = BaseStream.from_weight(torch.randn(96, 64), 8).cuda()
    x = torch.randn(3, 64, device="cuda", requires_grad=True)
    assert path_of(monkeypatch, lambda: layer(x.detach())) == "triton"
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)


@on_a_gpu
def test_rounded_activations_on_a_gpu():
    base = BaseStream.from_weight(torch.randn(48, 64, dtype=torch.bfloat16), 8).cuda()
    x = torch.randn(40, 64, dtype=torch.bfloat16, device="cuda")
    exact = base(x)
    base.activation_bits = 8
    rounded = base(x)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).float().norm() < 0.02 * exact.float().norm()


if __name__ == "__main__":
    json.dump(outcomes("cpu"), sys.stdout)
