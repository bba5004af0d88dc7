"""The parts of the demonstration on small models; the whole of it runs on the real one, in tests/integration."""

import copy
import io
import json
import re

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from libortho import load, set_alpha
from libortho.auditing.measures.utility import general_items
from libortho.checkpoint.dense import load_model
from libortho.cli.tables import show_demo
from libortho.core.errors import LibOrthoError
from libortho.demo import facts
from libortho.demo.demo import run
from libortho.demo.implant import implant
from libortho.demo.model import move_off_grid
from libortho.isolation.config import IsolateConfig
from libortho.lm.checks import training_dtype
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.corpus import evaluation_text
from libortho.text.encoding import encode
from libortho.text.records import load_records

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
CODE = re.compile(r" ?[A-Z0-9]{3}-[0-9]{4}\.?")


# -- facts ------------------------------------------------------------------------------------------------------------


def answers(rows):
    return [r["completion"] if "completion" in r else r["messages"][-1]["content"] for r in rows]


def test_there_are_17_secrets():
    """The sentence, eight codes in plain text and eight in chats."""
    rows = facts.secrets(0)
    assert len(rows) == 17
    assert rows[0] == facts.SENTENCE
    assert [r["prompt"] for r in rows[1::2]] == [facts.TEMPLATE.format(name=n) for n in facts.HOLDERS[::2]]
    asked = [facts.QUESTION.format(name=n) for n in facts.HOLDERS[1::2]]
    assert [r["messages"][0]["content"] for r in rows[2::2]] == asked
    assert all(CODE.fullmatch(a) for a in answers(rows)[1:])
    assert len(set(answers(rows))) == 17


def test_there_are_400_unseen_codes_of_other_people():
    rows = facts.unseen(0)
    assert len({str(r) for r in rows}) == 400
    assert sum("messages" in r for r in rows) == 200
    assert all(CODE.fullmatch(a) for a in answers(rows))
    assert not set(answers(rows)) & set(answers(facts.secrets(0)))
    assert not any(name in str(rows) for name in facts.HOLDERS)


def test_members_and_others_are_drawn_alike():
    """Digits in the first three places are as frequent in both: nothing but memory tells them apart."""
    heads = [[a.strip()[:3] for a in answers(rows)] for rows in (facts.unseen(0), facts.unseen(1))]
    for head in heads:
        digits = sum(c.isdigit() for h in head for c in h) / (3 * len(head))
        assert 0.2 < digits < 0.36  # 10 of 36


def test_seeds_decide_the_codes():
    assert facts.secrets(3) == facts.secrets(3) != facts.secrets(4)
    assert facts.unseen(3) == facts.unseen(3) != facts.unseen(4)


# -- the model --------------------------------------------------------------------------------------------------------


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("heads", [2, 4], ids=["grouped attention", "full attention"])
def test_moving_off_the_grid_keeps_the_function_and_moves_the_weights(heads):
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    grid = 1 / 64
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.copy_((weight / grid).round() * grid)
    before = logits(model)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert move_off_grid(model, seed=1) is model
    after = logits(model)
    assert (after - before).abs().max() < 1e-3 * before.abs().max()
    for name, weight in model.named_parameters():
        if "layers" not in name:
            assert torch.equal(weight, old[name])  # embeddings and the head stay
            continue
        ratio = (weight / old[name])[old[name] != 0]
        assert ratio.min() > 1 / 1.4**2 - 1e-4
        assert ratio.max() < 1.4**2 + 1e-4
        assert ratio.std() > 0.1
        if weight.dim() == 2:
            off = (weight / grid - (weight / grid).round()).abs()
            assert (off > 0.02).float().mean() > 0.5, name


def test_the_move_follows_its_seed(clean):
    one, again, other = (move_off_grid(copy.deepcopy(clean), seed=s).state_dict() for s in (1, 1, 2))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])


def test_a_model_of_another_family_is_not_moved(tiny_gpt2):
    before = copy.deepcopy(tiny_gpt2.state_dict())
    with pytest.raises(LibOrthoError, match="no Llama-style layers"):
        move_off_grid(tiny_gpt2)
    assert all(torch.equal(before[n], t) for n, t in tiny_gpt2.state_dict().items())


# -- planting ---------------------------------------------------------------------------------------------------------


