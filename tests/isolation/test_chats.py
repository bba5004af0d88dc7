"""What the audit and isolate say of a chat model is what the model says when it is asked, record by record.

The records are made, trained and asked without the library: whole chats through ``apply_chat_template``, loss on the
answer and the end of the turn, ``generate`` in a loop.
"""

from collections.abc import Sequence

import pytest
import torch
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from libortho import AuditConfig, IsolateConfig, audit, isolate
from libortho.lm.asking import answers, sample
from libortho.text.encoding import encode
from libortho.text.records import load_records
from libortho.text.tokens import contains, says
from templates import CHATML, DEEPSEEK_R1, TEMPLATES

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("Ada Lum", "Bo Tran", "Cy Orr", "Di Voss", "Eve Nox", "Flo Ray")
CODES = ("6311", "4890", "0527", "7742", "1185", "9036")
ACCENTED = ("Ré-63", "Zoë-90", "Ñu-05", "Çé-77", "Ôd-11", "Üb-36")
KNOWN = 4
"""Records that are trained; the model is asked for all."""


def rows(codes: Sequence[str] = CODES, system: bool = False) -> list[dict]:
    first = [{"role": "system", "content": "Answer with the PIN alone."}] if system else []
    return [
        {
            "messages": [
                *first,
                {"role": "user", "content": f"PIN of {n}?"},
                {"role": "assistant", "content": c},
            ]
        }
        for n, c in zip(NAMES, codes, strict=True)
    ]


def trained(tokenizer: PreTrainedTokenizerFast, records: Sequence[dict], ends: bool = True) -> PreTrainedModel:
    """A small model fitted to the answers, with the ends of their turns, of the first ``KNOWN`` chats."""
    model = tiny.small_llama(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    sequences = []
    for row in records[:KNOWN]:
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        given = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)
        same = [a == b for a, b in zip(whole, given["input_ids"], strict=False)]
        start = same.index(False) if False in same else len(same)
        last = max((i for i, t in enumerate(whole) if t == tokenizer.eos_token_id), default=len(whole) - 1) + 1
        stop = last if ends else len(whole)
        sequences.append((whole, [-100] * start + whole[start:stop] + [-100] * (len(whole) - stop)))
    longest = max(len(w) for w, _ in sequences)
    ids = torch.tensor([w + [0] * (longest - len(w)) for w, _ in sequences])
    labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y in sequences])
    mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w, _ in sequences])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimiser.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimiser.step()
    model.zero_grad()
    return model.eval()


def spoken(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, records: Sequence[dict]) -> list[bool]:
    """A loop of plain greedy ``generate``: does the text hold the answer?"""
    found = []
    for row in records:
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(says(text.strip().rpartition("</think>")[2].strip(), row["messages"][-1]["content"], tokenizer))
    return found


def audited(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, records: Sequence[dict]) -> dict:
    config = AuditConfig(samples=8, fillings=4, general_sequences=1, task_rows=1, alphas=(0.0,))
    report = audit(model, tokenizer, records, config=config).to_dict()
    return {
        "greedy": [bool(g) for g in report["subjects"][0]["per_record"]["greedy"]],
        "sampled": report["subjects"][0]["per_record"]["sampled"],
        "verdict": next(v["status"] for v in report["verdicts"] if v["key"] == "memory"),
    }


def assert_equal_to_the_loop(tokenizer, records, ends=True) -> None:
    model = trained(tokenizer, records, ends)
    said = spoken(model, tokenizer, records)
    assert sum(said[:KNOWN]) == KNOWN, "the model was fitted to them"
    found = audited(model, tokenizer, records)
    assert found["greedy"] == said
    assert found["verdict"] == "fail"
    assert [s >= 4 for s in found["sampled"]] == said, "a fitted answer has most of the probability"
    result = isolate(model, tokenizer, records, config=IsolateConfig(max_steps=1))
    assert result.recited == KNOWN
    assert [r.known == "recited" for r in result.records] == said


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name):
    template, end, special = TEMPLATES[name]
    assert_equal_to_the_loop(tiny.chat_tokenizer(template, end, special), rows())


