"""The weights-only split: compression with a dial. It does not forget, and says so.

    W = base + tail + sparse + rest
    base    Q(U_r S_r V_r^T), or Q(W): integers and scales
    tail    the singular directions that the base dropped, as factors
    sparse  W - base - tail on the chosen entries, never more than ``ratio`` of them

Tail and sparse form the ortho stream. A memory that fine-tuning left is spread over the whole weight and survives in
any base that is good enough to be of use (measured; see docs/explanation/isolation.md): forgetting takes
:func:`libortho.isolate`.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import torch
from torch import nn

from libortho.core.config import TargetModules
from libortho.core.dtypes import DTYPES
from libortho.core.layer import OrthoLinear
from libortho.core.models import plain_torch
from libortho.core.progress import Progress
from libortho.core.report import record_method
from libortho.core.streams import BaseStream, Columns, Entries, OrthoStream
from libortho.core.streams.base import check_shape
from libortho.core.surgery import assemble, bias_of, install, linear_weight
from libortho.core.switch.switch import Switch
from libortho.core.targets import find_targets
from libortho.selection.scores import SCORES, top_columns, top_entries
from libortho.splitting.config import SplitConfig
from libortho.splitting.low_rank import truncate

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


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


def _split_layer(name: str, module: nn.Module, config: SplitConfig, switch: Switch) -> OrthoLinear:
    weight = linear_weight(module)
    exact = weight.float()
    cut = truncate(exact, config) if config.use_low_rank else None
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
    return assemble(
        name,
        exact,
        base,
        stream,
        bias_of(module),
        switch,
        config.stream,
        None if cut is None else cut.rank,
        low_rank_error,
    )
