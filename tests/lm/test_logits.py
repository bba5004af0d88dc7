"""Statistics of tokens against formulas written out by hand, and the property that each was chosen for."""

import pytest
import torch
import torch.nn.functional as F

from libortho.lm.logits import (
    completion_scores,
    drawn,
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


# -- drawing ----------------------------------------------------------------------------------------------------------


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """Four standard errors of each share; logits are defined up to a constant."""
    p = torch.tensor([0.02, 0.5, 0.08, 0.3, 0.1])
    count = 50_000
    for shift in (0.0, 40.0):
        found = drawn((p.log() + shift).expand(count, 5), rng(0))
        shares = torch.bincount(found, minlength=5) / count
        assert ((shares - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()


def test_each_row_has_one_draw_of_its_own():
    """Rows of one certain token each give that, in their order; equal rows are drawn apart."""
    certain = torch.tensor([4, 0, 2, 2, 7, 1])
    logits = torch.full((6, 8), -torch.inf).scatter(1, certain[:, None], 0.0)
    assert torch.equal(drawn(logits, rng(0)), certain)
    even = drawn(torch.zeros(64, 8), rng(0))
    assert even.shape == (64,)
    assert even.dtype == torch.long
    assert len(set(even.tolist())) == 8


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_what_has_no_probability_is_never_drawn(monkeypatch, uniform):
    """Whatever the random number: at both ends, in the middle, and where a row's cumulative sum is not quite 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(400, 300, generator=generator)
    impossible = torch.rand(400, 300, generator=generator) < 0.5
    impossible[:, :3] = impossible[:, -3:] = True
    impossible[:, 7] = False
    logits[impossible] = -torch.inf
    ends = logits.softmax(-1).cumsum(-1)[:, -1]
    assert float(ends.min()) < 1 < float(ends.max())
    monkeypatch.setattr(torch, "rand", lambda *size, generator=None: torch.full(size, uniform))
    found = drawn(logits)
    assert not impossible.gather(1, found[:, None]).any()


def test_draws_are_those_of_the_generator():
    """The same for one seed, and of torch's own where none is given; a given one leaves that alone."""
    logits = torch.randn(40, 30)
    first = drawn(logits, rng(1))
    assert torch.equal(first, drawn(logits, rng(1)))
    assert not torch.equal(first, drawn(logits, rng(2)))
    torch.manual_seed(5)
    own = drawn(logits)
    torch.manual_seed(5)
    drawn(logits, rng(1))
    assert torch.equal(drawn(logits), own)


def test_half_precision_is_drawn_from_as_it_is():
    """A sum in half precision would end long before 300 equal tokens do."""
    found = drawn(torch.zeros(20_000, 300, dtype=torch.bfloat16), rng(0))
    assert found.unique().numel() == 300
    assert float(found.float().mean()) == pytest.approx(149.5, abs=3)
