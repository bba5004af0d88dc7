"""Decode on a GPU: the null test, what alpha = 1 adds, and tokens per second beside bf16, bitsandbytes and torchao.

    python benchmarks/gpu.py [--sizes 135M 1B] [--batches 1 4 16 64] [--rounds 30]

Random Llama of the shapes of `speed.py`, every linear layer split, 0.5 % columns; one token for each sequence after 32.
Interleaved rounds timed by CUDA events, medians and quartiles of the per-round ratios. The control is a second copy of
the base alone. Models run eagerly, so small batches show the launches as well; "layers" is the linear layers without
them: replayed from one CUDA graph. Peers that are not installed are said to be so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DynamicCache, LlamaModel

from _common import save
from _timing import Call, ratio, shown
from libortho import alpha
from libortho.core.layer import OrthoLinear
from libortho.core.ops import triton
from speed import CONTEXT, SHAPES, BaseAlone, base_alone, llama, splitted

WARMUP = 5
OFF, ON, MIXED = "alpha 0", "alpha 1", "alpha mixed"
PAIRS = [("base alone, again", "A/A control"), (OFF, "null test"), (ON, "alpha = 1"), (MIXED, "alpha per sequence")]


def event_seconds(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def rounds(calls: dict[str, Call], count: int, seconds: Callable[[Call], float]) -> dict[str, list[float]]:
    """Seconds of every call in every round; each round runs all of them, in an order that is turned round by round."""
    names = list(calls)
    found: dict[str, list[float]] = {n: [] for n in names}
    for number in range(-WARMUP, count):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            spent = seconds(calls[name])
            if number >= 0:
                found[name].append(spent)
    return found


def under(model: nn.Module, value: Any, call: Call) -> Call:
    """``call`` under an alpha; as it is for None, of a model without a switch."""
    if value is None:
        return call

    def switched() -> None:
        with alpha(model, value):
            call()

    return switched


def decoding(model: LlamaModel, batch: int, value: Any) -> Call:
    """One more token for every sequence after ``CONTEXT``; the cache is cut back after every call."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1024, (batch, CONTEXT + 1), generator=generator).to(model.device)
    cache = DynamicCache()

    def first() -> None:
        with torch.inference_mode():
            model(tokens[:, :-1], past_key_values=cache)

    def step() -> None:
        with torch.inference_mode():
            model(tokens[:, -1:], past_key_values=cache)
            cache.crop(-1)

    under(model, value, first)()
    return under(model, value, step)


