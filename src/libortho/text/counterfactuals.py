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
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from libortho.text.characters import Word, alphabet, bare, is_han_numeral, is_latin, is_unspaced, kind
from libortho.text.characters import words as words_of
from libortho.text.corpus import is_name, names, shipped_text
from libortho.text.grammar import GRAMMAR, VERDICTS

Spans = Sequence[tuple[int, int]]
"""Ranges of characters of a prompt that people wrote."""
_ENOUGH_TO_COMPARE = 4
"""Completions of one shape that must agree on a character before it counts as form."""
_SHORT = 4
"""Lower-case words shorter than this are grammar, and stay."""
_JOINERS = frozenset("-\u2010\u2011\u2013_/.\u00b7:#|")
"""Between the parts of one code."""
_STRETCH = 4
"""Letters without blanks that make a sentence, in scripts that write none between words."""
_PART = 3
"""Characters of such a sentence that are exchanged where one word is."""
_TRIES = 8
"""Draws for a name or code that differs from all others of its prompt."""


@functools.cache
def _words() -> dict[int, tuple[str, ...]]:
    """Content words of the shipped text, with repetition (so that draws follow frequency), by length."""
    lengths: defaultdict[int, list[str]] = defaultdict(list)
    for word in re.findall(r"\b[a-z]{4,}\b", " ".join(shipped_text())):
        if word not in GRAMMAR:
            lengths[len(word)].append(word)
    return {k: tuple(v) for k, v in lengths.items()}


def kind_of(word: str) -> str:
    """What a run of letters and digits is: "code", "name", "word", or "form" (grammar, which stays).

    A name in a script other than Latin is a "word": there is no list of such names to draw from.
    """
    letters = bare(word)
    if not letters or letters.lower() in VERDICTS:
        return "form"
    if (len(letters) > 1 and letters.isupper()) or _is_number(letters):
        return "word" if _longest_unspaced(letters) >= _STRETCH and not _is_number(letters, whole=True) else "code"
    if _is_foreign(letters):
        if kind(letters[0]) != "lower":  # a name, or a script without capitals
            return "word" if len(letters) > 1 else "form"
        return "word" if len(letters) >= _SHORT else "form"
    if letters[0].isupper() and len(letters) > 1 and letters.lower() not in GRAMMAR:
        return "name"
    return "word" if len(letters) >= _SHORT and letters.lower() not in GRAMMAR and letters.isalpha() else "form"


def _is_number(letters: str, *, whole: bool = False) -> bool:
    return (not whole and any(kind(c) == "digit" for c in letters)) or all(map(is_han_numeral, letters))


def _is_foreign(letters: str) -> bool:
    return not letters.isascii() and any(c.isalpha() and kind(c) != "mark" and not is_latin(c) for c in letters)


def _longest_unspaced(letters: str) -> int:
    stretch = longest = 0
    for c in letters if not letters.isascii() else "":
        stretch = stretch + 1 if is_unspaced(c) else 0
        longest = max(longest, stretch)
    return longest


class _Run(NamedTuple):
    """A run of letters and digits in its text; ``kind`` is "name" for a capitalised word of another script too."""

    text: str
    start: int
    end: int
    kind: str
    opening: bool


def _scan(text: str, opens: bool = True, spans: Spans | None = None) -> list[_Run]:
    """The runs of a text, or of its spans, each of which begins a sentence."""
    found = []
    for start, end in ((0, len(text)),) if spans is None else spans:
        piece = text[start:end]
        runs = words_of(piece)
        for run, sort in zip(runs, _kinds(piece, runs), strict=True):
            opening = _opens_sentence(piece, run.start, opens)
            if sort == "word" and run.text[0].isupper():  # Latin words with a capital are names already
                sort = kind_of(run.text.lower()) if opening else "name"
            found.append(_Run(run.text, start + run.start, start + run.end, sort, opening))
    return found


def _kinds(text: str, runs: Sequence[Word]) -> list[str]:
    """``kind_of`` each run; but a few letters without case that are joined to a code are code too."""
    kinds = [kind_of(r.text) for r in runs]
    if text.isascii():
        return kinds

    def joined(first: int, second: int) -> bool:
        return text[runs[first].end : runs[second].start] in _JOINERS

    for order, step in ((range(1, len(runs)), -1), (range(len(runs) - 2, -1, -1), 1)):
        for i in order:
            beside = i + step
            if kinds[beside] == "code" and joined(min(i, beside), max(i, beside)) and _is_caseless(runs[i].text):
                kinds[i] = "code"
    return kinds


def _is_caseless(word: str) -> bool:
    letters = bare(word)
    return 0 < len(letters) <= _SHORT and all(kind(c) == "letter" for c in letters)


