"""What the switch costs: alpha = 0 and 1 beside the same base kernel alone, beside dense bf16, and beside peers.

    python benchmarks/speed.py [--sizes 135M 1B] [--rounds 15] [--peers]
    python benchmarks/speed.py --kernels native        # torch's kernels, or the C++ ones (libortho kernels)
    python benchmarks/speed.py --instructions          # counts them under valgrind, which must be installed

Random Llama of two shapes (576 x 1536 x 30 and 2048 x 5632 x 22), every linear layer split but `lm_head`, which is not
run; 0.5 % columns. One thread, interleaved rounds, medians and quartiles of the per-round ratios. "Decode" is eight
tokens after 32, each a whole pass over weights that no cache holds; "prefill" is 128 tokens. The control is a second
copy of the base alone. `--peers` needs bitsandbytes, optimum-quanto and torchao.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from _common import save
from _timing import Call, ratio, rounds, shown
from libortho import SplitConfig, alpha, quantise_activations, split
from libortho.core.layer import ortho_layers
from libortho.core.ops import native

SHAPES = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
}  # fmt: skip
CONTEXT, TOKENS, PREFILL = 32, 8, 128
COLUMNS: dict[str, Any] = {"use_low_rank": False, "structure": "columns", "ratio": 0.005}
TARGETS = {
    ("135M", "alpha 1", "base alone", "decode"): 1.10,
    ("1B", "alpha 1", "base alone", "decode"): 1.05,
    ("135M", "alpha 1", "base alone", "prefill"): 1.05,
    ("1B", "alpha 1", "base alone", "prefill"): 1.05,
    ("135M", "mixed alpha", "base alone", "decode, 8"): 1.15,
    ("1B", "mixed alpha", "base alone", "decode, 8"): 1.15,
    ("1B", "alpha 0", "dense bf16", "decode"): 0.65,
    ("1B", "alpha 0", "dense bf16", "prefill"): 1.25,
    ("1B", "W8A8, alpha 0", "dense bf16", "prefill"): 1.0,
    ("1B", "INT4, alpha 0", "dense bf16", "decode"): 0.5,
}


class BaseAlone(nn.Module):
    """The same base kernel without a switch: what a plain quantised layer runs."""

    def __init__(self, base: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.base = base
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base.forward(x.reshape(-1, x.shape[-1]))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])


def llama(shape: str, layers: int | None = None) -> LlamaModel:
    fields = {**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=512, **fields)
    config._attn_implementation = "sdpa"
    return LlamaModel(config).to(torch.bfloat16).eval()


def splitted(dense: LlamaModel, bits: int = 8, targets: str = "all-linear") -> LlamaModel:
    return split(copy.deepcopy(dense), SplitConfig(target_modules=targets, bits=bits, **COLUMNS))


def base_alone(model: LlamaModel) -> LlamaModel:
    """The dense skeleton over the very tensors of a split model."""
    plain = copy.deepcopy(model)
    from libortho.core.switch.alpha import Switch

    Switch.detach(plain)
    ours = ortho_layers(model)
    for name in ours:
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, BaseAlone(ours[name].base, ours[name].bias))
    return plain


def decoding(model: nn.Module, batch: int = 1, under: Any = None) -> Call:
    """``TOKENS`` more, one by one, after ``CONTEXT``; then the cache is cut back."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1024, (batch, CONTEXT + TOKENS), generator=generator)
    cache = DynamicCache()

    def within(call: Callable[[], Any]) -> None:
        with torch.inference_mode(), nullcontext() if under is None else alpha(model, under):
            call()

    def decode() -> None:
        for i in range(CONTEXT, CONTEXT + TOKENS):
            model(tokens[:, i : i + 1], past_key_values=cache)

    def step() -> None:
        within(decode)
        cache.crop(-TOKENS)

    within(lambda: model(tokens[:, :CONTEXT], past_key_values=cache))
    return step


