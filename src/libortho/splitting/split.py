"""The weights-only split: compression with a dial. It does not forget, and says so.

    W = base + tail + sparse + rest
    base    Q(U_r S_r V_r^T), or Q(W): integer codes
    tail    the singular directions that the base dropped, as factors
    sparse  W - base - tail on the chosen entries, never more than ``ratio`` of them

Tail and sparse form the ortho stream. A memory that fine-tuning left is spread over the whole weight and survives in
any base that is good enough to be of use (measured; see docs/isolation.md): forgetting takes :func:`libortho.isolate`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from libortho.core.config import DTYPES, SplitConfig, TargetModules
from libortho.core.layer import LayerReport, OrthoLinear, ortho_layers
from libortho.core.report import record_method
from libortho.core.streams import BaseStream, Columns, Entries, Factors, OrthoStream
from libortho.core.streams.base import check_shape
from libortho.core.switch.guard import TOKENS_FIRST, family
from libortho.core.switch.switch import Switch
from libortho.core.targets import find_targets, routed
from libortho.lm.loading import plain_torch, refuse_stock_save
from libortho.selection.scores import SCORES, top_columns, top_entries

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


@plain_torch()
def split(model: ModelT, config: SplitConfig | None = None, *, progress: Progress | None = None) -> ModelT:
    """Split the chosen linear layers of ``model`` into base and ortho, in place, and return the model.

    Args:
        model: A causal language model, or any module tree.
        config: What to split and how; the default takes the MLP's output projections at rank 0.95, INT8, 0.5 %.
        progress: Called after each layer.

    Raises:
        TargetError: if nothing matches, or a layer cannot be split. The model is left as it was.
        ConfigError: if the group size does not fit a layer. The model is left as it was.
    """
    config = config or SplitConfig()
    targets = find_targets(model, config.target_modules, partial=True)
    for module in targets.values():
        check_shape(linear_weight(module).shape[1], config.bits, config.resolved_group_size)
    switch = Switch()
    switch.add_stream(config.stream, alpha=1.0)
    layers = _split_layers(targets, config, switch, progress)
    fallen = [
        n for n, m in layers.items() if m.report is not None and m.report.low_rank_error and not m.report.used_low_rank
    ]
    if fallen:
        logger.warning(
            "%d of %d layers lose more than %.0f %% to low-rank truncation and were quantised directly (%s%s)",
            len(fallen), len(layers), 100 * config.max_low_rank_error, fallen[0], ", ..." if len(fallen) > 1 else "",
        )  # fmt: skip
    install(model, layers, switch)
    record_method(model, config.stream, {"verb": "split", **config.to_dict()})
    return model


def _split_layers(
    targets: dict[str, nn.Module], config: SplitConfig, switch: Switch, progress: Progress | None
) -> dict[str, OrthoLinear]:
    """Split every layer; on a CPU as many at a time as torch has threads, each with its share of them."""
    threads = torch.get_num_threads()
    on_cpu = all(linear_weight(m).device.type == "cpu" for m in targets.values())
    workers = min(threads, len(targets)) if on_cpu else 1
    made: dict[str, OrthoLinear] = {}
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        waiting = {pool.submit(_split_layer, n, m, config, switch): n for n, m in targets.items()}
        for done, future in enumerate(as_completed(waiting), 1):
            made[waiting[future]] = future.result()
            if progress is not None:
                progress("split", done, len(targets))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # MKL's number belongs to the process, not to the workers
    return {name: made[name] for name in targets}


def replace_linear_layers(
    model: ModelT,
    target_modules: TargetModules = ("down_proj",),
    ratio: float = 0.005,
    rank_ratio: float | str = 0.95,
    use_low_rank: bool = True,
    **options: Any,
) -> ModelT:
    """:func:`split` with the arguments spelled out; ``options`` are further fields of ``SplitConfig``."""
    fields: dict[str, Any] = dict(target_modules=target_modules, ratio=ratio, rank_ratio=rank_ratio, **options)
    return split(model, SplitConfig(use_low_rank=use_low_rank, **fields))


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out_features, in_features); GPT-2's Conv1D stores the transpose."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, split or not."""
    if isinstance(module, OrthoLinear):
        return module.out_features, module.in_features
    rows, columns = linear_weight(module).shape
    return rows, columns


def install(model: nn.Module, layers: dict[str, OrthoLinear], switch: Switch) -> None:
    """Put finished layers in the place of others and attach the switch, if it controls any stream.

    ``save_pretrained`` of the model raises from then on.

    A model that is split already keeps the switch that it has, which takes over the streams of ``switch`` with the
    alphas that they stand at; its own streams stand where they stood.
    """
    own = next((m.switch for m in ortho_layers(model).values()), None)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer.train(getattr(owner, leaf).training)
        layer.sorted_rows = not routed(name) and family(model) not in TOKENS_FIRST
        setattr(owner, leaf, layer)
        if own is not None:
            layer.switch = own
    if own is not None:
        for stream, value in switch.persistent.items():
            own.add_stream(stream, value)
        switch = own
    if switch.streams:
        switch.attach(model)
    refuse_stock_save(model)


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error ``|A - W| / |W|``; 0 for a zero reference."""
    return float((approximation - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float32).tiny))


@dataclass(frozen=True)
class _Truncation:
    """A weight cut after ``rank`` singular directions: ``kept + up @ down`` is the weight again."""

    kept: Tensor
    rank: int
    error: float
    tail: Factors | None


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias of a linear layer, or None."""
    return module.bias if isinstance(module.bias, nn.Parameter) else None