def layers_alone(model: LlamaModel, batch: int, value: Any) -> Call:
    """All linear layers on one token for each sequence, captured once under ``value`` and replayed."""
    kinds = (nn.Linear, OrthoLinear, BaseAlone)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    inputs = {
        n: torch.randn(batch, 1, n, dtype=torch.bfloat16, device=model.device)
        for n in {m.base.in_features if isinstance(m, BaseAlone) else m.in_features for m in layers}
    }

    def run() -> None:
        with torch.inference_mode():
            for m in layers:
                m(inputs[m.base.in_features if isinstance(m, BaseAlone) else m.in_features])

    run = under(model, value, run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled, and workspaces made, before the capture
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bitsandbytes_int8(dense: LlamaModel) -> LlamaModel:
    import bitsandbytes as bnb

    def layer(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        return made

    return exchanged(dense, layer)


def bitsandbytes_nf4(dense: LlamaModel) -> LlamaModel:
    import bitsandbytes as bnb

    def layer(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        return made

    return exchanged(dense, layer)


def exchanged(dense: LlamaModel, layer: Callable[[nn.Linear], nn.Module]) -> LlamaModel:
    """A copy with other linear layers, which quantise themselves as they move to the GPU."""
    model = copy.deepcopy(dense)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer(module).to(dense.device))
    return model


def torchao_int8(dense: LlamaModel) -> LlamaModel:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(dense)
    quantize_(model, Int8WeightOnlyConfig())
    return model


PEERS: dict[str, tuple[str, Callable[[LlamaModel], LlamaModel]]] = {
    "bitsandbytes INT8": ("bitsandbytes", bitsandbytes_int8),
    "bitsandbytes NF4": ("bitsandbytes", bitsandbytes_nf4),
    "torchao INT8": ("torchao", torchao_int8),
}


def subjects(dense: LlamaModel) -> tuple[dict[str, tuple[LlamaModel, Any]], list[str]]:
    """What is timed, by name: a model and its alpha; and the peers that are not installed."""
    found: dict[str, tuple[LlamaModel, Any]] = {"dense bf16": (dense, None)}
    for bits in (8, 4):
        model = splitted(dense, bits)
        for name in ("base alone", "base alone, again"):
            found[f"INT{bits} {name}"] = (base_alone(model), None)
        for name, value in ((OFF, 0.0), (ON, 1.0), (MIXED, [1.0, 0.0, 0.5, 0.25])):
            found[f"INT{bits} {name}"] = (model, value)
    missing = []
    for name, (package, make) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            missing.append(name)
        else:
            found[name] = (make(dense), None)
    return found, missing


def measure(
    dense: LlamaModel,
    batches: list[int],
    count: int,
    kinds: dict[str, Callable[[LlamaModel, int, Any], Call]],
    seconds: Callable[[Call], float],
) -> dict[str, Any]:
    """Milliseconds, tokens per second and ratios to the base alone of every subject, by what is run and batch."""
    models, missing = subjects(dense)
    results: dict[str, Any] = {"not installed": missing}
    for kind, make in kinds.items():
        for batch in batches:
            calls = {}
            for name, (model, value) in models.items():
                if kind == "layers" and (name in PEERS or isinstance(value, list)):
                    continue  # a peer's own synchronisation, or a copy from the host, cannot be captured
                values = [value[i % len(value)] for i in range(batch)] if isinstance(value, list) else value
                calls[name] = make(model, batch, values)
            spent = rounds(calls, count, seconds)
            medians = {n: statistics.median(s) for n, s in spent.items()}
            results[f"{kind}, batch {batch}"] = {
                "milliseconds": {n: 1000 * s for n, s in medians.items()},
                "tokens per second": {n: batch / s for n, s in medians.items()},
                "ratios": {
                    f"INT{bits} {label}": ratio(spent, f"INT{bits} {above}", f"INT{bits} base alone")
                    for bits in (8, 4)
                    for above, label in PAIRS
                    if f"INT{bits} {above}" in spent
                },
            }
    return results


def show(title: str, results: dict[str, Any]) -> None:
    console = Console(width=140)
    runs = {k: v for k, v in results.items() if k != "not installed"}
    for heading, key, form in (
        ("tokens/s", "tokens per second", lambda v: f"{v:.0f}"),
        ("to the base alone", "ratios", shown),
    ):
        table = Table(title=f"{title}: {heading}")
        for column in ("", *runs):
            table.add_column(column)
        for name in next(iter(runs.values()))[key]:
            table.add_row(name, *(form(run[key][name]) if name in run[key] else "-" for run in runs.values()))
        if key == "tokens per second":
            for name in results["not installed"]:
                table.add_row(name, *["not installed"] * len(runs))
        console.print(table)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py needs a CUDA GPU, and torch sees none; speed.py measures the same on a CPU")
    if not triton.available():
        raise SystemExit("gpu.py measures the Triton kernels, and triton is not installed: pip install triton")
    data: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": triton.triton.__version__,
        "rounds": options.rounds,
    }
    for size in options.sizes:
        kinds = {"decode": decoding, "layers": layers_alone}
        data[size] = measure(llama(size).to("cuda"), options.batches, options.rounds, kinds, event_seconds)
        show(f"{size} on {data['gpu']}", data[size])
    print(f"saved to {save('gpu', data).name}")


if __name__ == "__main__":
    main(sys.argv[1:])
