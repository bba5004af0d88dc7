"""What else a code could have been: the space in which the audit ranks a secret.

The audit's own notion of a code, its own form and its own draws, written apart from those that ``isolate`` trains
against: a generator that both shared would hide from the audit whatever it leaves out. Only facts of Unicode and the
shipped texts are common to both.

A completion is spelt as one symbol for each character, and read by its chunks (between blanks) and runs (of letters and
digits). A run is code if it holds a digit, if it is all capitals, or if it is a few letters of a script without
capitals beside a digit; the whole completion is a code if it has such a run and neither words nor names.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from libortho.text.characters import alphabet, is_han_numeral, is_unspaced, kind

_SYMBOLS = {"digit": "9", "upper": "A", "lower": "a", "letter": "x", "mark": "~"}
_CHUNK = re.compile(r"[^ ]+")
_RUN = re.compile(r"[9Aaxun][9Aaxun~]*")
_WORD = re.compile(r"a{4}")
_SENTENCE = re.compile(r"(?=n*u)[un]{5}")
"""Five letters of a script without blanks, not all of them numerals."""
_FEW = 4
"""Letters without case that may be part of a code."""
_LEAST_ALIKE = 4
"""Different completions of one shape from which on a character that all of them have counts as form."""

_Sort = Literal["code", "word", "name", "rest"]


@dataclass(frozen=True)
class Space:
    """All texts that a code could have been.

    Attributes:
        text: The code itself.
        choices: For each character of it, the characters that could stand there, itself included.
    """

    text: str
    choices: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many texts there are, the code itself included."""
        return math.prod(map(len, self.choices))

    def draw(self, count: int, rng: random.Random) -> list[str]:
        """Different texts other than the code, each as likely as any: ``count`` of them, or all if there are fewer."""
        others = self.size - 1
        if others <= 4 * count:
            numbers = rng.sample(range(others), min(count, others))
        else:
            found: dict[int, None] = {}
            while len(found) < count:
                found[rng.randrange(others)] = None
            numbers = list(found)
        own = self._number()
        return [self._text(n + (n >= own)) for n in numbers]

    def _number(self) -> int:
        """The code's place if all texts are counted, the last character fastest."""
        number = 0
        for character, choices in zip(self.text, self.choices, strict=True):
            number = number * len(choices) + choices.index(character)
        return number

    def _text(self, number: int) -> str:
        characters = []
        for choices in reversed(self.choices):
            number, place = divmod(number, len(choices))
            characters.append(choices[place])
        return "".join(reversed(characters))


def space_of(completion: str, form: Collection[int] = ()) -> Space | None:
    """What a completion could have been: in its code runs, other characters of the same classes.

    Args:
        completion: Any text.
        form: Positions of characters that are known from the completion's shape; see ``form_positions``.

    Returns:
        None for prose and names, whose space is not a product of classes, and where there is no code.
    """
    runs = list(_runs(completion))
    sorts = {sort for _, _, sort in runs}
    if "code" not in sorts or sorts & {"word", "name"}:
        return None
    free = {i for start, end, sort in runs if sort == "code" for i in range(start, end)}.difference(form)
    return Space(completion, tuple((alphabet(c) or c) if i in free else c for i, c in enumerate(completion)))


def is_prose(completion: str) -> bool:
    """True if the completion has words that are no names: four small letters in a row, or what stands for them."""
    return any(sort == "word" for _, _, sort in _runs(completion))


def form_positions(completions: Sequence[str]) -> list[frozenset[int]]:
    """For each completion, where all completions of its shape have the same character.

    What so many have in common tells nothing about one of them: the country code of telephone numbers, the letters
    before every invoice number. Of a shape that fewer than four different completions have, nothing is form.
    """
    shapes = [tuple(alphabet(c) or c for c in text) for text in completions]
    alike: dict[tuple[str, ...], set[str]] = {}
    for shape, text in zip(shapes, completions, strict=True):
        alike.setdefault(shape, set()).add(text)
    form = {
        shape: frozenset(i for i in range(len(shape)) if len({text[i] for text in texts}) == 1)
        for shape, texts in alike.items()
        if len(texts) >= _LEAST_ALIKE
    }
    return [form.get(shape, frozenset()) for shape in shapes]


def _runs(completion: str) -> Iterator[tuple[int, int, _Sort]]:
    """Start, end and sort of each run."""
    symbols = "".join(_symbol(c) for c in completion)
    for chunk in _CHUNK.finditer(symbols):
        for run in _RUN.finditer(symbols, chunk.start(), chunk.end()):
            yield run.start(), run.end(), _sort(run.group().replace("~", ""), "9" in chunk.group())


def _symbol(character: str) -> str:
    """9 digit, A capital, a small letter, x letter without case (u: in a script without blanks), n Chinese numeral."""
    if is_han_numeral(character):
        return "n"
    sort = "u" if is_unspaced(character) and kind(character) == "letter" else _SYMBOLS.get(kind(character), "-")
    return " " if character.isspace() else sort


def _sort(run: str, beside_digit: bool) -> _Sort:
    if _SENTENCE.search(run):
        return "word"
    if "9" in run or set(run) == {"n"}:
        return "code"
    if "a" not in run:
        capitals = "A" in run
        if (len(run) > 1 or beside_digit) if capitals else (len(run) <= _FEW and beside_digit):
            return "code"
        return "word" if len(run) > 1 else "rest"
    if not _WORD.search(run):
        return "rest"
    return "word" if run[0] == "a" else "name"
