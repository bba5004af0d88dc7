"""Loading a causal LM the way this library needs it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from libortho.core.errors import CheckpointError, ConfigError, DataError, LibOrthoError, TargetError
from libortho.core.extras import require


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Dense model and tokenizer from a hub id, a path or a GGUF file, in evaluation mode.

    Parameters are copied out of the memory-mapped file: a small machine evicts mapped pages, and then every forward
    pass reads the disk again.

    Raises:
        LibOrthoError: if transformers cannot load the model (the message repeats its reason), or a GGUF file needs an
            extra that is not installed.
        CheckpointError: if it is a checkpoint of this library.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    refuse_checkpoint(name)
    source, options = str(name), {}
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        require("demo", f"reading the GGUF file {name}")
        source, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise LibOrthoError(f"cannot load the model {str(name)!r}: {error}") from error
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    if options:
        forget_quantisation(model)
    return model.to(device).eval(), tokenizer


def forget_quantisation(model: Any) -> None:
    """Drop the marks that a loader leaves on a model it has dequantised, which is an ordinary dense one."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)


def refuse_checkpoint(name: str | Path, what: str = "the model") -> None:
    """Refuse a checkpoint of this library where a dense model is asked for: an ordinary loader drops its streams.

    Args:
        name: Hub id or path.
        what: What the caller calls the model.

    Raises:
        CheckpointError: then; the message names the streams.
    """
    from libortho.checkpoint import is_checkpoint, stream_names

    if is_checkpoint(name):
        streams = stream_names(Path(name))
        held = f"with the streams {streams}, which an ordinary loader drops" if streams else "without streams"
        raise CheckpointError(
            f"{what} {str(name)!r} is a checkpoint of libortho {held}; expected a dense model: name the original one. "
            "In Python libortho.load reads a checkpoint; of the commands isolate (with a --stream of another name), "
            "audit, eval and generate take one as their model"
        )


def training_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 where the processor multiplies it in hardware, else fp32: emulated, it is several times slower than fp32.

    Where torch cannot tell (before ``torch.cpu.get_capabilities``), bf16.
    """
    if not device.startswith("cpu") or not hasattr(torch.cpu, "get_capabilities"):
        return torch.bfloat16
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(has and name.endswith("bf16") for name, has in found.items()) else torch.float32


def fingerprint(model: nn.Module) -> str:
    """Hash of a spread of the values of every parameter and buffer; models that differ in training differ in it."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().flatten()
        # An odd step meets all columns: widths are multiples of powers of two, and edits are whole columns.
        picked = flat[:: max(1, flat.numel() // 1024) | 1].float().cpu().contiguous()
        digest.update(name.encode() + picked.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it is when a process begins, whatever the caller has set; afterwards the caller's settings are back.

    Default dtype float32, default device cpu, no autocast, gradients on, no inference mode. Work inside depends on its
    inputs alone.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def adapters(model: nn.Module) -> list[str]:
    """Names of the PEFT adapters that a model carries, wrapped around it or put into it, merged or not."""
    if "peft" not in sys.modules:  # then nobody can have made one
        return []
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, PeftModel):
            found |= dict.fromkeys(module.peft_config)
        elif isinstance(module, BaseTunerLayer):
            found |= dict.fromkeys(n for kind in module.adapter_layer_names for n in getattr(module, kind, None) or ())
    return list(found)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, its adapters in place; any other model itself.

    Raises:
        TargetError: for adapters that live in the wrapper (prompt and prefix tuning).
    """
    if "peft" not in sys.modules:
        return model
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if any(c.is_prompt_learning for c in model.peft_config.values()):
        raise TargetError(
            f"this {type(model).__name__} adds virtual tokens to its input ({', '.join(model.peft_config)}); expected "
            "a plain transformers model, or adapters in its layers such as LoRA"
        )
    return model.get_base_model()


def refuse_stock_save(model: nn.Module) -> None:
    """Let ``save_pretrained`` and ``push_to_hub`` of the model, and of the models inside it, raise on this instance.

    The tensors of a split layer have names that stock transformers does not know: it would load such a directory with
    fresh random weights in their place. Copies and pickles refuse as well.
    """
    for module in model.modules():
        if hasattr(type(module), "save_pretrained"):
            module.__dict__ |= {"save_pretrained": _no_save_pretrained, "push_to_hub": _no_push_to_hub}


def allow_stock_save(model: nn.Module) -> None:
    """Undo :func:`refuse_stock_save`."""
    for module in model.modules():
        for name in ("save_pretrained", "push_to_hub"):
            if module.__dict__.get(name) in (_no_save_pretrained, _no_push_to_hub):
                del module.__dict__[name]


def _no_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    raise CheckpointError(
        "save_pretrained does not know split layers: stock transformers would load what it writes with random weights "
        "in their place; use libortho.save(model, tokenizer, directory), whose base stock transformers loads"
    )


def _no_push_to_hub(*args: Any, **kwargs: Any) -> NoReturn:
    raise CheckpointError(
        "push_to_hub does not know split layers: stock transformers would load what it uploads with random weights in "
        "their place; use libortho.save(model, tokenizer, directory), then libortho.push_to_hub(directory, repo_id)"
    )


def check_causal(model: nn.Module) -> None:
    """Refuse what is no decoder-only language model with data that gradients can be taken of.

    Raises:
        TargetError: for an encoder-decoder, or without an output embedding.
        ConfigError: for a model that was made inside ``torch.inference_mode``.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(
            f"{kind} is an encoder-decoder, whose completions follow an encoded input; expected a decoder-only causal "
            "language model (a transformers AutoModelForCausalLM)"
        )
    get = getattr(model, "get_output_embeddings", None)
    if get is None or get() is None or decoder_of(model) is model:
        raise TargetError(
            f"{kind} is not a causal language model with a decoder and an output embedding; expected a transformers "
            "AutoModelForCausalLM"
        )
    if any(t.is_inference() for t in [*model.parameters(), *model.buffers()]):
        raise ConfigError(
            f"this {kind} was made inside torch.inference_mode, so that no gradient can be taken through it; make or "
            "load it outside"
        )


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a transformers causal LM that makes hidden states; the model itself where there is none."""
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        return base
    embedding = _input_embedding(model)  # Llama 4 names a base that it has not
    return next((m for m in model.children() if m is not embedding and embedding in set(m.modules())), model)


def check_tokens(model: nn.Module, tokenizer: Any, texts: Iterable[tuple[str, str | Sequence[int]]]) -> None:
    """Refuse a text with a token that the model has no embedding for.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        texts: What the model will be given, as text or token ids, each after what errors call it ("forget record 3").

    Raises:
        DataError: then; the message names the text and the token.
    """
    rows = embedding_rows(model)
    if rows is None or max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    for name, text in texts:
        ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text
        unknown = next((t for t in ids if t >= rows), None)
        if unknown is not None:
            raise DataError(
                f"{name} holds the token {tokenizer.convert_ids_to_tokens(unknown)!r} (id {unknown}), but the model "
                f"has embeddings for {rows} tokens only; take the tokenizer that belongs to the model, or call "
                "model.resize_token_embeddings(len(tokenizer)) and train the new ones"
            )


def embedding_rows(model: nn.Module) -> int | None:
    """Tokens that the model has embeddings for; None if it does not say."""
    weight = getattr(_input_embedding(model), "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) else None


def _input_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if get is not None else None
    except NotImplementedError:  # transformers' word for a model that does not say
        return None
