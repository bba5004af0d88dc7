import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from libortho.core.errors import DataError
from libortho.evaluation.tasks import arithmetic_rows, encode_pair, evaluate, load_task
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import token_statistics
from questions import LETTERS, QUESTIONS


def _log_p(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str) -> float:
    """Transformers' own loss over the continuation's tokens, as a sum."""
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer(context)["input_ids"])] = -100
    return -model(input_ids=ids, labels=labels).loss.item() * int((labels != -100).sum())


def test_the_models_own_greedy_continuation_scores_one_and_any_other_zero(
    clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    right, wrong = [], []
    for context in ("The old man", "Code of Ada Lum:", "In the town"):
        ids = tokenizer(context, return_tensors="pt")
        text = tokenizer.decode(clean.generate(**ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0])
        assert text.isascii()
        assert text.startswith(context + " ")
        right.append({"context": context, "continuation": text[len(context) :]})
        wrong.append({"context": context, "continuation": text[len(context) : -1] + "~"})
    result = evaluate(LanguageModel(clean), tokenizer, load_task(right))
    assert result.correct == (1, 1, 1)
    assert result.accuracy == 1.0
    assert result.unnormalised is None
    assert evaluate(LanguageModel(clean), tokenizer, load_task(wrong)).correct == (0, 0, 0)


def test_choices_by_an_independent_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = [
        "Question: Which metal is liquid?\nAnswer:",
        "Question: What do bees make?\nAnswer:",
        "To open a tin",
        "Question: Is ice cold?\nAnswer:",
        "The sun rises in the",
    ]
    result = evaluate(LanguageModel(model), tokenizer, load_task(QUESTIONS, "q"))
    normalised, plain, nll = [], [], []
    for context, row in zip(contexts, QUESTIONS, strict=True):
        sums = [_log_p(model, tokenizer, context, f" {c}") for c in row["choices"]]
        by_length = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]
        plain.append(int(sums.index(max(sums)) == row["gold"]))
        normalised.append(int(by_length.index(max(by_length)) == row["gold"]))
        nll.append(-sums[row["gold"]] / len(tokenizer(f" {row['choices'][row['gold']]}")["input_ids"]))
    assert result.metric == "acc_norm"
    assert result.correct == tuple(normalised)
    assert result.unnormalised == tuple(plain)
    assert result.correct != result.unnormalised, "the rows must tell the two normalisations apart"
    assert result.nll == pytest.approx(nll, rel=1e-4)
    assert result.to_dict()["accuracy"] == sum(normalised) / 5


def test_a_model_that_knows_its_codes_knows_them_as_a_task(
    planted: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"context": r["prompt"], "continuation": r["completion"].strip()} for r in tiny.FORGET]
    choice = [
        {"query": r["prompt"], "choices": ["1234.", r["completion"].strip(), "9999."], "gold": 1} for r in tiny.FORGET
    ]
    for task in (load_task(rows), load_task(choice)):
        known, unknown = (evaluate(LanguageModel(m), tokenizer, task) for m in (planted, clean))
        assert known.accuracy == 1.0
        assert unknown.accuracy < 1.0
        assert max(known.nll) < min(unknown.nll)


def test_every_model_is_asked_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(LETTERS, "letters")
    a, b = (evaluate(LanguageModel(tiny.sharpened(tokenizer, f)), tokenizer, task, limit=4, seed=3) for f in (1.0, 6.0))
    assert a.rows == b.rows
    assert len(set(a.rows)) == len(a.correct) == len(a.nll) == 4
    assert a.nll != b.nll
    other = evaluate(LanguageModel(tiny.sharpened(tokenizer)), tokenizer, task, limit=4, seed=4)
    assert other.rows != a.rows
    assert evaluate(LanguageModel(tiny.sharpened(tokenizer)), tokenizer, task, limit=99).rows == tuple(range(8))
    with pytest.raises(DataError, match="limit is 0 rows"):
        evaluate(LanguageModel(tiny.sharpened(tokenizer)), tokenizer, task, limit=0)


