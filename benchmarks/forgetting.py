"""Is alpha = 0 a model that was never trained on the records? Random canaries, several seeds, several requests.

    python benchmarks/forgetting.py plant --seeds 11 12 13               the models, once (in the cache)
    python benchmarks/forgetting.py measure --seeds 11 12 13             the final templates
    python benchmarks/forgetting.py measure --case tuning --seeds 0
    python benchmarks/forgetting.py measure --seeds 11 --attacks         with rounding, relearning, other prompts
    python benchmarks/forgetting.py measure --seeds 11 --count 1         requests of other sizes
    python benchmarks/forgetting.py measure --gradient-weight 5          the gradient's norm matched too
    python benchmarks/forgetting.py measure --count 10 --ratio auto      the smallest budget that will do
    python benchmarks/forgetting.py measure --case chat --seeds 11       the canaries in chats of one and of three turns
    python benchmarks/forgetting.py measure --case demo --seeds 0 --model gemma3      another family (second_model.py)
    python benchmarks/forgetting.py sequential --seeds 11                the records in ten requests
    python benchmarks/forgetting.py show                                 table and plots of what was measured

100 canaries in four templates, each repeated 1 to 10 times in an epoch, are planted in SmolLM2-135M, moved off its
quantisation grid. In chats (``--case chat``) loss is on the answers alone. The never-trained model is measured on the
same records, 400 unseen ones of the same templates stand beside them, and differences of AUC are paired (bootstrap).
Templates of ``--case tuning`` were looked at while the method was made, those of ``--case final`` were not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import DATA, RESULTS, save, wikitext
from cases import CANARIES, TUNING_CANARIES, canaries, chats
from libortho import IsolateConfig, alpha, isolate
from libortho.auditing.attacks import AttackInputs, relearning, requantisation
from libortho.auditing.measures import privacy
from libortho.auditing.measures.fillings import space_of
from libortho.auditing.measures.gradients import gradient_norms
from libortho.auditing.measures.memory import exposure_extrapolated
from libortho.auditing.measures.utility import general_items
from libortho.auditing.page.charts import dots
from libortho.auditing.page.marks import Dot, Row
from libortho.auditing.prompts import variants
from libortho.auditing.roc import auc_difference, stratified_auc
from libortho.auditing.subjects import Subject
from libortho.checkpoint.dense import load_model
from libortho.core.cache import cache_directory
from libortho.core.layer import ortho_layers
from libortho.core.targets import find_targets
from libortho.demo import facts
from libortho.demo.implant import implant
from libortho.demo.model import move_off_grid, packaged_model
from libortho.evaluation.intervals import mean_estimate
from libortho.evaluation.tasks import arithmetic_rows, evaluate, load_task
from libortho.lm.checks import training_dtype
from libortho.lm.metrics import general_perplexity, sampled_extractions
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import shared_prefix_nll, token_statistics
from libortho.text import counterfactuals
from libortho.text.encoding import encode
from libortho.text.records import Record, load_records
from second_model import move_second_off_grid, second_model

KINDS: dict[str, tuple[Callable[[], Path], Callable[[torch.nn.Module, int], torch.nn.Module]]] = {
    "smollm2": (packaged_model, move_off_grid),
    "gemma3": (second_model, move_second_off_grid),
}
"""Models, the packaged one and a second family's: where each comes from, and what moves it off its grid."""
PLAIN = "smollm2"
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus", "grad_norm")
TASKS = ("lambada/lambada_openai_test.jsonl", "arc/arc_easy_test.jsonl", "piqa/piqa_valid.jsonl")
KEY, OPTIONS = ("model", "case", "seed", "records"), ("objective", "gradient_weight", "ratio")
"""What tells stored runs apart, beside where they ran; options of the isolation."""
METHOD = {"objective": "profile", "gradient_weight": 0.0}
"""The method of the library, as stored runs of others name theirs."""
EXPOSED = 40
"""Records, and unseen ones, whose exposure is measured."""
PLOTS = Path(__file__).parents[1] / "docs" / "images"
STYLE = (
    ".chart { font: 10px sans-serif; background: #fff } .chart text { fill: #444 } .grid { stroke: #ddd } "
    ".axis, .rule { stroke: #777 } .whisker, .line, .mark { stroke: currentColor; fill: currentColor } "
    ".s-off { color: #b3401d } .s-on { color: #2b6cb0 } .s-reference { color: #555 } .s-control { color: #777 }"
)
"""Of a chart outside the report, whose page styles it."""
Enter = Callable[[], AbstractContextManager[Any]]


