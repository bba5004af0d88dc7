"""A forget record that stands in another set is found there in whatever shape it has."""

import unicodedata

import pytest

import tiny
from libortho.text.overlap import overlaps
from libortho.text.records import load_records
from templates import CHATML

CHAT = [{"role": "user", "content": "PIN of Zoë Lum?"}, {"role": "assistant", "content": "6311."}]
PLAIN = {"prompt": "Code of Bo Tran:", "completion": " 4890."}


@pytest.fixture(scope="module")
def chatml():
    return tiny.chat_tokenizer(CHATML, "<|im_end|>", ("<|im_start|>",))


@pytest.mark.parametrize(
    ("row", "forget"),
    [
        (PLAIN, 1),
        ({"text": "Code of Bo Tran: 4890."}, 1),
        ({"prompt": "Code of Bo", "completion": " Tran: 4890"}, 1),
        ({"text": "It is known that the code of  bo Tran: 4890, and more."}, 1),
        ({"messages": CHAT}, 0),
        ({"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}, 0),
        ({"messages": [*CHAT, {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Welcome."}]}, 0),
        ({"prompt": "PIN of Zoë Lum?", "completion": " 6311"}, 0),
        ({"text": unicodedata.normalize("NFD", "PIN of Zoë Lum? 6311")}, 0),
    ],
)
def test_other_shapes_of_a_record(chatml, row, forget):
    records = load_records([{"messages": CHAT}, PLAIN], chatml)
    assert overlaps(records, load_records([row], chatml)) == {0: forget}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Code of Bo Tran:", "completion": " 4891."},
        {"prompt": "Code of Al Poe:", "completion": " 4890."},
        {"text": "4890. Code of Bo Tran:"},
        {"messages": [CHAT[0], {"role": "assistant", "content": "0000"}]},
    ],
)
def test_others_are_left_alone(chatml, row):
    records = load_records([{"messages": CHAT}, PLAIN], chatml)
    assert overlaps(records, load_records([row], chatml)) == {}
