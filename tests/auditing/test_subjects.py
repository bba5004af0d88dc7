"""The controls: the same edit elsewhere, no edit at all, and dense copies that compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import libortho
import tiny
from libortho import IsolateConfig, alpha
from libortho.auditing.subjects import dense_copy, moved_edit, plain_base, subjects_of, touched
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.streams import BaseStream


@pytest.fixture(scope="module")
def isolated(_planted: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = copy.deepcopy(_planted)
    config = IsolateConfig(ratio=0.05, max_steps=2, value_dtype="float32")
    libortho.isolate(model, tokenizer, tiny.FORGET, retain=tiny.RETAIN, config=config)
    return model, _planted


def test_plain_base_is_the_original_quantised(isolated: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, original = isolated
    for name, layer in ortho_layers(model).items():
        nearest = BaseStream.from_weight(original.get_submodule(name).weight.detach(), 8)
        made, edited = plain_base(layer), touched(layer)
        assert torch.equal(made.scales, nearest.scales)
        assert torch.equal(made.codes[~edited], layer.base.codes[~edited])
        assert int((made.codes.int() - nearest.codes.int())[~edited].abs().max()) <= 3  # they make up for each other
        # ortho values are rounded to bf16, so a value half-way between two codes may fall to the other side
        apart = (made.codes.int() - nearest.codes.int())[edited].abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).double().mean()) < 0.02
        assert bool((layer.base.codes[edited] != made.codes[edited]).any())


def test_a_moved_edit_is_the_same_change_at_other_columns(
    isolated: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, _ = isolated
    for layer in ortho_layers(model).values():
        columns = touched(layer).any(0).nonzero()[:, 0]
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(1))
        plain = plain_base(layer).dense()
        change = layer.base.dense() - plain
        moved = moved_edit(layer, order).dense() - plain
        step = layer.base.scales.float()
        expected = torch.zeros_like(plain)
        expected[:, order[: len(columns)]] = change[:, columns]
        # equal, but for the grid's ends, where a moved change may be cut
        inside = (plain + expected).abs() <= 127 * step
        assert torch.allclose(moved[inside], expected[inside], atol=1e-5)
        assert float(inside.double().mean()) > 0.95


def test_subjects_restore_the_model_even_after_an_error(isolated: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, original = isolated
    bases = {n: m.base for n, m in ortho_layers(model).items()}
    found = subjects_of(model, original=original, reference=original, others={"x": original}, seed=0)
    assert [s.key for s in found] == ["off", "on", "original", "quantised", "random", "magnitude", "x", "reference"]
    for subject in found:
        with pytest.raises(RuntimeError, match="inside"), subject.enter():
            raise RuntimeError("inside")
        assert all(m.base is bases[n] for n, m in ortho_layers(model).items())


def test_every_subject_is_another_model(
    isolated: tuple[PreTrainedModel, PreTrainedModel], tokens: torch.Tensor
) -> None:
    model, original = isolated
    found = {}
    for subject in subjects_of(model, original=original, reference=None, others={}, seed=0):
        with subject.enter(), torch.no_grad():
            found[subject.key] = subject.model(tokens).logits
    keys = list(found)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            assert not torch.equal(found[a], found[b]), (a, b)
    near = (found["on"] - found["original"]).abs().max()
    assert float(near) < 0.1 * float((found["off"] - found["original"]).abs().max()) + 0.05


def test_random_columns_follow_the_seed(isolated: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, _ = isolated

    def weights(seed: int) -> list[torch.Tensor]:
        subject = next(
            s for s in subjects_of(model, original=None, reference=None, others={}, seed=seed) if s.key == "random"
        )
        with subject.enter():
            return [m.base.dense() for m in ortho_layers(model).values()]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def test_a_dense_copy_computes_the_same_and_is_its_own(
    isolated: tuple[PreTrainedModel, PreTrainedModel], tokens: torch.Tensor
) -> None:
    model, original = isolated
    for subject in subjects_of(model, original=original, reference=None, others={}, seed=0):
        copied = dense_copy(subject)
        assert not any(isinstance(m, OrthoLinear) for m in copied.modules())
        with subject.enter(), torch.no_grad():
            assert torch.allclose(copied(tokens).logits, subject.model(tokens).logits, atol=1e-4)
        state = {n: t.clone() for n, t in subject.model.state_dict().items()}
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(t, state[n]) for n, t in subject.model.state_dict().items())
        with pytest.raises(libortho.AlphaError, match="no ortho stream"), alpha(copied, 0.0):
            pass  # nothing of the switch is left on it
        assert not copied._forward_hooks
        assert not copied._forward_pre_hooks


def test_a_plain_model_is_audited_as_it_is(tiny_llama: nn.Module) -> None:
    (only,) = subjects_of(tiny_llama, original=None, reference=None, others={}, seed=0)
    assert (only.key, only.role) == ("model", "audited")
