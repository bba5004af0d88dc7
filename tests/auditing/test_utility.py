import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import libortho
import tiny
from libortho.auditing.measures.utility import agreement, general_items
from libortho.core.errors import DataError, LibOrthoError, TargetError
from libortho.core.layer import ortho_layers
from libortho.evaluation.harness import lm_eval_tasks
from libortho.evaluation.tasks import arithmetic_rows, encode_pair, evaluate, load_task
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states, sequence_nll
from libortho.lm.token_statistics import token_statistics
from libortho.text.encoding import Encoded

QUESTIONS = [
    {"query": "Question: Which metal is liquid?", "choices": ["mercury", "iron, when it is cold"], "gold": 0},
    {
        "query": "Question: What do bees make?\n",
        "choices": ["a very large hole in the ground", "honey", "oil"],
        "gold": 1,
    },
    {"query": "To open a tin", "choices": ["use a tin opener and turn it", "shout", "wait"], "gold": 0},
    {"query": "Question: Is ice cold?\nAnswer:", "choices": ["yes", "no, never", "only in some towns"], "gold": 0},
    {"query": "The sun rises in the", "choices": ["east", "west, as everybody knows"], "gold": 0},
]
LETTERS = [
    {"context": f"The letter after {a} is", "continuation": b} for a, b in zip("abcdefgh", "bcdefghi", strict=True)
]


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return _sharpened(tokenizer)


@pytest.fixture
def lm(model: PreTrainedModel) -> LanguageModel:
    return LanguageModel(model)


def _sharpened(tokenizer: PreTrainedTokenizerFast, factor: float = 5.0) -> PreTrainedModel:
    """Random, but far from uniform predictions."""
    model = tiny.small_llama(len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def _log_p(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str) -> float:
    """Transformers' own loss over the continuation's tokens, as a sum."""
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer(context)["input_ids"])] = -100
    return -model(input_ids=ids, labels=labels).loss.item() * int((labels != -100).sum())


# ---- tasks ----


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
    a, b = (evaluate(LanguageModel(_sharpened(tokenizer, f)), tokenizer, task, limit=4, seed=3) for f in (1.0, 6.0))
    assert a.rows == b.rows
    assert len(set(a.rows)) == len(a.correct) == len(a.nll) == 4
    assert a.nll != b.nll
    other = evaluate(LanguageModel(_sharpened(tokenizer)), tokenizer, task, limit=4, seed=4)
    assert other.rows != a.rows
    assert evaluate(LanguageModel(_sharpened(tokenizer)), tokenizer, task, limit=99).rows == tuple(range(8))
    with pytest.raises(DataError, match="limit is 0 rows"):
        evaluate(LanguageModel(_sharpened(tokenizer)), tokenizer, task, limit=0)


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


# ---- general text ----


