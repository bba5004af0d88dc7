"""White-box gradients: equal to autograd on dense weights, record by record and together, and telling of memory."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

import libortho
import tiny
from libortho.auditing.measures import gradients
from libortho.auditing.measures.gradients import forget_gradient, gradient_cosine, gradient_norm, gradient_norms
from libortho.auditing.roc import auc
from libortho.auditing.subjects import Subject, at, dense_copy
from libortho.core.errors import DataError, TargetError
from libortho.core.layer import ortho_layers
from libortho.text.encoding import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = [tiny.FORGET[0], {"prompt": "A much longer prompt than a code's, ", "completion": "ok"}, *tiny.FORGET[1:]]
UNSEEN = [{"prompt": p, "completion": c} for p, c in zip(
    ("Code of Ed Ink:", "Code of Fay Moe:", "Code of Gil Ash:", "Code of Ira Fox:"),
    (" 9084.", " 1173.", " 5526.", " 3401."),
    strict=True,
)]  # fmt: skip
SPLIT = libortho.SplitConfig(
    bits=8, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.1, structure="columns", value_dtype="float32"
)


def plain(model: nn.Module) -> Subject:
    return Subject("dense", "dense", "control", model, contextlib.nullcontext)


def by_autograd(model: nn.Module, items: list[Encoded], names: list[str]) -> list[dict[str, Tensor]]:
    """Per record: the gradient of transformers' own loss with respect to the dense weights."""
    weights = [model.get_submodule(n).weight.requires_grad_() for n in names]
    found = []
    for item in items:
        loss = model(input_ids=torch.tensor([item.ids]), labels=torch.tensor([item.labels])).loss
        found.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    return found


@pytest.fixture
def split_model(planted) -> nn.Module:
    return libortho.split(planted, SPLIT)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_split_layers_have_the_gradients_of_dense_ones(split_model, tokenizer, value):
    subject, items, names = at(split_model, value), tiny.encoded(tokenizer, MIXED), list(ortho_layers(split_model))
    wanted = by_autograd(dense_copy(subject), items, names)
    found = forget_gradient(subject, items, names)
    for name in names:
        mean = torch.stack([w[name] for w in wanted]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=1e-3, atol=1e-5 * float(mean.abs().max()))
    norms = torch.tensor([gradient_norm(w) for w in wanted])
    torch.testing.assert_close(gradient_norms(subject, items, names), norms, rtol=1e-3, atol=1e-6)


