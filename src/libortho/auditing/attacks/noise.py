"""Noise of equal norm in the ortho values or in the base: where does the memory sit?

    ortho    W + N on the support       base    W + N anywhere in the layer       ||N||_F = scale * ||W_ortho||_F

per layer, at alpha = 1, N Gaussian. If the memory sits in the ortho stream, noise there ends extraction at a scale at
which the same norm in the base does little. Do not expect it at scale 1: the edit has one direction on purpose, and
noise of its norm points everywhere; on SmolLM2-135M extraction fell at scales of 3 to 10. Where inputs were isotropic,
both places would disturb the layer's output by the same amount; a support is chosen where the inputs are large, so
that part of the difference is the choice of columns and not the values in them. The ortho norm is that of the
supports; a low-rank tail is not counted and gets no noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.auditing.attacks.attack import Attack, AttackInputs
from libortho.auditing.attacks.measuring import (
    Level,
    edited_layers,
    general_subset,
    measure,
    measure_subject,
    support_weight,
)
from libortho.auditing.attacks.perturbation import HEADING, damage_table
from libortho.auditing.page.exhibits import Drawn, Exhibit
from libortho.auditing.report import Check
from libortho.auditing.schema import ON
from libortho.auditing.subjects import dense_copy
from libortho.core.layer import touched
from libortho.lm.model import LanguageModel

QUESTION = (
    "Noise asks another question. Where does the memory sit? If in the ortho stream, then noise there undoes it at a "
    "smaller scale than noise of the same norm spread over the base. Scale 1 is the stream\u2019s own norm. Measured "
    "with the switch on."
)


class NoiseRow(Level):
    """Noise in "ortho" or "base" at one scale (its norm / that of the layer's support), and the model at alpha = 1."""

    where: str
    scale: float


def gaussian(places: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of Frobenius norm ``norm`` where ``places`` (out_features, in_features) is True, fp32."""
    drawn = torch.randn(places.shape, generator=generator).to(places.device) * places  # the same on every device
    return drawn * (norm / drawn.norm())


@torch.no_grad()
def run(inputs: AttackInputs, scales: Sequence[float] = (1.0, 3.0, 10.0)) -> list[NoiseRow]:
    """Disturb a split model at alpha = 1 and measure; scale 0 is the undisturbed model.

    Args:
        inputs: The records are those that the ortho stream holds; first tokens of the general text are used.
        scales: Norms, as fractions of each layer's ortho norm.

    Raises:
        TargetError: if the model has no layer with a support.
        DataError: if there are no records.
    """
    layers, subject = edited_layers(inputs.audited.model), inputs.subject(ON)
    assert subject is not None  # whatever has a stream stands under alpha = 1 as well
    text = general_subset(inputs.general)
    clean = measure_subject(subject, inputs.items, text)
    rows: list[NoiseRow] = []
    for place in ("ortho", "base"):
        rows.append({"where": place, "scale": 0.0, **clean})
        for scale in scales:
            generator = torch.Generator().manual_seed(inputs.seed)
            copied = dense_copy(subject)
            for name, layer in layers.items():
                mask = touched(layer)
                drawn = gaussian(
                    mask if place == "ortho" else torch.ones_like(mask),
                    scale * float(support_weight(layer).norm()),
                    generator,
                )
                weight = copied.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                weight.copy_(weight.float() + drawn)
            rows.append({"where": place, "scale": scale, **measure(LanguageModel(copied), inputs.items, text)})
    return rows


def checks(rows: Sequence[NoiseRow]) -> list[Check]:
    """None: noise says where the memory sits, and not whether it is gone."""
    return []


def exhibit(rows: Sequence[NoiseRow], subjects: Sequence[Drawn]) -> Exhibit:
    """A row for each place and scale."""
    names = [f"{r['where']}, {r['scale']:g}" for r in rows]
    table = damage_table("Gaussian noise, with the switch on", "Where, scale", names, rows)
    return Exhibit(HEADING, (QUESTION,), tables=(table,))


ATTACK = Attack("noise", 4, run, checks, exhibit, lambda inputs: inputs.subject(ON) is not None)
