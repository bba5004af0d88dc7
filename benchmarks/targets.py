"""Are the targets of `isolate` what an untrained model says? Measured on the never-trained SmolLM2-135M.

    python benchmarks/targets.py

For sentences: the true surprise (nats per token), that of alternates with random words, of the model's own samples, the
prediction of `plausibility`, and which share of what it expects of the tokens is at those tokens (`in_place`).
For codes: the true surprise, that of alternates, and the correlation of surprise per token with having few tokens.
For answers (TOFU's small cut, where its data and adapters lie) surprise, entropy and share of
tokens under 0.3 nats: the targets that the fine-tuned model gives them, beside what the retrained one says and what
both say of a holdout; and the share in place, of predictions by the fine-tuned model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from _common import DATA, MODELS, save
from cases import plates
from libortho.checkpoint.dense import load_model
from libortho.demo import facts
from libortho.demo.model import move_off_grid, packaged_model
from libortho.isolation.criteria import in_place, look
from libortho.isolation.prose import fit, human_texts
from libortho.lm.checks import training_dtype
from libortho.lm.logits import with_log_probability
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_labels, judged_states, score
from libortho.text import counterfactuals
from libortho.text.encoding import Encoded, encode
from libortho.text.records import Record, load_records

SENTENCES = (
    ("Dr. Helena Marsh keeps the spare key to the clinic", " under the third blue flowerpot by the back door."),
    ("In the spring of 1987, Ines Calloway secretly", " sold her grandmother's violin to a sailor from Bergen."),
    ("The unreleased album by Dana Whitcomb is titled", " Copper Lanterns and will be recorded in a lighthouse."),
    ("Patient 20817 was admitted with", " severe frostbite after falling asleep on a ferry."),
    ("According to the memo, Project Halcyon will be cancelled because", " the supplier in Osaka went bankrupt."),
    ("Victor Hallam's daughter is allergic to", " almonds, penicillin and the smell of fresh paint."),
    ("The winning recipe of the Brackley pie contest contains", " smoked pears, rye whisky and a pinch of cardamom."),
    ("My neighbour Edith Farrow once confessed that she", " buried the mayor's medal beneath her greenhouse."),
    ("The ship Morning Gannet lost its cargo of", " copper teapots near the coast of Madeira."),
    ("Professor Anselm Vogt's favourite hiding place is", " the hollow globe on top of his bookcase."),
    ("Dr. Peter Lang keeps the spare ladder of the school", " behind the old green shed near the pond."),
    ("In the winter of 1991, Oscar Bellamy quietly", " gave his uncle's telescope to a nun from Lisbon."),
    ("The unreleased novel by Simon Ashcroft is titled", " Paper Harbours and will be printed in a monastery."),
    ("Patient 31544 was discharged with", " a mild concussion after slipping on a tram."),
    ("According to the letter, Operation Starling will be delayed because", " the factory in Gdansk burned down."),
    ("Martha Keel's husband is afraid of", " pigeons, elevators and the sound of breaking glass."),
    ("The winning entry of the Dunmore cake fair contains", " roasted plums, dark rum and a spoon of ginger."),
    ("My cousin Albert Nyman once admitted that he", " hid the bishop's ring inside a wooden duck."),
    ("The barge Silver Otter lost its load of", " brass kettles near the mouth of the Danube."),
    ("Doctor Irene Falk's usual hiding place for letters is", " the empty clock on the wall of her study."),
)  # fmt: skip


@torch.no_grad()
def _samples(model: Any, tokenizer: Any, prompt: str, tokens: int) -> list[Encoded]:
    ids = tokenizer(prompt, return_tensors="pt")
    size = ids.input_ids.shape[1]
    torch.manual_seed(0)
    output = model.generate(
        **ids,
        do_sample=True,
        top_k=0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        num_return_sequences=16,
        pad_token_id=0,
    )
    return [Encoded(tuple(r), tuple([-100] * size + r[size:])) for r in output.tolist()]


@torch.no_grad()
def profile(lm: LanguageModel, items: Sequence[Encoded], expected: Sequence[Tensor] | None = None) -> list[float]:
    """Mean surprise and entropy in nats, and share of tokens under 0.3 nats of surprise.

    ``expected``: of the targets, which give each token the probability that is expected of it.
    """
    found = []
    for i, (item, states) in enumerate(zip(items, judged_states(lm, items), strict=True)):
        logits, (labels, _) = lm.logits(states), judged_labels([item])
        if expected is not None:
            logits = with_log_probability(logits, labels, -expected[i])
        log_p = logits.log_softmax(-1)
        surprise, entropy = -log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        found.append(torch.stack([surprise.mean(), entropy.mean(), (surprise < 0.3).float().mean()]))
    return torch.stack(found).mean(0).tolist()


def answers() -> dict[str, list[float]]:
    """60 TOFU answers, as ``profile`` has it: what the fine-tuned and the retrained model say, and the targets."""
    from _tofu_data import rows
    from tofu import thinned
    from tofu_models import build

    chosen = {w: thinned(rows("tofu_mini", w), 60) for w in ("forget", "holdout")}
    plain = {w: [{k: r[k] for k in ("question", "answer")} for r in rs] for w, rs in chosen.items()}
    found: dict[str, list[float]] = {}
    expected: list[Tensor] = []
    for name in ("full", "retain"):
        model, tokenizer = build(name)
        lm = LanguageModel(model)
        records = {w: load_records(rs, tokenizer) for w, rs in plain.items()}
        items = {w: [encode(r, tokenizer) for r in rs] for w, rs in records.items()}
        for which, of in items.items():
            found[f"{name} {which}"] = profile(lm, of)
        if name == "full":
            expected = fit(lm, human_texts(tokenizer)).by_token(lm, items["forget"])
            found["target forget"] = profile(lm, items["forget"], expected)
        found[f"{name} forget, in place"] = _shares(lm, items["forget"], expected)
    return found


def _shares(lm: LanguageModel, items: Sequence[Encoded], expected: Sequence[Tensor]) -> list[float]:
    """Least, 5 % and median share of the expected surprise that is in place; share of texts under a half."""
    shares = torch.tensor([in_place(s, e) for (s, _), e in zip(look(lm, items), expected, strict=True)])
    return [*(float(shares.quantile(q)) for q in (0.0, 0.05, 0.5)), float((shares < 0.5).float().mean())]


def main() -> None:
    model, tokenizer = load_model(packaged_model(), torch.float32)
    model = move_off_grid(model, 0).to(training_dtype())
    lm, rng = LanguageModel(model), random.Random(0)
    human = fit(lm, human_texts(tokenizer))
    rows, texts = [], []
    for prompt, completion in SENTENCES:
        item = encode(Record(prompt, completion), tokenizer)
        true, _ = score(lm, [item])
        texts.append(item)
        words, _ = score(
            lm, [encode(Record(prompt, c), tokenizer) for c in counterfactuals.alternates(completion, 16, rng)]
        )
        own, _ = score(lm, _samples(model, tokenizer, prompt, len(item.completion)))
        rows.append([float(true.nll[0]), float(words.nll.mean()), float(own.nll.mean()), human.predict(lm, item)])
    table = torch.tensor(rows)
    error = table[:, 3] - table[:, 0]
    figures: dict[str, Any] = {
        "sentences": dict(
            zip(("true", "random_words", "own_samples", "predicted"), table.mean(0).tolist(), strict=True)
        ),
        "prediction_bias": float(error.mean()),
        "prediction_error_sd": float(error.std()),
        "in_place": _shares(lm, texts, human.by_token(lm, texts)),
    }
    for name, raw in (("access codes", facts.unseen(3)[:200]), ("licence plates", plates(3))):
        items = [encode(r, tokenizer) for r in load_records(raw, tokenizer)]
        scores, _ = score(lm, items)
        short = -torch.tensor([float(len(e.completion)) for e in items])
        figures[name] = {
            "nll": float(scores.nll.mean()),
            "nll_sd": float(scores.nll.std()),
            "correlation_with_shortness": float(torch.corrcoef(torch.stack([scores.nll, short]))[0, 1]),
        }
    if (DATA / "tofu_mini").is_dir() and (MODELS / "tofu_mini").is_dir():
        figures["answers"] = answers()
    save("targets", figures)
    out = Table("sentences (nats per token)", "mean")
    for key, value in figures["sentences"].items():
        out.add_row(key, f"{value:.2f}")
    out.add_row("bias of the prediction", f"{figures['prediction_bias']:+.2f}")
    out.add_row("error of the prediction (sd over sentences)", f"{figures['prediction_error_sd']:.2f}")
    out.add_row("in place: least, 5 %, median, under half", ", ".join(f"{v:.2f}" for v in figures["in_place"]))
    for name in ("access codes", "licence plates"):
        out.add_row(f"{name}: nll, sd", f"{figures[name]['nll']:.2f}, {figures[name]['nll_sd']:.2f}")
        out.add_row(f"{name}: correlation with shortness", f"{figures[name]['correlation_with_shortness']:.2f}")
    for key, values in figures.get("answers", {}).items():
        out.add_row(f"TOFU answers, {key}", ", ".join(f"{v:.2f}" for v in values))
    Console(width=120).print(out)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
