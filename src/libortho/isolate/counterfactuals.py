"""What the model would have met instead: alternates of a completion, neighbours of a prompt.

    alternate   the same prompt, another completion of the same shape
    neighbour   the same shape of prompt about somebody else

Had a record never been trained on, it would be exchangeable with its alternates: that is the target of forgetting. Its
neighbours were never in question: they must not move.

Both are made by resampling what carries information and keeping what carries form: digits and capitals of code-like
words by class, names by other names, content words by words of the shipped text; everything else stays.
"""

from __future__ import annotations

import functools
import random
import re
import string
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from importlib import resources

_RUN = re.compile(r"[^\W_]+")
_ENOUGH_TO_COMPARE = 4
"""Completions of one shape that must agree on a character before it counts as form."""
_SHORT = 4
"""Lower-case words shorter than this are grammar, and stay."""
_GRAMMAR = frozenset(
    """
    about above after again against also although always among another around back because been before being below
    between both came come could does doing done down during each either else even ever every from gave give given
    goes going have having here hers herself himself into itself just keep kept like made make many might more most
    much must myself near neither never nothing once only onto other ours over said same shall should since some
    still such take taken than that their them then there these they this those through thus took toward under until
    upon very want were what when where whether which while whom whose will with within without would your yours
    """.split()  # noqa: SIM905
)


_EVALUATION_PARAGRAPHS = 50


@functools.cache
def shipped_text() -> tuple[str, ...]:
    """Paragraphs of the general English text that ships with the package, for ``isolate`` to learn from."""
    return tuple(_read("general.txt").splitlines()[:-_EVALUATION_PARAGRAPHS])


@functools.cache
def evaluation_text() -> tuple[str, ...]:
    """Further paragraphs of that text, which ``isolate`` never sees."""
    return tuple(_read("general.txt").splitlines()[-_EVALUATION_PARAGRAPHS:])


@functools.cache
def _names() -> dict[str, tuple[str, ...]]:
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for line in _read("names.txt").splitlines():
        kind, _, word = line.partition("\t")
        kinds[kind].append(word)
    return {k: tuple(v) for k, v in kinds.items()}


@functools.cache
def _words() -> dict[int, tuple[str, ...]]:
    """Content words of the shipped text, with repetition (so that draws follow frequency), by length."""
    lengths: defaultdict[int, list[str]] = defaultdict(list)
    for word in re.findall(r"\b[a-z]{4,}\b", " ".join(shipped_text())):
        if word not in _GRAMMAR:
            lengths[len(word)].append(word)
    return {k: tuple(v) for k, v in lengths.items()}


def _read(name: str) -> str:
    return resources.files("libortho").joinpath("data_files", name).read_text(encoding="utf-8")


def kind_of(word: str) -> str:
    """What a run of letters and digits is: "code", "name", "word", or "form" (grammar, which stays)."""
    if any(c.isdigit() for c in word) or (len(word) > 1 and word.isupper()):
        return "code"
    if word[0].isupper() and len(word) > 1 and word.lower() not in _GRAMMAR:
        return "name"
    return "word" if len(word) >= _SHORT and word.lower() not in _GRAMMAR and word.isalpha() else "form"


def common_form(completions: Sequence[str]) -> list[frozenset[int]]:
    """For each completion, the character positions at which all completions of its shape agree.

    Such a position is form, not information: the country code of telephone numbers, the letters before every invoice
    number. Shapes are equal if digits, capitals and small letters stand at the same places; fewer than
    ``_ENOUGH_TO_COMPARE`` completions of a shape say nothing.
    """
    shapes: defaultdict[str, list[str]] = defaultdict(list)
    for completion in completions:
        shapes[_shape(completion)].append(completion)
    agreed: dict[str, frozenset[int]] = {}
    for shape, same in shapes.items():
        constant = (i for i, characters in enumerate(zip(*same, strict=True)) if len(set(characters)) == 1)
        agreed[shape] = frozenset(constant) if len(same) >= _ENOUGH_TO_COMPARE else frozenset()
    return [agreed[_shape(c)] for c in completions]


def _shape(text: str) -> str:
    return re.sub(r"[0-9]", "0", re.sub(r"[A-Z]", "A", re.sub(r"[a-z]", "a", text)))


def resample(
    text: str, rng: random.Random, *, words: bool = True, opens: bool = True, keep: Collection[int] = ()
) -> str:
    """Another text of the same shape; the same text if nothing in it carries information.

    Args:
        text: Any text.
        rng: Source of randomness.
        words: Replace content words too, not only codes and names.
        opens: The text begins a sentence, so that its first capital need not be a name.
        keep: Positions of characters that stay although they stand in a code.
    """
    runs = list(_RUN.finditer(text))
    out, position = [], 0
    for number, run in enumerate(runs):
        word = run.group()
        out.append(text[position : run.start()])
        position = run.end()
        kind = kind_of(word)
        if kind == "name" and _opens_sentence(text, run.start(), opens) and not _is_name(word):
            kind = kind_of(word.lower())
        if kind == "code":
            start = run.start()
            out.append("".join(c if start + i in keep else _same_class(c, rng) for i, c in enumerate(word)))
        elif kind == "name":
            out.append(_other_name(text, runs, number, rng, opens))
        elif kind == "word" and words:
            out.append(_other_word(word, rng))
        else:
            out.append(word)
    return "".join(out) + text[position:]


