"""Rows of TOFU, split as its benchmark splits them, in the form of a chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _common import DATA

SPLITS = {"tofu_mini": None, "forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


HOLDOUT = slice(3200, 3600)
"""Rows of the original ``full`` that no model here is trained on, for membership tests; TOFU has no holdout."""


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The model's own without the default system message, which the fine-tuned models have not seen."""


def rows(split: str, which: str) -> list[dict[str, Any]]:
    """Rows of ``split`` with "question", "answer" and, if perturbed, TOFU's further fields.

    ``which``: forget, retain, holdout, forget_perturbed, retain_perturbed, real_authors_perturbed,
    world_facts_perturbed. For the original splits, retain (and what ``full`` is trained on) lacks the holdout.
    """
    if split not in SPLITS:
        raise SystemExit(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    mini = split == "tofu_mini"
    if which in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        return read(DATA / "tofu" / f"{which}.jsonl")
    if which == "forget_perturbed":
        return read(DATA / "tofu_mini" / f"{which}.jsonl" if mini else DATA / "tofu" / f"{split}_perturbed.jsonl")
    if which not in ("forget", "retain", "holdout"):
        raise SystemExit(f"which is {which!r}; expected forget, retain, holdout or one of the perturbed sets")
    if mini:
        return read(DATA / "tofu_mini" / f"{which}.jsonl")
    holdout = read(DATA / "tofu" / "full.jsonl")[HOLDOUT]
    if which == "holdout":
        return holdout
    found = read(DATA / "tofu" / f"{split if which == 'forget' else SPLITS[split]}.jsonl")
    return [row for row in found if row not in holdout]


def read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: set LIBORTHO_DATA to a directory that holds tofu/ and tofu_mini/, "
            "as benchmarks/tofu_data.py writes them"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
