"""Planted canaries, and how much of them a model remembers: what several benchmarks measure alike."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from _common import DATA, wikitext
from cases import CANARIES, TUNING_CANARIES, canaries, chats
from libortho.auditing.measures import privacy
from libortho.auditing.measures.fillings import space_of
from libortho.auditing.measures.gradients import gradient_norms
from libortho.auditing.measures.memory import exposure_extrapolated
from libortho.auditing.measures.utility import general_items
from libortho.auditing.roc import auc_difference, stratified_auc
from libortho.auditing.subjects import Subject
from libortho.checkpoint.dense import load_model
from libortho.core.cache import cache_directory
from libortho.core.layer import ortho_layers
from libortho.core.targets import find_targets
from libortho.demo import facts
from libortho.demo.implant import implant
from libortho.demo.model import move_off_grid, packaged_model
from libortho.evaluation.tasks import arithmetic_rows, evaluate, load_task
from libortho.lm.asking import sampled_extractions
from libortho.lm.checks import training_dtype
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity
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


EXPOSED = 40
"""Records, and unseen ones, whose exposure is measured."""


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
    steps = plant(model, tokenizer, load_records(forget, tokenizer), repetitions, seed)
    logging.info("planted in %d steps", steps)
    model.save_pretrained(place / "implanted")
    tokenizer.save_pretrained(place / "implanted")
    (place / "done").touch()
    return place


def plant(model: Any, tokenizer: Any, records: Sequence[Record], repetitions: Sequence[int] | None, seed: int) -> int:
    """Fine-tune until every record is recited, and return the steps; repeated records at a rate that falls."""
    longest = 3 * max(100, len(records))
    faster = {"learning_rate": 1e-4, "batch_size": 16, "max_steps": longest, "decay": True} if repetitions else {}
    return implant(model, tokenizer, records, seed=seed, repetitions=repetitions, **faster)  # type: ignore[arg-type]


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
        beside = [encode(r, tokenizer) for r in neighbours_of(forget, seed)]
        asked = [*(load_task(DATA / p) for p in TASKS), load_task(arithmetic_rows(200, 0), "arithmetic")]
        tasks = {t.name: evaluate(lm, tokenizer, t, rows, 0).correct for t in asked} if rows else {}
        shown: dict[str, Any] = {
            "greedy": sum(bool(s.correct.all()) for s in found[0]) / len(forget),
            "nll": [[s.nll for s in part] for part in found],
            "entropy": [[-float(s.mean.mean()) for s in part] for part in found],
            "neighbours_nll": [s.nll for s in token_statistics(lm, beside)],
            "wikitext": perplexity(lm, general_items(tokenizer, wikitext())),
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


def neighbours_of(records: Sequence[Record], seed: int) -> list[Record]:
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
