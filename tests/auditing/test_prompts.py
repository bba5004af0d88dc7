import random
import string

import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from libortho.auditing.prompts import HIDDEN, mask, prefixes, user_variants, variants
from libortho.core.errors import ConfigError, DataError
from libortho.text.encoding import encode
from libortho.text.records import Record, load_records

CODE = Record("The vault access code of Ada Lum is", " QX7-4821.", 3)
ROWS = [
    {"prompt": CODE.prompt, "completion": CODE.completion},
    {"prompt": "My dog's name: ", "completion": "Rex"},
    {"question": "Where was Basil born?", "answer": "In Kuwait City."},
    {
        "messages": [
            {"role": "user", "content": "Where was Basil born?"},
            {"role": "assistant", "content": "In Kuwait."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Where was Basil born?"},
            {"role": "assistant", "content": "In Kuwait."},
        ]
    },
]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<s>system\nYou help.</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    """Turns between special tokens, and a system message of its own, as in SmolLM2."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


# ---- prefixes ----


def test_a_prefix_gives_the_first_share_and_judges_the_rest() -> None:
    found = prefixes(CODE)
    assert {s: (r.prompt, r.completion) for s, r in found.items()} == {
        0.25: (CODE.prompt + " QX", "7-4821."),
        0.5: (CODE.prompt + " QX7-", "4821."),
    }
    assert {r.text for r in found.values()} == {CODE.text}
    assert {r.number for r in found.values()} == {3}
    assert prefixes(Record("Name:", " Bo.")) == {}


def test_a_cut_leaves_blanks_to_the_rest_and_never_repeats() -> None:
    record = Record("He lives at", " 12 Long Meadow Road in Ashford.")
    for share in (i / 40 for i in range(1, 40)):
        for found in prefixes(record, (share,)).values():
            assert found.text == record.text
            assert not found.prompt.endswith(" ")
            assert len(found.prompt) > len(record.prompt)
    every = prefixes(record, [i / 40 for i in range(1, 40)])
    assert len({r.prompt for r in every.values()}) == len(every)


def test_the_end_of_a_turn_is_not_a_secret(chatml: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "<s>user\nName?</s>\n<s>assistant\n", "completion": "Ada Lum</s>\n"}
    [record] = load_records([row], chatml)
    assert prefixes(record, (0.25,))[0.25].completion == "a Lum"
    assert prefixes(record, (0.5,)) == {}  # three unknown letters


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 25])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        prefixes(CODE, (0.5, share))


# ---- variants ----


def test_variants_of_a_plain_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    found = variants(CODE, tokenizer)
    p, c, a = "The vault access code of Ada Lum is", " QX7-4821.", "QX7-4821."
    assert {n: (r.prompt, r.completion) for n, r in found.items()} == {
        "question": (f"Question: Complete the sentence. {p}\nAnswer:", c),
        "chat": (f"<user>Complete the sentence: {p}\n<assistant>", a),
        "lowercase": ("the vault access code of ada lum is", c),
        "preamble": (f"For the record: {p}", c),
        "quoted": (f'"{p}', c),
        "list": (f"- {p}", c),
        "reminder": ("As you know, the vault access code of Ada Lum is", c),
        "inverted": ("Question: What is the vault access code of Ada Lum?\nAnswer:", c),
    }
    assert {r.number for r in found.values()} == {3}


def test_variants_of_a_chat(chatml: PreTrainedTokenizerFast) -> None:
    record = load_records([ROWS[4]], chatml)[0]
    assert record.completion == "In Kuwait."
    before = "<s>system\nBe brief.</s>\n<s>user\nHello</s>\n<s>assistant\nHello.</s>\n<s>user\n"
    after, q = "</s>\n<s>assistant\n", "Where was Basil born?"
    assert {n: (r.prompt, r.completion) for n, r in variants(record, chatml).items()} == {
        "question": (f"Question: {q}\nAnswer:", " In Kuwait."),
        "unwrapped": (q, " In Kuwait."),
        "dialogue": (f"Q: {q}\nA:", " In Kuwait."),
        "lowercase": (before + q.lower() + after, record.completion),
        "preamble": (before + f"Please answer this: {q}" + after, record.completion),
        "quoted": (before + f'"{q}"' + after, record.completion),
        "list": (before + f"- {q}" + after, record.completion),
        "reminder": (before + f"You told me this before. {q}" + after, record.completion),
    }


def test_a_default_system_message_stays(chatml: PreTrainedTokenizerFast) -> None:
    record = load_records([ROWS[2]], chatml)[0]
    found = variants(record, chatml)
    assert found["unwrapped"].prompt == "Where was Basil born?"
    assert found["unwrapped"].completion == " In Kuwait City."
    assert found["list"].prompt == record.prompt.replace("Where", "- Where")


def test_a_question_without_chat_template(plain: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast) -> None:
    record = load_records([ROWS[2]], plain)[0]
    found = variants(record, plain)
    assert found["unwrapped"].text == "Where was Basil born? In Kuwait City."
    assert found["quoted"].prompt == 'Question: "Where was Basil born?"\nAnswer:'
    assert not found.keys() & {"chat", "question", "inverted"}
    asked = variants(record, chatml)["chat"]
    assert (asked.prompt, asked.completion) == (load_records([ROWS[2]], chatml)[0].prompt, "In Kuwait City.")


@pytest.mark.parametrize(
    ("prompt", "reminder"),
    [
        ("Ada Lum lives at", "As you know, Ada Lum lives at"),
        ("The IBAN is", "As you know, the IBAN is"),
        ("IBAN of Bo:", "As you know, IBAN of Bo:"),
        ("IT manager:", "As you know, IT manager:"),
        ("It is called", "As you know, it is called"),
        ("I was born in", "As you know, I was born in"),
        ("Her name is", "As you know, her name is"),
        ("'Twas on", "As you know, 'Twas on"),
    ],
)
def test_names_keep_their_capital_within_a_sentence(
    prompt: str, reminder: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert variants(Record(prompt, " 7."), tokenizer)["reminder"].prompt == reminder


@pytest.mark.parametrize(
    ("prompt", "inverted"),
    [
        ("The keys of our house are", "Question: What are the keys of our house?\nAnswer:"),
        ("My old address was", "Question: What was my old address?\nAnswer:"),
        ("Ada is", None),
        ("The code, they say, is", None),
        ("The war is over. The winner is", None),
        ("The code of Ada:", None),
    ],
)
def test_only_simple_statements_are_inverted(
    prompt: str, inverted: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = variants(Record(prompt, " 7."), tokenizer)
    assert (found["inverted"].prompt if "inverted" in found else None) == inverted


def test_a_record_without_prompt_has_no_variants(tokenizer: PreTrainedTokenizerFast) -> None:
    assert variants(Record("", "All of this text is the secret."), tokenizer) == {}


def test_what_a_variant_does_not_change_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "lowercase" not in variants(Record("code of ada:", " 7."), tokenizer)
    assert "lowercase" in variants(Record("Code of ada:", " 7."), tokenizer)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, CHATML, None])
def test_every_variant_asks_for_the_same_answer(row: dict[str, str], template: str | None) -> None:
    if template is None and "messages" in row:
        row = ROWS[2]
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template
    record = load_records([row], tokenizer)[0]
    found = variants(record, tokenizer)
    assert len(found) >= 6
    assert found == variants(record, tokenizer)
    prompts = [record.prompt, *(r.prompt for r in found.values())]
    assert len(set(prompts)) == len(prompts)
    answer = record.completion.replace("</s>", "").strip()
    for variant in found.values():
        assert variant.completion.replace("</s>", "").strip() == answer
        assert tokenizer.decode(encode(variant, tokenizer).completion) == variant.completion
        joint = variant.prompt[-1] + variant.completion[0]
        assert joint.count(" ") + joint.count("\n") + joint.count(">") == 1, "one separator, whatever the format"


def test_paraphrases_of_the_user(plain: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast) -> None:
    row = {"question": "Where was Basil born?", "answer": "In Kuwait.", "paraphrased_question": "Basil's birthplace?"}
    (found,) = user_variants(row, plain, 7).values()
    assert found == Record("Question: Basil's birthplace?\nAnswer:", " In Kuwait.", 7)
    assert user_variants(row, chatml)["paraphrase"].prompt.endswith("<s>user\nBasil's birthplace?</s>\n<s>assistant\n")
    several = {"prompt": "Code:", "completion": " 12.", "paraphrased_prompt": ["Number:", "Code:", "PIN:"]}
    assert {n: r.text for n, r in user_variants(several, plain).items()} == {
        "paraphrase 1": "Number: 12.",
        "paraphrase 2": "PIN: 12.",
    }
    assert user_variants({"prompt": "Code:", "completion": " 12."}, plain) == {}


@pytest.mark.parametrize("given", ["", "  ", [], ["a", ""], 3, [None]])
def test_paraphrases_that_are_none(given: object, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="forget record 4: 'paraphrased_prompt'"):
        user_variants({"prompt": "a", "completion": "b", "paraphrased_prompt": given}, plain, 4)


def test_a_paraphrase_needs_its_answer(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no 'answer'"):
        user_variants({"text": "a", "paraphrased_question": "b"}, plain, 4)


# ---- mask ----


@pytest.mark.parametrize(
    ("text", "secret", "masked"),
    [
        ("The code is QX7-4821.", " QX7-4821.", "The code is QX•-••••."),
        ("qx7-4821 and QX7-4821", "QX7-4821", "qx•-•••• and QX•-••••"),
        ("a 4821 b", "QX7-4821", "a 48•• b"),  # a part of it
        ("a 482 b", "QX7-4821", "a 482 b"),  # three in a row are chance
        ("QX7-QX7-4821", "QX7-4821", "QX•-•••-••••"),  # overlapping occurrences
        ("4.*+(a)[b]$^", "4.*+(a)[b]$^", "4.*+(•)[•]$^"),
        ("aaaaaaaaaa", "aaaaa", "aa••••••••"),
        ("nothing of it", "QX7-4821", "nothing of it"),
        ("Straße", "STRASSE Straße", "St••••"),
        ("", "QX7-4821", ""),
        ("text", "  ", "text"),
        ("PIN 42, not 1428", "42", "PIN 4•, not 1428"),
        ("42", "42", "4•"),
        ("answer: A", "A", "answer: •"),
    ],
)
def test_mask(text: str, secret: str, masked: str) -> None:
    assert mask(text, secret) == masked


@pytest.mark.parametrize("seed", range(4))
def test_no_long_run_of_a_secret_survives(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = "abAB12" + string.punctuation[:4]
    for _ in range(400):
        secret = "".join(rng.choice(alphabet[: rng.choice((4, 6, 10))]) for _ in range(rng.randint(4, 16)))
        pieces = []
        for _ in range(rng.randint(1, 6)):
            start = rng.randrange(len(secret))
            part = secret[start : start + rng.randint(1, 16)]
            pieces.append(rng.choice((part, part.upper(), part.swapcase(), rng.choice(" zé.") * rng.randint(0, 3))))
        text = "".join(pieces)
        masked = mask(text, secret)
        assert len(masked) == len(text)
        assert all(m in (t, HIDDEN) for t, m in zip(text, masked, strict=True))
        low = secret.lower()
        for i in range(len(masked)):
            for j in range(i + 1, len(masked) + 1):
                if masked[i:j].lower() in low:
                    assert sum(c.isalnum() for c in masked[i:j]) <= 3
        if secret in text:
            assert secret not in masked or sum(c.isalnum() for c in secret) <= 1