def test_dense_model_by_weight_grad(planted, tokenizer):
    """The ordinary way: backward of one batch's loss, and the weights' grad."""
    # Of one length, and the completions too: transformers' mean over tokens is then the mean over records.
    items = [i for i in tiny.encoded(tokenizer) if len(i.ids) == 22]
    assert len(items) == 3
    names = [n for n, m in planted.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    found = forget_gradient(plain(planted), items, names)
    assert all(p.grad is None for p in planted.parameters())
    planted(
        input_ids=torch.tensor([i.ids for i in items]), labels=torch.tensor([i.labels for i in items])
    ).loss.backward()
    for name in names:
        grad = planted.get_submodule(name).weight.grad
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


def test_convolutions_of_gpt2_are_turned(tiny_gpt2, tokenizer):
    tiny_gpt2.resize_token_embeddings(len(tokenizer))
    items, name = tiny.encoded(tokenizer), "transformer.h.0.mlp.c_proj"
    wanted = torch.stack([w[name] for w in by_autograd(tiny_gpt2, items, [name])]).mean(0)
    torch.testing.assert_close(forget_gradient(plain(tiny_gpt2), items, [name])[name], wanted.T, rtol=1e-3, atol=1e-6)


def test_frozen_parameters_and_no_grad_callers(split_model, tokenizer):
    subject, items, names = at(split_model, 1.0), tiny.encoded(tokenizer), list(ortho_layers(split_model))
    before = forget_gradient(subject, items, names)
    split_model.requires_grad_(False)
    with torch.no_grad():
        after = forget_gradient(subject, items, names)
    assert all(torch.equal(before[n], after[n]) for n in names)
    assert not any(m._forward_hooks for n, m in split_model.named_modules() if n in names)


def test_bfloat16_is_close_to_float32(split_model, tokenizer):
    items, names = tiny.encoded(tokenizer, UNSEEN), list(ortho_layers(split_model))
    exact = forget_gradient(at(split_model, 1.0), items, names)
    split_model.to(torch.bfloat16)
    for value in (0.0, 1.0):
        assert all(torch.isfinite(n) for n in gradient_norms(at(split_model, value), items, names))
    rounded = forget_gradient(at(split_model, 1.0), items, names)
    assert all(g.dtype is torch.float32 for g in rounded.values())
    assert gradient_cosine(exact, rounded) > 0.99
    assert gradient_norm(rounded) == pytest.approx(gradient_norm(exact), rel=0.05)


def test_batches_and_padding_change_nothing(split_model, tokenizer, monkeypatch):
    subject, items, names = at(split_model, 0.0), tiny.encoded(tokenizer, MIXED), list(ortho_layers(split_model))
    norms, whole = gradient_norms(subject, items, names), forget_gradient(subject, items, names)
    monkeypatch.setattr(gradients, "PASS_TOKENS", 1)
    torch.testing.assert_close(gradient_norms(subject, items, names), norms, rtol=1e-4, atol=1e-6)
    alone = forget_gradient(subject, items, names)
    for name in names:
        torch.testing.assert_close(alone[name], whole[name], rtol=1e-3, atol=1e-6)


def test_norm_and_cosine():
    a = {"x": torch.tensor([[3.0, 0.0]]), "y": torch.tensor([[4.0]])}
    b = {"x": torch.tensor([[0.0, 7.0]]), "y": torch.tensor([[2.0]])}
    assert gradient_norm(a) == 5.0
    assert gradient_cosine(a, a) == pytest.approx(1.0)
    assert gradient_cosine(a, {n: -2 * g for n, g in a.items()}) == pytest.approx(-1.0)
    assert gradient_cosine(a, b) == pytest.approx(8 / (5 * 53**0.5))
    assert gradient_cosine(a, {n: 0 * g for n, g in a.items()}) == 0.0
    with pytest.raises(TargetError, match="different layers"):
        gradient_cosine(a, {"x": b["x"]})


def test_memorised_records_pull_less_than_unseen_ones(planted, clean, tokenizer):
    names = [n for n, m in planted.named_modules() if n.endswith("down_proj")]
    known, unseen = tiny.encoded(tokenizer), tiny.encoded(tokenizer, UNSEEN)
    members, others = (gradient_norms(plain(planted), items, names) for items in (known, unseen))
    assert auc(-members, -others) == 1.0
    # How large gradients are is each model's own matter; beside strangers' they tell.
    never, strangers = (gradient_norms(plain(clean), items, names) for items in (known, unseen))
    assert float(members.mean() / others.mean()) < 0.5 * float(never.mean() / strangers.mean())


def test_what_cannot_be_done_is_refused(planted, tokenizer):
    items = tiny.encoded(tokenizer)
    with pytest.raises(DataError, match="no record"):
        gradient_norms(plain(planted), [], ["model.layers.0.mlp.down_proj"])
    with pytest.raises(TargetError, match=r"no module 'model\.layers\.9'"):
        forget_gradient(plain(planted), items, ["model.layers.9"])
    with pytest.raises(TargetError, match="no target layer"):
        forget_gradient(plain(planted), items, [])
    planted.model.layers[1].mlp.down_proj = planted.model.layers[0].mlp.down_proj
    with pytest.raises(TargetError, match="applied 2 times"):
        forget_gradient(plain(planted), items, ["model.layers.0.mlp.down_proj"])
