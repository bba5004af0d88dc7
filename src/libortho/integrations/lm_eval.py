"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, under one alpha.

    python -m libortho.integrations.lm_eval --model libortho --model_args pretrained=out,alpha=0 --tasks arc_easy

is the harness's own command line after this module has registered the model ``libortho``: the harness reads no entry
points, so that its own ``lm_eval`` command knows only the models it ships with. In Python, importing this module is
enough for ``lm_eval.simple_evaluate(model="libortho", model_args={"pretrained": "out", "alpha": 0})``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from libortho.checkpoint import is_checkpoint, load, stream_names
from libortho.core.dtypes import DTYPES
from libortho.core.errors import CheckpointError, ConfigError, LibOrthoError
from libortho.core.escapes import one_line
from libortho.core.switch.alpha import alpha as under
from libortho.core.switch.alpha import current_alphas, set_alpha
from libortho.core.switch.state import parse_alpha
from libortho.evaluation.harness import harness
from libortho.lm.checks import fingerprint

try:
    harness()
except LibOrthoError as error:
    if __name__ == "__main__":
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        sys.exit(2)
    raise

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

_OPTIONS = (
    "add_bos_token", "chat_template_args", "enable_thinking", "logits_cache", "max_length", "mixed_precision_dtype",
    "prefix_token_id", "think_end_token", "truncation",
)  # fmt: skip
"""What the harness's own class takes and what means the same for a model that is loaded already."""
_MARK = "libortho"
"""Key under which a response cache keeps whose responses it holds."""


@register_model("libortho")
class LibOrthoLM(HFLM):
    """A checkpoint of :func:`libortho.save` whose every forward pass runs under one alpha.

    Args:
        pretrained: The checkpoint's directory.
        alpha: A number for all streams, or ``hr=1;legal=0``; streams not named are off. (As ``--alpha`` elsewhere; the
            harness itself splits its arguments at commas.) Default: as loaded, which is 0 for streams of ``isolate``.
        streams: ``all``, ``none``, or the names of those to read, such as ``hr;legal``.
        device: Default: cuda where there is one, as in the harness.
        dtype: Of the dense tensors: auto (as stored), bfloat16, float16 or float32.
        softmax_dtype: Probabilities are computed in it. The harness would take the logits' dtype; in bf16 choices tie.
        batch_size: A number; on a GPU also ``auto`` or ``auto:N``.
        max_batch_size: Where ``auto`` begins.
        options: The harness's truncation, logits_cache, max_length, mixed_precision_dtype, add_bos_token,
            prefix_token_id, think_end_token, enable_thinking and chat_template_args.

    Raises:
        CheckpointError: if the directory is no checkpoint, is damaged, or lacks a stream.
        AlphaError: if alpha is out of range or names an unknown stream.
        ConfigError: if another option is unknown or out of its domain.
    """

    def __init__(
        self,
        pretrained: str | Path,
        alpha: Any = None,
        streams: Any = "all",
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        softmax_dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options).difference(_OPTIONS))
        if unknown:
            raise ConfigError(f"the model libortho does not take {unknown[0]!r}; it takes {', '.join(_OPTIONS)}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("the model libortho runs in one process; start it without accelerate or torchrun")
        names = parse_streams(streams)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        size = _batch_size(batch_size, where)
        if isinstance(dtype, str) and dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected auto, {', '.join(DTYPES)}")
        directory = Path(pretrained).resolve()
        if not is_checkpoint(directory):
            raise CheckpointError(f"{directory} is not a checkpoint of libortho; for an ordinary model use --model hf")
        spec = None if alpha is None else parse_alpha(alpha, stream_names(directory))
        kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        model, tokenizer = load(directory, streams=names, device=where, dtype=kind)
        if tokenizer is None:
            raise CheckpointError(f"{directory} holds no tokenizer; save the model together with its own")
        loaded = current_alphas(model)
        self.alpha: float | dict[str, float] = (loaded or 0.0) if spec is None else spec
        with under(model, self.alpha):  # refuses what it cannot take, before anything runs
            pass
        if loaded:
            if not isinstance(self.alpha, dict):
                self.alpha = dict.fromkeys(loaded, self.alpha)
            self.alpha = {n: self.alpha.get(n, 0.0) for n in loaded}
            set_alpha(model, self.alpha)  # whatever the harness may call besides the two methods below has it, too
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=size, max_batch_size=max_batch_size,
            softmax_dtype=softmax_dtype, **options,
        )  # fmt: skip
        self.pretrained = str(directory)  # absolute, so that nobody takes it for a name on the hub

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with under(self.model, self.alpha):
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with under(self.model, self.alpha):
            return super()._model_generate(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: its own information, and the alpha of each stream."""
        return {**super().get_model_info(), "alpha": self.alpha}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Accept a response cache (``--use_cache``) only if its responses are this model's under this alpha.

        The harness looks responses up by the question alone, so that one cache for alpha = 1 and alpha = 0 would let
        the second repeat what the first said.

        Raises:
            ConfigError: if the cache is another model's or another alpha's.
        """
        cache = getattr(cache_hook, "dbdict", None)
        if cache is not None:
            mine = {"model": fingerprint(self.model), "alpha": self.alpha}
            if len(cache) and cache.get(_MARK) != mine:
                raise ConfigError(
                    "the response cache holds the answers of another model or another alpha; give --use_cache a path "
                    "of its own for each"
                )
            cache[_MARK] = mine
        super().set_cache_hook(cache_hook)


def parse_streams(value: Any) -> str | list[str] | None:
    """Which streams of a checkpoint are read: ``all``, ``none``, or names such as ``hr;legal`` (or ``hr,legal``).

    Raises:
        ConfigError: if the value is none of these.
    """
    if value is None or value == "none":
        return None
    if value == "all":
        return "all"
    names = value.replace(";", ",").split(",") if isinstance(value, str) else value
    if isinstance(names, Sequence) and names and all(isinstance(n, str) and n.strip() for n in names):
        return [n.strip() for n in names]
    raise ConfigError(f"streams is {value!r}; expected all, none, or names such as hr;legal")


def _batch_size(value: int | str, device: torch.device) -> int | str:
    if str(value).startswith("auto"):
        if device.type == "cpu":
            raise ConfigError(
                f"batch_size is {value}: it finds the largest batch by running out of memory, which on a CPU ends the "
                "process; give a number"
            )
        return value
    if str(value).isdecimal() and int(value) >= 1:
        return int(value)
    raise ConfigError(f"batch_size is {value!r}; expected a number of at least 1, or auto on a GPU")


def main() -> None:
    """The harness's command line with this model registered; our errors become one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (LibOrthoError, OSError) as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