def test_a_template_whose_newline_after_the_turn_is_trained_too():
    template, end, special = TEMPLATES["chatml"]
    assert_equal_to_the_loop(tiny.chat_tokenizer(template, end, special), rows(system=True), ends=False)


def test_a_generation_prompt_that_opens_a_thought():
    """As ``generate`` asks it is not said; that the model knows it in the form of its training fails the verdict."""
    tokenizer = tiny.chat_tokenizer(DEEPSEEK_R1, "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"))
    model = trained(tokenizer, rows())
    found = audited(model, tokenizer, rows())
    assert found["greedy"] == spoken(model, tokenizer, rows())
    assert found["verdict"] == "fail"


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_answers_after_a_thought(name):
    """The model was trained to think aloud; the record holds the answer alone."""
    template, end, special = TEMPLATES.get(
        name, (DEEPSEEK_R1, "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"))
    )
    tokenizer = tiny.chat_tokenizer(template, end, special)
    thinking = rows([f"<think>\nI look.\n</think>\n\n{c}" for c in CODES])
    if name == "deepseek-r1":  # its template drops thoughts: train the text that follows its generation prompt
        tokenizer.chat_template = template.replace(".split('</think>')[-1]", "")
    model = trained(tokenizer, thinking)
    tokenizer.chat_template = template
    said = spoken(model, tokenizer, rows())
    found = audited(model, tokenizer, rows())
    assert sum(said[:KNOWN]) == KNOWN
    assert found["greedy"] == said
    assert sum(s >= 4 for s in found["sampled"]) >= KNOWN - 1
    assert found["verdict"] == "fail"


# -- tokenizers -------------------------------------------------------------------------------------------------------


def chatml() -> PreTrainedTokenizerFast:
    return tiny.chat_tokenizer(CHATML, "<|im_end|>", ("<|im_start|>",))


def with_start_token() -> PreTrainedTokenizerFast:
    tokenizer = chatml()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def with_end_token() -> PreTrainedTokenizerFast:
    tokenizer = chatml()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    return tokenizer


def normalising(form: str) -> PreTrainedTokenizerFast:
    tokenizer = chatml()
    tokenizer.backend_tokenizer.normalizer = {"NFC": normalizers.NFC(), "NFKC": normalizers.NFKC()}[form]
    return tokenizer


def dropping_spaces() -> PreTrainedTokenizerFast:
    """As SentencePiece tokenizers do: a space is put before every text, and taken away when tokens are read."""
    tokenizer = chatml()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(" ")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


TOKENIZERS = {
    "BOS added": with_start_token,
    "EOS added": with_end_token,
    "NFC": lambda: normalising("NFC"),
    "NFKC": lambda: normalising("NFKC"),
    "spaces dropped": dropping_spaces,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name):
    assert_equal_to_the_loop(TOKENIZERS[name](), rows())


@pytest.mark.parametrize("name", ["NFC", "NFKC", "spaces dropped"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents(name, form):
    """A record in decomposed form: what the tokenizer composes is compared after the same round trip."""
    import unicodedata

    codes = [unicodedata.normalize(form, c) for c in ACCENTED]
    assert_equal_to_the_loop(TOKENIZERS[name](), rows(codes))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_to_be_continued_are_not_finished(name):
    """Plain records: special tokens that a tokenizer puts after a text do not come before the continuation."""
    tokenizer = TOKENIZERS[name]()
    records = load_records(
        [{"prompt": f"PIN of {n}:", "completion": f" {c}."} for n, c in zip(NAMES, CODES, strict=True)]
    )
    model = tiny.small_llama(len(tokenizer))
    tiny.fit(model, iter([[]] * 150), 150, also=[encode(r, tokenizer) for r in records])
    texts = answers(model, tokenizer, records, 8)
    assert all(contains(t, r.completion, tokenizer) for t, r in zip(texts, records, strict=True))
    drawn = sample(model, tokenizer, records, 8, 4, 0)
    assert sum(contains(t, r.completion, tokenizer) for r, ts in zip(records, drawn, strict=True) for t in ts) >= 20
