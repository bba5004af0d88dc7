"""A step against the normal equations solved as a whole."""

import pytest
import torch
from torch import Tensor, nn

from libortho.selection.curvature import KroneckerPreconditioner
from libortho.training.gauss_newton import DAMPING, GaussNewton

SHAPES = {"a": (3, 4), "b": (2, 5)}
EQUATIONS = 4


def factor(width: int) -> Tensor:
    found = torch.randn(width, width)
    return found @ found.T + 0.1 * torch.eye(width)


class Problem:
    """Random equations on two layers, and the dense curvature of both."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.factors = {n: (factor(k), factor(out)) for n, (k, out) in SHAPES.items()}
        metrics = {n: KroneckerPreconditioner.of(a, b, 1e-6) for n, (a, b) in self.factors.items()}
        self.start = {n: torch.randn(shape) for n, shape in SHAPES.items()}
        self.values = {n: nn.Parameter(v.clone()) for n, v in self.start.items()}
        self.optimiser = GaussNewton(self.values, metrics)
        self.gradients = {n: torch.randn(EQUATIONS, *shape) for n, shape in SHAPES.items()}
        self.residuals = torch.randn(EQUATIONS)

    def step(
        self, share: float, sizes: tuple[int, ...] = (EQUATIONS,), damping: float = DAMPING, pull: float = 0.0
    ) -> Tensor:
        rows = {n: [self.optimiser.whiten(n, p) for p in g.split(list(sizes))] for n, g in self.gradients.items()}
        self.optimiser.step(rows, self.residuals, share, damping, pull)
        return torch.cat([(self.values[n].detach() - s).flatten() for n, s in self.start.items()])

    def jacobian(self) -> Tensor:
        return torch.cat([g.flatten(1) for g in self.gradients.values()], 1)

    def curvature(self) -> Tensor:
        return torch.block_diag(*(torch.kron(a, b) for a, b in self.factors.values()))


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_a_step_solves_the_normal_equations(share, damping):
    problem = Problem()
    jacobian, curvature = problem.jacobian().double(), problem.curvature().double()
    gram = jacobian @ torch.linalg.solve(curvature, jacobian.T)
    weight = damping * gram.diagonal().mean()
    expected = torch.linalg.solve(
        jacobian.T @ jacobian + weight * curvature, -share * jacobian.T @ problem.residuals.double()
    )
    torch.testing.assert_close(problem.step(share, damping=damping).double(), expected, rtol=1e-3, atol=1e-4)


def test_a_pull_weighs_the_whole_way_from_the_start():
    problem, share, damping, pull = Problem(), 0.7, 0.3, 0.1
    way = problem.step(1.0).double()
    jacobian, curvature = problem.jacobian().double(), problem.curvature().double()
    unit = (jacobian @ torch.linalg.solve(curvature, jacobian.T)).diagonal().mean()
    slope = jacobian.T @ problem.residuals.double() + pull * unit * curvature @ way
    expected = way - share * torch.linalg.solve(jacobian.T @ jacobian + damping * unit * curvature, slope)
    torch.testing.assert_close(problem.step(share, damping=damping, pull=pull).double(), expected, rtol=1e-3, atol=1e-4)


def test_steps_with_a_pull_end_at_the_nearest_values():
    """However they began: of many values with which the equations hold, those of ridge regression."""
    problem, damping = Problem(), 0.2
    with torch.no_grad():
        for value in problem.values.values():
            value.add_(torch.randn_like(value))
    jacobian, curvature = problem.jacobian().double(), problem.curvature().double()
    unit = (jacobian @ torch.linalg.solve(curvature, jacobian.T)).diagonal().mean()
    first = torch.cat([(problem.values[n].detach() - s).flatten() for n, s in problem.start.items()]).double()
    at_start = problem.residuals.double() - jacobian @ first
    expected = torch.linalg.solve(jacobian.T @ jacobian + damping * unit * curvature, -jacobian.T @ at_start)
    found = problem.step(1.0, damping=damping, pull=damping)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_without_damping_a_whole_step_leaves_nothing_of_linear_residuals():
    problem = Problem()
    left = problem.residuals + problem.jacobian() @ problem.step(1.0, damping=1e-7)
    assert float(left.abs().max()) < 1e-3 * float(problem.residuals.abs().max())


def test_parts_of_the_equations_are_the_equations():
    torch.testing.assert_close(Problem().step(0.5, (1, 3)), Problem().step(0.5))


def test_what_text_to_keep_minds_is_left_alone():
    """Both values would do the same for the equation; one is minded a hundred times as much."""
    value = nn.Parameter(torch.zeros(2, 1))
    metric = KroneckerPreconditioner.of(torch.tensor([1.0, 100.0]).diag(), torch.eye(1), 1e-9)
    optimiser = GaussNewton({"l": value}, {"l": metric})
    optimiser.step({"l": [optimiser.whiten("l", torch.ones(1, 2, 1))]}, torch.tensor([1.0]), 1.0)
    free, minded = value.detach().flatten().tolist()
    assert free < -0.8
    assert minded == pytest.approx(free / 100, rel=1e-3)
