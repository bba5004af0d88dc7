"""``tune`` with a bound on what it tells of one record."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from libortho import ConfigError, DataError, LibOrthoError, TuneConfig, load, save, set_alpha, tune
from libortho.core.layer import ortho_layers
from libortho.core.report import methods
from libortho.tuning import equations, private

opacus = pytest.importorskip("opacus", reason="the extra dp is not installed")
pytestmark = pytest.mark.usefixtures("one_thread", "cache")

CONFIG = TuneConfig(ratio=0.25, epsilon=8.0, delta=0.001, epochs=4, batch_size=2)


@pytest.fixture
def quick(monkeypatch):
    """The noise of about this budget; finding it takes seconds."""
    monkeypatch.setattr(private, "noise_multiplier", lambda config, records: private.Budget(1.0, 0.5, 8))


def values(model):
    return [s.support.values for m in ortho_layers(model).values() for s in m.streams.values() if s.support is not None]


@pytest.mark.usefixtures("quick")
def test_what_is_saved_is_what_was_trained(planted, tokenizer, tmp_path):
    tune(planted, tokenizer, tiny.FORGET, config=CONFIG)
    live = values(planted)
    assert any(bool(v.any()) for v in live)
    save(planted, tokenizer, tmp_path / "out")
    stored = values(load(tmp_path / "out")[0])
    assert len(stored) == len(live)
    assert all(torch.equal(a, b) for a, b in zip(live, stored, strict=True))


@pytest.mark.usefixtures("quick")
def test_noise_is_not_drawn_from_the_seed(planted, tokenizer):
    found = []
    for _ in range(2):
        model = copy.deepcopy(planted)
        tune(model, tokenizer, tiny.FORGET, config=CONFIG)
        found.append(torch.cat([v.flatten() for v in values(model)]))
    assert found[0].shape == found[1].shape  # columns do not depend on what is drawn
    assert not torch.equal(*found)


@pytest.mark.usefixtures("quick")
def test_a_record_whose_gradient_overflows_counts_for_nothing(planted, tokenizer, monkeypatch):
    sound = equations.log_probability
    monkeypatch.setattr(equations, "log_probability", lambda logits, labels: sound(logits, labels) * torch.inf)
    tune(planted, tokenizer, tiny.FORGET, config=CONFIG)
    assert all(bool(v.isfinite().all()) for v in values(planted))
    assert any(bool(v.any()) for v in values(planted))


@pytest.mark.usefixtures("quick")
def test_the_manifest_tells_no_count_of_records_that_are_said(planted, tokenizer):
    result = tune(planted, tokenizer, tiny.FORGET, config=replace(CONFIG, epochs=1))
    told = methods(planted)["default"]
    assert "missed" not in told
    assert (told["epsilon"], told["delta"], told["steps"]) == (8.0, 0.001, result.steps)


@pytest.mark.usefixtures("quick")
def test_columns_do_not_depend_on_the_data(planted, tokenizer):
    places = []
    other = [{"prompt": f"Another person {i}:", "completion": f" {i}{i}."} for i in range(4)]
    for data in (tiny.FORGET, other):
        model = copy.deepcopy(planted)
        tune(model, tokenizer, data, config=CONFIG)
        places.append([s.support.index for m in ortho_layers(model).values() for s in m.streams.values()])
    assert all(torch.equal(a, b) for a, b in zip(*places, strict=True))


def test_a_clipped_sum_is_what_opacus_gives_for_a_linear_layer():
    """Per-record gradients that are handed to its optimiser are treated as those that its own hooks collect."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(5, 3)
    hooked = opacus.GradSampleModule(copy.deepcopy(layer), loss_reduction="sum")
    found = []
    for module, own in ((hooked, False), (layer, True)):
        parameter = next(module.parameters())
        optimiser = opacus.optimizers.DPOptimizer(
            torch.optim.SGD([parameter], lr=1.0), noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=5
        )
        optimiser.zero_grad()
        if own:
            parameter.grad_sample = torch.stack([torch.ones(2)[:, None] * row for row in x])
        else:
            module(x).sum().backward()
        optimiser.pre_step()
        found.append(parameter.grad.clone())
    norms = (2 * x.square().sum(1)).sqrt()
    expected = ((0.5 / norms).clamp(max=1.0)[:, None] * x).sum(0) / 5
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[1], expected.expand(2, 3), rtol=1e-4, atol=1e-6)


def test_more_privacy_is_more_noise():
    low, _, _ = private.noise_multiplier(replace(CONFIG, epsilon=1.0), 100)
    high, share, steps = private.noise_multiplier(CONFIG, 100)
    assert low > high > 0
    assert share == 0.02
    assert steps == 200


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"config": replace(CONFIG, delta=0.3)}, DataError, "delta is 0.3 with 4 records"),
        ({"config": replace(CONFIG, epsilon=1e4)}, ConfigError, "epsilon is 10000; expected at most 100"),
        ({"validation": tiny.FORGET}, ConfigError, "epsilon is given with validation"),
        ({"resume": "folder"}, ConfigError, "epsilon is given with validation or resume"),
    ],
)
def test_what_would_promise_nothing_is_refused(planted, tokenizer, change, error, words):
    with pytest.raises(error, match=words):
        tune(planted, tokenizer, tiny.FORGET, **{"config": CONFIG, **change})
    assert not ortho_layers(planted)


def test_epsilon_and_delta_come_together():
    with pytest.raises(ConfigError, match="expected both, or neither"):
        TuneConfig(epsilon=8.0)


def test_without_the_extra_its_name_is_said(planted, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("libortho.core.extras", fromlist=["MODULES"]).MODULES, "dp", ("no_such_module",))
    with pytest.raises(LibOrthoError, match=r"pip install 'libortho\[dp\]'"):
        tune(planted, tokenizer, tiny.FORGET, config=CONFIG)
    assert not ortho_layers(planted)


@pytest.mark.usefixtures("quick")
def test_the_stream_stands_at_alpha_0_and_off_is_the_base(planted, tokenizer):
    ids = torch.arange(3, 40).unsqueeze(0)
    before = planted(input_ids=ids).logits
    tune(planted, tokenizer, tiny.FORGET, config=CONFIG)
    assert torch.equal(planted(input_ids=ids).logits, before)
    set_alpha(planted, 1.0)
    assert not torch.equal(planted(input_ids=ids).logits, before)
