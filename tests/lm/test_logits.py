"""Losses against formulas written out by hand, and the property that each was chosen for."""

import math

import pytest
import torch
import torch.nn.functional as F

from libortho.isolation.losses import altpo, grad_diff, log_odds, npo, profile_distance, simnpo
from libortho.lm.logits import (
    Scores,
    completion_scores,
    kl_divergence,
    label_log_odds,
    profile_and_odds,
    record_means,
    token_profile,
    with_log_probability,
)


def scores(nll: list[float], odds: list[float] | None = None, tokens: list[int] | None = None) -> Scores:
    return Scores(
        torch.tensor(nll, dtype=torch.float64, requires_grad=True),
        torch.tensor(odds or [0.0] * len(nll), dtype=torch.float64, requires_grad=True),
        torch.tensor(tokens or [1] * len(nll), dtype=torch.float64),
    )


def test_log_odds_are_those_of_the_probability():
    logits = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([0, 3, 6, 2, 2])
    p = logits.softmax(-1)[torch.arange(5), labels]
    torch.testing.assert_close(label_log_odds(logits, labels), (p / (1 - p)).log())


@pytest.mark.parametrize("margin", [20.0, 60.0])
def test_the_gradient_of_log_odds_does_not_vanish_on_a_memorised_token(margin):
    """At p close to 1 the gradient of the negative log-likelihood is 1 - p; that of the log-odds stays 1."""
    logits = torch.zeros(1, 10)
    logits[0, 4] = margin
    logits.requires_grad_()
    label = torch.tensor([4])
    [odds] = torch.autograd.grad(label_log_odds(logits, label).sum(), logits)
    [nll] = torch.autograd.grad(F.cross_entropy(logits, label), logits)
    assert odds[0, 4] == pytest.approx(1.0)
    assert abs(nll[0, 4]) < 1e-7


def test_completion_scores_average_over_the_tokens_of_each_record():
    logits = torch.randn(5, 7)
    labels = torch.tensor([1, 2, 3, 4, 5])
    record = torch.tensor([0, 0, 1, 1, 1])
    found = completion_scores(logits, labels, record, 2)
    nll = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found.nll, torch.stack([nll[:2].mean(), nll[2:].mean()]))
    odds = label_log_odds(logits, labels)
    torch.testing.assert_close(found.odds, torch.stack([odds[:2].mean(), odds[2:].mean()]))
    assert found.tokens.tolist() == [2, 3]
    torch.testing.assert_close(found.total, -torch.stack([nll[:2].sum(), nll[2:].sum()]))


# -- log-odds matching ------------------------------------------------------------------------------------------------


def test_matching_is_zero_at_the_target():
    target = scores([2.0, 3.0], [-1.0, -2.5])
    assert log_odds(target, target).tolist() == [0.0, 0.0]


def test_matching_is_huber_in_likelihood_and_in_excess_odds():
    secret, target = scores([0.5, 2.4, 6.0], [1.7, -1.6, -5.0]), scores([2.0, 2.0, 2.0], [-1.0, -2.0, -2.0])
    expected = [
        (1.5 - 0.5) + (2.7 - 0.5),  # both far: |d| - 1/2
        0.4**2 / 2 + 0.4**2 / 2,  # both near: d^2 / 2
        (4.0 - 0.5) + 0.0,  # unlikelier than its target: odds do not count
    ]
    torch.testing.assert_close(log_odds(secret, target), torch.tensor(expected, dtype=torch.float64))


def test_matching_pushes_from_both_sides():
    target = scores([2.0], [-1.0])
    for nll, odds, direction in ((0.1, 2.0, -1), (5.0, -5.0, 1)):
        secret = scores([nll], [odds])
        log_odds(secret, target).sum().backward()
        # A descent step moves against the gradient: remembered secrets must rise in nll, over-forgotten ones fall.
        assert math.copysign(1, secret.nll.grad.item()) == direction
    assert secret.odds.grad.item() == 0.0


def test_matching_pushes_a_memorised_record_with_full_force():
    """At p = 1 - 1e-9, where the likelihood term alone has no gradient in the logits."""
    logits = torch.zeros(1, 10)
    logits[0, 4] = 25.0
    logits.requires_grad_()
    secret = completion_scores(logits, torch.tensor([4]), torch.tensor([0]), 1)
    log_odds(secret, scores([2.0], [-2.0])).sum().backward()
    assert logits.grad[0, 4] == pytest.approx(1.0, abs=1e-3)


