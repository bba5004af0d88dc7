"""Is alpha = 0 a model that was never trained on the records? Random canaries, several seeds, several requests.

    python benchmarks/forgetting.py plant --seeds 11 12 13               the models, once (in the cache)
    python benchmarks/forgetting.py measure --seeds 11 12 13             the final templates
    python benchmarks/forgetting.py measure --case tuning --seeds 0
    python benchmarks/forgetting.py measure --seeds 11 --attacks         with rounding, relearning, other prompts
    python benchmarks/forgetting.py measure --seeds 11 --count 1         requests of other sizes
    python benchmarks/forgetting.py measure --count 10 --ratio auto      the smallest budget that will do
    python benchmarks/forgetting.py measure --case chat --seeds 11       the canaries in chats of one and of three turns
    python benchmarks/forgetting.py measure --case demo --seeds 0 --model gemma3      another family (second_model.py)
    python benchmarks/forgetting.py sequential --seeds 11                the records in ten requests
    python benchmarks/forgetting.py show                                 tables of what was measured

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
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _canaries import KINDS, PLAIN, case, compared, device_name, figures, models, neighbours_of, unedited
from _common import RESULTS, save, wikitext
from _forgetting_tables import KEY, OPTIONS, show, show_sequential, summarise
from _method import METHOD
from libortho import IsolateConfig, alpha, isolate
from libortho.auditing.attacks import AttackInputs, relearning, requantisation
from libortho.auditing.measures.utility import general_items
from libortho.auditing.prompts import variants
from libortho.auditing.subjects import Subject
from libortho.checkpoint.dense import load_model
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity
from libortho.lm.token_statistics import token_statistics
from libortho.text.encoding import encode
from libortho.text.records import Record, load_records


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
    groups = [[encode(r, tokenizer) for r in part] for part in (forget, unseen, neighbours_of(forget, seed))]

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
        return {**figures, "extracted": extracted, "wikitext": perplexity(lm, windows)}

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
