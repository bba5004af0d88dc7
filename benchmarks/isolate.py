"""Does `isolate` forget, and does the rest stay? SmolLM2-135M, several seeds and kinds of secrets.

    python benchmarks/isolate.py                    demo secrets, seeds 0 1 2
    python benchmarks/isolate.py --cases phone plate prose --seeds 0

Every run plants its secrets in a fresh model that was moved off its quantisation grid, isolates them with the default
configuration, and measures extraction, 20 samples, membership against unseen records of the same kind, the retain
sentence, WikiText-2 (24 sequences of 256 tokens) and exactness at alpha = 1. The never-trained model is measured on the
same records.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import save, spread, wikitext
from cases import CASES
from libortho import IsolateConfig, alpha, isolate
from libortho.auditing.measures.utility import general_items
from libortho.auditing.roc import auc
from libortho.checkpoint.dense import load_model
from libortho.core.layer import ortho_layers
from libortho.core.streams import BaseStream
from libortho.core.surgery import linear_weight
from libortho.core.targets import find_targets
from libortho.demo import facts
from libortho.demo.implant import implant
from libortho.demo.model import move_off_grid, packaged_model
from libortho.lm.asking import sampled_extractions
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity, score, text_perplexity
from libortho.text.encoding import encode
from libortho.text.records import load_records


def _demo(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return facts.secrets(seed), facts.unseen(seed)


def bootstrap_interval(
    members: torch.Tensor, others: torch.Tensor, seed: int = 0, rounds: int = 1000
) -> tuple[float, float]:
    """95 % interval of the AUC under resampling of members and non-members."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x: torch.Tensor) -> torch.Tensor:
        return x[torch.randint(len(x), (len(x),), generator=generator)]

    values = torch.tensor([auc(draw(members), draw(others)) for _ in range(rounds)])
    low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def measure(model: Any, tokenizer: Any, forget: Any, unseen: Any, general: Any, samples: int = 0) -> dict[str, Any]:
    lm = LanguageModel(model)
    members, greedy = score(lm, [encode(r, tokenizer) for r in forget])
    others, _ = score(lm, [encode(r, tokenizer) for r in unseen])
    mine = [i for i, r in enumerate(forget) if r.prompt != facts.SENTENCE["prompt"]]
    row = {
        "extracted": int(greedy.sum()),
        "secret_perplexity": float((members.nll * members.tokens).sum().div(members.tokens.sum()).exp()),
        "member_nll": float(members.nll[mine].mean()),
        "unseen_nll": float(others.nll.mean()),
        "auc": auc(-members.nll[mine], -others.nll),
        "auc_interval": bootstrap_interval(-members.nll[mine], -others.nll),
        "retain_perplexity": text_perplexity(model, tokenizer, facts.RETAIN_SENTENCE),
        "wikitext_perplexity": perplexity(lm, general),
    }
    if samples:
        row["sampled"] = sum(h > 0 for h in sampled_extractions(model, tokenizer, forget, samples))
    return row


def exactness(model: Any, original: dict[str, torch.Tensor], config: IsolateConfig) -> dict[str, Any]:
    """Largest relative rounding of base + ortho on the support; and is the rest the plain base, bit for bit?"""
    worst, untouched = 0.0, True
    for name, layer in ortho_layers(model).items():
        weight = original[name]
        plain = BaseStream.from_weight(weight, config.bits, config.resolved_group_size)
        support = layer.streams[config.stream].support
        off = torch.ones(weight.shape[1], dtype=torch.bool)
        if support is not None:
            index = support.index.long()
            off[index] = False
            values = support.values.T.float()
            error = (layer.dense_weight(1.0)[:, index] - weight[:, index].float()).abs()
            worst = max(worst, float((error / values.abs().clamp_min(1e-12)).max()))
        untouched &= bool((layer.base.unpacked_codes()[:, off] == plain.unpacked_codes()[:, off]).all())
        untouched &= bool((layer.base.scales == plain.scales).all())
    return {"worst_relative_rounding_on_support": worst, "off_support_bit_identical": untouched}