def test_sampled_rows_are_judged_as_among_all(lm: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(QUESTIONS)
    whole, some = evaluate(lm, tokenizer, task), evaluate(lm, tokenizer, task, limit=3)
    assert [whole.correct[i] for i in some.rows] == list(some.correct)
    assert [whole.nll[i] for i in some.rows] == pytest.approx(some.nll)


def test_texts_longer_than_the_model_lose_their_beginning(
    lm: LanguageModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = encode_pair("x" * 300, " end", tokenizer, max_length=128)
    assert len(long.ids) == 128
    assert tokenizer.decode(long.completion) == " end"
    result = evaluate(lm, tokenizer, load_task([{"context": "x" * 300, "continuation": "end"}]))
    assert result.nll[0] == pytest.approx(token_statistics(lm, [long])[0].nll)


@pytest.mark.parametrize(
    ("row", "context", "continuations"),
    [
        ({"context": "I went", "continuation": "home"}, "I went", (" home",)),
        ({"context": "I went ", "continuation": "home"}, "I went ", ("home",)),
        ({"context": "I went", "continuation": "\thome"}, "I went", ("\thome",)),
        ({"context": "2+2=", "continuation": "4"}, "2+2=", ("4",)),
        ({"context": "How many? ", "answer": "4", "chain_of_thought": ""}, "Question: How many?\nAnswer:", (" 4",)),
        ({"query": "Question: Why?\n", "choices": ["a", "b"], "gold": 1}, "Question: Why?\nAnswer:", (" a", " b")),
        (
            {"query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 1},
            "Question: Why?\nAnswer:",
            (" a", " b"),
        ),
        (
            {"ctx": "Mix  it. [title] Stir", "endings": ["[step] well.", "  never. "], "label": "1"},
            "Mix it.. Stir",
            ("  well.", " never."),
        ),
    ],
)
def test_how_rows_are_joined(row: dict[str, Any], context: str, continuations: tuple[str, ...]) -> None:
    question = load_task([row]).questions[0]
    assert question.context == context
    assert question.continuations == continuations
    assert question.gold == (1 if len(continuations) > 1 else 0)


def test_hellaswag_gets_its_activity_and_a_capital() -> None:
    row = {"activity_label": "Pole vault", "ctx_a": "It is a sport.", "ctx_b": "a few women", "ctx": "It is a sport. a"}
    question = load_task([{**row, "endings": ["run.", "sit."], "label": 0}]).questions[0]
    assert question.context == "Pole vault: It is a sport. A few women"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 of .*toy.jsonl is not JSON"),
        ("[1]", "line 3 of .*toy.jsonl is a list"),
        ('{"context": "a"}', r"line 3 of .*keys \['context'\]; expected one of the shapes"),
        ('{"context": "", "continuation": "a"}', "line 3 of .*'context' is ''; expected a non-empty string"),
        ('{"context": "a", "continuation": 4}', "line 3 of .*'continuation' is 4"),
        ('{"query": "a", "choices": ["a", "b"], "gold": 0}', "line 3 of .*another kind than the first row"),
        (
            '{"query": "a", "choices": ["a", "b"], "gold": 2}',
            "line 3 of .*'gold' is 2; expected a position from 0 to 1",
        ),
        ('{"query": "a", "choices": ["a", "b"], "gold": true}', "line 3 of .*'gold' is True"),
        ('{"query": "a", "choices": ["a"], "gold": 0}', "line 3 of .*'choices' is .* two or more"),
        ('{"query": "a", "choices": "ab", "gold": 0}', "line 3 of .*'choices' is 'ab'"),
        ('{"ctx": "a", "endings": ["a", ""], "label": 0}', "line 3 of .*'endings'"),
        ('{"ctx": "a", "endings": [1, 2], "label": 0}', "line 3 of .*'endings'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "toy.jsonl"
    path.write_text(json.dumps(LETTERS[0]) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_task(path)


def test_sources_that_are_no_task(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for source, message in (
        (tmp_path / "absent.jsonl", "absent.jsonl cannot be read"),
        (tmp_path / "empty.jsonl", "'empty' holds no row"),
        (tmp_path / "bytes.jsonl", "not UTF-8"),
        ([], "'task' holds no row"),
        (LETTERS[0], "is a dict; expected a path"),
    ):
        with pytest.raises(DataError, match=message):
            load_task(source)


def test_a_task_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "arc_easy.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    assert load_task(path) == load_task(QUESTIONS, "arc_easy")
    assert load_task(path, "other").name == "other"


def test_a_token_across_the_border_is_taken_apart() -> None:
    tokenizer = tiny.byte_tokenizer([("=", "-")])
    assert len(tokenizer("9-12=-3")["input_ids"]) == 6  # five bytes and "=-"
    item = encode_pair("9-12=", "-3", tokenizer)
    assert tokenizer.decode(item.completion) == "-3"
    assert tokenizer.decode(item.ids) == "9-12=-3"
    with pytest.raises(DataError, match="no token of '' after 'a='"):
        encode_pair("a=", "", tokenizer)


def test_arithmetic_is_right_and_repeatable() -> None:
    rows = arithmetic_rows(200, seed=1)
    assert rows == arithmetic_rows(200, seed=1) != arithmetic_rows(200, seed=2)
    assert len({r["context"] for r in rows}) == 200
    signs = set()
    for row in rows:
        a, sign, b = re.fullmatch(r"(\d\d)([+-])(\d\d)=", row["context"]).groups()
        assert int(row["continuation"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
        signs.add(sign)
    assert signs == {"+", "-"}
    with pytest.raises(DataError, match="0 rows"):
        arithmetic_rows(0, seed=1)
