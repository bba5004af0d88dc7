"""Which layers are split: names in, modules out, with everything that cannot be split refused by name."""

from __future__ import annotations

import difflib
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from libortho.core.arguments import check_model
from libortho.core.config import ALL_LINEAR, MLP_OUT, TargetModules
from libortho.core.errors import TargetError
from libortho.core.layer import OrthoLinear
from libortho.core.models import adapters, unwrapped
from libortho.core.streams import OrthoStream

logger = logging.getLogger(__name__)

MLP_OUTPUT = re.compile(r"(.*\.)?(down_proj|fc2|mlp\.c_proj|mlp\.fc_out|dense_4h_to_h|w2)")
"""Paths of the MLP's output projection in the families that transformers knows; GPT-2's attention has a c_proj too."""
_FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"
# What configs call the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def find_targets(
    model: nn.Module,
    target_modules: TargetModules,
    *,
    again: bool = False,
    partial: bool = False,
    tails: bool = False,
) -> dict[str, nn.Module]:
    """Return the linear layers that ``target_modules`` names, by dotted path, in the model's order.

    Args:
        model: Any module tree.
        target_modules: A plain name matches a suffix of the dotted path (as in PEFT); ``re:<pattern>`` matches the
            full path; ``"mlp-out"`` is the MLP's output projection; ``"all-linear"`` is every linear layer but the
            output embedding.
        again: Take layers that are split already, too.
        partial: Leave fused experts out with a warning, where other layers go by the same name.
        tails: With ``again``, take layers that have a tail, too.

    Raises:
        TargetError: if ``model`` is no model in memory, if nothing matches (near names are listed), if a match is
            already split (with ``again``: if it has a tail), quantised by another library, tied, shared, not floating
            point or not finite, if the model carries PEFT adapters, or if a name or shorthand means an MLP whose
            routed experts are fused in one parameter.
    """
    check_model(model)
    _refuse_adapters(model)
    patterns = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    split = tuple(n for n, m in model.named_modules() if isinstance(m, OrthoLinear))
    if split and not again:
        raise TargetError(
            "this model is already split; start from the original model (isolate alone can split it again)"
        )
    inner = tuple(f"{n}." for n in split)
    modules = {name: module for name, module in model.named_modules() if name and not name.startswith(inner)}
    head = output_embedding(model)
    fused = fused_experts(model)
    banks = {n.rpartition(".")[0] for n in fused}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = [n for n, m in modules.items() if _matches(n, m, pattern, head)]
        if not pattern.startswith("re:"):
            hits = [n for n in hits if n not in banks]
        left_out = _left_out(model, pattern, hits, fused)
        if left_out is not None:
            if not (partial and hits):
                raise TargetError(left_out)
            logger.warning("%s", left_out)
        if not hits:
            raise TargetError(f"no module matches {pattern!r}; {_near(pattern, modules)}")
        found.update((n, modules[n]) for n in hits)
    found = {n: m for n, m in modules.items() if n in found}
    shared = _shared_parameters(model)
    for name, module in found.items():
        _check(name, module, head, shared, tails)
    return found


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that hold the weights of several routed experts at once, by dotted path."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = {getattr(text, key, None) for key in _EXPERTS} - {None, 1}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | OrthoLinear | nn.Embedding | nn.modules.conv._ConvNd):
            continue
        expert = routed(name) or "Experts" in type(module).__name__
        for leaf, parameter in module.named_parameters(recurse=False):
            several = parameter.dim() == 3 and (expert or parameter.shape[0] in counts)
            if several or (expert and parameter.dim() == 2):
                found[f"{name}.{leaf}" if name else leaf] = parameter
    return found


def routed(name: str) -> bool:
    """True for what lies in a routed expert: a router sends it some of the tokens, in an order of its own."""
    return any(re.fullmatch(r"(routed_)?experts?", part) for part in name.split("."))


