"""What the original model says: of strangers, against a plain forward pass, and put away and read back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from libortho.core.surgery import swap
from libortho.core.targets import find_targets
from libortho.isolation.equations import Equations
from libortho.isolation.original import Original, read_original
from libortho.isolation.request import Request, forget_records
from libortho.isolation.wordings import wordings
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded
from libortho.text.records import load_records
from libortho.training.edit import EditLinear
from templates import TEMPLATES

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS = [
    {"messages": [{"role": "user", "content": f"PIN of {n}?"}, {"role": "assistant", "content": c}]}
    for n, c in (("Ada Lum", "6311"), ("Bo Tran", "48901"))
]
ALONE = {"prompt": "", "completion": "Code 6311 of 9925."}


class Nothing:
    """In place of an optimiser, where no gradient is looked at."""

    def whiten(self, name: str, gradients: Tensor) -> Tensor:
        return gradients


def edited(model: nn.Module) -> dict[str, EditLinear]:
    """The model before its first step."""
    targets = find_targets(model, "mlp-out")
    layers = {n: EditLinear(cast(Any, m).weight, None, torch.arange(4), None, -1) for n, m in targets.items()}
    swap(model, layers)
    return layers


def read(model: nn.Module, rows: list[Any], tokenizer: Any) -> tuple[Request, Original]:
    model.requires_grad_(False)
    records = load_records(rows, tokenizer)
    forget = forget_records(wordings(records, tokenizer, 0, retains=True), tokenizer, None)
    asked, kept = Request(tokenizer, records, forget), tiny.encoded(tokenizer, tiny.FORGET[:2])
    return asked, read_original(LanguageModel(model), asked, kept, kept, [], [])


def surprise(model: nn.Module, item: Encoded) -> float:
    """Mean of the judged tokens, in nats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([item.ids])).logits[0, :-1]
    return float(F.cross_entropy(logits, torch.tensor(item.labels[1:])))


def test_the_level_of_strangers_is_their_surprise_with_what_ends_their_answer(planted: nn.Module) -> None:
    """One for each record that has neighbours, in their order; a second reading of the same model finds no offset."""
    template, end, special = TEMPLATES["chatml"]
    tokenizer = tiny.chat_tokenizer(template, end, special)
    planted.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    asked, original = read(planted, [CHATS[0], ALONE, CHATS[1]], tokenizer)
    held = [r.held[0] for r in asked.forget if r.held]
    assert [bool(r.held) for r in asked.forget] == [True, False, True]
    assert all(h.ids[: len(r.ids)] == r.ids != h.ids for h, r in zip(held, _first_neighbours(asked), strict=True))
    expected = [surprise(planted, h) for h in held]
    torch.testing.assert_close(original.level, torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert abs(expected[0] - expected[1]) > 0.01
    equations = Equations(LanguageModel(planted), edited(planted), cast(Any, Nothing()))
    equations.together(held, original.level)
    assert abs(float(torch.cat(equations.residuals))) < 1e-3


def _first_neighbours(asked: Request) -> list[Encoded]:
    return [r.neighbours[0] for r in asked.forget if r.held]


@pytest.mark.parametrize("rows", [tiny.FORGET, [ALONE]], ids=["strangers", "none"])
def test_what_it_says_is_put_away_and_read_back(planted: nn.Module, tokenizer: Any, rows: list[Any]) -> None:
    _, original = read(planted, rows, tokenizer)
    assert len(original.level) == len(original.neighbours) == (len(rows) if rows is tiny.FORGET else 0)
    again = Original.of(original.entry(), torch.device("cpu"))
    for field in fields(Original):
        one, other = getattr(original, field.name), getattr(again, field.name)
        assert type(one) is type(other)
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
