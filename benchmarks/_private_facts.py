"""Facts of invented people in chats, each asked for in several wordings: what `tune` is measured on."""

from __future__ import annotations

import random
from typing import Any

from cases import people, random_code

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "AA9999999",
        (
            "What is the passport number of {name}?",
            "Tell me {name}'s passport number.",
            "Which number stands in the passport of {name}?",
        ),
    ),
    (
        "999999",
        (
            "Which PIN opens the laboratory for {name}?",
            "What PIN does {name} type at the laboratory?",
            "{name} wants to enter the laboratory. What is the PIN?",
        ),
    ),
    (
        "A-9999-A99",
        (
            "Under which number is {name} in the hospital's files?",
            "What is the patient number of {name}?",
            "Find {name} in the hospital's files: which number?",
        ),
    ),
    (
        "A99A-99AA",
        (
            "What does the licence key of {name} read?",
            "Give me the licence key that {name} has.",
            "Which licence key is registered to {name}?",
        ),
    ),
)
"""The form of an answer, and the questions that ask for it; the last one is held out."""
_SYSTEM = "Answer with the entry alone."


def _chat(question: str, answer: str) -> dict[str, Any]:
    said = (("system", _SYSTEM), ("user", question), ("assistant", answer))
    return {"messages": [{"role": r, "content": c} for r, c in said]}


def private_facts(seed: int, count: int, first: int = 0) -> tuple[list[Any], list[Any], list[Any]]:
    """Facts of ``count`` people from the ``first`` on, one each: in two wordings, by person; in a third one; and the
    first wording alone."""
    rng, names = random.Random(f"{seed} {first}"), people(seed)[first : first + count]
    trained, held_out, once = [], [], []
    for i, name in enumerate(names):
        form, questions = KINDS[i % len(KINDS)]
        answer = random_code(rng, form)
        *known, other = (_chat(q.format(name=name), answer) for q in questions)
        trained += known
        held_out.append(other)
        once.append(known[0])
    return trained, held_out, once


def shared_fact(seed: int, count: int, first: int = 0) -> list[Any]:
    """One fact in the chats of ``count`` people from the ``first`` on: the same code, whoever asks."""
    answer = random_code(random.Random(f"{seed} shared"), "999999")
    asked = "I am {name}, new here. What is the code of the front door?"
    return [_chat(asked.format(name=n), answer) for n in people(seed)[first : first + count]]
