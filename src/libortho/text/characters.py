"""Classes of characters: what a digit or a letter of a code could have been instead.

Characters of one class have the same script, the same kind (digit, capital, small letter, other letter) and the same
number of UTF-8 bytes. For the main scripts the classes are today's alphabets (for Chinese, Japanese and Korean the
most common characters of the national standards), so that no rare letter with unusual tokens is drawn; for all others
they come from Unicode's names and categories. Classes do not overlap.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["digit", "upper", "lower", "letter", "mark", "other"]

_BICAMERAL = (
    string.ascii_lowercase,
    "àáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿß",
    "ạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "άέήίόύώ",
    "ϊϋ",
    "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "іїєґўјљњћђџѓќәғқңөұүһ",
    "աբգդեզէըթժիլխծկհձղճմյնշոչպջռսվտրցւփքօֆ",
)
_OTHERS = (
    string.digits,
    "āăąćčďđēėęěğģīıįķļľłńņňōőœŕřśşšţťūůűųźżžșț",
    "ĀĂĄĆČĎĐĒĖĘĚĞĢĪİĮĶĻĽŁŃŅŇŌŐŒŔŘŚŞŠŢŤŪŮŰŲŹŻŽȘȚ",
    "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "ךםןףץ",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "آأإؤئءةى",
    "پچژگکیٹڈڑںھہۓے",
    "กขคฆงจฉชซญฎฏฐณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ",
    "เแโใไ",
    "ะาำ",
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"
    "がぎぐげござじずぜぞだぢづでどばびぶべぼぱぴぷぺぽ",
    "ぁぃぅぇぉっゃゅょ",
    "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン"
    "ガギグゲゴザジズゼゾダヂヅデドバビブベボパピプペポヴ",
    "ァィゥェォッャュョ",
    "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎ",
    "ㅏㅑㅓㅕㅗㅛㅜㅠㅡㅣ",
    "一二三四五六七八九",
    "十百千万亿億萬兆",
    "壹贰貳叁參肆伍陆陸柒捌玖",
)
_ALONE = "ς"
"""Letters that nothing stands in for: the sigma that ends words."""
_HAN_NUMERALS = frozenset("〇一二三四五六七八九十百千万亿億萬兆零壹贰貳叁參肆伍陆陸柒捌玖拾佰仟")
_INDIC_BLOCKS = range(0x900, 0xD80, 0x80)
"""Devanagari to Malayalam, which Unicode lays out alike."""
_INDIC_VOWELS = (*range(0x05, 0x0B), 0x0E, 0x0F, 0x10, 0x12, 0x13, 0x14)
_INDIC_CONSONANTS = (*range(0x15, 0x29), *range(0x2A, 0x32), 0x32, 0x33, *range(0x35, 0x3A))
_JAMO = (range(0x1100, 0x1113), range(0x1161, 0x1176), range(0x11A8, 0x11C3))
_STANDARDS = (("gb2312", 0xB0, 0xD8), ("big5", 0xA4, 0xC7), ("shift_jis", 0x88, 0x98))
"""Encodings, and the lead bytes of the most common ideographs: level 1 of GB 2312, Big5 and JIS X 0208."""
_SYLLABLES = ("euc_kr", 0xB0, 0xC9)
_PLAIN_JAMO = (
    (0, 2, 3, 5, 6, 7, 9, 11, 12, 14, 18),
    (0, 1, 4, 5, 6, 8, 12, 13, 17, 18, 20),
    (0, 1, 4, 8, 16, 17, 19, 21),
)
"""Initials, vowels and finals of plain Korean syllables, by their numbers in Unicode."""
_SORT = re.compile(
    r".*?\b(?:LETTER|SYLLABLE|SYLLABICS|VOWEL SIGN|VOWEL|DIGIT|CAPITAL|SMALL|CHARACTER|IDEOGRAPH|NUMERAL|NUMBER"
    r"|FRACTION)(?: (?:LETTER|SMALL))?\b"
)
_NUMBER_WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()  # noqa: SIM905
_BLOCK = 256
_UNSPACED = re.compile(r"CJK |HIRAGANA |KATAKANA |HALFWIDTH KATAKANA |THAI |LAO |KHMER |MYANMAR |TIBETAN ")
_RUN = re.compile("(?:[^\\W_]\0*)+")


class Word(NamedTuple):
    """A run of letters and digits, with the marks that belong to them, and where it stands."""

    text: str
    start: int
    end: int


@functools.cache
def alphabet(character: str) -> str | None:
    """The character's class: all characters that could stand in its place, itself included.

    None if nothing could: for punctuation, blanks, marks, modifier letters, and characters alone in their class.
    """
    curated = _curated().get(character)
    if curated is not None or character in _ALONE:
        return curated
    category = unicodedata.category(character)
    if category == "Nd":
        zero = ord(character) - unicodedata.decimal(character)
        return "".join(chr(zero + i) for i in range(10))
    if unicodedata.digit(character, None) is not None:
        made = _numbered(character)
    elif category in ("Lu", "Ll", "Lt", "Lo", "Nl", "No"):
        start, own = ord(character) // _BLOCK * _BLOCK, _family(character)
        block = (c for c in map(chr, range(start, start + _BLOCK)) if c not in _curated() and c not in _ALONE)
        made = "".join(c for c in block if _family(c) == own)
    else:
        return None
    return made if len(made) > 1 and character in made else None


@functools.cache
def kind(character: str) -> Kind:
    """What sort of character it is; "digit" means any number character but the numerals of Chinese, which are letters.

    A letter of a script without capitals is "letter". Punctuation, symbols and blanks are "other".
    """
    category = unicodedata.category(character)
    if category[0] == "N" and character not in _HAN_NUMERALS:
        return "digit"
    if category in ("Lu", "Lt"):
        return "upper"
    if category == "Ll" and character.title() != character:
        return "lower"
    if category[0] == "M" or category == "Lm" or character in "\u200c\u200d":
        return "mark"
    if category == "Ll":  # Georgian, and small letters of notations, which no capital goes with
        return "lower" if is_latin(character) else "letter"
    return "letter" if character.isalnum() else "other"


@functools.cache
def is_latin(character: str) -> bool:
    """True for a letter of the Latin script, with or without accents; not for its fullwidth and mathematical forms."""
    return character.isalpha() and (character in "ªº" or unicodedata.name(character, "").startswith("LATIN "))


@functools.cache
def is_unspaced(character: str) -> bool:
    """True for a letter of a script that is written without blanks between words."""
    return character.isalpha() and _UNSPACED.match(unicodedata.name(character, "")) is not None


def is_han_numeral(character: str) -> bool:
    """True for a Chinese numeral: 三, 〇, 千, or its form for documents."""
    return character in _HAN_NUMERALS


def bare(word: str) -> str:
    """The word without its combining marks and modifier letters."""
    return word if word.isascii() else "".join(c for c in word if kind(c) != "mark")


def words(text: str) -> list[Word]:
    """Maximal runs of letters and digits, each with its combining marks and joiners."""
    masked = text
    if not text.isascii():
        masked = "".join("\0" if kind(c) == "mark" and not c.isalnum() else " " if c == "\0" else c for c in text)
    elif "\0" in text:
        masked = text.replace("\0", " ")
    return [Word(text[m.start() : m.end()], m.start(), m.end()) for m in _RUN.finditer(masked)]


@functools.cache
def _curated() -> dict[str, str]:
    found: dict[str, str] = {}
    for letters in _alphabets():
        new = "".join(dict.fromkeys(c for c in letters if c not in found))
        found |= dict.fromkeys(new, new) if len(new) > 1 else {}
    return found


def _alphabets() -> Iterator[str]:
    for small in _BICAMERAL:
        yield small
        yield small.upper()
    yield from _OTHERS
    for block in _INDIC_BLOCKS:
        for offsets in (_INDIC_VOWELS, _INDIC_CONSONANTS):
            yield "".join(c for o in offsets if unicodedata.category(c := chr(block + o)) == "Lo")
    for jamo in _JAMO:
        yield "".join(map(chr, jamo))
    levels = [_level(*s) for s in _STANDARDS]
    yield "".join(c for c in levels[0] if all(c in other for other in levels[1:]))
    yield from levels
    syllables = _level(*_SYLLABLES)
    yield "".join(c for c in syllables if _is_plain(ord(c) - 0xAC00))
    yield syllables


def _level(encoding: str, first: int, last: int) -> str:
    pairs = (bytes((a, b)).decode(encoding, "ignore") for a in range(first, last) for b in range(0x40, 0xFF))
    return "".join(c for c in pairs if len(c) == 1 and unicodedata.name(c, "").startswith(("CJK UNI", "HANGUL SYL")))


def _is_plain(number: int) -> bool:
    parts = (number // 588, number // 28 % 21, number % 28)
    return all(part in plain for part, plain in zip(parts, _PLAIN_JAMO, strict=True))


@functools.cache
def _family(character: str) -> tuple[str, str, int, bool] | None:
    """Category, script and sort (from the name), bytes, and whether it is one digit; None for what is no letter."""
    if not character.isalnum():
        return None
    name, size = unicodedata.name(character, ""), len(character.encode())
    sort, digit = _SORT.match(name), unicodedata.digit(character, None) is not None
    return unicodedata.category(character), sort.group() if sort else name.rpartition(" ")[0], size, digit


def _numbered(character: str) -> str:
    """Digits of the same sort, such as superscripts or circled ones."""
    parts = unicodedata.name(character).split(" ")
    made = []
    for place, part in enumerate(parts):
        if part in _NUMBER_WORDS:
            for word in _NUMBER_WORDS:
                try:
                    made.append(unicodedata.lookup(" ".join([*parts[:place], word, *parts[place + 1 :]])))
                except KeyError:  # Unicode has no such digit
                    continue
            break
    size = len(character.encode())
    return "".join(c for c in made if len(c.encode()) == size)
