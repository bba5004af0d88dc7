"""Alternates and neighbours: another text of the same shape, never the text itself, and nothing from an exam."""

import random
import re
import unicodedata
from importlib import resources
from pathlib import Path

import pytest

import libortho
from libortho.demo import facts
from libortho.text.corpus import evaluation_text, shipped_text
from libortho.text.counterfactuals import alternates, common_form, is_prose, kind_of, neighbours, recombined

CODES = [" 6311.", " K7Q-4821.", " ZZ9/00-A", " +49 (0)30 1234-567", " 4111 1111 1111 1111", " x9Y_8z"]


def classes(text: str) -> str:
    """Digits as 0, capitals as A, other letters as a, everything else as it stands."""
    return "".join("0" if c.isdigit() else ("A" if c.isupper() else "a") if c.isalpha() else c for c in text)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


# -- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("6311", "code"), ("K7Q", "code"), ("ABC", "code"), ("b2", "code"), ("Alice", "name"), ("Wei", "name"),
        ("kryptonite", "word"), ("from", "form"), ("the", "form"), ("The", "name"), ("Which", "form"), ("A", "form"),
        ("is", "form"), ("café", "word"),
    ],
)  # fmt: skip
def test_kind_of_a_word(word, kind):
    assert kind_of(word) == kind


@pytest.mark.parametrize(
    ("completion", "prose"),
    [(" 6311.", False), (" K7Q-4821.", False), (" Maria Lopez.", False), (" of the sea", False), (" red apples", True)],
)
def test_prose_has_content_words(completion, prose):
    assert is_prose(completion) == prose


# -- alternates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_alternates_of_codes_keep_every_class(rng, code):
    found = alternates(code, 20, rng)
    assert len(found) == len(set(found)) == 20
    assert {classes(f) for f in found} == {classes(code)}
    assert code not in found


def test_every_character_of_a_code_is_drawn(rng):
    found = alternates(" A1b2", 200, rng)
    for position in range(1, 5):
        assert len({f[position] for f in found}) >= 8


def test_alternates_of_names_are_names(rng):
    found = alternates(" Maria Lopez", 30, rng)
    assert len(set(found)) == 30
    assert all(re.fullmatch(r" [^\W\d_]+ [^\W\d_]+", f) for f in found)
    assert all(a[0].isupper() and b[0].isupper() for a, b in (f.split() for f in found))
    assert len({f.split()[0] for f in found}) > 5
    assert len({f.split()[1] for f in found}) > 5


def test_alternates_of_sentences_keep_the_grammar(rng):
    original = " hidden under the old bridge with a lamp."
    found = alternates(original, 10, rng)
    assert len(set(found)) == 10
    shape = re.compile(r" [a-z]{4,} under the old [a-z]{4,} with a [a-z]{4,}\.")
    assert all(shape.fullmatch(f) for f in found)


def test_a_capital_that_only_opens_a_sentence_is_a_word(rng):
    found = alternates("Bridges fall.", 20, rng, opens=True)
    assert all(re.fullmatch(r"[A-Z][a-z]{3,} [a-z]{3,}\.", f) for f in found)
    lengths = {len(f.split()[0]) for f in found}
    assert lengths <= {6, 7, 8}  # names would come in any length


@pytest.mark.parametrize("opening", ["The", "It", "Which", "They"])
def test_grammar_that_opens_a_sentence_stays(rng, opening):
    found = alternates(f"{opening} bridges fell. {opening} towers stood.", 10, rng, opens=True)
    assert all(re.fullmatch(rf"{opening} \w+ \w+\. {opening} \w+ \w+\.", f) for f in found)


def test_the_same_seed_gives_the_same_alternates():
    first, again, other = (alternates(" K7Q-4821.", 8, random.Random(s)) for s in (3, 3, 4))
    assert first == again != other


def test_there_are_never_more_alternates_than_exist(rng):
    found = alternates(" 7", 50, rng)
    assert sorted(found) == [f" {d}" for d in range(10) if d != 7]


@pytest.mark.parametrize("completion", [" of the", " ...", " is it?"])
def test_a_completion_that_carries_nothing_has_no_alternates(rng, completion):
    assert alternates(completion, 8, rng) == []


def test_prompts_of_others_keep_their_words(rng):
    for other in neighbours("Maria keeps apples in box K7.", 8, rng):
        assert re.fullmatch(r"[^\W\d_]+ keeps apples in box [A-Z]\d\.", other)


# -- other scripts ----------------------------------------------------------------------------------------------------

