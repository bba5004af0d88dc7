"""Checkpoints that are made once; each test gets a copy of its own."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from making import ENTRIES_TAIL, contents, make, two_streams, write
from transformers import PreTrainedModel

import tiny
from libortho.checkpoint import detach, encrypt, save


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All tests here."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(two_streams(), tiny.byte_tokenizer(), tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="session")
def made_bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer, which takes longer to copy, to search and to load than the rest."""
    return save(two_streams(), None, tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="session")
def made_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(two_streams(), None, tmp_path_factory.mktemp("made") / "out", max_shard_size="12KB")


@pytest.fixture(scope="session")
def made_detached(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stream "default" is gone, "hr" stays."""
    out = tmp_path_factory.mktemp("made") / "out"
    detach(made, out, streams=["default"])
    return out


@pytest.fixture(scope="session")
def _split(_llama: PreTrainedModel) -> PreTrainedModel:
    return make(copy.deepcopy(_llama))


@pytest.fixture(scope="session")
def _made_split(_split: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(_split, None, tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="session")
def made_entries(_llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make(copy.deepcopy(_llama), **ENTRIES_TAIL), None, tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """INT8 base, a tokenizer, the stream "default" (columns and tail), and "hr" (free entries)."""
    return write(tmp_path / "in", contents(made))


@pytest.fixture
def sharded(made_sharded: Path, tmp_path: Path) -> Path:
    """The same in several files, without a tokenizer."""
    return write(tmp_path / "sharded", contents(made_sharded))


@pytest.fixture
def detached(made_detached: Path, tmp_path: Path) -> Path:
    """The source without the stream "default", and its certificate."""
    return write(tmp_path / "out", contents(made_detached))


@pytest.fixture(scope="session")
def key() -> Any:
    """A key pair of age."""
    return pytest.importorskip("pyrage").x25519.Identity.generate()


@pytest.fixture(scope="session")
def made_locked(made: Path, key: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "default.age"
    return encrypt(made / "ortho/default", place, recipients=[str(key.to_public())])


@pytest.fixture
def locked(made_locked: Path, tmp_path: Path) -> Path:
    """The stream "default" of the source, encrypted."""
    return shutil.copy(made_locked, tmp_path / "default.age")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def split_model(_split: PreTrainedModel) -> PreTrainedModel:
    """The tiny Llama in INT8 per channel, with a stream of columns and tail."""
    return copy.deepcopy(_split)


@pytest.fixture
def saved(_made_split: Path, tmp_path: Path) -> Path:
    """The split model, saved."""
    return write(tmp_path / "out", contents(_made_split))


@pytest.fixture
def saved_entries(made_entries: Path, tmp_path: Path) -> Path:
    """A stream of free entries with a tail, saved."""
    return write(tmp_path / "out", contents(made_entries))
