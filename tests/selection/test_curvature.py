"""Moves that are long where text to keep does not notice them."""

import pytest
import torch
from torch import Tensor, nn

import tiny
from libortho.core.surgery import linear_weight
from libortho.core.targets import find_targets
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states
from libortho.selection.curvature import KroneckerPreconditioner, preconditioners
from libortho.selection.readings import Readings, drawn_labels, read_layers
from libortho.text.encoding import Encoded
from libortho.training.keep import divergence

pytestmark = pytest.mark.usefixtures("one_thread")


def factors() -> tuple[Tensor, Tensor]:
    """The second of rank 3, as of few tokens."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 4), torch.randn(6, 3)
    return a @ a.T, b @ b.T


def damped(factor: Tensor, damping: float) -> Tensor:
    return factor + damping * factor.trace() / len(factor) * torch.eye(len(factor))


def test_a_whitened_gradient_is_as_long_as_the_gradient_is_in_the_metric():
    inputs, outputs = factors()
    metric, g = KroneckerPreconditioner.of(inputs, outputs, 0.1), torch.randn(4, 6)
    full = torch.kron(damped(inputs, 0.1), damped(outputs, 0.1))
    expected = g.flatten() @ torch.linalg.solve(full, g.flatten())
    torch.testing.assert_close(metric.whitened(g).square().sum(), expected, rtol=1e-4, atol=1e-6)
    natural = metric.unwhitened(metric.whitened(g))
    torch.testing.assert_close(full @ natural.flatten(), g.flatten(), rtol=1e-3, atol=1e-4)


def test_a_whitened_move_is_a_move_to_whitened_gradients():
    metric = KroneckerPreconditioner.of(*factors(), 0.1)
    several, move = torch.randn(5, 4, 6), torch.randn(4, 6)
    whitened = (metric.whitened(several) * move).sum((1, 2))
    torch.testing.assert_close(whitened, (several * metric.unwhitened(move)).sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_a_move_is_whitened_by_the_inverse_of_what_takes_it_back():
    metric, move = KroneckerPreconditioner.of(*factors(), 0.1), torch.randn(4, 6)
    torch.testing.assert_close(metric.unwhitened(metric.whitened_move(move)), move, rtol=1e-4, atol=1e-4)


def test_far_above_one_the_damping_makes_all_directions_alike():
    inputs, outputs = torch.tensor([1.0, 9.0]).diag(), torch.tensor([4.0, 0.0, 2.0]).diag()
    alike = KroneckerPreconditioner.of(inputs, outputs, 1e6).scale
    torch.testing.assert_close(alike / alike.mean(), torch.ones(2, 3))
    apart = KroneckerPreconditioner.of(inputs, outputs, 0.01).scale
    assert float(apart.max() / apart.min()) > 30


def test_each_kind_of_text_counts_by_the_mean_over_its_tokens():
    torch.manual_seed(0)
    x, g = torch.randn(40, 7).bfloat16(), torch.randn(40, 5).bfloat16()
    index = torch.tensor([1, 4])

    def metric(*kinds: tuple[Tensor, Tensor]) -> KroneckerPreconditioner:
        kept = [Readings({}, {"l": a}, {"l": b}) for a, b in kinds]
        return preconditioners(kept, {"l": index}, 0.1)["l"]

    found = metric((x, g), (3 * x[:9], g[:9]))
    again = metric((torch.cat([x, x]), torch.cat([g, g])), (3 * x[:9], g[:9]))
    probe = torch.randn(2, 5)
    torch.testing.assert_close(
        found.unwhitened(found.whitened(probe)), again.unwhitened(again.whitened(probe)), rtol=1e-3, atol=1e-5
    )
    many, few = x.float()[:, index], 3 * x[:9].float()[:, index]
    inputs = many.T @ many / 40 + few.T @ few / 9
    outputs = g.float().T @ g.float() / 40 + g[:9].float().T @ g[:9].float() / 9
    full = torch.kron(damped(inputs, 0.1), damped(outputs, 0.1))
    expected = probe.flatten() @ torch.linalg.solve(full, probe.flatten())
    torch.testing.assert_close(found.whitened(probe).square().sum(), expected, rtol=0.02, atol=1e-5)


def test_a_move_in_the_metric_moves_text_to_keep_less_than_an_equally_long_one(planted, tokenizer):
    model = planted.requires_grad_(False)
    lm = LanguageModel(model)
    layers = find_targets(model, "mlp-out")
    support = {n: torch.arange(0, linear_weight(m).shape[1], 3) for n, m in layers.items()}
    items = [Encoded(tuple(t), tuple(t)) for t in tokenizer([r["text"] for r in tiny.RETAIN[:24]])["input_ids"]]
    read, judged = items[:12], items[12:]
    metrics = preconditioners([read_layers(lm, layers, read, drawn_labels(0))], support, 0.1)
    assert set(metrics) == set(support)
    before = judged_states(lm, judged)

    def moved(name: str, move: Tensor) -> float:
        module: nn.Module = layers[name]
        weight, kept = linear_weight(module), linear_weight(module).clone()
        weight[:, support[name]] += (0.3 * kept.norm() / move.norm() * move).T
        found = divergence(lm, judged, before)
        weight.copy_(kept)
        return found

    torch.manual_seed(0)
    for name, metric in metrics.items():
        noise = torch.randn(len(support[name]), linear_weight(layers[name]).shape[0])
        assert 0 < moved(name, metric.unwhitened(metric.whitened(noise))) < 0.5 * moved(name, noise)