def assemble(
    name: str,
    weight: Tensor,
    base: BaseStream,
    stream: OrthoStream,
    bias: nn.Parameter | None,
    switch: Switch,
    stream_name: str,
    cut: _Truncation | None = None,
    low_rank_error: float | None = None,
    earlier: Mapping[str, OrthoStream] | None = None,
) -> OrthoLinear:
    """A finished layer with its report; errors are measured on the tensors as stored.

    Args:
        name: Dotted path.
        weight: fp32 weight (out_features, in_features) that the streams stand for.
        base: The base stream.
        stream: The ortho stream.
        bias: Bias of the layer.
        switch: Switch of the model.
        stream_name: Name of the ortho stream.
        cut: The low-rank truncation that the base was made from, if any.
        low_rank_error: Error of the truncation that was tried, if any.
        earlier: Streams that the layer has already; none of them has a tail.
    """
    streams = {**(earlier or {}), stream_name: stream}
    approximation = base.dense(torch.float32)
    base_error = relative_error(approximation, weight)
    for part in streams.values():
        part.add_to(approximation)
    report = LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        rank=cut.rank if cut is not None else min(weight.shape),
        used_low_rank=cut is not None,
        low_rank_error=low_rank_error,
        base_error=base_error,
        final_error=relative_error(approximation, weight),
        ortho_density=sum(s.support_size for s in streams.values()) / weight.numel(),
        tail_rank=stream.tail.rank if stream.tail is not None else 0,
        tail_density=stream.tail_size / weight.numel(),
        base_bytes=base.nbytes,
        ortho_bytes=sum(s.nbytes for s in streams.values()),
    )
    layer = OrthoLinear(base, bias, switch, report)
    for key, part in streams.items():
        layer.add_stream(key, part)
    return layer


def _truncate(weight: Tensor, config: SplitConfig) -> _Truncation:
    """Keep the first singular directions of an fp32 weight (Eckart-Young); the rest becomes the tail.

    The directions are eigenvectors of the smaller of W W^T and W^T W, a quarter of the work of a full SVD. That squares
    the condition number: directions below about 3e-4 of the largest singular value are found in no particular order,
    which moves the error by as little. What is dropped is ``U U^T W`` for those few directions ``U``; no product of
    three dense matrices is formed, and kept + tail is the weight to fp32 rounding, whatever the directions are.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    full = wide.shape[0]
    norm = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
    kept_rank = full if config.rank_ratio == "auto" else max(1, int(full * config.rank_ratio))
    if not config.keep_tail and kept_rank <= full // 4:
        first = leading_directions(wide, kept_rank, config.seed)
        kept = first @ (first.T @ wide)
        kept = kept if wide is weight else kept.T
        return _Truncation(kept, kept_rank, relative_error(kept, weight), None)
    values, directions = torch.linalg.eigh(wide @ wide.T)  # ascending
    if config.rank_ratio == "auto":
        lost = values.clamp_min(0).cumsum(0).sqrt() / norm  # error of dropping the first i + 1 directions
        kept_rank = max(1, full - int((lost <= config.error_budget).sum()))
    if kept_rank == full:
        return _Truncation(weight, full, 0.0, None)
    last = directions[:, : full - kept_rank].contiguous()
    below = last.T @ wide
    error = float(below.norm() / norm)
    dropped = last @ below
    kept = weight - (dropped if wide is weight else dropped.T)
    tail = None
    if config.keep_tail:
        root = below.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny).sqrt()  # of singular values
        down, up = below / root, last * root.T
        down, up = (down, up) if wide is weight else (up.T, down.T)
        dtype = DTYPES[config.value_dtype]
        tail = Factors(down.to(dtype), up.to(dtype))
    return _Truncation(kept, kept_rank, error, tail)


def leading_directions(weight: Tensor, count: int, seed: int) -> Tensor:
    """Orthonormal left singular directions by randomised subspace iteration, (rows, count).

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1, with 16 extra samples and 4 iterations.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    size = min(min(weight.shape), count + 16)
    sample = torch.randn(weight.shape[1], size, generator=generator, device=weight.device, dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ sample).Q
    for _ in range(4):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    inside = basis.T @ weight
    return basis @ torch.linalg.eigh(inside @ inside.T).eigenvectors[:, -count:]


def _split_layer(name: str, module: nn.Module, config: SplitConfig, switch: Switch) -> OrthoLinear:
    weight = linear_weight(module)
    exact = weight.float()
    cut = _truncate(exact, config) if config.use_low_rank else None
    low_rank_error = cut.error if cut is not None else None
    if cut is not None and cut.error > config.max_low_rank_error:
        cut = None
    source = exact if cut is None else cut.kept
    base = BaseStream.from_weight(source.to(weight.dtype), config.bits, config.resolved_group_size)
    tail = cut.tail if cut is not None else None
    approximation = base.dense(torch.float32)
    if tail is not None:
        tail.add_to(approximation)
    residual = exact - approximation
    score = SCORES[config.score](residual, exact)
    dtype = DTYPES[config.value_dtype]
    support: Columns | Entries
    if config.structure == "columns":
        index = top_columns(score, config.ratio)
        support = Columns(index, residual[:, index].T.to(dtype))
    else:
        support = Entries.from_mask(residual, top_entries(score, config.ratio), dtype)
    stream = OrthoStream(support, tail)
    return assemble(name, exact, base, stream, bias_of(module), switch, config.stream, cut, low_rank_error)
