"""Tiny random models: every fast test runs without a download and within milliseconds."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import libortho
import tiny
from probe import Probe

VOCABULARY = 128


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the isolated real model, which takes longest."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep what shares a fixture in one worker: the tests of a file, and all those of the isolated real model."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            return "integration" if "/integration/" in file else file

    return ByFixture(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's cache is; the user's own is never touched."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("LIBORTHO_CACHE", str(directory))
    return directory


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are faster, and results the same on every machine, without a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _llama() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # large enough that the ortho stream shows in the logits
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def _gpt2() -> PreTrainedModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_inner=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def tiny_llama(_llama: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(_llama)


@pytest.fixture
def tiny_gpt2(_gpt2: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(_gpt2)


@pytest.fixture
def split_llama(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """Half of each down projection's directions and some columns in the ortho stream, so that alpha matters."""
    config = libortho.SplitConfig(
        bits=4, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.1, structure="columns", value_dtype="float32"
    )
    return libortho.split(tiny_llama, config)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three prompts of six tokens."""
    return torch.randint(2, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def untouched(tiny_llama: PreTrainedModel) -> Iterator[nn.Module]:
    """A model that must leave the test with the same modules and the same tensors."""
    state = copy.deepcopy(tiny_llama.state_dict())
    types = {name: type(module) for name, module in tiny_llama.named_modules()}
    yield tiny_llama
    assert {name: type(module) for name, module in tiny_llama.named_modules()} == types
    after = tiny_llama.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that any text works."""
    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def _clean(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny.untrained_on_secrets(tokenizer)


@pytest.fixture(scope="session")
def _planted(_clean: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = copy.deepcopy(_clean)
    tiny.plant(model, tokenizer)
    return model


@pytest.fixture
def clean(_clean: PreTrainedModel) -> PreTrainedModel:
    """A model that knows the form of the secrets, and none of them."""
    return copy.deepcopy(_clean)


@pytest.fixture
def planted(_planted: PreTrainedModel) -> PreTrainedModel:
    """The same model after it memorised ``tiny.FORGET``."""
    return copy.deepcopy(_planted)


@pytest.fixture(scope="session")
def planted_directory(
    _planted: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The planted model and its tokenizer on disk."""
    directory = tmp_path_factory.mktemp("planted")
    _planted.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def _checkpoint(_planted, tokenizer, tmp_path_factory) -> Path:
    model = copy.deepcopy(_planted)
    config = libortho.IsolateConfig(ratio=0.1, damping=1.0, stream="hr")
    libortho.isolate(model, tokenizer, tiny.FORGET, tiny.RETAIN, config=config)
    out = tmp_path_factory.mktemp("isolated") / "out"
    libortho.save(model, tokenizer, out)
    return out


@pytest.fixture(scope="module")
def checkpoint(_checkpoint, tmp_path_factory) -> Path:
    """The planted model after isolate, on disk, its codes in the stream "hr": alpha = 0 forgets them."""
    return shutil.copytree(_checkpoint, tmp_path_factory.mktemp("isolated") / "out")


@pytest.fixture(params=[1.0, 0.0], ids=["on", "off"])
def probe(request: pytest.FixtureRequest) -> Probe:
    made = Probe()
    libortho.set_alpha(made.model, request.param)
    return made
