"""Statistics of tokens against formulas written out by hand, and the property that each was chosen for."""

import pytest
import torch
import torch.nn.functional as F

from libortho.lm.logits import (
    completion_scores,
    kl_divergence,
    label_log_odds,
    with_log_probability,
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
    assert found.tokens.tolist() == [2, 3]


# -- token by token ---------------------------------------------------------------------------------------------------


def test_a_probability_is_set_and_the_proportions_of_the_others_stay():
    logits, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([2, 0, 5])
    wanted = torch.tensor([-0.01, -2.0, -9.0], dtype=torch.float64)
    found = with_log_probability(logits, labels, wanted).log_softmax(-1)
    torch.testing.assert_close(found.gather(1, labels[:, None])[:, 0], wanted)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, labels[:, None], False)
    shift = (found - logits)[others].view(3, 5)
    torch.testing.assert_close(shift, shift[:, :1].expand(3, 5))


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