def case(name: str, seed: int, count: int) -> tuple[list[Any], list[Any], list[int] | None]:
    """Records to plant, unseen ones, and repetitions."""
    if name == "demo":
        return facts.secrets(seed), facts.unseen(seed), None
    if name == "chat":
        return chats(seed, count)
    return canaries(seed, CANARIES if name == "final" else TUNING_CANARIES, count)


def models(name: str, seed: int, count: int, kind: str = PLAIN, device: str = "cpu") -> Path:
    """Directory with ``never`` and ``implanted``, made at the first call."""
    which = f"{name}-{seed}-{count}" if kind == PLAIN else f"{kind}-{name}-{seed}-{count}"
    place = cache_directory() / "benchmarks" / which
    if (place / "done").is_file():
        return place
    forget, _, repetitions = case(name, seed, count)
    torch.manual_seed(seed)
    source, moved = KINDS[kind]
    loaded, tokenizer = load_model(source(), torch.float32, device)
    model: Any = moved(loaded, seed).to(training_dtype(device))
    model.save_pretrained(place / "never")
    tokenizer.save_pretrained(place / "never")
    longest = 3 * max(100, len(forget))
    faster = {"learning_rate": 1e-4, "batch_size": 16, "max_steps": longest, "decay": True} if repetitions else {}
    steps = implant(model, tokenizer, load_records(forget, tokenizer), seed=seed, repetitions=repetitions, **faster)  # type: ignore[arg-type]
    logging.info("planted in %d steps", steps)
    model.save_pretrained(place / "implanted")
    tokenizer.save_pretrained(place / "implanted")
    (place / "done").touch()
    return place


