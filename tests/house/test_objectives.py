"""Losses of the peers against formulas written out by hand, and the property that each was chosen for."""

import math
import sys
from pathlib import Path

import pytest
import torch

from libortho.lm.logits import Scores

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from objectives import altpo, grad_diff, npo, simnpo


def scores(nll: list[float], tokens: list[int] | None = None) -> Scores:
    return Scores(
        torch.tensor(nll, dtype=torch.float64, requires_grad=True),
        torch.tensor(tokens or [1] * len(nll), dtype=torch.float64),
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_grad_diff_ascends_the_likelihood():
    assert grad_diff(scores([0.3, 2.0])).tolist() == [-0.3, -2.0]


def test_npo():
    # Sums of log-likelihoods: -0.2 * 5 = -1 against -0.1 * 5 = -0.5 before.
    secret, before = scores([0.2], tokens=[5]), scores([0.1], tokens=[5])
    expected = -(2 / 0.1) * log_sigmoid(-0.1 * (-1.0 - -0.5))
    assert npo(secret, before).item() == pytest.approx(expected)


def test_simnpo():
    expected = -(2 / 3.5) * log_sigmoid(3.5 * (0.4 - 1.5))
    assert simnpo(scores([0.4], tokens=[7]), delta=1.5).item() == pytest.approx(expected)


def test_altpo():
    secret, before = scores([0.2], tokens=[5]), scores([0.1], tokens=[5])
    other, other_before = scores([2.0], tokens=[4]), scores([3.0], tokens=[4])
    margin = (-8.0 - -12.0) - (-1.0 - -0.5)
    expected = -(2 / 0.1) * log_sigmoid(0.1 * margin)
    assert altpo(secret, before, other, other_before).item() == pytest.approx(expected)


def test_altpo_prefers_the_alternate():
    secret, other = scores([0.2], tokens=[5]), scores([2.0], tokens=[4])
    constant = scores([1.0], tokens=[4])
    altpo(secret, constant, other, constant).sum().backward()
    assert secret.nll.grad.item() < 0 < other.nll.grad.item()


@pytest.mark.parametrize(
    "loss", [grad_diff, lambda s: npo(s, scores([0.1])), simnpo], ids=["grad_diff", "npo", "simnpo"]
)
def test_every_objective_makes_the_record_less_likely(loss):
    secret = scores([0.2])
    loss(secret).sum().backward()
    assert secret.nll.grad.item() < 0


def test_npo_and_simnpo_let_go_of_what_is_forgotten():
    """Their gradient fades, where gradient ascent keeps pushing for ever."""
    for loss, nll in ((lambda s: npo(s, scores([0.1])), 200.0), (simnpo, 20.0)):
        secret = scores([nll])
        loss(secret).sum().backward()
        assert abs(secret.nll.grad.item()) < 1e-6
