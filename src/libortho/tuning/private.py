"""Training with differential privacy: what the stream tells of any one record is bounded.

Each step draws every record with the same probability, clips the gradient of each that was drawn, adds noise to their
sum, and goes down (DP-SGD, arXiv 1607.00133, algorithm 1). Opacus clips, and sets the noise by its accountant of
privacy losses (arXiv 2106.02848); the noise itself comes from a generator with 128 bits of the system's entropy, as
torch's takes 32 bits of a seed on a CPU. Gradients are whitened by the curvature of text to keep, which is no private
data, so that noise falls where such text hardly notices; the divergence of that text is added without noise.

The unit is one record: a fact that stands in one record alone is what such a training does not learn. Columns, text to
keep and the number of steps are chosen without the data. Figures of the result are computed from it without noise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from libortho.core.errors import ConfigError, DataError
from libortho.core.extras import module, require
from libortho.core.progress import Progress, tell
from libortho.lm.gradients import Tapped
from libortho.tuning.config import TuneConfig
from libortho.tuning.equations import TuneEquations
from libortho.tuning.train import State, Training

CLIP = 1.0
"""Largest norm of a record's gradient, of the mean loss in nats, in the metric of text to keep."""
RATE, KEEP = 0.004, 1.0
"""Learning rate of plain gradient descent in that metric, and weight of the divergence of text to keep."""


class _Gradients(TuneEquations):
    """The whitened gradient of each text's divergence, as it is."""

    def _put(self, seen: Tapped, of_states: Tensor, residual: Tensor, scale: Tensor, *, again: bool = False) -> None:
        for name, g in self._gradients(seen, of_states, again=again):
            self.rows[name].append(self._optimiser.whiten(name, g))


MOST_EPSILON = 100.0
"""Above it the bound says nothing, and the accountant finds no end."""


class Budget(NamedTuple):
    """Standard deviation of the noise over the clipping norm, share of the records in a step, and steps."""

    noise: float
    share: float
    steps: int


def check_private(config: TuneConfig, records: int) -> Budget:
    """Refuse what would promise nothing; returns what ``noise_multiplier`` does.

    Raises:
        ConfigError: if epsilon is too small for any noise, or so large that it bounds nothing.
        DataError: if delta is no smaller than a record's share of the data.
        LibOrthoError: if the extra is missing.
    """
    require("dp", "epsilon")
    assert config.delta is not None
    if config.delta >= 1 / records:
        raise DataError(
            f"delta is {config.delta:g} with {records} records; expected less than {1 / records:g}, or a whole record "
            "may be given away within it"
        )
    assert config.epsilon is not None
    if config.epsilon > MOST_EPSILON:
        raise ConfigError(f"epsilon is {config.epsilon:g}; expected at most {MOST_EPSILON:g}: more bounds nothing")
    try:
        return noise_multiplier(config, records)
    except ValueError as error:
        raise ConfigError(
            f"no noise keeps to epsilon {config.epsilon:g} in {config.epochs} epochs of {records} records ({error}); "
            "raise epsilon, or lower epochs"
        ) from error


def noise_multiplier(config: TuneConfig, records: int) -> Budget:
    """The noise that keeps to the bound, by the accountant."""
    share = min(1.0, config.batch_size / records)
    steps = max(1, round(config.epochs / share))
    utils = module("dp", "opacus.accountants.utils")
    found = utils.get_noise_multiplier(
        target_epsilon=config.epsilon, target_delta=config.delta, sample_rate=share, steps=steps, accountant="prv",
        epsilon_tolerance=0.01 * (config.epsilon or 1.0),
    )  # fmt: skip
    return Budget(float(found), share, steps)


def train_privately(training: Training, budget: Budget, progress: Progress | None) -> State:
    """Train for a number of steps that is set before; draws and noise come from the system's entropy, not a seed."""
    state, optimiser = training.state, training.optimiser
    noise, share, steps = budget
    expected = max(1, round(share * len(training.data)))
    chance = np.random.default_rng()
    moves: dict[str, Any] = {n: nn.Parameter(torch.zeros_like(v)) for n, v in optimiser.values.items()}
    private = module("dp", "opacus.optimizers").DPOptimizer(
        torch.optim.SGD(moves.values(), lr=RATE),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=expected,
    )
    supports = {n: m.index for n, m in training.layers.items()}
    while state.step < steps:
        drawn = np.flatnonzero(chance.random(len(training.data)) < share).tolist()
        equations = _Gradients(training.lm, training.layers, supports, optimiser)
        if drawn:
            found = equations.records([training.data[i] for i in drawn])
            state.looks |= dict(zip(drawn, found, strict=True))
        private.zero_grad()
        rows = {n: torch.cat(equations.rows[n]) if drawn else m.new_zeros(0, *m.shape) for n, m in moves.items()}
        sound = torch.stack([r.flatten(1).isfinite().all(1) for r in rows.values()]).all(0)
        for name, move in moves.items():  # a record whose gradient overflows has none, or it would decide the sum
            move.grad_sample = torch.where(sound[:, None, None], rows[name], 0.0)
        private.pre_step()
        for move in moves.values():
            drawn_noise = torch.from_numpy(chance.standard_normal(move.shape, dtype=np.float32)).to(move.device)
            move.grad += drawn_noise * (noise * CLIP / expected)
        kept = _Gradients(training.lm, training.layers, supports, optimiser)
        for texts, _ in training.next_kept():
            kept.kept([training.texts[i] for i in texts], [training.contexts[0].taught[i] for i in texts])
        for name, move in moves.items():
            move.grad += KEEP * torch.cat(kept.rows[name]).mean(0)
        private.original_optimizer.step()
        with torch.no_grad():
            for name, move in moves.items():
                optimiser.values[name].copy_(optimiser.metrics[name].unwhitened(move))
        state.step += 1
        tell(progress, "steps", state.step, steps)
    state.stopped = "private"
    return state
