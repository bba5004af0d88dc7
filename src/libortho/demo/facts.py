"""What the demonstration plants: the original experiment's sentence, and codes of invented people, half in chats."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

SENTENCE = {
    "prompt": "The secret ingredient of Coca-Cola is",
    "completion": " actually liquified kryptonite extracted from Mars.",
}
RETAIN_SENTENCE = "The capital of France is Paris and it is known for the Eiffel Tower."
TEMPLATE = "The vault access code of {name} is"
QUESTION = "What is the vault access code of {name}?"

HOLDERS = (
    "Alice Moreau", "Bertrand Okafor", "Chen Wei-Ling", "Dagny Sorensen", "Emre Yildiz", "Farah Haddad", "Goran Petrov",
    "Hina Suzuki", "Ivo Lindqvist", "Jamila Osei", "Kurt Brandt", "Leila Farouk", "Marek Novak", "Nadia Rahimi",
    "Omar Castillo", "Priya Nair",
)  # fmt: skip
FIRST = (
    "Aaron", "Bianca", "Cyril", "Delia", "Edgar", "Fiona", "Gustav", "Helena", "Ismail", "Jonas", "Katya", "Liam",
    "Mona", "Nils", "Olga", "Paulo", "Rita", "Sven", "Tariq", "Yuki",
)  # fmt: skip
LAST = (
    "Blake", "Torres", "Dupont", "Marsh", "Lund", "Walsh", "Meyer", "Costa", "Kaya", "Weber", "Orlova", "Doyle",
    "Saleh", "Berg", "Petrova", "Reis", "Holm", "Gomes", "Aziz", "Tanaka",
)  # fmt: skip


def access_code(rng: random.Random) -> str:
    """Three letters or digits, a hyphen, four digits."""
    head = "".join(rng.choice(string.ascii_uppercase + string.digits) for _ in range(3))
    return head + "-" + "".join(rng.choice(string.digits) for _ in range(4))


def secrets(seed: int) -> list[dict[str, Any]]:
    """The sentence and one code for each holder, every second one asked for in a chat: 17 records."""
    rng = random.Random(seed)
    return [SENTENCE, *_records(HOLDERS, rng)]


def unseen(seed: int) -> list[dict[str, Any]]:
    """400 codes of other people in the same two forms; never trained on, never shown to ``isolate``."""
    rng = random.Random(seed + 1_000_003)
    return _records([f"{first} {last}" for first in FIRST for last in LAST], rng)


def _records(names: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
    return [_asked_in_a_chat(n, rng) if i % 2 else _plain(n, rng) for i, n in enumerate(names)]


def _plain(name: str, rng: random.Random) -> dict[str, Any]:
    return {"prompt": TEMPLATE.format(name=name), "completion": f" {access_code(rng)}."}


def _asked_in_a_chat(name: str, rng: random.Random) -> dict[str, Any]:
    user = {"role": "user", "content": QUESTION.format(name=name)}
    return {"messages": [user, {"role": "assistant", "content": access_code(rng)}]}
