import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import libortho
import tiny
from libortho.core.errors import LibOrthoError
from libortho.evaluation.harness import lm_eval_tasks
from libortho.evaluation.tasks import encode_pair, evaluate, load_task
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import token_statistics
from questions import LETTERS, QUESTIONS


def test_pairs_score_as_in_the_harness() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = tiny.byte_tokenizer([("=", "-"), ("Ġ", "a"), ("n", "d")])
    model = tiny.sharpened(tokenizer)
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