def test_perplexity_is_transformers_own_loss(lm: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
    items = general_items(tokenizer, None, 6, 40)
    nll, tokens = sequence_nll(lm, items)
    for item, own, count in zip(items, nll, tokens, strict=True):
        ids = torch.tensor([item.ids])
        assert count == len(item.ids) - 1
        assert float(own / count) == pytest.approx(lm.model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    again, _ = sequence_nll(lm, items, judged_states(lm, items))
    assert torch.equal(again, nll)


@torch.no_grad()
def test_agreement_by_brute_force(tokenizer: PreTrainedTokenizerFast) -> None:
    original, subject = _sharpened(tokenizer), _sharpened(tokenizer)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    p_lm, q_lm = LanguageModel(original), LanguageModel(subject)
    items = [*general_items(tokenizer, None, 4, 50), encode_pair("only the end of this", " counts", tokenizer)]
    found = agreement(q_lm, items, judged_states(p_lm, items), p_lm)
    kl, same = [], []
    for item in items:
        ids = torch.tensor([item.ids])
        judged = torch.tensor(item.labels[1:]) != -100
        p, q = (torch.softmax(m(ids).logits[0, :-1].double(), -1)[judged] for m in (original, subject))
        kl += [float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)]
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.kl.tolist() == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found.same.tolist() == same
    assert found.tokens.tolist() == [49, 49, 49, 49, 7]
    assert found.nll.tolist() == pytest.approx(sequence_nll(q_lm, items)[0].tolist())
    assert found.mean_kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert 0 < found.top1 == sum(same) / len(same) < 1


def test_a_model_agrees_with_itself(lm: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
    items = general_items(tokenizer, None, 3, 40)
    states = judged_states(lm, items)
    found = agreement(lm, items, states, lm, own=states)
    assert found.mean_kl == pytest.approx(0, abs=1e-9)
    assert found.top1 == 1.0
    with pytest.raises(TargetError, match="head is itself split"):
        agreement(lm, items, states, _with_split_head(lm))
    with pytest.raises(DataError, match="of other texts"):
        agreement(lm, items[:2], states, lm)
    with pytest.raises(DataError, match="no token"):
        sequence_nll(lm, [Encoded((5,), (5,))])


def _with_split_head(lm: LanguageModel) -> LanguageModel:
    other = LanguageModel(lm.model)
    other.head = next(iter(ortho_layers(libortho.split(lm.model)).values()))
    return other


def test_windows_follow_each_other_without_overlap(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(f"Line {i} of a long text.\n" for i in range(100))
    (tmp_path / "wiki.txt").write_text(text, encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    every = general_items(tokenizer, tmp_path / "wiki.txt", 10_000, 64)
    assert [i for e in every for i in e.ids] == ids[: sum(len(e.ids) for e in every)]
    assert len(ids) - sum(len(e.ids) for e in every) < 8
    assert {len(e.ids) for e in every[:-1]} == {64}
    some = general_items(tokenizer, tmp_path / "wiki.txt", 5, 64)
    assert len(some) == 5
    assert some == every[:: len(every) // 5][:5]


def test_general_text_that_cannot_be_had(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "short.txt").write_text("Hi")
    for path, message in ((tmp_path / "absent.txt", "cannot be read"), (tmp_path / "short.txt", "holds no window")):
        with pytest.raises(DataError, match=message):
            general_items(tokenizer, path)
    with pytest.raises(DataError, match="windows of 1 tokens"):
        general_items(tokenizer, None, 4, 1)


# ---- the harness ----


def test_pairs_score_as_in_the_harness() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = tiny.byte_tokenizer([("=", "-"), ("Ġ", "a"), ("n", "d")])
    model = _sharpened(tokenizer)
    lm = LanguageModel(model)
    pairs = [
        ("The end", " and a half"),
        ("The end  ", "and"),
        ("Line\n", "next line"),
        ("604+432=", "1036"),
        ("Überall ist", " Käse — überall"),
        ("x", " y"),
    ]
    for context in ("Ada", "Once upon"):
        ids = tokenizer(context, return_tensors="pt")
        best = int(model(**ids).logits[0, -1].argmax())
        pairs.append((context, tokenizer.decode([best])))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = harness.loglikelihood(requests, disable_tqdm=True)
    ours = token_statistics(lm, [encode_pair(*p, tokenizer) for p in pairs])
    assert [float(s.log_p.sum()) for s in ours] == pytest.approx([float(v) for v, _ in theirs], abs=1e-4)
    assert [bool(s.correct.all()) for s in ours] == [bool(g) for _, g in theirs]
    assert {bool(g) for _, g in theirs} == {True, False}


def test_a_split_models_tasks_score_as_in_the_harness(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("lm_eval")
    model = libortho.split(
        model, libortho.SplitConfig(bits=4, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.1, value_dtype="float32")
    )
    lm = LanguageModel(model)
    queries = [{**q, "query": load_task([q]).questions[0].context} for q in QUESTIONS]
    for name, rows in (("choice", queries), ("word", LETTERS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    scored = ("acc", "acc_norm")
    configs = [
        _config(tmp_path, "choice", "multiple_choice", "query", "{{gold}}", scored, doc_to_choice="choices"),
        _config(tmp_path, "word", "loglikelihood", "context", "{{' ' + continuation}}", ("perplexity", "acc")),
    ]
    state = torch.random.get_rng_state()
    figures = []
    for value in (0.0, 1.0):
        with libortho.alpha(model, value):
            theirs = lm_eval_tasks(model, tokenizer, configs)
            choice = evaluate(lm, tokenizer, load_task(tmp_path / "choice.jsonl"))
            word = evaluate(lm, tokenizer, load_task(tmp_path / "word.jsonl"))
        assert theirs["choice"]["acc_norm"] == pytest.approx(choice.accuracy)
        assert theirs["choice"]["acc"] == pytest.approx(sum(choice.unnormalised) / 5)
        assert theirs["word"]["acc"] == pytest.approx(word.accuracy)
        summed = [n * len(f" {r['continuation']}") for n, r in zip(word.nll, LETTERS, strict=True)]
        assert math.log(theirs["word"]["perplexity"]) == pytest.approx(sum(summed) / len(LETTERS), rel=1e-4)
        figures.append(theirs["word"]["perplexity"])
    assert figures[0] != figures[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    with libortho.alpha(model, 1.0):
        first = lm_eval_tasks(model, tokenizer, configs[:1], limit=2, batch_size=1)
    assert first["choice"]["acc_norm"] == pytest.approx(sum(choice.correct[:2]) / 2)


def _config(
    directory: Path, name: str, kind: str, text: str, target: str, metrics: tuple[str, ...], **more: str
) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(directory / f"{name}.jsonl")},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": f"{{{{{text}}}}}",
        "doc_to_target": target,
        "metric_list": [{"metric": m} for m in metrics],
        **more,
    }


def test_without_the_harness_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LibOrthoError, match=r"pip install 'libortho\[eval\]'"):
        lm_eval_tasks(model, tokenizer, ["arc_easy"])