def common_form(completions: Sequence[str]) -> list[frozenset[int]]:
    """For each completion, the character positions at which all completions of its shape agree.

    Such a position is form, not information: the country code of telephone numbers, the letters before every invoice
    number. Shapes are equal if characters of the same classes stand at the same places; fewer than
    ``_ENOUGH_TO_COMPARE`` completions of a shape say nothing, nor do any number of equal ones.
    """
    shapes: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for completion in completions:
        shapes[_shape(completion)].append(completion)
    agreed: dict[tuple[str, ...], frozenset[int]] = {}
    for shape, same in shapes.items():
        constant = (i for i, characters in enumerate(zip(*same, strict=True)) if len(set(characters)) == 1)
        told = len(same) >= _ENOUGH_TO_COMPARE and len(set(same)) > 1
        agreed[shape] = frozenset(constant) if told else frozenset()
    return [agreed[_shape(c)] for c in completions]


def _shape(text: str) -> tuple[str, ...]:
    return tuple(alphabet(c) or c for c in text)


def _resampled(text: str, runs: Sequence[_Run], rng: random.Random, *, words: bool, keep: Collection[int]) -> str:
    """Another text of the same shape, of codes, names and, if ``words``, other words; what stands at ``keep`` stays."""
    out, position = [], 0
    for number, run in enumerate(runs):
        word, sort = run.text, run.kind
        out.append(text[position : run.start])
        position = run.end
        if sort == "name" and run.opening and not is_name(word):
            sort = kind_of(word.lower())
        if keep and all(i in keep for i in range(run.start, run.end)):
            out.append(word)
        elif sort == "code":
            out.append("".join(c if run.start + i in keep else _same_class(c, rng) for i, c in enumerate(word)))
        elif sort == "name":
            out.append(_other_name(text, runs, number, rng))
        elif sort == "word" and words:
            out.append(_other_word(word, rng))
        else:
            out.append(word)
    return "".join(out) + text[position:]


def alternates(
    completion: str, count: int, rng: random.Random, *, opens: bool = False, keep: Collection[int] = ()
) -> list[str]:
    """``count`` different completions of the same shape, fewer where so many do not exist.

    Args:
        completion: What is exchanged: codes, names and content words. Nothing of it, nothing is made.
        count: How many.
        rng: Source of randomness.
        opens: The text begins a sentence, so that its first capital need not be a name.
        keep: Positions of characters that stay: characters of a code, or whole runs of any kind.
    """
    runs = _scan(completion, opens)
    return _distinct(lambda: _resampled(completion, runs, rng, words=True, keep=keep), completion, count)


def neighbours(prompt: str, count: int, rng: random.Random, spans: Spans | None = None) -> list[str]:
    """``count`` prompts of the same shape about somebody else.

    Only names and codes are exchanged where the prompt has any; otherwise one content word is.

    Args:
        prompt: Any prompt.
        count: How many.
        rng: Source of randomness.
        spans: Ranges of characters that people wrote, in order; nothing else is exchanged, each begins a sentence, and
            within one made prompt a name or code is exchanged for the same other wherever it stands. None is the whole
            prompt, with every place drawn on its own.
    """
    runs = _scan(prompt, spans=spans)
    slots = _slots(runs, spans)
    if slots and spans is None:
        return _distinct(lambda: _resampled(prompt, runs, rng, words=False, keep=()), prompt, count)
    if slots:
        return _distinct(lambda: _everywhere(prompt, _others(prompt, runs, slots, rng)), prompt, count)
    content = [r for r in runs if r.kind == "word"]
    if not content:
        return []

    def exchange() -> str:
        run = rng.choice(content)
        return prompt[: run.start] + _other_part(run.text, rng) + prompt[run.end :]

    return _distinct(exchange, prompt, count)


def recombined(
    prompts: Sequence[str], count: int, rng: random.Random, spans: Sequence[Spans | None] | None = None
) -> list[list[str]]:
    """For each prompt up to ``count`` others, made of the names and codes of the prompts that differ in nothing else.

    A memory answers not only to its own prompt but also to half of it. Where the prompts of one frame differ in a
    single word, or there is only one, there is nothing to recombine.

    Args:
        prompts: Any prompts.
        count: How many for each.
        rng: Source of randomness.
        spans: For each prompt the ranges of characters that people wrote, or None; see ``neighbours``.
    """
    written = [None] * len(prompts) if spans is None else spans
    slots = [_slots(_scan(p, spans=s), s) for p, s in zip(prompts, written, strict=True)]
    frames: defaultdict[str, list[list[_Run]]] = defaultdict(list)
    for prompt, runs in zip(prompts, slots, strict=True):
        frames[_frame(prompt, runs)].append(runs)
    known = set(prompts)
    found: list[list[str]] = []
    for prompt, runs, own in zip(prompts, slots, written, strict=True):
        others = frames[_frame(prompt, runs)]
        drawn = len(runs) if own is None else len({r.text for r in runs})

        def make(
            prompt: str = prompt,
            runs: list[_Run] = runs,
            others: list[list[_Run]] = others,
            drawn: int = drawn,
            same: bool = own is not None,
        ) -> str:
            chosen: list[str] = []
            of: dict[str, str] = {}
            for i, run in enumerate(runs):
                if not same or run.text not in of:
                    of[run.text] = run.text if rng.random() < 1 / drawn else rng.choice(others)[i].text
                chosen.append(of[run.text])
            return _everywhere(prompt, of) if same else _replaced(prompt, runs, chosen)

        made = _distinct(make, prompt, 2 * count) if drawn > 1 and len(others) > 1 else []
        found.append([m for m in made if m not in known][:count])
    return found