def prefilling(model: nn.Module, under: Any = None) -> Call:
    tokens = torch.randint(0, 1024, (1, PREFILL), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        with torch.inference_mode(), nullcontext() if under is None else alpha(model, under):
            model(tokens, use_cache=False)

    return step


def peers(dense: LlamaModel, ours: LlamaModel) -> dict[str, nn.Module]:
    """The same model under other libraries' INT8, and a LoRA adapter as large as our columns over our base."""
    import bitsandbytes as bnb
    from optimum.quanto import freeze, qint8, quantize
    from peft import LoraConfig, get_peft_model
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    found: dict[str, nn.Module] = {}
    model = copy.deepcopy(dense)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            layer = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
            layer.weight = bnb.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            setattr(model.get_submodule(parent), leaf, layer.to("cpu"))
    found["bitsandbytes INT8"] = model
    model = copy.deepcopy(dense)
    quantize(model, weights=qint8)
    freeze(model)
    found["quanto INT8"] = model
    model = copy.deepcopy(dense)
    quantize_(model, Int8WeightOnlyConfig())
    found["torchao INT8"] = model
    sizes = {n: len(m.streams["default"].support.index) for n, m in ortho_layers(ours).items()}
    rank = max(sizes.values())
    plain = copy.deepcopy(dense)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(sizes),
        rank_pattern={n: k for n, k in sizes.items() if k != rank}, init_lora_weights=False,
    )  # fmt: skip
    adapted = get_peft_model(plain, config, autocast_adapter_dtype=False)
    for name, layer in ortho_layers(ours).items():
        wrapper = adapted.base_model.model.get_submodule(name)
        stand_in = BaseAlone(layer.base, layer.bias)
        wrapper.base_layer.forward = stand_in.forward
    found["PEFT LoRA over our base"] = adapted.eval()
    return found


def measure(shape: str, count: int, with_peers: bool, targets: str) -> dict[str, Any]:
    dense = llama(shape)
    ours = splitted(dense, targets=targets)
    plain, control = base_alone(ours), base_alone(ours)
    results: dict[str, Any] = {}

    def table(phase: str, calls: dict[str, Call], pairs: list[tuple[str, str]]) -> None:
        seconds = rounds(calls, count)
        print(f"\n{shape}, {targets}, {phase}: base alone {1000 * min(seconds['base alone']):.2f} ms")
        for above, below in pairs:
            found = ratio(seconds, above, below)
            target = TARGETS.get((shape, above, below, phase)) if targets == "all-linear" else None
            results[f"{phase}: {above} / {below}"] = {**found, "target": target}
            goal = (
                "" if target is None else f"   target <= {target}: {'met' if found['median'] <= target else 'MISSED'}"
            )
            print(f"  {above:>26} / {below:12} {shown(found)}{goal}")
        results[f"{phase}: milliseconds"] = {n: 1000 * min(s) for n, s in seconds.items()}

    def own(make: Callable[..., Call], **options: Any) -> dict[str, Call]:
        return {
            "base alone": make(plain, **options),
            "base alone, again": make(control, **options),
            "alpha 0": make(ours, under=0.0, **options),
            "alpha 1": make(ours, under=1.0, **options),
            "dense bf16": make(dense, **options),
        }

    own_pairs = [
        ("base alone, again", "base alone"),
        ("alpha 0", "base alone"),
        ("alpha 1", "base alone"),
        ("alpha 0", "dense bf16"),
        ("alpha 1", "dense bf16"),
    ]
    table("decode", own(decoding), own_pairs)
    table("prefill", own(prefilling), own_pairs)
    mixed = [1.0, 0.0, 0.5, 1.0, 0.0, 0.25, 1.0, 0.75]
    calls = {
        "base alone": decoding(plain, 8),
        "mixed alpha": decoding(ours, 8, mixed),
        "alpha 1": decoding(ours, 8, 1.0),
    }
    table("decode, 8", calls, [("mixed alpha", "base alone"), ("alpha 1", "base alone")])
    if targets != "all-linear":
        return results
    quantise_activations(ours, 8)
    calls = {"base alone": prefilling(plain), "dense bf16": prefilling(dense), "W8A8, alpha 0": prefilling(ours, 0.0)}
    table("prefill", calls, [("W8A8, alpha 0", "dense bf16")])
    quantise_activations(ours, None)
    small = splitted(dense, 4)
    calls = {"base alone": decoding(base_alone(small)), "dense bf16": decoding(dense)}
    calls |= {"INT4, alpha 0": decoding(small, under=0.0), "INT4, alpha 1": decoding(small, under=1.0)}
    table(
        "decode",
        calls,
        [("INT4, alpha 0", "dense bf16"), ("INT4, alpha 1", "dense bf16"), ("INT4, alpha 1", "base alone")],
    )
    del small
    if with_peers:
        others = peers(dense, ours)
        for phase, make in (("decode", decoding), ("prefill", prefilling)):
            calls = {n: make(m) for n, m in others.items()}
            calls |= {"base alone": make(plain), "alpha 1": make(ours, under=1.0), "alpha 0": make(ours, under=0.0)}
            pairs = [("alpha 1" if "LoRA" in n else "alpha 0", n) for n in others]
            table(phase, calls, [*pairs, *((a, n) for a in ("alpha 1",) for n in others if "LoRA" not in n)])
    return results


