from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import libortho
import tiny
from libortho.auditing.measures.utility import agreement, general_items
from libortho.core.errors import DataError, TargetError
from libortho.core.layer import ortho_layers
from libortho.evaluation.tasks import encode_pair
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states, sequence_nll
from libortho.text.encoding import Encoded


@pytest.fixture
def lm(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    return LanguageModel(tiny.sharpened(tokenizer))


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
    original, subject = tiny.sharpened(tokenizer), tiny.sharpened(tokenizer)
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
