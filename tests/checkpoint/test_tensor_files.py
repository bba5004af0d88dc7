"""Tensors are read as the safetensors library reads them, from the files of the directory alone."""

import os
from pathlib import Path

import pytest
import torch
from forging import LAYER
from making import (
    edit,
    make,
)
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
)

from libortho import CheckpointError
from libortho.checkpoint import load, save
from libortho.checkpoint.tensor_files import TensorFiles
from libortho.core.dtypes import DTYPES


def test_a_file_that_shrinks_while_it_is_read_is_named(saved: Path) -> None:
    files = TensorFiles(saved)
    os.truncate(saved / "model.safetensors", 2000)
    with pytest.raises(CheckpointError, match=r"cannot read the tensor model\.norm\.weight: the file ends"):
        files.get("model.norm.weight")


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.bool, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_tensors_are_read_as_the_library_reads_them(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name in ("x", "y")}
    save_file({"odd": torch.ones(3, dtype=torch.int8), **tensors}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert files.names() == ["odd", "x", "y"]
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        found = files.get(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_a_dtype_that_the_format_does_not_hold_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4).to(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E8M0"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "evil.bin"])
def test_an_index_cannot_name_files_elsewhere(name: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    save(make(tiny_llama), None, tmp_path / "out", max_shard_size="40KB")
    index = tmp_path / "out/model.safetensors.index.json"
    edit(index, lambda i: i["weight_map"].update({f"{LAYER}.weight_packed": name}))
    with pytest.raises(CheckpointError, match="expected a file name in the same directory"):
        load(tmp_path / "out")


def test_a_missing_shard_is_named(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    save(make(tiny_llama), None, tmp_path / "out", max_shard_size="40KB")
    next((tmp_path / "out").glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path / "out")
