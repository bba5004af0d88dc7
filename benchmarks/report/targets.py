"""Whether the targets of `isolate` are what an untrained model says."""

from __future__ import annotations

from pathlib import Path

from .tables import UNMEASURED, Row, made_by, number, page, read, share, table

SOURCES = {
    "true": "the true completion",
    "random_words": "alternates with random words",
    "own_samples": "the model's own samples",
    "predicted": "the prediction",
}
MODELS = {
    "full forget": "fine-tuned, forgotten answers",
    "target forget": "targets made by the fine-tuned model",
    "retain forget": "retrained, forgotten answers",
    "full holdout": "fine-tuned, holdout",
    "retain holdout": "retrained, holdout",
}
KINDS = ("access codes", "licence plates")


def shares(data: Row) -> list[list[str]]:
    """Of each kind of text the least, 5 % and median share in place, and how many texts have less than a half."""
    answers = data.get("answers", {})
    found = {
        "made-up sentences, never trained": data["in_place"],
        "answers of TOFU, fine-tuned": answers.get("full forget, in place"),
        "answers of TOFU, retrained": answers.get("retain forget, in place"),
    }
    return [[n, *(number(x, ".2f") for x in v[:3]), share(v[3])] for n, v in found.items() if v]


def targets(results: Path) -> str:
    data = read(results, "targets")
    if not data:
        return page("Targets", ABOUT, UNMEASURED)
    bias, spread = data["prediction_bias"], data["prediction_error_sd"]
    parts = [
        made_by("targets", [data], lambda r: ""),
        "## Sentences",
        table(["nats per token", "mean"], [[SOURCES[k], number(data["sentences"][k], ".2f")] for k in SOURCES]),
        f"The prediction is off by {bias:+.2f} nats on average; the standard deviation over sentences is {spread:.2f}.",
        "## Surprise in place",
        "The share of the expected surprise of a sentence's tokens that is at those tokens.",
        table(["texts", "least", "5 %", "median", "under a half"], shares(data)),
        "## Codes",
        table(
            ["records", "nats per token", "standard deviation", "correlation with having few tokens"],
            [[k, *(number(data[k][n], ".2f") for n in ("nll", "nll_sd", "correlation_with_shortness"))] for k in KINDS],
        ),
    ]
    if answers := data.get("answers"):
        rows = [[label, *(number(x, ".2f") for x in answers[k])] for k, label in MODELS.items()]
        header = ["model and answers of TOFU", "surprise, nats", "entropy, nats", "tokens under 0.3 nats"]
        parts += ["## Answers", table(header, rows)]
    return page("Targets", ABOUT, *parts)


ABOUT = (
    "`isolate` aims at what an untrained model would say of a record, and has to guess it. "
    "Here stand guesses beside the truth, on 20 made-up sentences, 200 codes of two kinds each, and 60 answers of TOFU."
)
