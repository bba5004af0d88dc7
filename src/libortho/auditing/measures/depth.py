r"""How deep the forgetting goes: is the knowledge gone from the hidden states, or only kept from the output?

Unlearning Depth Score (arXiv 2605.24614), by activation patching into the full model. The span is the completion; at
the positions that predict it, the output of decoder layer l is replaced by that of a source, and the layers above run
on. With log p the mean log-probability of the span's tokens, teacher-forced:

    d1_l = log p(full) - log p(full, layer l patched from the retain model)      what layer l knows
    d2_l = log p(full) - log p(full, layer l patched from the audited model)     what of it is lost
    UDS  = sum_l d1_l clip(d2_l / d1_l, 0, 1) / sum_l d1_l                       over layers with d1_l > tau

0: intact, 1: erased as far as in the model that never knew. The logit lens needs no retain model: the model's own final
norm and head, applied to the output of every layer.

Both are the same device. A forward pass in which layers 0 .. l return a given state runs only what comes after l; with
l the last layer that is the final norm, whatever the family calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libortho.auditing.subjects import Subject
from libortho.core.errors import DataError, TargetError
from libortho.core.progress import Progress
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import PASS_TOKENS, STATISTICS_ROWS, in_parts, log_probability, predicting_states
from libortho.text.encoding import IGNORE, Batch, Encoded, batches, collate


@dataclass(frozen=True)
class DepthScore:
    """The Unlearning Depth Score of every record.

    Attributes:
        uds: Per record, a fraction; None where no layer encodes the record (every d1 is at most ``tau``).
        retain_drop: (layers,) mean over records of d1, in nats per token.
        audited_drop: (layers,) mean over records of d2, in nats per token.
        tau: Least d1 of a layer that counts, in nats per token.
    """

    uds: tuple[float | None, ...]
    retain_drop: tuple[float, ...]
    audited_drop: tuple[float, ...]
    tau: float

    @property
    def values(self) -> list[float]:
        """The scores that exist."""
        return [u for u in self.uds if u is not None]

    @property
    def unscored(self) -> int:
        """Records without any layer that encodes them."""
        return sum(u is None for u in self.uds)

    @property
    def mean(self) -> float | None:
        """Mean score; None if no record has one."""
        return sum(self.values) / len(self.values) if self.values else None

    def to_dict(self) -> dict[str, Any]:
        """Per-layer means, JSON-ready; ``full`` is d1 and ``off`` is d2."""
        rows = zip(self.retain_drop, self.audited_drop, strict=True)
        return {"layers": [{"layer": i, "full": d1, "off": d2} for i, (d1, d2) in enumerate(rows)]}


def depth_scores(d1: Tensor, d2: Tensor, tau: float = 0.05) -> list[float | None]:
    """UDS from the drops of log p (arXiv 2605.24614).

    Args:
        d1: (records, layers) drop under patches from the retain model, in nats per token.
        d2: (records, layers) drop under patches from the audited model.
        tau: Layers with a ``d1`` at or below this do not count.

    Returns:
        One fraction per record; None where no layer counts.
    """
    encodes = d1 > tau
    erased = torch.where(encodes, torch.minimum(d2.clamp_min(0), d1), 0.0).double().sum(1)  # d1 clip(d2 / d1, 0, 1)
    known = torch.where(encodes, d1, 0.0).double().sum(1)
    return [e / k if k > 0 else None for e, k in zip(erased.tolist(), known.tolist(), strict=True)]


@torch.no_grad()
def unlearning_depth(
    full: Subject,
    audited: Subject,
    retain: Subject,
    forget: Sequence[Encoded],
    *,
    tau: float = 0.05,
    progress: Progress | None = None,
) -> DepthScore:
    """Unlearning Depth Score of the audited subject.

    Args:
        full: The model that knows the forget set; patches go into it.
        audited: The unlearned one; may be the same module under another alpha.
        retain: A model of the same shape that was never trained on the forget set.
        forget: Records; the span is the completion.
        tau: Least d1 of a layer that counts, in nats per token.
        progress: Called with "depth", batches done, all batches.

    Raises:
        DataError: if there is no record.
        TargetError: if decoder layers cannot be found, or the three models differ in their number or width.
    """
    _require(forget)
    d1: list[Tensor] = []
    d2: list[Tensor] = []
    order: list[int] = []
    passes = list(batches(forget, PASS_TOKENS))
    for done, rows in enumerate(passes, 1):
        batch = collate([forget[i] for i in rows])
        sources = [_layer_states(s, batch)[0] for s in (retain, audited)]
        own, tails = _layer_states(full, batch)
        for subject, source in zip((retain, audited), sources, strict=True):
            _check_shapes(full, own, subject, source)
        with full.enter():
            lm = full.language_model()
            layers = decoder_layers(full.model)
            end = len(own) - 1
            whole = _resume(lm, layers, batch, end, own[end], tails[end])
            for drops, source in zip((d1, d2), sources, strict=True):
                patched = [
                    _resume(lm, layers, batch, i, _patched(own[i], source[i], batch), tails[i])
                    for i in range(len(layers))
                ]
                drops.append(whole[:, None] - torch.stack(patched, 1))
        order += rows
        if progress is not None:
            progress("depth", done, len(passes))
    back = torch.tensor(order).argsort()
    retain_drop, audited_drop = torch.cat(d1)[back], torch.cat(d2)[back]
    return DepthScore(
        tuple(depth_scores(retain_drop, audited_drop, tau)),
        tuple(retain_drop.mean(0).tolist()),
        tuple(audited_drop.mean(0).tolist()),
        tau,
    )


@torch.no_grad()
def logit_lens(subject: Subject, forget: Sequence[Encoded]) -> list[float]:
    """Mean log-probability of the completions, read off the output of every decoder layer.

    Args:
        subject: The model and its setting.
        forget: Records.

    Returns:
        One value per layer, in nats per token (mean over records of means over tokens); the last is the model's own.

    Raises:
        DataError: if there is no record.
        TargetError: if decoder layers cannot be found.
    """
    _require(forget)
    total: Tensor | float = 0.0
    for rows in batches(forget, PASS_TOKENS):
        batch = collate([forget[i] for i in rows])
        states, tails = _layer_states(subject, batch)
        with subject.enter():
            lm, layers, end = subject.language_model(), decoder_layers(subject.model), len(states) - 1
            seen = [_resume(lm, layers, batch, end, state, tails[end]) for state in states]
        total = total + torch.stack(seen, 1).double().sum(0)
    assert isinstance(total, Tensor)
    return (total / len(forget)).tolist()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers causal LM, in the order in which they run.

    Raises:
        TargetError: unless the decoder holds exactly one list of ``config.num_hidden_layers`` modules.
    """
    get = getattr(model, "get_decoder", None)
    decoder = get() if get is not None else getattr(model, "base_model", model)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [m for m in lists.values() if len(m) == count]
    if len(fitting) != 1:
        raise TargetError(
            f"cannot tell the decoder layers of {type(model).__name__}: config.num_hidden_layers is {count}, and its "
            f"lists of modules are { {n: len(m) for n, m in lists.items()} }; expected exactly one of that length"
        )
    return fitting[0]