COUNTED = """
import sys, torch
sys.path.insert(0, {here!r})
import speed
torch.set_num_threads(1)
model = speed.splitted(speed.llama("135M", {layers}), targets="all-linear")
plain = speed.base_alone(model)
speed.PREFILL = {prefill}
for make in (speed.decoding, speed.prefilling):
    steps = [make(plain), make(model, under=0.0)]
    for step in steps:
        step()
    print("warm", flush=True)
    for step in steps:
        torch._C._valgrind_toggle()
        for _ in range({repeats}):
            step()
        torch._C._valgrind_toggle_and_dump_stats()
"""


def instructions(layers: int = 4, repeats: int = 2, prefill: int = 16) -> dict[str, Any]:
    """Instructions of a step with alpha = 0 and of the base alone, counted by callgrind in one process.

    Few layers and a short prefill: valgrind hides AVX-512, and bf16 products are slow without it. What the switch costs
    is a number of instructions for each layer, so that a longer prefill only makes its share smaller.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder) / "counted.py", Path(folder) / "out"
        script.write_text(
            COUNTED.format(here=str(Path(__file__).parent), layers=layers, repeats=repeats, prefill=prefill)
        )
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
        subprocess.run([*command, sys.executable, str(script)], check=True, capture_output=True)
        dumps = [out.with_name(f"out.{n}").read_text().splitlines() for n in range(1, 5)]
    counts = [int(next(x for x in d if x.startswith(("totals:", "summary:"))).split()[1]) / repeats for d in dumps]
    results: dict[str, Any] = {"layers": layers, "repeats": repeats, "prefill_tokens": prefill}
    for phase, plain, off in (("decode", *counts[:2]), ("prefill", *counts[2:])):
        results[phase] = {"base alone": plain, "alpha 0": off, "difference": off / plain - 1}
        print(f"{phase}: {plain / 1e6:.2f} M instructions for the base alone, alpha = 0: {off / plain - 1:+.3%}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--targets", nargs="+", default=["all-linear", "down_proj"])
    parser.add_argument("--name", default="speed", help="of the file with the results")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--kernels", choices=["torch", "native"], help="default: native if they are built")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.kernels == "torch":
        native.use(None)
    elif arguments.kernels == "native":
        native.build()
    kernels = "torch" if native.kernels() is None else "native"
    print(f"kernels: {kernels}")
    if arguments.instructions:
        print(f"saved to {save('speed_instructions', instructions()).name}")
        return
    if arguments.peers:
        missing = [n for n in ("bitsandbytes", "optimum", "torchao") if importlib.util.find_spec(n) is None]
        if missing:
            raise SystemExit(f"--peers needs bitsandbytes, optimum-quanto and torchao; missing: {', '.join(missing)}")
    data = {
        f"{size}, {targets}": measure(size, arguments.rounds, arguments.peers and targets == "all-linear", targets)
        for size in arguments.sizes
        for targets in arguments.targets
    }
    path = save(arguments.name, {"rounds": arguments.rounds, "kernels": kernels, "results": data})
    print(f"\nsaved to {path.name}")


if __name__ == "__main__":
    main()
