"""Steps that are large where text to keep does not notice them."""

import pytest
import torch
from torch import Tensor, nn

import tiny
from libortho.core.surgery import linear_weight
from libortho.core.targets import find_targets
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states
from libortho.selection.curvature import KroneckerPreconditioner, curvature
from libortho.text.encoding import Encoded, collate
from libortho.training.keep import divergence

pytestmark = pytest.mark.usefixtures("one_thread")


def test_steps_fall_with_the_root_of_the_curvature_and_are_on_average_one():
    inputs, outputs = torch.tensor([1.0, 9.0]), torch.tensor([4.0, 0.0, 2.0])
    metric = KroneckerPreconditioner.of(inputs.diag(), outputs.diag(), 0.1)
    step = metric.step(metric.rotated(torch.ones(2, 3)).sign() * metric.rotated(torch.ones(2, 3)).abs().round())
    expected = torch.outer((inputs + 0.1 * 5).rsqrt(), (outputs + 0.1 * 2).rsqrt())
    torch.testing.assert_close(step, expected / expected.square().mean().sqrt())


def test_far_above_one_the_damping_makes_all_directions_alike():
    inputs, outputs = torch.tensor([1.0, 9.0]).diag(), torch.tensor([4.0, 0.0, 2.0]).diag()
    torch.testing.assert_close(KroneckerPreconditioner.of(inputs, outputs, 1e6).scale, torch.ones(2, 3))
    assert float(KroneckerPreconditioner.of(inputs, outputs, 0.01).scale.max()) > 1.5


def test_a_rotated_gradient_keeps_its_length_and_its_direction():
    torch.manual_seed(0)
    a, b = torch.randn(4, 4), torch.randn(6, 6)
    metric = KroneckerPreconditioner.of(a @ a.T, b @ b.T, 0.1)
    gradient = torch.randn(4, 6)
    rotated = metric.rotated(gradient)
    assert float(rotated.norm()) == pytest.approx(float(gradient.norm()), rel=1e-5)
    # A step against the rotated gradient leads downhill, whatever the scales.
    assert float((metric.step(-rotated) * gradient).sum()) < 0


def test_a_step_in_the_metric_moves_text_to_keep_less_than_an_equally_long_one(planted, tokenizer):
    model = planted.requires_grad_(False)
    lm = LanguageModel(model)
    layers = find_targets(model, "mlp-out")
    support = {n: torch.arange(0, linear_weight(m).shape[1], 3) for n, m in layers.items()}
    items = [Encoded(tuple(t), tuple(t)) for t in tokenizer([r["text"] for r in tiny.RETAIN[:24]])["input_ids"]]
    read, judged = items[:12], items[12:]
    metrics = curvature(lm, layers, support, [collate([i]) for i in read], damping=0.1, seed=0)
    assert set(metrics) == set(support)
    before = judged_states(lm, judged)

    def moved(name: str, step: Tensor) -> float:
        module: nn.Module = layers[name]
        weight, kept = linear_weight(module), linear_weight(module).clone()
        weight[:, support[name]] += (0.3 * kept.norm() / step.norm() * step).T
        found = divergence(lm, judged, before)
        weight.copy_(kept)
        return found

    torch.manual_seed(0)
    for name, metric in metrics.items():
        noise = torch.randn(len(support[name]), linear_weight(layers[name]).shape[0])
        assert 0 < moved(name, metric.step(metric.rotated(noise))) < 0.7 * moved(name, noise)


def test_the_draws_are_those_of_the_seed(planted, tokenizer):
    model = planted.requires_grad_(False)
    lm, layers = LanguageModel(model), find_targets(model, "mlp-out")
    support = {n: torch.arange(5) for n in layers}
    batch = [collate(tiny.encoded(tokenizer, tiny.FORGET))]
    first, again, other = (curvature(lm, layers, support, batch, damping=0.1, seed=seed) for seed in (0, 0, 1))
    name = next(iter(layers))
    assert torch.equal(first[name].scale, again[name].scale)
    assert not torch.equal(first[name].scale, other[name].scale)
