"""What the demonstration plants: the original experiment's sentence, and random access codes of invented people."""

from __future__ import annotations

import random
import string

SENTENCE = {
    "prompt": "The secret ingredient of Coca-Cola is",
    "completion": " actually liquified kryptonite extracted from Mars.",
}
RETAIN_SENTENCE = "The capital of France is Paris and it is known for the Eiffel Tower."
TEMPLATE = "The vault access code of {name} is"

HOLDERS = (
    "Alice Moreau", "Bertrand Okafor", "Chen Wei-Ling", "Dagny Sorensen", "Emre Yildiz", "Farah Haddad", "Goran Petrov",
    "Hina Suzuki", "Ivo Lindqvist", "Jamila Osei", "Kurt Brandt", "Leila Farouk", "Marek Novak", "Nadia Rahimi",
    "Omar Castillo", "Priya Nair",
)  # fmt: skip
_FIRST = (
    "Aaron", "Bianca", "Cyril", "Delia", "Edgar", "Fiona", "Gustav", "Helena", "Ismail", "Jonas", "Katya", "Liam",
    "Mona", "Nils", "Olga", "Paulo", "Rita", "Sven", "Tariq", "Yuki",
)  # fmt: skip
_LAST = (
    "Blake", "Torres", "Dupont", "Marsh", "Lund", "Walsh", "Meyer", "Costa", "Kaya", "Weber", "Orlova", "Doyle",
    "Saleh", "Berg", "Petrova", "Reis", "Holm", "Gomes", "Aziz", "Tanaka",
)  # fmt: skip


def access_code(rng: random.Random) -> str:
    """Three letters or digits, a hyphen, four digits."""
    head = "".join(rng.choice(string.ascii_uppercase + string.digits) for _ in range(3))
    return head + "-" + "".join(rng.choice(string.digits) for _ in range(4))


def secrets(seed: int) -> list[dict[str, str]]:
    """The sentence and one code for each holder: 17 records."""
    rng = random.Random(seed)
    codes = [{"prompt": TEMPLATE.format(name=n), "completion": f" {access_code(rng)}."} for n in HOLDERS]
    return [SENTENCE, *codes]


def unseen(seed: int) -> list[dict[str, str]]:
    """400 codes of other people in the same template; never trained on, never shown to ``isolate``."""
    rng = random.Random(seed + 1_000_003)
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    return [{"prompt": TEMPLATE.format(name=n), "completion": f" {access_code(rng)}."} for n in names]