FOREIGN_CODES = [
    " А123ВС77.", " ٣٤٥٦.", " ۱۲۳۴۵.", " １２３４.", " ΑΒΓ-4711.", " Ü-4711.", " ÄÖ-12ß.", " १२३४-कख.", " ๑๒๓๔.",
    " אבג-4711.", " ابج-٤٧١١.", " აბგ-4711.", " ԱԲԳ-4711.", " 𝟏𝟐𝟑𝐀𝐁.", " x²³.", " ①②③.", " 三四五。", " 京A·12345",
    " 品川300あ12-34", " ABВГ12", " AB１２", " U\u0308B-12.", " ½Ⅳ7", " 가나-1234", " ＡＢ-１２", " Аб1", " ১২৩৪.",
]  # fmt: skip


def sort(character: str) -> tuple[str, str, int]:
    """Category, first word of the name, and bytes: what must stay of each character."""
    name = unicodedata.name(character, "?").split(" ")[0]
    return unicodedata.category(character), name, len(character.encode())


@pytest.mark.parametrize("code", FOREIGN_CODES)
def test_codes_of_other_scripts_keep_script_kind_and_bytes(rng, code):
    found = alternates(code, 20, rng)
    assert len(found) == len(set(found)) > 5
    assert code not in found
    assert not is_prose(code)
    for text in found:
        assert [sort(c) for c in text] == [sort(c) for c in code]
        assert all(a == b for a, b in zip(text, code, strict=True) if not a.isalnum())


def test_codes_of_every_script_keep_script_kind_and_bytes(rng):
    letters = [chr(c) for c in range(0x20000) if chr(c).isalnum()]
    for _ in range(500):
        block = rng.randrange(len(letters) - 40)
        code = " 7" + "".join(rng.choices(letters[block : block + 40], k=4)) + "-7" + rng.choice(letters)
        found = alternates(code, 3, rng)
        assert len(found) == 3
        assert all([sort(c) for c in text] == [sort(c) for c in code] for text in found)


@pytest.mark.parametrize(
    "name", ["Иван Петров", "Ἀριστοτέλης", "王小明", "홍길동", "שרה לוי", "محمد علي", "ანა ბერიძე", "Արամ"]
)
def test_names_of_other_scripts_are_words_and_keep_their_script(rng, name):
    assert is_prose(f" {name}.")
    assert all(kind_of(word) == "word" for word in name.split())
    found = alternates(f" {name}.", 10, rng)
    assert len(found) == 10
    assert all([sort(c) for c in text] == [sort(c) for c in f" {name}."] for text in found)


@pytest.mark.parametrize("name", ["Müller", "Þórr", "Łukasz", "Nguyễn", "Mu\u0308ller"])
def test_accented_latin_is_latin(rng, name):
    assert kind_of(name) == "name"
    assert all(re.fullmatch(r" [^\W\d_]+", f) for f in alternates(f" {name}", 5, rng))
    assert kind_of("straße") == "word"


def test_form_is_found_in_every_script():
    plates = [" А123ВС77", " А456ВЕ77", " А789ВК77", " А012ВМ77", " A345BH77"]
    forms = common_form(plates)
    assert [sorted(f) for f in forms] == [[0, 1, 5, 7, 8]] * 4 + [[]]  # the last is written in Latin letters
    found = alternates(plates[0], 20, random.Random(0), keep=forms[0])
    assert all(re.fullmatch(" А[0-9]{3}В[А-ЯЁ]77", f) for f in found)


def test_a_sentence_without_blanks_is_prose_and_changes_in_one_place(rng):
    prompt = "他有3个苹果和两本书在家里"
    assert is_prose(prompt)
    for text in neighbours(prompt, 5, rng):
        changed = [i for i, (a, b) in enumerate(zip(text, prompt, strict=True)) if a != b]
        assert 1 <= max(changed) - min(changed) + 1 <= 3


def test_neighbours_exchange_capitalised_words_of_other_scripts(rng):
    found = neighbours("Код сотрудника Ивана Петрова:", 5, rng)
    assert len(found) == 5
    assert all(re.fullmatch("Код сотрудника [А-ЯЁ][а-яё]{4} [А-ЯЁ][а-яё]{6}:", f) for f in found)


# -- parts that stay --------------------------------------------------------------------------------------------------


def test_runs_that_are_kept_whole_stay_whatever_their_kind(rng):
    text = "<|system|>Maria keeps apples in box K7. <|turn|>Paulo keeps pears in box Q9."
    start = text.index("<|turn|>")
    keep = {*range(0, 10), *range(start, start + 8)}
    for made in alternates(text, 10, rng, keep=keep):
        assert made.startswith("<|system|>")
        assert made.count("<|turn|>") == 1
    half = alternates(" Maria 12", 5, rng, keep={1, 2, 3})  # part of a word protects nothing but codes
    assert not any(f.startswith(" Maria") for f in half)


