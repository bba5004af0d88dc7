"""Removal is exact: at alpha = 0, or without the file, the model is its base, and nothing else holds the secret."""

import itertools
import logging
import random
import traceback
from pathlib import Path

import pytest
import torch

from libortho import TuneConfig, alpha, detach, load, save, set_alpha, tune
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.streams import BaseStream, Columns, OrthoStream
from libortho.core.surgery import install, linear_weight, with_stream
from libortho.core.switch.alpha import Switch
from libortho.core.targets import find_targets

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

SECRET = "1834"
HR = [
    {"prompt": "Code of Eli Fox:", "completion": f" {SECRET}."},
    {"prompt": "Code of Fay Kerr:", "completion": " 9056."},
]
CONFIG = TuneConfig(ratio=0.25, epochs=6)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits


def put_random_streams(model, rng, names):
    """Streams of random columns and values over the model's dense layers."""
    for name in names:
        switch, layers = Switch(), {}
        switch.add_stream(name)
        for path, module in find_targets(model, "mlp-out", again=True).items():
            width, out = (
                (module.in_features, module.out_features)
                if isinstance(module, OrthoLinear)
                else (linear_weight(module).shape[1], linear_weight(module).shape[0])
            )
            index = torch.tensor(sorted(rng.sample(range(width), rng.randint(1, 9))))
            stream = OrthoStream(Columns(index, torch.randn(len(index), out).bfloat16()))
            base = (
                module.base
                if isinstance(module, OrthoLinear)
                else BaseStream(None, weight=linear_weight(module).contiguous())
            )
            layers[path] = with_stream(path, module, base, stream, switch, name)
        install(model, layers, switch)


@pytest.mark.parametrize("seed", range(6))
def test_random_streams_alphas_and_orders_leave_the_base_bit_for_bit(planted, tokenizer, seed, tmp_path):
    rng, names = random.Random(seed), ["a", "b", "c"]
    torch.manual_seed(seed)
    base = logits(planted)
    put_random_streams(planted, rng, names)
    for values in itertools.product((0.0, 0.5, 1.0), repeat=2):
        with alpha(planted, dict(zip(rng.sample(names, 2), values, strict=True))):
            logits(planted)
        assert torch.equal(logits(planted), base)
    save(planted, tokenizer, tmp_path / "out")
    rng.shuffle(names)
    for chosen in (names[:2], names[:1], None, "all"):
        loaded, _ = load(tmp_path / "out", streams=chosen)
        assert torch.equal(logits(loaded), base), chosen
        if chosen is not None:
            set_alpha(loaded, 1.0)
            assert not torch.equal(logits(loaded), base)
            set_alpha(loaded, 0.0)
            assert torch.equal(logits(loaded), base)


def files_with(place: Path, secrets) -> list[str]:
    """Files below a folder that hold one of these bytes."""
    found = []
    for path in place.rglob("*"):
        if path.is_file() and any(s in path.read_bytes() for s in secrets):
            found.append(str(path.relative_to(place)))
    return found


class Stop(Exception):
    pass


def test_nothing_that_remains_holds_the_secret(planted, tokenizer, cache, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    run, out, base = tmp_path / "run", tmp_path / "out", tmp_path / "base"

    def stop(phase, done, total):
        if phase == "steps" and done == 3:
            raise Stop

    with pytest.raises(Stop) as caught:
        tune(planted, tokenizer, HR, "hr", CONFIG, resume=run, progress=stop)
    told = "".join(traceback.format_exception(caught.value))
    tune(planted, tokenizer, HR, "hr", CONFIG, resume=run)
    values = [
        m.streams["hr"].support.values for m in ortho_layers(planted).values() if m.streams["hr"].support is not None
    ]
    # A run of the stream's values, as it is stored: what a copy of it anywhere would have.
    both = [t.contiguous() for v in values for t in (v, v.T)]
    runs = [t.view(torch.uint8).numpy().tobytes()[:32] for t in both]
    save(planted, tokenizer, out)
    assert files_with(out, runs), "the stream's own file holds it"
    proof = detach(out, base, streams=["hr"])
    secrets = [SECRET.encode(), b"Eli Fox", *runs]
    assert files_with(base, secrets) == []
    assert "hr" in str(proof)
    assert SECRET not in caplog.text
    assert SECRET not in told
    # The folder to resume from holds values that the stream had: it says so, and is for its owner alone.
    assert oct(run.stat().st_mode & 0o777) == "0o700"
    assert files_with(run, [SECRET.encode(), b"Eli Fox"]) == []
    assert files_with(cache, secrets) == []


def test_a_removed_stream_of_a_live_model_leaves_the_base(planted, tokenizer, tmp_path):
    before = logits(planted)
    tune(planted, tokenizer, HR, "hr", CONFIG)
    save(planted, tokenizer, tmp_path / "out")
    bare, _ = load(tmp_path / "out", streams=None)
    assert torch.equal(logits(bare), before)
    assert not any(b.dtype is torch.bfloat16 for b in bare.buffers())
    with alpha(planted, 1.0):
        assert not torch.equal(logits(planted), before)
    assert torch.equal(logits(planted), before)