def _require(forget: Sequence[Encoded]) -> None:
    if not forget:
        raise DataError("the forget set holds no record; depth needs at least one")


def _layer_states(subject: Subject, batch: Batch) -> tuple[list[Tensor], list[tuple[Any, ...] | None]]:
    """Output of every decoder layer, each (rows, tokens, width); and what a layer returns besides, if a tuple."""
    states: list[Tensor] = []
    tails: list[tuple[Any, ...] | None] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        tails.append(output[1:] if isinstance(output, tuple) else None)

    with subject.enter():
        lm = subject.language_model()
        layers = decoder_layers(subject.model)
        handles = [layer.register_forward_hook(keep) for layer in layers]
        try:
            lm.hidden(batch.to(lm.device))
        finally:
            for handle in handles:
                handle.remove()
    if len(states) != len(layers) or any(s.shape[:2] != batch.input_ids.shape for s in states):
        raise TargetError(
            f"the {len(layers)} decoder layers of {type(subject.model).__name__} gave outputs of shapes "
            f"{sorted({tuple(s.shape) for s in states})}; expected one (sequences, tokens, width) from each"
        )
    return states, tails


def _check_shapes(full: Subject, own: list[Tensor], other: Subject, states: list[Tensor]) -> None:
    mine, theirs = [(len(s), s[0].shape[-1]) for s in (own, states)]
    if mine != theirs:
        raise TargetError(
            f"{other.label!r} has {theirs[0]} decoder layers of width {theirs[1]}, {full.label!r} has {mine[0]} of "
            f"width {mine[1]}; patching needs models of the same shape"
        )


def _predicts(batch: Batch) -> Tensor:
    """True at the positions whose next token is judged, (rows, tokens)."""
    return nn.functional.pad(batch.labels[:, 1:] != IGNORE, (0, 1))


def _patched(own: Tensor, source: Tensor, batch: Batch) -> Tensor:
    return torch.where(_predicts(batch).to(own.device)[..., None], source.to(own), own)


@contextlib.contextmanager
def _returning(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let ``layers`` return ``output`` without running; attributes that the decoder reads from them stay."""
    kept = [layer.__dict__.get("forward") for layer in layers]  # others (accelerate) put theirs here too
    try:
        for layer in layers:
            layer.__dict__["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for layer, forward in zip(layers, kept, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward


def _resume(
    lm: LanguageModel, layers: nn.ModuleList, batch: Batch, last: int, state: Tensor, tail: tuple[Any, ...] | None
) -> Tensor:
    """Mean log p of each row's span, (rows,), if ``state`` is what layer ``last`` returns."""
    batch = batch.to(lm.device)
    with _returning(list(layers)[: last + 1], state if tail is None else (state, *tail)):
        states, labels, owner = predicting_states(lm.hidden(batch), batch)
    log_p = torch.cat(in_parts(lm, states, labels, log_probability, STATISTICS_ROWS))
    return torch.stack([p.mean() for p in log_p.split(torch.bincount(owner).tolist())]).cpu()
