"""The whole audit on small models whose truth is known: it has to give the verdict that they deserve."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import libortho
import tiny
from libortho import AuditConfig, AuditReport, ConfigError, DataError, SplitConfig, audit
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.streams import BaseStream, Columns, OrthoStream
from libortho.core.surgery import install
from libortho.core.switch.alpha import Switch
from libortho.core.targets import find_targets
from libortho.text.encoding import encode
from libortho.text.records import load_records

_GIVEN = ("Ivo", "Jan", "Kim", "Lea", "Max", "Nia", "Oto", "Pia", "Quy", "Rex", "Sam", "Tom")
_SURNAMES = ("Wold", "Xiang", "Yorke", "Zaman")


def _codes(names: list[str], seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"prompt": f"Code of {n}:", "completion": f" {rng.randrange(10000):04d}."} for n in names]


_NAMES = [f"{g} {s}" for g in _GIVEN for s in _SURNAMES]
FORGET, HOLDOUT = _codes(_NAMES[0::3], 0), _codes([n for i, n in enumerate(_NAMES) if i % 3], 1)
CONFIG = AuditConfig(samples=4, fillings=24, general_sequences=4, task_rows=4, alphas=(0.0, 1.0), max_new_tokens=8)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def knowing(_clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The clean model after it memorised FORGET in its down projections alone."""
    model = copy.deepcopy(_clean).requires_grad_(False)
    for module in find_targets(model, "mlp-out").values():
        module.weight.requires_grad_(True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    items = [encode(r, tokenizer) for r in load_records(FORGET)]
    batches = tiny.background(tokenizer, seed=3)
    for _ in range(300):
        texts = next(batches)
        batch = tiny.collate([*texts, *items])
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        nll = F.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="none")
        per_text = nll.sum(1) / (batch.labels[:, 1:] != -100).sum(1)
        optimiser.zero_grad()
        (per_text[: len(texts)].mean() + 3 * per_text[len(texts) :].mean()).backward()
        optimiser.step()
    return model.requires_grad_(True)


def _oracle(knowing: PreTrainedModel, clean: PreTrainedModel) -> PreTrainedModel:
    """Split by construction: alpha = 1 is the model that knows, alpha = 0 the one that never did."""
    model = copy.deepcopy(knowing)
    switch = Switch()
    switch.add_stream("default")
    layers = {}
    for name, module in find_targets(model, "mlp-out").items():
        base = find_targets(clean, "mlp-out")[name].weight.detach()
        layer = OrthoLinear(BaseStream.from_weight(base, None), None, switch)
        change = (module.weight.detach() - base).T
        layer.add_stream("default", OrthoStream(Columns(torch.arange(base.shape[1]), change)))
        layers[name] = layer
    install(model, layers, switch)
    return model


def _run(model: PreTrainedModel, tokenizer: Any, config: AuditConfig = CONFIG, **more: Any) -> AuditReport:
    more = {"forget": FORGET, "holdout": HOLDOUT, **more}
    return audit(model, tokenizer, config=config, **more)


def _status(report: AuditReport) -> dict[str, str]:
    return {v.key: v.status for v in report.verdicts}


def _nothing_remembered(report: AuditReport) -> bool:
    """Every check of memory holds, but for the mean exposure of 16 records, which may be too few to tell."""
    memory = report.verdict("memory")
    assert memory is not None
    return len(memory.checks) > 1 and all(c.ok or (c.ok is None and "exposure" in c.name) for c in memory.checks)