def figures(
    model: Any, tokenizer: Any, enter: Enter, forget: Sequence[Record], unseen: Sequence[Record], rows: int, seed: int,
    *, attacks: bool, sampling: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """What one model says of the records, record by record, and its ability.

    ``attacks``: also membership tests, and with ``sampling`` what takes long: samples and exposure.
    """
    mine, others = ([encode(r, tokenizer) for r in s] for s in (forget, unseen))
    subject = Subject("one", "one", "control", model, enter)
    with enter():
        lm = LanguageModel(model)
        found = [token_statistics(lm, items) for items in (mine, others)]
        beside = [encode(r, tokenizer) for r in _neighbours(forget, seed)]
        asked = [*(load_task(DATA / p) for p in TASKS), load_task(arithmetic_rows(200, 0), "arithmetic")]
        tasks = {t.name: evaluate(lm, tokenizer, t, rows, 0).correct for t in asked} if rows else {}
        shown: dict[str, Any] = {
            "greedy": sum(bool(s.correct.all()) for s in found[0]) / len(forget),
            "nll": [[s.nll for s in part] for part in found],
            "entropy": [[-float(s.mean.mean()) for s in part] for part in found],
            "neighbours_nll": [s.nll for s in token_statistics(lm, beside)],
            "wikitext": general_perplexity(lm, general_items(tokenizer, wikitext())),
            "tasks": {n: [int(c) for c in v] for n, v in tasks.items()},
        }
        if not attacks:
            return shown
        rest = [
            bool(s.correct[k:].all())
            for item, s in zip(mine, found[0], strict=True)
            for k in range(1, len(item.completion))
            if sum(c.isalnum() for c in tokenizer.decode(list(item.completion)[k:])) >= 4
        ]
        shown["beginning_given"] = sum(rest) / max(1, len(rest))
        if sampling:
            hits = sampled_extractions(model, tokenizer, list(forget), 20)
            shown["sampled"] = sum(h > 0 for h in hits) / len(forget)
            shown["exposure"] = [_exposures(lm, tokenizer, part[:EXPOSED], seed) for part in (forget, unseen)]
    targets = list(find_targets(model, "mlp-out")) if not ortho_layers(model) else list(ortho_layers(model))
    shown["scores"] = {
        "loss": [[privacy.loss_score(s.log_p) for s in part] for part in found],
        "zlib": [
            [privacy.zlib_score(r.completion, s.log_p) for r, s in zip(records, part, strict=True)]
            for records, part in zip((forget, unseen), found, strict=True)
        ],
        "min_k": [[privacy.min_k_score(s.log_p, 0.4) for s in part] for part in found],
        "min_k_plus": [[privacy.min_k_plus_score(s.log_p, s.mean, s.deviation, 0.4) for s in part] for part in found],
        "grad_norm": [(-gradient_norms(subject, items, targets)).tolist() for items in (mine, others)],
    }
    return shown


def _exposures(lm: LanguageModel, tokenizer: Any, records: Sequence[Record], seed: int) -> list[float]:
    """Bits, of each code: what else a sentence could be is not known, and any model finds most of it odder."""
    rng, found = random.Random(seed), []
    for r in records:
        if (space := space_of(r.completion)) is None:
            continue
        others = [r.answered(c) for c in space.draw(32, rng)]
        items = [encode(o, tokenizer) for o in (r, *others)]
        totals = shared_prefix_nll(lm, items).double() * torch.tensor([len(e.completion) for e in items])
        found.append(exposure_extrapolated(float(totals[0]), totals[1:], space.size))
    return found


def _neighbours(records: Sequence[Record], seed: int) -> list[Record]:
    """Somebody else's prompts with somebody else's codes; drawn with another seed than those that isolate makes."""
    rng, found = random.Random(seed + 1_000), []
    for r in records[:60]:
        prompts = counterfactuals.neighbours(r.prompt, 1, rng, r.spans)
        codes = counterfactuals.alternates(r.completion, 1, rng)
        found += [r.beside(p, c) for p, c in zip(prompts, codes, strict=True)]
    return found


def unedited(
    place: Path, forget: Sequence[Record], unseen: Sequence[Record], rows: int, seed: int, device: str,
    *, sampling: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Figures of the never-trained and of the planted model, measured once and kept beside them."""
    kept = place / (f"figures-{rows}.json" if sampling else f"figures-{rows}-unsampled.json")
    if not kept.is_file():
        made = {}
        for which in ("never", "implanted"):
            model, tokenizer = load_model(place / which, device=device)
            made[which] = figures(
                model, tokenizer, contextlib.nullcontext, forget, unseen, rows, seed,
                attacks=which == "never", sampling=sampling,
            )  # fmt: skip
            logging.info("%s measured", which)
        kept.write_text(json.dumps(made))
    return json.loads(kept.read_text())


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Isolate and measure one set of records."""
    place = models(name, seed, arguments.count, arguments.model, arguments.device)
    raw, beside, _ = case(name, seed, arguments.count)
    model, tokenizer = load_model(place / "implanted", device=arguments.device)
    forget, unseen = load_records(raw, tokenizer), load_records(beside, tokenizer)
    plain = unedited(place, forget, unseen, arguments.rows, seed, arguments.device)
    config = IsolateConfig(seed=seed, ratio=arguments.ratio)
    result = isolate(model, tokenizer, forget, config=config)
    logging.info("isolated: %s", result.missed or "no criterion missed")
    off, on = (
        figures(model, tokenizer, partial(alpha, model, a), forget, unseen, arguments.rows, seed, attacks=a == 0.0)
        for a in (0.0, 1.0)
    )
    row = {
        "model": arguments.model, "case": name, "seed": seed, "records": len(forget), **METHOD,
        "ratio": arguments.ratio,
        "device": device_name(arguments.device),
        "steps": result.steps, "seconds": result.seconds, "density": result.density, "missed": result.missed,
        "retain_kl": result.retain_kl, "quantised_kl": result.quantised_kl, "recited_on": result.recited_on,
        **compared(off, on, plain["never"], plain["implanted"], forget, unseen, seed),
    }  # fmt: skip
    if arguments.attacks:
        row["attacks"] = attacked(model, tokenizer, place, forget)
    return row


def compared(
    off: Any, on: Any, never: Any, implanted: Any, forget: Sequence[Record], unseen: Sequence[Record], seed: int
) -> dict[str, Any]:
    """The figures of the four models, and the differences that the targets are about."""
    models = {"alpha 0": off, "alpha 1": on, "never trained": never, "implanted": implanted}
    strata = [[privacy.template_of(r.prompt) for r in s] for s in (forget, unseen)]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / max(1, len(values))

    rows = {
        key: {
            "greedy": f["greedy"], "nll": mean(f["nll"][0]), "nll_unseen": mean(f["nll"][1]),
            "entropy": mean(f["entropy"][0]), "entropy_unseen": mean(f["entropy"][1]),
            "neighbours_nll": mean(f["neighbours_nll"]), "wikitext": f["wikitext"],
            "tasks": {t: mean(c) for t, c in f["tasks"].items()},
        }
        for key, f in models.items()
    }  # fmt: skip
    for key, f in models.items():
        if "scores" in f:
            rows[key] |= {n: f[n] for n in ("sampled", "beginning_given") if n in f}
            if "exposure" in f:
                rows[key] |= {"exposure": mean(f["exposure"][0]), "exposure_unseen": mean(f["exposure"][1])}
            rows[key]["auc"] = {a: _auc(f["scores"][a], strata, seed) for a in ATTACKS}
    differences = {}
    for attack in ATTACKS:
        found = auc_difference(*off["scores"][attack], *never["scores"][attack], *strata, seed=seed)
        differences[attack] = [found.value, found.low, found.high]
    return {"models": rows, "auc_difference": differences}


def device_name(device: str) -> str:
    """What a run was made on, as far as it matters for its figures and times."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


def _auc(scores: Sequence[Sequence[float]], strata: Sequence[Sequence[str]], seed: int) -> float:
    return stratified_auc(*scores, *strata)


def attacked(model: Any, tokenizer: Any, place: Path, forget: Sequence[Record]) -> dict[str, Any]:
    """Rounding to fewer bits, one epoch of training on half of the set, and other words and formats of the prompts."""
    items, general = [encode(r, tokenizer) for r in forget], general_items(tokenizer, wikitext(), 4)
    reference, _ = load_model(place / "never", device=str(next(model.parameters()).device))
    off = Subject("off", "alpha = 0", "audited", model, lambda: alpha(model, 0.0))
    never = Subject("reference", "never trained", "reference", reference, contextlib.nullcontext)
    on = Subject("on", "alpha = 1", "switch on", model, lambda: alpha(model, 1.0))
    inputs = AttackInputs(subjects=[off, never, on], items=items, general=general)
    rounded, again = requantisation.run(inputs), relearning.run(inputs, epochs=1)
    asked = [encode(v, tokenizer) for r in forget for v in variants(r, tokenizer).values()]
    with alpha(model, 0.0):
        said = [bool(s.correct.all()) for s in token_statistics(LanguageModel(model), asked)]
    with alpha(model, 1.0):
        told = [bool(s.correct.all()) for s in token_statistics(LanguageModel(model), asked)]
    return {
        "requantisation": rounded,
        "relearning": again,
        "other_prompts": {"asked": len(asked), "alpha 0": sum(said) / len(said), "alpha 1": sum(told) / len(told)},
    }


def sequential(name: str, seed: int, arguments: argparse.Namespace, requests: int = 10) -> dict[str, Any]:
    """The records in ``requests`` requests one after another, each with a stream of its own."""
    place = models(name, seed, arguments.count, arguments.model, arguments.device)
    raw, beside, _ = case(name, seed, arguments.count)
    model, tokenizer = load_model(place / "implanted", device=arguments.device)
    forget, unseen = load_records(raw, tokenizer), load_records(beside, tokenizer)
    windows = general_items(tokenizer, wikitext())
    groups = [[encode(r, tokenizer) for r in part] for part in (forget, unseen, _neighbours(forget, seed))]

    def state(taken: int) -> dict[str, float]:
        """Of all requests so far, and of those to come."""
        lm = LanguageModel(model)
        mine, others, near = (token_statistics(lm, g) for g in groups)
        asked = [i % requests < taken for i in range(len(mine))]
        means = {
            "forgotten_nll": [s.nll for s, a in zip(mine, asked, strict=True) if a],
            "waiting_nll": [s.nll for s, a in zip(mine, asked, strict=True) if not a],
            "unseen_nll": [s.nll for s in others],
            "neighbours_nll": [s.nll for s in near],
        }
        figures = {n: sum(v) / len(v) for n, v in means.items() if v}
        extracted = sum(bool(s.correct.all()) for s, a in zip(mine, asked, strict=True) if a)
        return {**figures, "extracted": extracted, "wikitext": general_perplexity(lm, windows)}

    rows = [{"requests": 0, **state(0)}]
    for r in range(requests):
        result = isolate(model, tokenizer, forget[r::requests], config=IsolateConfig(seed=seed, stream=f"request-{r}"))
        with alpha(model, 0.0):
            figures = state(r + 1)
        rows.append({"requests": r + 1, "steps": result.steps, "seconds": result.seconds, **figures})
        logging.info("%s", rows[-1])
    with alpha(model, 1.0):
        on = sum(bool(s.correct.all()) for s in token_statistics(LanguageModel(model), groups[0]))
    return {
        "model": arguments.model, "case": name, "seed": seed, "records": len(forget), "rows": rows, "recited_on": on,
    }  # fmt: skip


def show_sequential(runs: Sequence[dict[str, Any]]) -> None:
    for r in runs:
        title = f"{r['records']} records in requests, {r['case']} {r['seed']}; {r['recited_on']} recited with all on"
        table = Table("requests", "extracted", "forgotten", "waiting", "unseen", "neighbours", "WikiText", "steps",
                      "seconds", title=title)  # fmt: skip
        for row in r["rows"]:
            nats = [f"{row[k]:.2f}" if k in row else "" for k in
                    ("forgotten_nll", "waiting_nll", "unseen_nll", "neighbours_nll", "wikitext")]  # fmt: skip
            cost = [str(row.get("steps", "")), f"{row['seconds']:.0f}" if "seconds" in row else ""]
            table.add_row(str(row["requests"]), str(row["extracted"]), *nats, *cost)
        Console(width=140).print(table)


def show(runs: Sequence[dict[str, Any]]) -> None:
    """One row for each model of each run, and the plots."""
    table = Table("case", "seed", "method", "state", "greedy %", "in 20 %", "beginning %", "exposure", "unseen",
                  "nats", "unseen", *(f"AUC {a}" for a in ATTACKS), "neighbours", "WikiText", "steps")  # fmt: skip
    for r in runs:
        for label, m in r["models"].items():
            cells = [f"{100 * m['sampled']:.0f}", f"{100 * m['beginning_given']:.1f}", f"{m['exposure']:.2f}",
                     f"{m['exposure_unseen']:.2f}"] if "auc" in m else [""] * 4  # fmt: skip
            table.add_row(
                _about(r), str(r["seed"]), _method(r), label, f"{100 * m['greedy']:.0f}", *cells,
                f"{m['nll']:.2f}", f"{m['nll_unseen']:.2f}",
                *(f"{m['auc'][a]:.3f}" if "auc" in m else "" for a in ATTACKS),
                f"{m['neighbours_nll']:.3f}", f"{m['wikitext']:.2f}", str(r["steps"]) if label == "alpha 0" else "",
            )  # fmt: skip
        table.add_section()
    console = Console(width=200)
    console.print(table)
    for r in runs:
        shown = ", ".join(
            f"{a} {v:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")  # of one record there is none
            for a, (v, low, high) in r["auc_difference"].items()
        )
        console.print(f"{_about(r)}, {r['seed']}, {_method(r)}: AUC minus never trained: {shown}")
        off, on = (r["models"][k]["tasks"] for k in ("alpha 0", "alpha 1"))
        console.print("   tasks alpha 0 / 1: " + ", ".join(f"{t} {off[t]:.3f} / {on[t]:.3f}" for t in off))
        console.print(f"   {r['steps']} steps, {r['seconds']:.0f} s on {r['device']}, density {r['density']:.5f}")
        console.print(f"   missed: {r['missed'] or 'nothing'}")
        if "attacks" in r:
            show_attacks(r["attacks"], console)
    if final := [r for r in runs if (r["model"], r["case"], r["records"]) == (PLAIN, "final", 100)]:
        plot(final)


def _about(run: dict[str, Any]) -> str:
    return f"{run['model']} {run['case']} {run['records']}"


def _method(run: dict[str, Any]) -> str:
    """What was not as by default, after the objective, and where it ran."""
    plain = {**METHOD, "ratio": IsolateConfig().ratio}
    changed = [f"{n} {run[n]}" for n in OPTIONS if n != "objective" and run[n] != plain[n]]
    return ", ".join([run["objective"], *changed, run["device"]])


def show_attacks(attacks: dict[str, Any], console: Console) -> None:
    """Rounding, relearning and other prompts, in one line each."""
    rounded = "; ".join(
        f"{a['format']} {100 * a['extraction']:.0f} % {a['nll']:.2f} ({a['reference_nll']:.2f})"
        for a in attacks["requantisation"]
    )
    console.print(f"   rounded, extracted and nats (never trained): {rounded}")
    for c in attacks["relearning"]["curves"]:
        console.print(
            f"   relearning, {c['subject']}, {c['data']}: nats {c['nll'][0]:.2f} to {c['nll'][-1]:.2f}, extracted "
            f"{100 * c['extraction'][-1]:.0f} %"
        )
    for n, v in attacks["relearning"]["recovery"].items():
        excess = attacks["relearning"]["excess"][n]
        console.print(f"   recovery by {n}: {v}, beyond the never-trained model's: {excess}")
    other = attacks["other_prompts"]
    console.print(f"   {other['asked']} other prompts: {100 * other['alpha 0']:.1f} % at alpha 0, "
                  f"{100 * other['alpha 1']:.1f} % at alpha 1")  # fmt: skip


def summarise(runs: Sequence[dict[str, Any]]) -> None:
    """Over the seeds of each case and method: mean, and the smallest and largest."""
    table = Table("case", "method", "seeds", "figure", "mean", "from", "to")
    for about, method in dict.fromkeys((_about(r), _method(r)) for r in runs):
        same = [r for r in runs if (_about(r), _method(r)) == (about, method)]
        values = {f"AUC {a} - never trained": [r["auc_difference"][a][0] for r in same] for a in ATTACKS}
        off, on, never = ([r["models"][k] for r in same] for k in ("alpha 0", "alpha 1", "never trained"))
        values |= {
            "greedy %": [100 * m["greedy"] for m in off],
            "in 20 samples % - never trained": [
                100 * (m["sampled"] - n["sampled"]) for m, n in zip(off, never, strict=True)
            ],
            "beginning given %": [100 * m["beginning_given"] for m in off],
            "exposure - unseen's (bits)": [m["exposure"] - m["exposure_unseen"] for m in off],
            "neighbours - alpha 1's (nats)": [
                m["neighbours_nll"] - n["neighbours_nll"] for m, n in zip(off, on, strict=True)
            ],
            "WikiText alpha 0 / 1": [m["wikitext"] / n["wikitext"] for m, n in zip(off, on, strict=True)],
            "alpha 1 greedy %": [100 * m["greedy"] for m in on],
            "seconds": [r["seconds"] for r in same],
        }
        asked = [(m["tasks"], n["tasks"]) for m, n in zip(off, on, strict=True) if m["tasks"]]
        for task in asked[0][0] if asked else ():
            values[f"{task} alpha 0 - 1 (points)"] = [100 * (m[task] - n[task]) for m, n in asked]
        for figure, found in values.items():
            spread = [f"{v:+.3f}" for v in (sum(found) / len(found), min(found), max(found))]
            table.add_row(about, method, str(len(found)), figure, *spread)
        table.add_section()
    Console(width=140).print(table)


def plot(runs: Sequence[dict[str, Any]]) -> None:
    """AUC of each attack minus that of the never-trained model, by method, over the seeds."""
    methods = list(dict.fromkeys(_method(r) for r in runs))
    styles = dict(zip(methods, ("off", "on", "reference", "control", "other", "member"), strict=False))
    rows = []
    for attack in ATTACKS:
        found = []
        for m in methods:
            values = [r["auc_difference"][attack][0] for r in runs if _method(r) == m]
            e = mean_estimate(values, seed=0) if len(values) > 1 else None
            low, high = (e.low, e.high) if e is not None else (None, None)
            found.append(Dot(styles[m], m, sum(values) / len(values), low, high))
        rows.append(Row(attack, dots=found))
    description = "AUC of membership attacks at alpha = 0 minus the never-trained model's; 0 is the aim."
    svg = dots("auc", "Membership attacks", description, rows, x_label="AUC minus never trained", x_range=(-0.6, 0.6),
               level=0.0)  # fmt: skip
    PLOTS.mkdir(parents=True, exist_ok=True)
    alone = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "<g ", f"<style>{STYLE}</style><g ", 1
    )
    (PLOTS / "membership.svg").write_text(alone)


def stored_runs(which: str = "runs") -> list[dict[str, Any]]:
    stored = RESULTS / "forgetting.json"
    return json.loads(stored.read_text()).get(which, []) if stored.is_file() else []


def keep(which: str, row: dict[str, Any], key: Sequence[str]) -> None:
    """Put a row among those of earlier runs, in place of one of the same case."""
    found = {n: stored_runs(n) for n in ("runs", "sequential")}  # another process may have added to it
    found[which] = [r for r in found[which] if any(r[k] != row[k] for k in key)] + [row]
    save("forgetting", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plant", "measure", "sequential", "show"])
    parser.add_argument("--case", default="final", choices=["final", "tuning", "demo", "chat"])
    parser.add_argument("--model", default=PLAIN, choices=KINDS)
    parser.add_argument("--count", type=int, default=100, help="canaries to plant")
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    parser.add_argument("--ratio", type=lambda text: text if text == "auto" else float(text), default=0.005)
    parser.add_argument("--rows", type=int, default=200, help="rows of each task; 0 for none")
    parser.add_argument("--attacks", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for seed in arguments.seeds if arguments.what != "show" else []:
        if arguments.what == "plant":
            models(arguments.case, seed, arguments.count, arguments.model, arguments.device)
            continue
        if arguments.what == "sequential":
            keep("sequential", sequential(arguments.case, seed, arguments), KEY)
            continue
        began = time.monotonic()
        keep("runs", run(arguments.case, seed, arguments), (*KEY, "device", *OPTIONS))
        logging.info("%s %d: %.0f s", arguments.case, seed, time.monotonic() - began)
    if runs := stored_runs():
        show(runs)
        summarise(runs)
    show_sequential(stored_runs("sequential"))


if __name__ == "__main__":
    main()