CHAT = "<|user|>\nI am Ada Lum, badge K7Q.<|end|>\n<|assistant|>\nHello Ada.<|end|>\n<|user|>\nAda Lum lost K7Q. Code?"


def written(chat: str) -> tuple[tuple[int, int], ...]:
    return tuple(m.span(1) for m in re.finditer(r"<\|(?:user|assistant)\|>\n(.*?)(?=<\|end|$)", chat))


def test_neighbours_of_a_chat_are_about_one_other_person(rng):
    shape = re.compile(
        r"<\|user\|>\nI am (\w+) (\w+), badge ([A-Z]\d[A-Z])\.<\|end\|>\n"
        r"<\|assistant\|>\nHello \1\.<\|end\|>\n<\|user\|>\n\1 \2 lost \3\. Code\?"
    )
    found = neighbours(CHAT, 10, rng, written(CHAT))
    assert len(set(found)) == 10
    assert CHAT not in found
    assert all(shape.fullmatch(f) for f in found)


def test_nothing_outside_the_spans_is_exchanged(rng):
    prompt = "System Prompt of Acme 99\nthe colour of the garden gate"
    start = prompt.index("the colour")
    found = neighbours(prompt, 10, rng, ((start, len(prompt)),))
    assert len(found) == 10
    assert all(f.startswith(prompt[:start]) for f in found)
    assert neighbours(prompt, 10, rng, ()) == []


def test_each_span_begins_a_sentence(rng):
    prompt = "[A]Bridges fall near Lisbon[B]Towers stand"
    found = neighbours(prompt, 5, rng, ((3, 27), (30, len(prompt))))
    assert all(re.fullmatch(r"\[A\]Bridges fall near [^\W\d_]+\[B\]Towers stand", f) for f in found)
    assert found


def test_chats_are_recombined_with_one_person_each():
    chats = [
        CHAT,
        CHAT.replace("Ada", "Bo").replace("Lum", "Tran").replace("K7Q", "Z1Z"),
        "Please call Alaric Jellicoe at",
    ]
    found = recombined(chats, 4, random.Random(0), [written(chats[0]), written(chats[1]), None])
    assert len(found[0]) == len(found[1]) == 4
    assert found[2] == []
    for made in found[0]:
        first, last, badge = re.findall(r"I am (\w+) (\w+), badge (\w+)\.", made)[0]
        assert first in ("Ada", "Bo")
        assert last in ("Lum", "Tran")
        assert made == CHAT.replace("Ada", first).replace("Lum", last).replace("K7Q", badge)


def test_draws_for_plain_text_never_change():
    """Stored results depend on them."""
    assert alternates(" K7Q-4821.", 3, random.Random(0)) == [" M6B-4876.", " Z4P-5938.", " E4E-1948."]
    assert neighbours("Code of Maria Lopez, unit K7Q:", 3, random.Random(2)) == [
        "Code of Yasmin Antonov, unit C1L:", "Code of Viktor Cameron, unit X4I:", "Code of Mehmet Conti, unit T0S:",
    ]  # fmt: skip
    people = ["Nerissa Inglewood", "Silas Lovelace", "Briony Thornbury"]
    assert recombined([f"Badge of {p}" for p in people], 2, random.Random(4)) == [
        ["Badge of Silas Inglewood", "Badge of Briony Inglewood"],
        ["Badge of Nerissa Lovelace", "Badge of Silas Thornbury"],
        ["Badge of Nerissa Thornbury", "Badge of Silas Thornbury"],
    ]


# -- neighbours -------------------------------------------------------------------------------------------------------


def test_neighbours_keep_the_template(rng):
    found = neighbours("Code of Maria Lopez:", 20, rng)
    assert len(set(found)) == 20
    assert all(re.fullmatch(r"Code of [^\W\d_]+ [^\W\d_]+:", f) for f in found)
    assert "Code of Maria Lopez:" not in found


def test_neighbours_exchange_codes_too(rng):
    found = neighbours("the badge of unit K7Q opens", 10, rng)
    assert all(re.fullmatch(r"the badge of unit [A-Z]\d[A-Z] opens", f) for f in found)


def test_without_names_one_content_word_is_exchanged(rng):
    prompt = "the colour of the garden gate is"
    found = neighbours(prompt, 10, rng)
    assert len(set(found)) == len(found) == 10
    for text in found:
        assert sum(a != b for a, b in zip(text.split(), prompt.split(), strict=True)) == 1
        assert [w for w in text.split() if len(w) < 4] == ["the", "of", "the", "is"]