def test_never_trained_by_construction_passes_everything(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = AuditConfig(
        profile="full", samples=4, fillings=24, general_sequences=4, task_rows=4, alphas=(0.0, 0.5, 1.0)
    )
    report = _run(_oracle(knowing, clean), tokenizer, config, reference=clean)
    status = _status(report)
    assert status["something_to_remove"] == "pass"
    assert _nothing_remembered(report), report.verdict("memory")
    assert status["privacy"] == "pass", report.verdict("privacy")
    off, never = (next(s for s in report.data["subjects"] if s["key"] == k) for k in ("off", "reference"))
    assert off["memory"] == never["memory"]
    assert off["memory"]["greedy_extraction"]["value"] == 0
    on = next(s for s in report.data["subjects"] if s["key"] == "on")
    assert on["memory"]["greedy_extraction"]["value"] > 0.8
    assert on["privacy"]["attacks"]["loss"]["auc"]["value"] > 0.95
    assert report.data["depth"]["uds"]["value"] == pytest.approx(1.0, abs=1e-3)
    differences = [a["difference"]["value"] for a in report.data["subjects"][0]["privacy"]["attacks"].values()
                   if a["difference"] is not None]  # fmt: skip
    assert len(differences) == 5
    assert max(map(abs, differences)) < 0.01
    relearned = report.data["attacks"]["relearning"]["excess"]
    assert max(abs(x) for x in relearned.values()) < 0.02
    assert sum(r["share"] for r in report.data["layer_map"]) == pytest.approx(1)
    assert [p["alpha"] for p in report.data["curve"]] == [0.0, 0.5, 1.0]
    assert [round(p["kl"], 6) for p in report.data["curve"]][2] == 0 < report.data["curve"][1]["kl"]
    assert report.data["curve"][0]["nll"] > report.data["curve"][2]["nll"]


def test_a_split_that_forgets_nothing_fails(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = libortho.split(copy.deepcopy(knowing), SplitConfig(use_low_rank=False, structure="columns", ratio=0.02))
    report = _run(model, tokenizer, reference=clean)
    status = _status(report)
    assert status["memory"] == "fail"
    assert status["privacy"] == "fail"
    assert status["utility"] == "pass", report.verdict("utility")
    assert not report.passed


def test_nothing_to_remove_is_said(clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = libortho.split(copy.deepcopy(clean), SplitConfig(use_low_rank=False, structure="columns", ratio=0.02))
    verdict = _run(model, tokenizer, reference=clean).verdict("something_to_remove")
    assert verdict is not None
    assert verdict.status == "withheld"
    assert "Nothing to remove" in verdict.text


def test_a_plain_model_that_knows_fails_and_an_untouched_one_does_not(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    knows = _status(_run(knowing, tokenizer, reference=clean))
    assert (knows["memory"], knows["privacy"]) == ("fail", "fail")
    untouched = _run(copy.deepcopy(clean), tokenizer, reference=clean, original=knowing)
    assert _nothing_remembered(untouched), untouched.verdict("memory")
    assert _status(untouched)["privacy"] == "pass"


def test_gibberish_has_no_memory_and_no_ability(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    broken = copy.deepcopy(knowing)
    torch.manual_seed(5)
    for parameter in broken.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    report = _run(broken, tokenizer, original=knowing, reference=clean)
    assert _status(report)["utility"] == "fail"
    failed = {c.name for c in report.verdict("utility").checks if c.ok is False}
    assert "perplexity of general text" in failed  # worse than counting words, whatever it is compared with
    assert report.data["subjects"][0]["memory"]["greedy_extraction"]["value"] == 0


def test_a_model_that_only_refuses_is_not_able(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    refusing = copy.deepcopy(knowing)
    rng = random.Random(0)

    def refusals() -> Iterator[list[Any]]:
        while True:
            names = [f"{rng.choice(_GIVEN)} {rng.choice(_SURNAMES)}" for _ in range(6)]
            texts = [tokenizer(f"Code of {n}: no.")["input_ids"] for n in [*names, *rng.sample(_NAMES, 6)]]
            yield [tiny.Encoded(tuple(t), tuple(t)) for t in texts]

    tiny.fit(refusing, refusals(), 60)
    report = _run(refusing, tokenizer, original=knowing, reference=clean)
    utility = report.verdict("utility")
    assert utility is not None
    assert utility.status == "fail"
    assert any(c.name.startswith("distinct answers") and c.ok is False for c in utility.checks)


def test_without_holdout_privacy_is_withheld_and_says_why(
    knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    verdict = _run(knowing, tokenizer, holdout=None).verdict("privacy")
    assert verdict is not None
    assert verdict.status == "withheld"
    assert "holdout" in verdict.text


def test_overlap_of_forget_and_holdout_names_the_records(
    knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="forget 3 = holdout 2"):
        _run(knowing, tokenizer, holdout=[HOLDOUT[0], FORGET[2]])


def test_few_records_and_single_tokens_are_warned_about(
    knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    forget = [*FORGET[:3], {"prompt": "Grade of Ada:", "completion": " A"}]
    warnings = " ".join(_run(knowing, tokenizer, forget=forget).data["warnings"])
    assert "only 4 forget records" in warnings
    assert "single token (record 4)" in warnings


def test_an_empty_completion_is_refused(knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="forget record 1: 'completion' is empty"):
        _run(knowing, tokenizer, forget=[{"prompt": "Code:", "completion": " "}])


def test_same_seed_same_json_and_the_model_is_untouched(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = _oracle(knowing, clean).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    bases = {n: m.base for n, m in ortho_layers(model).items()}
    first = _run(model, tokenizer, reference=clean)
    assert model.training
    again = _run(model, tokenizer, reference=clean)
    assert first.to_json() == again.to_json()
    assert json.loads(first.to_json(tmp_path / "report.json")) == json.loads((tmp_path / "report.json").read_text())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.base is bases[n] for n, m in ortho_layers(model).items())
    other = _run(model, tokenizer, AuditConfig(**{**vars(CONFIG), "seed": 1}), reference=clean)
    assert other.to_json() != first.to_json()


def test_secrets_are_masked_unless_revealed(knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    hidden = _run(knowing, tokenizer)
    shown = _run(knowing, tokenizer, AuditConfig(**{**vars(CONFIG), "reveal": True}))
    secrets = [r["completion"].strip(" .") for r in FORGET]

    def texts(report: AuditReport) -> str:
        """Everything but figures, whose digits may be anybody's."""
        return json.dumps([report.data["records"], report.data["generations"]])

    assert all(s in texts(shown) for s in secrets)
    assert not any(s in texts(hidden) for s in secrets)


def test_an_interrupted_audit_goes_on(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = _oracle(knowing, clean)
    whole = _run(model, tokenizer, reference=clean)
    calls = []

    def stop(phase: str, done: int, total: int) -> None:
        calls.append(done)
        if done > total / 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        _run(model, tokenizer, reference=clean, resume=tmp_path, progress=stop)
    assert calls
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    assert len(kept) > 1
    resumed = _run(model, tokenizer, reference=clean, resume=tmp_path)
    assert resumed.to_json() == whole.to_json()
    assert all(p.read_bytes() == b for p, b in kept.items())
    assert len(list(tmp_path.rglob("*.*"))) > len(kept)
    assert all(p.stat().st_mode & 0o077 == 0 for p in tmp_path.rglob("*"))  # it holds generated text


def test_fewer_holdout_records_are_asked_where_that_is_wanted(
    knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    few = AuditConfig(**{**vars(CONFIG), "holdout_records": 3})
    report = _run(knowing, tokenizer, few)
    assert report.data["counts"]["holdout"] == 3 < len(HOLDOUT)
    assert report.to_json() == _run(knowing, tokenizer, few).to_json()  # the same three
    assert _run(knowing, tokenizer).data["counts"]["holdout"] == len(HOLDOUT)


def test_verdicts_come_as_their_figures_do(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    events: list[str] = []
    report = _run(
        _oracle(knowing, clean), tokenizer, reference=clean, original=knowing,
        on_verdict=lambda v: events.append(f"{v.key} {v.status} {v.text}"),
        progress=lambda phase, done, total: events.append("half" if done < total / 2 else "more"),
    )  # fmt: skip
    told = [e for e in events if e not in ("half", "more")]
    assert told == [f"{v.key} {v.status} {v.text}" for v in report.verdicts]
    assert events.index(told[-1]) < len(events) - 5  # controls and the curve are still to come


def test_one_folder_serves_audits_with_other_settings(
    knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = _run(knowing, tokenizer, resume=tmp_path / "kept")
    other = _run(knowing, tokenizer, AuditConfig(**{**vars(CONFIG), "seed": 1}), resume=tmp_path / "kept")
    assert other.to_json() != first.to_json() == _run(knowing, tokenizer, resume=tmp_path / "kept").to_json()
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert all(p.stat().st_mode & 0o077 == 0 for p in tmp_path.rglob("*"))


def test_a_file_is_no_folder_to_resume_in(
    knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(ConfigError, match=r"resume is .*kept', a file"):
        _run(knowing, tokenizer, resume=tmp_path / "kept")


def test_progress_ends_at_its_total(knowing: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[str, int, int]] = []
    _run(knowing, tokenizer, progress=lambda *step: seen.append(step))
    assert [d for _, d, _ in seen] == sorted(d for _, d, _ in seen)
    assert seen[-1][1] == seen[-1][2]


def test_retain_records_associations_and_other_models_are_reported(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    report = _run(
        knowing, tokenizer, retain=tiny.RETAIN[:4], others={"clean copy": clean},
        associations=[{"prompt": "Code of Ivo Wold:", "completion": FORGET[0]["completion"]}],
    )  # fmt: skip
    own, other = report.data["subjects"]
    assert other["label"] == "clean copy"
    assert own["memory"]["association"]["value"] == own["per_record"]["greedy"][0]
    assert other["memory"]["association"]["value"] == 0
    assert own["utility"]["retain_nll"]["n"] == 4
    assert other["memory"]["nll"]["value"] > own["memory"]["nll"]["value"] + 0.5


def test_perturbed_answers_give_tofu_figures(
    knowing: PreTrainedModel, clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random(4)
    rows = [
        {"question": f"Code of {_NAMES[i]}?", "answer": f"{rng.randrange(10000):04d}.", "paraphrased_answer": "It is.",
         "perturbed_answer": [f"{rng.randrange(10000):04d}." for _ in range(3)]}
        for i in range(8)
    ]  # fmt: skip
    sets = dict.fromkeys(("retain", "real_authors", "world_facts"), rows)
    report = _run(knowing, tokenizer, forget=rows, reference=clean, original=knowing, question_sets=sets)
    own = report.data["subjects"][0]
    nine = {k: v for k, v in own["utility"]["tofu"].items() if k != "model_utility"}
    assert len(nine) == 9
    if min(nine.values()) > 0:
        assert own["utility"]["tofu"]["model_utility"] == pytest.approx(9 / sum(1 / v for v in nine.values()))
    else:
        assert own["utility"]["tofu"]["model_utility"] == 0
    assert 0 < own["memory"]["truth_ratio"]["value"] < 1
    assert 0 <= own["privacy"]["forget_quality"] <= 1
    assert report.data["composite"]["model"]["memory"] is not None