def _slots(runs: Sequence[_Run], spans: Spans | None) -> list[_Run]:
    """Names and codes of a prompt; within spans also where they open a sentence, if they are known to be such."""
    found = [r for r in runs if r.kind in ("name", "code") and not r.opening]
    if spans is None:
        return found
    known = {r.text for r in found}
    slots = [r for r in runs if r.text in known or r.kind == "code" or (r.kind == "name" and is_name(r.text))]
    telling = [r for r in slots if not _is_acronym(r.text)]  # "PIN" says what is asked for, not about whom
    return telling or slots


def _is_acronym(word: str) -> bool:
    return word.isalpha() and word.isupper()


def _frame(prompt: str, slots: Sequence[_Run]) -> str:
    return _replaced(prompt, slots, ["\0"] * len(slots))


def _replaced(prompt: str, runs: Sequence[_Run], others: Sequence[str]) -> str:
    out, position = [], 0
    for run, other in zip(runs, others, strict=True):
        out += [prompt[position : run.start], other]
        position = run.end
    return "".join(out) + prompt[position:]


def _everywhere(prompt: str, of: Mapping[str, str]) -> str:
    """The prompt with other texts for these, also where a template repeats them, and where they stand in capitals."""
    of = {**{w.upper(): o.upper() for w, o in of.items() if len(w) > 1}, **of}
    words = "|".join(map(re.escape, sorted(of, key=len, reverse=True)))
    return re.sub(rf"(?<!\w)(?:{words})(?!\w)", lambda m: of[m.group()], prompt)


def _others(prompt: str, runs: Sequence[_Run], slots: Sequence[_Run], rng: random.Random) -> dict[str, str]:
    """Another text for the text of each slot, and different ones for different texts."""
    wanted = {r.text for r in slots}
    of: dict[str, str] = {}
    for number in sorted(range(len(runs)), key=lambda n: runs[n].opening):
        run = runs[number]
        if run.text not in wanted or run.text in of:
            continue
        for _ in range(_TRIES):
            if run.kind == "code":
                other = "".join(_same_class(c, rng) for c in run.text)
            else:
                other = _other_name(prompt, runs, number, rng)
            if other != run.text and other not in of.values():
                break
        of[run.text] = other
    return of


def is_prose(completion: str) -> bool:
    """True if the completion has content words, which no word drawn at random can stand for."""
    return "word" in _kinds(completion, words_of(completion))


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
    characters = alphabet(character)
    return character if characters is None else rng.choice(characters)


def _opens_sentence(text: str, start: int, opens: bool = True) -> bool:
    while start and text[start - 1] in " \"'(\n":
        start -= 1
    return text[start - 1] in ".!?:" if start else opens


def _other_name(text: str, runs: Sequence[_Run], number: int, rng: random.Random) -> str:
    """A given name before another name, a surname after one, any name if it stands alone.

    In scripts other than Latin, other letters of the same classes.
    """

    def joined(first: int, second: int) -> bool:
        if first < 0 or second >= len(runs):
            return False
        a, b = runs[first], runs[second]
        return text[a.end : b.start] in (" ", "-", "'") and a.text[0].isupper() and b.text[0].isupper()

    if _is_foreign(runs[number].text):
        return _other_word(runs[number].text, rng)
    known = names()
    if joined(number - 1, number) and not runs[number - 1].opening:
        return rng.choice(known["surname"])
    if joined(number, number + 1):
        return rng.choice(known["given"])
    return rng.choice(known[rng.choice(("place", "surname", "given"))])


def _other_word(word: str, rng: random.Random) -> str:
    """A content word of about the same length, with the same capital; letters of the same classes in other scripts."""
    if _is_foreign(word):
        return "".join(_same_class(c, rng) for c in word)
    by_length = _words()
    near = [w for n in range(len(word) - 1, len(word) + 2) for w in by_length.get(n, ())]
    new = rng.choice(near or by_length[max(by_length)])
    return new.capitalize() if word[0].isupper() else new


def _other_part(word: str, rng: random.Random) -> str:
    """Another word; of a sentence without blanks another part."""
    if _longest_unspaced(word) < _STRETCH:
        return _other_word(word, rng)
    start = rng.randrange(len(word) - _PART + 1)
    part = word[start : start + _PART]
    return word[:start] + "".join(_same_class(c, rng) for c in part) + word[start + _PART :]
