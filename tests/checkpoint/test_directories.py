"""A checkpoint is there whole or not at all, and what stood in its place is lost only when the new one is whole."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from making import (
    contents,
    logits,
    make,
)
from transformers import (
    PreTrainedModel,
)

from libortho import CheckpointError
from libortho.checkpoint import directories, load, save, stream_files, writing
from libortho.core.layer import ortho_layers
from libortho.core.streams import BaseStream


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise OSError("disk full")


@pytest.fixture(params=["new", "earlier"])
def place(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Iterator[Path]:
    """A place to save to, checked afterwards: as it was, and nothing left beside it."""
    target = saved if request.param == "earlier" else tmp_path / "new"
    before = contents(target)
    beside = sorted(tmp_path.iterdir())
    yield target
    assert contents(target) == before
    assert sorted(tmp_path.iterdir()) == beside


@pytest.mark.parametrize(
    ("where", "name"),
    [(os, "replace"), (stream_files, "save_file"), (os, "fsync"), (writing, "write_stream")],
)
def test_a_failure_leaves_the_old_directory(
    where: Any, name: str, place: Path, split_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "swap", lambda first, second: False)  # as where the system cannot exchange names
    monkeypatch.setattr(where, name, _raise)
    with pytest.raises(OSError, match="disk full"):
        save(split_model, None, place)
    monkeypatch.undo()


@pytest.mark.parametrize("place", ["earlier"], indirect=True)  # a new directory moves nothing aside
def test_a_failure_to_move_the_old_directory_aside_leaves_it(
    place: Path, split_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "swap", lambda first, second: False)  # as where the system cannot exchange names
    monkeypatch.setattr(os, "rename", _raise)
    with pytest.raises(OSError, match="disk full"):
        save(split_model, None, place)
    monkeypatch.undo()


def test_wrong_codes_never_get_the_final_name(
    place: Path, split_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = writing.encode_base

    def wrong(name: str, base: BaseStream) -> dict[str, torch.Tensor]:
        tensors = right(name, base)
        return {k: v + 1 if k.endswith("weight_packed") else v for k, v in tensors.items()}

    monkeypatch.setattr(writing, "encode_base", wrong)
    with pytest.raises(CheckpointError, match="with other values"):
        save(split_model, None, place)


def test_layers_that_stock_tools_would_not_see_never_get_the_final_name(
    place: Path, split_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.Scheme, "quantization_config", lambda self, targets: {"quant_method": "none"})
    with pytest.raises(CheckpointError):
        save(split_model, None, place)


def test_an_earlier_checkpoint_is_replaced_whole(saved: Path, tokens: torch.Tensor) -> None:
    model, _ = load(saved)
    layer = next(iter(ortho_layers(model).values()))
    layer.streams["default"].support.values.mul_(2)
    (saved / "ortho/default/stray").write_text("")
    save(model, None, saved)
    again, _ = load(saved)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert not (saved / "ortho/default/stray").exists()
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


def test_a_symbolic_link_is_followed(saved: Path, split_model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    assert save(split_model, None, tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "link")


def test_a_directory_of_somebody_else(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint of libortho"):
        save(make(tiny_llama), None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file"):
        save(tiny_llama, None, tmp_path / "out/thesis.txt")
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_an_empty_directory_is_taken(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    load(save(make(tiny_llama), None, tmp_path / "out"))


def test_what_only_the_earlier_checkpoint_holds_is_not_lost(saved: Path) -> None:
    base, _ = load(saved, streams=None)
    with pytest.raises(CheckpointError, match=r"holds the streams \['default'\]"):
        save(base, None, saved)
    whole, _ = load(saved)
    (saved / "README.md").write_text("card")
    with pytest.raises(CheckpointError, match=r"holds README\.md"):
        save(whole, None, saved)