# -- token by token ---------------------------------------------------------------------------------------------------


def test_a_profile_is_surprise_entropy_and_standardised_surprise():
    logits, labels = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 8, 3, 3])
    found = token_profile(logits, labels)
    own = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found[:, 0], -own.log_prob(labels))
    torch.testing.assert_close(found[:, 1], own.entropy())
    for row, logit in zip(found, logits, strict=True):
        p = logit.softmax(-1)
        variance = sum(float(x) * (math.log(float(x)) + float(row[1])) ** 2 for x in p)
        z = float(row[0] - row[1]) / math.sqrt(variance)
        root = math.sqrt(1 + abs(z)) - 1
        assert float(row[2]) == pytest.approx(math.copysign(2 * root, z), rel=0.05)  # the deviation is a little more


def distance(logits: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return profile_distance(*profile_and_odds(logits, labels), wanted)


def test_a_record_that_has_its_profile_is_left_alone_and_any_other_is_not():
    logits, labels = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 8, 3, 3])
    record, wanted = torch.tensor([0, 0, 1, 1]), token_profile(logits, labels)
    assert record_means(distance(logits, labels, wanted), record, 2).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    for column in range(3):
        other = wanted.clone()
        other[2, column] += 0.5
        first, second = record_means(distance(logits, labels, other), record, 2).tolist()
        assert first == pytest.approx(0.0, abs=1e-9)
        assert second > 0.01


def test_tokens_that_are_wrong_in_opposite_directions_do_not_cancel():
    """What the mean over a record's tokens cannot see, and Min-K % does."""
    logits, labels = torch.zeros(2, 9, dtype=torch.float64), torch.tensor([1, 1])
    wanted = token_profile(logits, labels)
    logits[0, 1], logits[1, 1] = 3.0, -1.9
    mean = completion_scores(logits.float(), labels, torch.tensor([0, 0]), 1).nll
    assert float(mean[0]) == pytest.approx(math.log(9), abs=0.2)
    assert float(distance(logits, labels, wanted).mean()) > 0.8


def test_a_memorised_token_still_has_a_gradient_under_profile_distance():
    logits = torch.zeros(1, 10)
    logits[0, 4] = 60.0
    logits.requires_grad_()
    wanted = token_profile(torch.zeros(1, 10), torch.tensor([4]))
    [gradient] = torch.autograd.grad(distance(logits, torch.tensor([4]), wanted).sum(), logits)
    assert gradient[0, 4] == pytest.approx(1.0, abs=1e-3)


def test_a_probability_is_set_and_the_proportions_of_the_others_stay():
    logits, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([2, 0, 5])
    wanted = torch.tensor([-0.01, -2.0, -9.0], dtype=torch.float64)
    found = with_log_probability(logits, labels, wanted).log_softmax(-1)
    torch.testing.assert_close(found.gather(1, labels[:, None])[:, 0], wanted)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, labels[:, None], False)
    shift = (found - logits)[others].view(3, 5)
    torch.testing.assert_close(shift, shift[:, :1].expand(3, 5))


# -- the field's objectives -------------------------------------------------------------------------------------------


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


# -- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_torch():
    a, b = torch.randn(6, 9), torch.randn(6, 9)
    expected = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    found = kl_divergence(a, b)
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()


def test_divergence_of_equals_is_zero_and_not_below():
    a = 30 * torch.randn(50, 200)
    found = kl_divergence(a, a + 3.0)  # logits are defined up to a constant
    assert found.abs().max() < 1e-5


def test_divergence_has_a_direction():
    certain, flat = torch.tensor([[9.0, 0.0]]), torch.zeros(1, 2)
    assert kl_divergence(flat, certain).item() > 2 * kl_divergence(certain, flat).item()


def test_a_sure_token_still_has_a_gradient_towards_doubt():
    """With the label's own surprise right, only entropy and deviation are off, and the model is all but sure."""
    logits = torch.zeros(1, 10)
    logits[0, 7] = 12.0  # sure of another token than the label
    logits.requires_grad_()
    wanted = token_profile(logits.detach(), torch.tensor([4]))
    wanted[0, 1:] = torch.tensor([1.0, 1.0])
    loss = distance(logits, torch.tensor([4]), wanted)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    entropy = token_profile(logits, torch.tensor([4]))[0, 1]
    (plain,) = torch.autograd.grad(entropy, logits)
    assert float(found[0, 7]) > 0  # downhill is less of the token that it is sure of
    assert float(found.norm()) > 10 * float(plain.norm())