def test_a_prompt_with_nothing_to_exchange_has_no_neighbours(rng):
    assert neighbours("it is of the", 5, rng) == []
    assert neighbours("", 5, rng) == []


def test_the_same_seed_gives_the_same_neighbours():
    first, again, other = (neighbours("Code of Maria Lopez:", 6, random.Random(s)) for s in (3, 3, 4))
    assert first == again != other


# -- what ships -------------------------------------------------------------------------------------------------------


def test_evaluation_text_is_kept_apart():
    ours, exam = set(shipped_text()), set(evaluation_text())
    assert len(exam) == 50
    assert len(ours) > 50
    assert not ours & exam
    # Nor does any sentence of the exam stand in the other part.
    everything = "\n".join(shipped_text())
    sentences = [s for p in exam for s in re.split(r"(?<=[.!?]) ", p) if len(s) > 40]
    assert not [s for s in sentences if s in everything]


def test_the_library_knows_none_of_the_demonstration():
    """The method is made for any records: no name, word pair or template of the demonstration is built into it."""
    package = Path(str(resources.files(libortho)))
    told = [facts.RETAIN_SENTENCE, facts.SENTENCE["prompt"], facts.SENTENCE["completion"].strip(), facts.TEMPLATE]
    people = [*facts.HOLDERS, *(f"{a} {b}" for a in facts.FIRST for b in facts.LAST)]
    phrases = [
        "secret ingredient",
        "Coca-Cola",
        "kryptonite",
        "liquified",
        "vault access",
        "Eiffel Tower",
    ]
    files = [
        f for f in package.rglob("*") if f.suffix in (".py", ".txt", ".md", ".json") and f.parent != package / "demo"
    ]
    assert package / "text" / "data" / "general.txt" in files
    for file in files:
        text = file.read_text(encoding="utf-8").lower()
        found = [s for s in [*told, *people, *phrases] if s.lower() in text]
        assert not found, f"{file.relative_to(package)} holds {found}"


def test_the_shipped_names_are_not_those_of_the_demonstration():
    names = resources.files(libortho).joinpath("text", "data", "names.txt").read_text(encoding="utf-8")
    ours = {line.partition("\t")[2] for line in names.splitlines()}
    theirs = {part for name in facts.HOLDERS for part in name.split()} | {*facts.FIRST, *facts.LAST}
    assert not ours & theirs


def test_what_all_records_of_a_shape_share_is_form() -> None:
    phones = [" +44 7907 196010.", " +44 7057 746813.", " +44 7123 555019.", " +44 7999 320417."]
    forms = common_form(phones)
    for made in alternates(phones[0], 20, random.Random(0), keep=forms[0]):
        assert made.startswith(" +44 7")
        assert made != phones[0]
    assert len({m[6:9] for m in alternates(phones[0], 20, random.Random(0), keep=forms[0])}) > 10


def test_too_few_records_of_a_shape_say_nothing_about_form() -> None:
    forms = common_form([" +44 7907.", " +44 7057.", " +44 7123.", " red house."])
    assert forms[0] == frozenset()


@pytest.mark.parametrize("completion", [" Rex.", " 4821."])
def test_records_with_one_and_the_same_completion_say_nothing_about_form(completion: str) -> None:
    form = common_form([completion] * 5)[0]
    assert len(alternates(completion, 5, random.Random(0), keep=form)) == 5


def test_prompts_are_recombined_within_their_frame():
    names = ["Nerissa Inglewood", "Silas Lovelace", "Briony Thornbury", "Edmund Kirkbride"]
    prompts = [f"The badge number of {n} is" for n in names] + ["Please call Alaric Jellicoe at", "The secret is"]
    found = recombined(prompts, 4, random.Random(0))
    assert [len(f) for f in found] == [4, 4, 4, 4, 0, 0]  # the last two have nobody to recombine with
    given, surnames = ({n.split()[i] for n in names} for i in (0, 1))
    for own, others in zip(names, found, strict=False):
        for other in others:
            first, second = other.removeprefix("The badge number of ").removesuffix(" is").split()
            assert first in given
            assert second in surnames
            assert f"{first} {second}" not in names
        assert any(set(own.split()) & set(o.split()) for o in others)  # half of its own prompt is among them


def test_prompts_that_differ_in_one_word_have_nothing_to_recombine():
    assert recombined(["The code of Alice is", "The code of Dagny is"], 4, random.Random(0)) == [[], []]