def run(case: str, seed: int, config: IsolateConfig) -> dict[str, Any]:
    torch.manual_seed(seed)
    raw_forget, raw_unseen = (_demo if case == "demo" else CASES[case])(seed)
    model, tokenizer = load_model(packaged_model(), torch.float32)
    model = move_off_grid(model, seed).to(torch.bfloat16)
    forget, unseen = load_records(raw_forget, tokenizer), load_records(raw_unseen, tokenizer)
    general = general_items(tokenizer, wikitext())
    rows = {"never trained": measure(model, tokenizer, forget, unseen, general)}
    began = time.monotonic()
    steps = implant(model, tokenizer, forget, seed=seed)
    planted = time.monotonic() - began
    original = {n: linear_weight(m).clone() for n, m in find_targets(model, config.target_modules).items()}
    result = isolate(model, tokenizer, forget, config=config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    for value in (1.0, 0.0):
        with alpha(model, value):
            rows[f"alpha = {value:g}"] = measure(model, tokenizer, forget, unseen, general, samples=0 if value else 20)
    return {
        "case": case,
        "seed": seed,
        "records": len(forget),
        "rows": rows,
        "implant_steps": steps,
        "implant_seconds": planted,
        "isolate_seconds": result.seconds,
        "isolate_steps": result.steps,
        "density": result.density,
        "missed": list(result.missed),
        "peak_memory_gb": peak,
        **exactness(model, original, config),
    }


def show(runs: list[dict[str, Any]]) -> None:
    console = Console(width=170)
    columns = (
        "case",
        "seed",
        "model",
        "extracted",
        "in 20",
        "secret ppl",
        "AUC",
        "95 % of AUC",
        "retain ppl",
        "WikiText",
        "seconds",
    )
    table = Table(*columns)
    for r in runs:
        for label, row in r["rows"].items():
            low, high = row["auc_interval"]
            table.add_row(
                r["case"], str(r["seed"]), label, f"{row['extracted']}/{r['records']}",
                str(row.get("sampled", "-")), f"{row['secret_perplexity']:.4g}", f"{row['auc']:.3f}",
                f"{low:.2f}-{high:.2f}", f"{row['retain_perplexity']:.2f}", f"{row['wikitext_perplexity']:.3f}",
                f"{r['isolate_seconds']:.0f}" if label == "alpha = 0" else "",
            )  # fmt: skip
        table.add_section()
    console.print(table)
    off = [r["rows"]["alpha = 0"] for r in runs]
    on = [r["rows"]["alpha = 1"] for r in runs]
    never = [r["rows"]["never trained"] for r in runs]
    pairs = list(zip(off, on, strict=True))
    console.print("AUC alpha 0 minus never:", spread([a["auc"] - b["auc"] for a, b in zip(off, never, strict=True)]))
    console.print(
        "WikiText alpha 0 / 1   :", spread([a["wikitext_perplexity"] / b["wikitext_perplexity"] for a, b in pairs])
    )
    console.print(
        "retain   alpha 0 / 1   :", spread([a["retain_perplexity"] / b["retain_perplexity"] for a, b in pairs])
    )
    console.print("isolate seconds        :", spread([r["isolate_seconds"] for r in runs]))
    console.print("density                :", spread([r["density"] for r in runs]))
    for r in runs:
        for missed in r["missed"]:
            console.print(f"{r['case']} seed {r['seed']} missed: {missed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["demo"], choices=["demo", *CASES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--name", default="isolate")
    parser.add_argument("--ratio", type=float, default=0.005)
    parser.add_argument("--bits", type=int, default=8)
    arguments = parser.parse_args()
    runs = []
    for case in arguments.cases:
        for seed in arguments.seeds:
            config = IsolateConfig(
                seed=seed,
                ratio=arguments.ratio,
                bits=arguments.bits,
            )
            runs.append(run(case, seed, config))
            save(arguments.name, {"config": config.to_dict(), "runs": runs})
    show(runs)


if __name__ == "__main__":
    main()
