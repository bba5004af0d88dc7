"""Which streams are loaded, under which alpha, and what is refused as a directory, a name or a dtype."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from making import (
    add_stream,
    base_logits,
    logits,
    make,
    truncate,
)
from transformers import (
    PreTrainedModel,
)

import libortho
from libortho import AlphaError, CheckpointError
from libortho.checkpoint import inspect, load, save
from libortho.core.layer import ortho_layers


def test_streams_are_loaded_by_name_and_summed_in_their_order(
    tiny_llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = make(tiny_llama, value_dtype="float32")
    add_stream(model, "zeta", 1)
    add_stream(model, "alpha", 2)
    save(model, None, tmp_path / "out")
    libortho.set_alpha(model, 1.0)
    everything, _ = load(tmp_path / "out", streams=["alpha", "zeta", "default"], alpha=1.0)
    assert torch.equal(logits(everything, tokens), logits(model, tokens))
    some, _ = load(tmp_path / "out", streams=["alpha"], alpha={"alpha": 1.0})
    with libortho.alpha(model, {"alpha": 1.0}):
        assert torch.equal(logits(some, tokens), logits(model, tokens))
    with pytest.raises(AlphaError, match="unknown stream 'zeta'"):
        libortho.set_alpha(some, {"zeta": 1.0})
    libortho.set_alpha(everything, {"zeta": 0.0, "default": 0.0})
    assert torch.equal(logits(everything, tokens), logits(some, tokens))


@pytest.mark.parametrize("streams", [None, []])
def test_no_stream_is_a_split_model_without_a_switch(
    streams: Any, saved: Path, split_model: PreTrainedModel, tokens: torch.Tensor
) -> None:
    model, _ = load(saved, streams=streams)
    assert len(ortho_layers(model)) == 2
    assert torch.equal(logits(model, tokens), base_logits(split_model, tokens))
    for value in (0, 0.0, [0.0, 0.0], torch.zeros(3), {}):
        libortho.set_alpha(model, value)
        with libortho.alpha(model, value):
            assert torch.equal(logits(model, tokens), base_logits(split_model, tokens))
    for value in (1.0, 1e-9, [0.0, 1.0], {"default": 1.0}, {"default": 0.0}):
        with pytest.raises(AlphaError, match=r"no ortho stream is loaded beside this base.*libortho\.load.*attach"):
            libortho.set_alpha(model, value)
        with pytest.raises(AlphaError, match="no ortho stream"), libortho.alpha(model, value):
            pass
    for value in (float("nan"), -1, "0", True):
        with pytest.raises(AlphaError, match="expected a number"):
            libortho.set_alpha(model, value)
    report = libortho.layer_report(model)
    assert report.totals()["ortho_bytes"] == 0
    assert report[0].final_error == report[0].base_error


def test_the_base_stands_alone(saved: Path, split_model: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    shutil.rmtree(saved / "ortho")
    model, _ = load(saved)
    assert torch.equal(logits(model, tokens), base_logits(split_model, tokens))
    again, _ = load(save(model, None, tmp_path / "again"))
    assert torch.equal(logits(again, tokens), base_logits(split_model, tokens))
    assert "default" not in (saved / "libortho.json").read_text()


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        (["hr"], r"no stream 'hr'; it has \['default'\]"),
        (["../x"], "stream name '../x'"),
        (["/etc"], "stream name '/etc'"),
        ([".."], "stream name"),
        ([3], "stream name 3"),
        ("default", r"a list such as \['default'\]"),
    ],
)
def test_unknown_and_impossible_stream_names(streams: Any, message: str, saved: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(saved, streams=streams)


def test_a_broken_stream_does_not_stop_the_base(saved: Path) -> None:
    truncate(saved / "ortho/default/adapter_model.safetensors")
    load(saved, streams=None)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"libortho\.json is missing"):
        inspect(tmp_path)


def test_dtype_must_be_a_float(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.int8"):
        load(saved, dtype=torch.int8)