def alternates(
    completion: str, count: int, rng: random.Random, *, opens: bool = False, keep: Collection[int] = ()
) -> list[str]:
    """``count`` different completions of the same shape (fewer where so many do not exist); see ``resample``."""
    return _distinct(lambda: resample(completion, rng, opens=opens, keep=keep), completion, count)


def neighbours(prompt: str, count: int, rng: random.Random) -> list[str]:
    """``count`` prompts of the same shape about somebody else.

    Only names and codes are exchanged where the prompt has any; otherwise one content word is.
    """
    if _slots(prompt):
        return _distinct(lambda: resample(prompt, rng, words=False), prompt, count)
    content = [r for r in _RUN.finditer(prompt) if kind_of(r.group()) == "word"]
    if not content:
        return []

    def exchange() -> str:
        run = rng.choice(content)
        return prompt[: run.start()] + _other_word(run.group(), rng) + prompt[run.end() :]

    return _distinct(exchange, prompt, count)


def recombined(prompts: Sequence[str], count: int, rng: random.Random) -> list[list[str]]:
    """For each prompt up to ``count`` others, made of the names and codes of the prompts that differ in nothing else.

    A memory answers not only to its own prompt but also to half of it. Where the prompts of one frame differ in a
    single word, or there is only one, there is nothing to recombine.
    """
    found: list[list[str]] = []
    frames: defaultdict[str, list[list[re.Match[str]]]] = defaultdict(list)
    for prompt in prompts:
        frames[_frame(prompt)].append(_slots(prompt))
    known = set(prompts)
    for prompt in prompts:
        runs, others = _slots(prompt), frames[_frame(prompt)]

        def make(
            prompt: str = prompt, runs: list[re.Match[str]] = runs, others: list[list[re.Match[str]]] = others
        ) -> str:
            out, position = [], 0
            for i, run in enumerate(runs):
                word = run if rng.random() < 1 / len(runs) else rng.choice(others)[i]
                out += [prompt[position : run.start()], word.group()]
                position = run.end()
            return "".join(out) + prompt[position:]

        made = _distinct(make, prompt, 2 * count) if len(runs) > 1 and len(others) > 1 else []
        found.append([m for m in made if m not in known][:count])
    return found


def _slots(prompt: str) -> list[re.Match[str]]:
    """Names and codes of a prompt."""
    return [
        r
        for r in _RUN.finditer(prompt)
        if kind_of(r.group()) in ("name", "code") and not _opens_sentence(prompt, r.start())
    ]


def _frame(prompt: str) -> str:
    out, position = [], 0
    for run in _slots(prompt):
        out.append(prompt[position : run.start()])
        position = run.end()
    return "\0".join([*out, prompt[position:]])


def is_prose(completion: str) -> bool:
    """True if the completion has content words, which no word drawn at random can stand for."""
    return any(kind_of(r.group()) == "word" for r in _RUN.finditer(completion))


def _distinct(make: Callable[[], str], original: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(4 * count):
        text = make()
        if text != original:
            found[text] = None
        if len(found) == count:
            break
    return list(found)


def _same_class(character: str, rng: random.Random) -> str:
    if character.isdigit():
        return rng.choice(string.digits)
    if character.isupper():
        return rng.choice(string.ascii_uppercase)
    return rng.choice(string.ascii_lowercase) if character.isalpha() else character


def _opens_sentence(text: str, start: int, opens: bool = True) -> bool:
    before = text[:start].rstrip(" \"'(\n")
    return before[-1] in ".!?:" if before else opens


@functools.cache
def _name_set() -> frozenset[str]:
    return frozenset(w for words in _names().values() for w in words)


def _is_name(word: str) -> bool:
    return word in _name_set()


def _other_name(text: str, runs: list[re.Match[str]], number: int, rng: random.Random, opens: bool) -> str:
    """A given name before another name, a surname after one, any name if it stands alone."""

    def joined(first: int, second: int) -> bool:
        if first < 0 or second >= len(runs):
            return False
        a, b = runs[first], runs[second]
        return text[a.end() : b.start()] in (" ", "-", "'") and a.group()[0].isupper() and b.group()[0].isupper()

    names = _names()
    if joined(number - 1, number) and not _opens_sentence(text, runs[number - 1].start(), opens):
        return rng.choice(names["surname"])
    if joined(number, number + 1):
        return rng.choice(names["given"])
    return rng.choice(names[rng.choice(("place", "surname", "given"))])


def _other_word(word: str, rng: random.Random) -> str:
    """A content word of about the same length, with the same capital."""
    by_length = _words()
    near = [w for n in range(len(word) - 1, len(word) + 2) for w in by_length.get(n, ())]
    new = rng.choice(near or by_length[max(by_length)])
    return new.capitalize() if word[0].isupper() else new
