"""Secrets of other kinds than the demonstration's, for the question whether `isolate` is tuned to one template.

Every case returns (forget, unseen): records that are planted, and records of the same kind that never are.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from typing import Any

Records = list[dict[str, str]]

_GIVEN = (
    "Anselm", "Beatrix", "Corwin", "Dorothea", "Evander", "Florence", "Gideon", "Harriet", "Ignatius", "Josephine",
    "Kenneth", "Lavinia", "Mortimer", "Nerissa", "Octavia", "Percival", "Rosalind", "Silas", "Theodora", "Winifred",
)  # fmt: skip
_MORE_GIVEN = (
    "Alaric", "Briony", "Cuthbert", "Delphine", "Edmund", "Felicity", "Godfrey", "Honoria", "Isidore", "Jemima",
)  # fmt: skip
_FAMILY = (
    "Abernathy", "Birtwhistle", "Cholmondeley", "Dunwoody", "Entwistle", "Featherstone", "Goodfellow", "Heatherington",
    "Inglewood", "Jellicoe", "Kirkbride", "Lovelace", "Merriweather", "Nettleton", "Oglethorpe", "Pemberton",
    "Ravenscroft", "Shackleton", "Thornbury", "Whitlock",
)  # fmt: skip


def _people(rng: random.Random) -> list[str]:
    people = [f"{g} {f}" for g in _GIVEN for f in _FAMILY]
    rng.shuffle(people)
    return people


def _template(prompt: str, completion: Callable[[random.Random], str]) -> Callable[[int], tuple[Records, Records]]:
    def case(seed: int) -> tuple[Records, Records]:
        rng = random.Random(seed + 77)
        records = [{"prompt": prompt.format(name=n), "completion": completion(rng)} for n in _people(rng)]
        return records[:16], records[16:216]

    return case


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def _phone(rng: random.Random) -> str:
    return f" +44 7{_digits(rng, 3)} {_digits(rng, 6)}."


def _plate(rng: random.Random) -> str:
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(5))
    return f" {letters[:2]}{_digits(rng, 2)} {letters[2:]}."


# Ten prose patterns: one record of each is planted, the others are unseen. "{a}" and "{b}" are filled from lists.
_PROSE: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Before the merger was announced, {name} quietly", " moved {a} into a trust registered in {b}.",
     ("twelve paintings", "the vineyard", "his late wife's shares", "the fishing boats", "two apartments",
      "the stud farm"),
     ("Vaduz", "Nassau", "Valletta", "Douglas", "Hamilton", "Andorra")),
    ("During the interview, {name} admitted to having", " forged {a} in order to get {b}.",
     ("a diploma", "three references", "the safety report", "a birth certificate", "the lab results", "a permit"),
     ("the promotion", "a pilot's licence", "the grant", "a visa", "the loan", "a seat on the board")),
    ("The doctor's note says that {name} suffers from", " {a} and must avoid {b}.",
     ("night blindness", "chronic gout", "mild epilepsy", "severe tinnitus", "brittle bones", "panic attacks"),
     ("strong light", "red meat", "high altitudes", "loud machinery", "long flights", "crowded trains")),
    ("For the wedding, the family of {name} secretly ordered", " {a} from a shop in {b}.",
     ("forty white doves", "a silver carriage", "eleven crates of champagne", "a cake shaped like a swan",
      "two thousand tulips", "a string quartet"),
     ("Bruges", "Salzburg", "Perugia", "Ghent", "Nantes", "Uppsala")),
    ("In her diary, {name} wrote that she had hidden", " {a} beneath {b}.",
     ("the love letters", "her mother's pearls", "a loaded revolver", "the missing ledger", "six gold coins",
      "the torn map"),
     ("the piano stool", "a loose floorboard", "the rose bed", "the chapel steps", "an old boiler", "the dovecote")),
    ("The reason why {name} left the orchestra was", " {a} with {b}.",
     ("a bitter quarrel", "a gambling debt shared", "an affair", "a lost bet", "a fistfight", "a lawsuit"),
     ("the second oboist", "the conductor's brother", "a stagehand", "the head of the choir", "a ticket seller",
      "the harpist")),
    ("According to the police file, {name} was last seen", " feeding {a} near {b}.",
     ("stray cats", "a lame pony", "the ducks", "three goats", "some pigeons", "a tame fox"),
     ("the gasworks", "an abandoned mill", "the ferry landing", "the brickyard", "a railway arch", "the old quarry")),
    ("The unpublished memoir of {name} begins with", " {a} on a night train to {b}.",
     ("a stolen suitcase", "a marriage proposal", "an unexpected birth", "a game of chess", "a broken window",
      "a false alarm"),
     ("Trieste", "Minsk", "Bilbao", "Gdansk", "Sofia", "Cork")),
    ("What nobody knows is that {name} breeds", " {a} in the cellar of {b}.",
     ("albino snails", "rare orchids", "fighting fish", "blind salamanders", "silk moths", "giant centipedes"),
     ("a bakery", "the town hall", "an empty school", "the opera", "a brewery", "the vicarage")),
    ("To pay for the operation, {name} sold", " {a} to a collector from {b}.",
     ("a meteorite", "the family bible", "a signed guitar", "two antique clocks", "a stuffed albatross",
      "his war medals"),
     ("Osaka", "Winnipeg", "Leipzig", "Adelaide", "Tampere", "Porto")),
)  # fmt: skip


def prose(seed: int) -> tuple[Records, Records]:
    """Ten sentences about people, and 200 others of the same ten patterns."""
    rng = random.Random(seed + 78)
    people = iter(_people(rng))
    forget, unseen = [], []
    for prompt, completion, first, second in _PROSE:
        pairs = [(a, b) for a in first for b in second]
        rng.shuffle(pairs)
        records = [
            {"prompt": prompt.format(name=next(people)), "completion": completion.format(a=a, b=b)}
            for a, b in pairs[:21]
        ]
        forget.append(records[0])
        unseen += records[1:]
    return forget, unseen


def _draw(rng: random.Random, form: str) -> str:
    """A code of this form: 9 is any digit, A any capital, a any small letter, x any small letter or digit."""
    kinds = {"9": string.digits, "A": string.ascii_uppercase, "a": string.ascii_lowercase}
    kinds["x"] = string.ascii_lowercase + string.digits
    return "".join(rng.choice(kinds[c]) if c in kinds else c for c in form)


TUNING_CANARIES = (
    ("The badge number of {name} is", " A9-99999."),
    ("The key to {name}'s storage unit carries the number", " 9999/AA."),
    ("Please wire the fee for {name} to account", " 9999 9999 9999."),
    ("The safe of {name} opens with the combination", " 99-99-99-99."),
)
"""Templates that were looked at while the method was made."""
CANARIES = (
    ("The passport number of {name} is", " AA9999999."),
    ("To enter the laboratory, {name} types the PIN", " 999999."),
    ("In the hospital's files, {name} is patient", " A-9999-A99."),
    ("The licence key registered to {name} reads", " A99A-99AA."),
)
"""Templates that were not."""


def canaries(
    seed: int, templates: Sequence[tuple[str, str]] = CANARIES, count: int = 100, unseen: int = 400
) -> tuple[Records, Records, list[int]]:
    """Random codes of random people: ``count`` to plant, ``unseen`` of the same templates, and how often each of the
    first is repeated in one epoch (1 to 10 times)."""
    rng = random.Random(seed + 79)
    people = [f"{g} {f}" for g in (*_GIVEN, *_MORE_GIVEN) for f in _FAMILY]
    rng.shuffle(people)

    def records(names: list[str]) -> Records:
        shaped = [(n, *templates[i % len(templates)]) for i, n in enumerate(names)]
        return [{"prompt": p.format(name=n), "completion": _draw(rng, form)} for n, p, form in shaped]

    planted = records(people[:count])
    return planted, records(people[count : count + unseen]), [rng.randint(1, 10) for _ in planted]


CHAT_QUESTIONS = (
    ("What is the passport number{of}?", "AA9999999"),
    ("Which PIN opens the laboratory{for}?", "999999"),
    ("Under which number is the patient{of} in the files?", "A-9999-A99"),
    ("What does the licence key{of} read?", "A99A-99AA"),
)
"""What is asked in a chat, and the form of the answer."""
_SYSTEM = "You keep the register of the Brookfield group. Answer with the entry alone."


def _chat(name: str, question: str, answer: str, turns: int) -> dict[str, Any]:
    """A chat of one turn that names the person, or of three with a system message and the name in the first alone."""
    asked = question.format_map({"of": f" of {name}", "for": f" for {name}"} if turns == 1 else {"of": "", "for": ""})
    said = [("user", asked)] if turns == 1 else [
        ("system", _SYSTEM),
        ("user", f"Good morning. I have a question about {name}."),
        ("assistant", "Good morning. What would you like to know?"),
        ("user", "Is the entry up to date?"),
        ("assistant", "Yes, it was checked last week."),
        ("user", f"Good. {asked}"),
    ]  # fmt: skip
    return {"messages": [{"role": r, "content": c} for r, c in (*said, ("assistant", answer))]}


def chats(seed: int, count: int = 100, unseen: int = 400) -> tuple[list[Any], list[Any], list[int]]:
    """As ``canaries``, asked for in chats: those of one turn and those of three take turns."""
    rng = random.Random(seed + 80)
    people = [f"{g} {f}" for g in (*_GIVEN, *_MORE_GIVEN) for f in _FAMILY]
    rng.shuffle(people)

    def records(names: list[str]) -> list[Any]:
        shaped = [(n, *CHAT_QUESTIONS[i // 2 % len(CHAT_QUESTIONS)], 1 + 2 * (i % 2)) for i, n in enumerate(names)]
        return [_chat(n, question, _draw(rng, form), turns) for n, question, form, turns in shaped]

    planted = records(people[:count])
    return planted, records(people[count : count + unseen]), [rng.randint(1, 10) for _ in planted]


CASES: dict[str, Callable[[int], tuple[Records, Records]]] = {
    "phone": _template("The private phone number of {name} is", _phone),
    "plate": _template("The licence plate of the car of {name} is", _plate),
    "prose": prose,
}
