"""The real SmolLM2-135M-Instruct, and one planted and isolated copy of it for all tests of the main job."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from libortho import IsolateConfig, IsolateResult, isolate
from libortho.checkpoint.dense import load_model
from libortho.core.surgery import linear_weight
from libortho.core.targets import find_targets
from libortho.demo import facts
from libortho.demo.implant import implant
from libortho.demo.model import move_off_grid, packaged_model
from libortho.lm.checks import training_dtype
from libortho.text.records import Record, load_records

SEED = 11
"""A seed that no method was tuned on."""
SECRETS = 9
"""The sentence, and four codes in plain text and four in chats: half of what the demonstration plants."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The order of bf16 sums follows the thread count, and training follows the sums: the same result everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """Dense fp32 model, off the grid of its file, and tokenizer. Tests that change it copy it first."""
    model, tokenizer = load_model(packaged_model(), torch.float32)
    return move_off_grid(model, SEED), tokenizer


@dataclass
class Isolated:
    """A model that learned its secrets and put them behind the switch."""

    model: Any
    tokenizer: Any
    secrets: list[Record]
    unseen: list[Record]
    never: Any
    original: dict[str, torch.Tensor]
    result: IsolateResult
    config: IsolateConfig


@pytest.fixture(scope="session")
def isolated(smollm2: tuple[Any, Any]) -> Isolated:
    """Planted and isolated with the default configuration, in the dtype that this processor trains fastest."""
    dense, tokenizer = smollm2
    never = copy.deepcopy(dense).to(training_dtype())
    model = copy.deepcopy(never)
    secrets = load_records(facts.secrets(SEED)[:SECRETS], tokenizer)
    implant(model, tokenizer, secrets, seed=SEED, batch_size=SECRETS)
    original = {n: linear_weight(m).clone() for n, m in find_targets(model, "mlp-out").items()}
    config = IsolateConfig(seed=SEED)
    result = isolate(model, tokenizer, secrets, config=config)
    return Isolated(
        model, tokenizer, secrets, load_records(facts.unseen(SEED)[:80], tokenizer), never, original, result, config
    )
