"""Does `isolate` look in the right place? Secrets planted in known columns, and how many of those each score finds.

    python benchmarks/known_support.py --seeds 0 1 2

17 secrets are trained into random columns of every ``down_proj`` of SmolLM2-135M, as many as `isolate` may take
(0.5 %), and into nothing else. Each score then names as many columns: the share of them that is right is its precision
and its recall at once (chance: 0.5 %). "Recited" is what the model still recites once the named columns are put back to
what they were before the planting: a memory can be spoken through columns that it does not lie in, but undone only
where it lies.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from _common import save
from libortho import IsolateConfig, isolate
from libortho.checkpoint.dense import load_model
from libortho.core.surgery import linear_weight, swap
from libortho.core.targets import find_targets
from libortho.demo import facts
from libortho.demo.model import move_off_grid, packaged_model
from libortho.isolation.support import RequestReadings, select_columns
from libortho.lm.checks import training_dtype
from libortho.lm.gradients import tapped_gradients
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_logits, score
from libortho.selection.budget import allocate, balanced_weights, column_costs, retain_floor
from libortho.selection.columns import LAYER_CAP
from libortho.selection.readings import summed_odds
from libortho.text.encoding import Encoded, collate, encode
from libortho.text.records import load_records
from libortho.training.edit import EditLinear

STEPS, RATE, STOP = 300, 0.1, 0.1
"""Most steps of Adam, its step as a share of the weights' scale, and the loss at which planting ends."""


class _Found(Exception):
    """Ends `isolate` once its support is known."""


def plant(
    model: nn.Module, tokenizer: Any, layers: Mapping[str, nn.Module], seed: int
) -> tuple[dict[str, Tensor], int]:
    """Train the secrets into random columns; which ones, and how many secrets are recited then."""
    config, rng = IsolateConfig(bits=None, seed=seed), torch.Generator().manual_seed(seed)
    true, edited = {}, {}
    for name, module in layers.items():
        width = linear_weight(module).shape[1]
        true[name] = torch.randperm(width, generator=rng)[: max(1, int(config.ratio * width))].sort().values
        edited[name] = EditLinear(linear_weight(module), None, true[name], config.bits, config.resolved_group_size)
    swap(model, edited)
    trained = [e.values for e in edited.values() if e.values is not None]
    groups = [{"params": [v], "lr": RATE * float(v.detach().square().mean().sqrt())} for v in trained]
    optimiser, lm = torch.optim.Adam(groups), LanguageModel(model)
    items = [encode(r, tokenizer) for r in load_records(facts.secrets(seed))]
    torch.set_flush_denormal(True)
    for step in range(STEPS):
        batch = collate(random.Random(f"{seed} {step}").sample(items, 9))
        logits, labels, _ = judged_logits(lm, batch)
        loss = F.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 9 and (scores := score(lm, items))[1].all() and float(scores[0].nll.mean()) < STOP:
            break
    for name, module in layers.items():
        values = edited[name].values
        assert values is not None
        with torch.no_grad():
            linear_weight(module)[:, true[name]] = values.T.to(linear_weight(module))
    swap(model, layers)
    return true, int(score(lm, items)[1].sum())


def supports(model: nn.Module, tokenizer: Any, seed: int) -> dict[str, dict[str, Tensor]]:
    """The columns that each score names, by layer."""
    named: dict[str, dict[str, Tensor]] = {}

    def look(readings: RequestReadings, config: IsolateConfig) -> dict[str, Tensor]:
        lm, targets, ratio = readings.lm, readings.targets, float(config.ratio)
        named["isolate"] = select_columns(readings, config)
        lonely = [replace(c, neighbours=()) for c in readings.forget]
        named["without neighbours"] = select_columns(replace(readings, forget=lonely), config)

        def best(scores: dict[str, Tensor]) -> dict[str, Tensor]:
            return allocate(scores, ratio, LAYER_CAP, column_costs(targets))

        own = readings.own.saliency
        floor = retain_floor({n: s.mean(0) for n, s in readings.kept[0].saliency.items()})
        together = torch.cat(list(own.values()), 1)
        weights = balanced_weights(together, max(1, int(ratio * together.shape[1])))
        named["gradient of the records alone"] = best({n: weights @ s for n, s in own.items()})
        named["Fisher ratio, records equal"] = best({n: s.sum(0) / floor[n] for n, s in own.items()})
        named["weight times gradient"] = best(attribution(lm, targets, [r.secret for r in readings.forget]))
        named["largest columns"] = best({n: linear_weight(m).float().norm(dim=0) for n, m in targets.items()})
        raise _Found

    try:
        isolate(model, tokenizer, facts.secrets(seed), config=IsolateConfig(seed=seed), select=look)
    except _Found:
        return named
    raise AssertionError("isolate did not ask for columns")


def attribution(lm: LanguageModel, layers: Mapping[str, nn.Module], records: Sequence[Encoded]) -> dict[str, Tensor]:
    """First-order effect on the records' log-odds of deleting a column, |sum w g|, summed over records."""
    found: dict[str, Tensor] = {}
    for start in range(0, len(records), 8):
        batch = collate(records[start : start + 8]).to(lm.device)
        for name, (x, g) in tapped_gradients(lm, layers, batch, summed_odds).items():
            effect = (x * (g @ linear_weight(layers[name]).float())).sum(1).abs().sum(0)
            found[name] = found.get(name, torch.zeros_like(effect)) + effect
    return found


def run(seed: int) -> dict[str, Any]:
    """Precision of each score, and what is recited after putting its columns back."""
    model, tokenizer = load_model(packaged_model(), torch.float32)
    model = move_off_grid(model, seed).to(training_dtype())
    model.requires_grad_(False)
    layers = find_targets(model, "mlp-out")
    before = {n: linear_weight(m).clone() for n, m in layers.items()}
    true, recited = plant(model, tokenizer, layers, seed)
    named = {"true columns": true, **supports(model, tokenizer, seed)}
    planted = {n: linear_weight(m).clone() for n, m in layers.items()}
    items, lm = [encode(r, tokenizer) for r in load_records(facts.secrets(seed))], LanguageModel(model)
    rows = {}
    for score_name, columns in named.items():
        for n, m in layers.items():
            index = columns.get(n, torch.zeros(0, dtype=torch.long))
            with torch.no_grad():
                linear_weight(m).copy_(planted[n])
                linear_weight(m)[:, index] = before[n][:, index]
        right = sum(int(torch.isin(c, true[n]).sum()) for n, c in columns.items())
        share = right / sum(len(c) for c in columns.values())
        rows[score_name] = {"precision": share, "recited": int(score(lm, items)[1].sum())}
    return {"seed": seed, "planted": recited, "scores": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    runs = [run(seed) for seed in seeds]
    save("known_support", {"runs": runs})
    table = Table("score", "precision %", "recited of 17, columns put back", title="secrets in known columns")
    table.add_row("(planted)", "", ", ".join(str(r["planted"]) for r in runs))
    of: Callable[[str, str], list[float]] = lambda name, key: [r["scores"][name][key] for r in runs]  # noqa: E731
    for name in runs[0]["scores"]:
        precision = [100 * p for p in of(name, "precision")]
        shown = f"{statistics.mean(precision):.1f} ({min(precision):.1f} to {max(precision):.1f})"
        table.add_row(name, shown, ", ".join(str(int(n)) for n in of(name, "recited")))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