def _left_out(model: nn.Module, pattern: str, hits: Sequence[str], fused: Mapping[str, nn.Parameter]) -> str | None:
    """What to tell who names fused experts and other layers in one word: the experts are no layers, and stay.

    None for a regular expression and for a dotted path in full, which mean what they match and nothing else.
    """
    if not fused or pattern.startswith("re:") or hits == [pattern]:
        return None
    matched = list(fused)
    if pattern not in (MLP_OUT, ALL_LINEAR):
        leaf, *owners = reversed(pattern.split("."))
        matched = [n for n in fused if leaf in n.split(".")[-2:]]
        if not matched or any("shared" in owner for owner in owners):
            return None
    shown = next((n for n in matched if MLP_OUTPUT.fullmatch(n)), matched[0])
    ends = list(dict.fromkeys(re.escape(re.sub(r"^.*\.\d+\.", "", n)) for n in hits))
    rest = "no other layer goes by this name" if not ends else (
        f"name the others alone by a regular expression, for example {', '.join(f're:.*{e}' for e in ends[:3])}"
    )  # fmt: skip
    return (
        f"{pattern!r} means the routed experts of this {type(model).__name__} too, which are fused in parameters such "
        f"as {shown} {tuple(fused[shown].shape)} ({len(matched)} of them) and are not split; {rest}"
    )


def _refuse_adapters(model: nn.Module) -> None:
    names = adapters(unwrapped(model))
    if names or unwrapped(model) is not model:
        raise TargetError(
            f"this {type(model).__name__} carries the PEFT adapters {', '.join(map(repr, names))}, which a split would "
            "lose or hide; merge them first: model = model.merge_and_unload() (adapters that model.add_adapter or "
            "load_adapter put in: load them with peft.PeftModel.from_pretrained, then merge)"
        )


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, for models that say so."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def is_linear(module: nn.Module) -> bool:
    """True for the dense layers that can be split: ``nn.Linear``, Falcon's copy of it, and GPT-2's ``Conv1D``."""
    kind = type(module)
    return kind in (nn.Linear, Conv1D) or f"{kind.__module__}.{kind.__name__}" == _FALCON


def _matches(name: str, module: nn.Module, pattern: str, head: nn.Module | None) -> bool:
    if pattern == MLP_OUT:
        leaf = isinstance(module, OrthoLinear) or not list(module.children())
        return bool(MLP_OUTPUT.fullmatch(name)) and leaf
    if pattern == ALL_LINEAR:
        return isinstance(module, nn.Linear | Conv1D | OrthoLinear) and module is not head
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(f"{pattern!r} is not a regular expression: {error}") from error
    return name == pattern or name.endswith("." + pattern)


def _near(pattern: str, modules: dict[str, nn.Module]) -> str:
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D | OrthoLinear)]
    leaves = sorted({n.rsplit(".", 1)[-1] for n in linear})
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], leaves, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"linear layers of this model are named {', '.join(leaves) if leaves else '(there are none)'}"


def _shared_parameters(model: nn.Module) -> set[int]:
    owners: defaultdict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(name)
    return {p for p, o in owners.items() if len(o) > 1}


def _check(name: str, module: nn.Module, head: nn.Module | None, shared: set[int], tails: bool) -> None:
    if module is head:
        raise TargetError(f"{name} makes the logits and is not split; leave it out of target_modules")
    if isinstance(module, OrthoLinear):
        held = [n for n, s in module.streams.items() if isinstance(s, OrthoStream) and s.tail is not None]
        if held and not tails:
            raise TargetError(
                f"{name} has a low-rank tail in stream {held[0]!r}, which covers the whole weight and leaves no place "
                "to another stream; split with keep_tail=False, or start from the original model"
            )
        return
    if not is_linear(module):
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise TargetError(
            f"{name} is a {kind}; expected nn.Linear or Conv1D. A layer that another library has quantised or wrapped "
            "must be loaded in its dense form first"
        )
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise TargetError(f"{name} holds {weight.dtype} codes, not dense weights; load the model without quantisation")
    if weight.is_meta:
        raise TargetError(f"{name} has no data (meta device); load the weights first")
    if id(weight) in shared:
        raise TargetError(f"{name} shares its weight with another module and is not split; leave it out")
    if not bool(torch.isfinite(weight.detach()).all()):
        raise TargetError(f"{name} holds NaN or infinite weights; repair the checkpoint first")
