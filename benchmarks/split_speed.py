"""What the low-rank split costs beside the SVD that it does without.

    python benchmarks/split_speed.py [--rounds 5]

SmolLM2-135M's `down_proj`s, rank 0.95, INT8, tail and 0.5 % of the entries; one thread, interleaved with
`torch.linalg.svd` of the same layers. Also: time against the number of layers, and what the eigendecomposition loses.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch

from _common import save
from _timing import ratio, rounds, shown
from libortho import SplitConfig, split
from libortho.checkpoint.dense import load_model
from libortho.core.layer import ortho_layers
from libortho.core.surgery import linear_weight
from libortho.core.targets import find_targets
from libortho.demo.model import packaged_model

TARGET = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    count = parser.parse_args().rounds
    torch.set_num_threads(1)
    model, _ = load_model(packaged_model(), torch.bfloat16)
    layers = find_targets(model, ["down_proj"])
    weights = {n: linear_weight(m).float() for n, m in layers.items()}
    split_model = {}

    def run(names: list[str]) -> None:
        holder = torch.nn.ModuleDict({n.replace(".", "_"): copy.deepcopy(layers[n]) for n in names})
        split_model["last"] = split(holder, SplitConfig(target_modules="re:.*", rank_ratio=0.95))

    def decompose() -> None:
        for weight in weights.values():
            torch.linalg.svd(weight, full_matrices=False)

    names = list(layers)
    sizes = [len(names) // 4, len(names) // 2, len(names)]
    calls = {f"{n} layers": (lambda n=n: run(names[:n])) for n in sizes}
    seconds = rounds({"svd": decompose, **calls}, count, warmup=1)
    against = ratio(seconds, f"{len(names)} layers", "svd")
    print(f"split / {len(names)} full SVDs: {shown(against)} (target <= {TARGET})")
    data: dict[str, Any] = {"target": TARGET, "ratio": against, "seconds": seconds, "layers": sizes}
    for size in sizes:
        per_layer = min(seconds[f"{size} layers"]) / size
        data[f"seconds_per_layer_{size}"] = per_layer
        print(f"{size:3} layers: {1000 * per_layer:.1f} ms per layer")
    run(names)
    worst = 0.0
    for name, layer in zip(names, ortho_layers(split_model["last"]).values(), strict=True):
        singular = torch.linalg.svdvals(weights[name].double())
        best = float(singular[layer.report.rank :].norm() / singular.norm())
        worst = max(worst, abs(layer.report.low_rank_error / best - 1))
    data["worst_excess_error"] = worst
    print(f"low-rank error beside the optimum: apart by at most {worst:.2e} of it")
    print(f"saved to {save('split_speed', data).name}")


if __name__ == "__main__":
    main()
