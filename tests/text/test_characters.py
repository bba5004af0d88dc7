"""Classes of characters: every one is of one script, one kind and one length, whatever the script."""

import unicodedata

import pytest

from libortho.text.characters import alphabet, bare, kind, words

BLOCKS = [
    range(0x00, 0x250), range(0x370, 0x600), range(0x900, 0xE80), range(0x10A0, 0x1400), range(0x1E00, 0x2200),
    range(0x2460, 0x2500), range(0x3000, 0x3200), range(0x4E00, 0x5000), range(0xAC00, 0xAD00), range(0xFF00, 0xFFF0),
    range(0x10400, 0x10500), range(0x1D400, 0x1D800),
]  # fmt: skip


def script(character: str) -> str:
    return unicodedata.name(character).split(" ")[0]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.start:04X}")
def test_classes_are_of_one_script_one_category_and_one_length_and_do_not_overlap(block: range) -> None:
    found = 0
    for character in map(chr, block):
        letters = alphabet(character)
        if letters is None:
            continue
        found += 1
        assert character in letters
        assert len(set(letters)) == len(letters) > 1
        for other in letters:
            assert alphabet(other) == letters
            assert unicodedata.category(other) == unicodedata.category(character)
            assert kind(other) == kind(character)
            assert len(other.encode()) == len(character.encode())
            assert script(other) == script(character)
    assert found > 50


@pytest.mark.parametrize("character", [c for c in map(chr, range(0x1FFFF)) if unicodedata.category(c) == "Nd"][::7])
def test_a_decimal_digit_stands_for_the_ten_of_its_own_set(character: str) -> None:
    letters = alphabet(character)
    assert letters is not None
    assert [unicodedata.decimal(c) for c in letters] == list(range(10))


@pytest.mark.parametrize(
    ("character", "expected"),
    [
        ("7", "0123456789"), ("Q", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), ("q", "abcdefghijklmnopqrstuvwxyz"),
        ("²", "¹²³"), ("④", "⓪①②③④⑤⑥⑦⑧⑨"), ("Γ", "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ"),
        ("Ж", "АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ"), ("ב", "אבגדהוזחטיכלמנסעפצקרשת"), ("三", "一二三四五六七八九"),
        ("-", None), (" ", None), ("\u0301", None), ("ー", None), ("〇", None), ("ς", None), ("\0", None),
    ],
)  # fmt: skip
def test_alphabet_of(character: str, expected: str | None) -> None:
    assert alphabet(character) == expected


@pytest.mark.parametrize("character", ["的", "人", "語", "码", "한", "김"])
def test_common_characters_stand_for_common_ones(character: str) -> None:
    letters = alphabet(character)
    assert letters is not None
    assert 100 < len(letters) < 4000
    assert not set(letters) & {"龘", "䶮", "갂", "걁"}


def test_words_hold_their_combining_marks() -> None:
    text = "u\u0308ber क्षत्रिय, x_1 O'Neil\0b"
    found = words(text)
    assert [w.text for w in found] == ["u\u0308ber", "क्षत्रिय", "x", "1", "O", "Neil", "b"]
    assert all(text[w.start : w.end] == w.text for w in found)
    assert bare("U\u0308B") == "UB"


@pytest.mark.parametrize(
    ("character", "expected"),
    [
        ("5", "digit"), ("٣", "digit"), ("½", "digit"), ("Ⅳ", "digit"), ("Ж", "upper"), ("ж", "lower"), ("ა", "letter"),
        ("ß", "lower"), ("字", "letter"), ("三", "letter"), ("\u0301", "mark"), ("ー", "mark"), ("-", "other"),
    ],
)  # fmt: skip
def test_kind_of_a_character(character: str, expected: str) -> None:
    assert kind(character) == expected
