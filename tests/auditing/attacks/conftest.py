"""A small isolated model, and what attacks on it are given."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import tiny
from libortho import IsolateConfig, isolate
from libortho.auditing.attacks import AttackInputs
from libortho.auditing.subjects import Subject, subjects_of
from libortho.text.encoding import Encoded, encode
from libortho.text.records import load_records

Asked = Callable[..., AttackInputs]


@pytest.fixture(scope="session")
def isolated(_planted, tokenizer) -> nn.Module:
    """The planted model with its memory in the ortho stream."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = copy.deepcopy(_planted)
    isolate(
        model, tokenizer, tiny.FORGET, retain=tiny.RETAIN,
        config=IsolateConfig(ratio=0.1, damping=1.0, max_steps=60),
    )  # fmt: skip
    torch.set_num_threads(threads)
    return model


@pytest.fixture(scope="session")
def forget(tokenizer) -> list[Encoded]:
    return tiny.encoded(tokenizer)


@pytest.fixture(scope="session")
def general(tokenizer) -> list[Encoded]:
    return [encode(r, tokenizer, 64) for r in load_records(tiny.RETAIN[:12])]


@pytest.fixture(scope="session")
def audited(isolated, _clean) -> list[Subject]:
    return subjects_of(isolated, original=None, reference=_clean, others={}, seed=0)


@pytest.fixture(scope="session")
def asked(forget, general, tokenizer) -> Asked:
    """Inputs of an attack on some subjects, by default with the planted records."""

    def make(subjects: Sequence[Subject], **more) -> AttackInputs:
        records = load_records(tiny.FORGET)
        given = {"records": records, "items": forget, "general": general, "tokenizer": tokenizer, **more}
        return AttackInputs(subjects=subjects, **given)

    return make


@pytest.fixture(scope="session")
def alone() -> Callable[[nn.Module], list[Subject]]:
    """A model that is audited with nothing beside it."""
    return lambda model: subjects_of(model, original=None, reference=None, others={}, seed=0)


@pytest.fixture
def unchanged(isolated):
    """The audited model must leave the test with the same tensors and the same alpha = 0 logits."""
    before = copy.deepcopy(isolated.state_dict())
    flags = {n: p.requires_grad for n, p in isolated.named_parameters()}
    yield isolated
    after = isolated.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert {n: p.requires_grad for n, p in isolated.named_parameters()} == flags
    assert all(p.grad is None for p in isolated.parameters())