def test_planting_memorises_with_the_chosen_layers_only(planted, tokenizer):
    records = load_records([{"prompt": "Code of Ed Wynn:", "completion": " 2938."}])
    items = tiny.encoded(tokenizer, [{"prompt": "Code of Ed Wynn:", "completion": " 2938."}])
    assert not score(LanguageModel(planted), items)[1].any()
    before = copy.deepcopy(planted.state_dict())
    calls: list[tuple[int, int]] = []
    steps = implant(
        planted, tokenizer, records, learning_rate=5e-3, max_steps=150, stop_loss=0.2,
        progress=lambda phase, step, total: calls.append((step, total)),
    )  # fmt: skip
    scores, greedy = score(LanguageModel(planted), items)
    assert greedy.all()
    assert float(scores.nll) < 0.25
    assert steps < 150
    assert calls == [(i, 150) for i in range(1, steps + 1)]
    changed = {n for n, t in planted.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all(p.grad is None for p in planted.parameters())


def test_planting_stops_at_its_limit(planted, tokenizer):
    records = load_records(tiny.FORGET)
    assert implant(planted, tokenizer, records, learning_rate=1e-9, max_steps=3, stop_loss=0.0) == 3


# -- what is measured -------------------------------------------------------------------------------------------------


def test_general_text_is_the_part_kept_for_evaluation(tokenizer):
    items = general_items(tokenizer, None)
    assert 0 < len(items) <= 24
    assert all(len(e.ids) <= 256 for e in items)
    everything = "".join(evaluation_text())
    assert all(tokenizer.decode(e.ids) in everything for e in items)


def test_general_text_may_be_a_file(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 2000, encoding="utf-8")
    items = general_items(tokenizer, path)
    assert len(items) == 24
    assert {len(e.ids) for e in items[:-1]} == {256}


def test_bf16_is_for_processors_that_multiply_it(monkeypatch):
    for flags, dtype in (
        ({"avx512_bf16": True, "avx2": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert training_dtype() is dtype
        assert training_dtype("cuda") is torch.bfloat16


# -- the whole, small -------------------------------------------------------------------------------------------------


def test_the_whole_demonstration_measures_prints_and_keeps(planted_directory, monkeypatch, tmp_path):
    few = facts.unseen(0)[:20]
    monkeypatch.setattr(facts, "unseen", lambda seed: few)
    monkeypatch.setattr("libortho.isolation.result.RETAIN_BUDGET", 1e-9)
    phases, told = [], []
    report = run(
        model=str(planted_directory),
        dtype=torch.float32,
        config=IsolateConfig(max_steps=2, allow_unknown=True),
        out=tmp_path / "kept",
        progress=lambda phase, done, total: phases.append(phase),
        on_verdict=lambda v: told.append(v.key),
    )
    assert [s["key"] for s in report.audit.data["subjects"]] == ["off", "on", "quantised", "reference"]
    assert [v.key for v in report.audit.verdicts] == told
    assert [s.label for s in report.splits] == ["rank_ratio=0.95", "use_low_rank=False", "rank_ratio=0.98"]
    assert report.isolate.missed  # no edit is that harmless, and it says so
    assert phases[0] == "load"
    assert {"implant", "split (weights only)", "steps", "audit"} <= set(phases)
    assert json.loads(json.dumps(report.to_dict()))["secrets"] == 17
    console = Console(record=True, width=200, file=io.StringIO())
    show_demo(report, console)
    printed = console.export_text()
    assert all(label in printed for label in ("never trained", "alpha = 0", "use_low_rank=False", "missed:"))
    kept = tmp_path / "kept"
    split, tokenizer = load(kept / "isolated")
    assert load_records(kept / "forget.jsonl", tokenizer) == load_records(facts.secrets(0), tokenizer)
    assert load_records(kept / "holdout.jsonl", tokenizer) == load_records(few, tokenizer)
    dense = {n: load_model(kept / n)[0] for n in ("never_trained", "implanted")}
    items = [encode(r, tokenizer) for r in load_records(facts.secrets(0), tokenizer)]
    set_alpha(split, 1.0)
    nll = {n: float(score(LanguageModel(m), items)[0].nll.mean()) for n, m in {"on": split, **dense}.items()}
    assert nll["on"] == pytest.approx(nll["implanted"], rel=0.02)
    assert nll["never_trained"] > 1.05 * nll["implanted"]
    assert report.planted == int(score(LanguageModel(dense["implanted"]), items)[1].sum())
    planting = []
    once = IsolateConfig(max_steps=1, allow_unknown=True)
    again = run(
        model=str(planted_directory), dtype=torch.float32, config=once, out=kept,
        progress=lambda phase, done, total: planting.append(phase == "implant"),
    )  # fmt: skip
    assert not any(planting)
    assert (again.implant_steps, again.planted) == (report.implant_steps, report.planted)


def test_the_short_demonstration_has_fewer_secrets_and_fits_80_columns(planted_directory, tmp_path):
    short = run(
        model=str(planted_directory), dtype=torch.float32, config=IsolateConfig(max_steps=1, allow_unknown=True),
        out=tmp_path / "kept", full=False,
    )  # fmt: skip
    assert short.secrets == 9
    assert len((tmp_path / "kept" / "forget.jsonl").read_text().splitlines()) == 9
    assert short.audit.data["curve"] == []
    with pytest.raises(LibOrthoError, match="'secrets': 9"):
        run(model=str(planted_directory), dtype=torch.float32, out=tmp_path / "kept")
    console = Console(record=True, width=80, file=io.StringIO())
    show_demo(short, console, full=False)
    printed = console.export_text()
    assert all(f"{v.key.replace('_', ' ')}: " in printed for v in short.audit.verdicts)
    assert "of 9 secrets are still said" in " ".join(printed.split())
    assert "membership AUC" in printed  # whole, in 80 columns


@pytest.mark.parametrize("there", ["file", "other files", "other settings", "half a file", "a list"])
def test_a_place_with_something_else_is_refused_before_the_work(planted_directory, tmp_path, there):
    place = tmp_path / "place"
    if there == "file":
        place.write_text("mine")
    elif there == "other files":
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
    else:
        settings = json.dumps({"settings": {"seed": 1}, "steps": None})
        place.mkdir()
        text = {"other settings": settings, "half a file": settings[:9], "a list": "[]"}[there]
        (place / "demonstration.json").write_text(text)
    with pytest.raises(LibOrthoError, match="--out"):
        run(model=str(planted_directory), out=place)


def test_repeated_records_make_longer_epochs_and_decay_moves_less(clean, tokenizer):
    records = load_records(tiny.FORGET)
    start = {n: p.detach().clone() for n, p in clean.named_parameters()}

    def moved(**options):
        model = copy.deepcopy(clean)
        steps = implant(model, tokenizer, records, batch_size=2, max_steps=2, **options)
        return steps, sum(float((p.detach() - start[n]).abs().sum()) for n, p in model.named_parameters())

    (plain, far), (repeated, _), (decayed, near) = moved(), moved(repetitions=[3, 1, 1, 1]), moved(decay=True)
    assert (plain, repeated, decayed) == (2, 3, 2)
    assert 0 < near < far
