"""A cache of a run gives back what was put there, and refuses folders of others and damaged files."""

from typing import Any

import pytest
import torch

from libortho.core import run_cache
from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.run_cache import Entry, RunCache, run_key


def _forbidden() -> Any:
    raise AssertionError("this was done before")


def test_another_version_of_the_library_is_another_run(monkeypatch):
    key = run_key("model", 1)
    assert run_key("model", 1) == key != run_key("model", 2)
    monkeypatch.setattr(run_cache, "__version__", "0.0.0")
    assert run_key("model", 1) != key


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="a file; expected a folder"):
        RunCache(tmp_path / "file", "key")
    with pytest.raises(ConfigError, match=r"holds file, and no run\.json"):
        RunCache(tmp_path, "key")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new/tmp7x").write_bytes(b"half")  # its writer died before anything else was there
    RunCache(tmp_path / "new", "key")
    RunCache(tmp_path / "new", "key")


@pytest.mark.parametrize("name", ["run.json", "one.safetensors"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff" * 40])
def test_a_damaged_file_is_refused(tmp_path, name, damage):
    RunCache(tmp_path, "key").put("one", Entry({"x": torch.ones(2)}))
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(CheckpointError, match=f"cannot read .*{name}.* to start again"):
        RunCache(tmp_path, "key").get("one")


def test_an_entry_comes_back_as_it_was(tmp_path):
    table = torch.arange(12.0).view(3, 4)
    tensors = {
        "z": table.T, "b": table[1].bfloat16(), "a": torch.tensor(3), "nan": torch.tensor([float("nan"), -0.0]),
        "m": torch.zeros(0, 2),
    }  # fmt: skip
    RunCache(tmp_path, "key").put("one", Entry(tensors, {"numbers": [0.1, float("inf")], "none": None}))
    found = RunCache(tmp_path, "key").get("one")
    assert found is not None
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].nan_to_num(7), tensor.nan_to_num(7))
        assert found.tensors[name].data_ptr() % 64 == 0 or not tensor.numel()
    assert found.data == {"numbers": [0.1, float("inf")], "none": None}
    assert RunCache(tmp_path, "key").get("other") is None
    assert RunCache().get("one") is None


def test_an_entry_that_is_there_is_not_made_again(tmp_path):
    RunCache(tmp_path, "key").get_or_compute("one", lambda: Entry({}, 1))
    assert RunCache(tmp_path, "key").get_or_compute("one", _forbidden).data == 1
    assert RunCache().get_or_compute("one", lambda: Entry({}, 2)).data == 2
