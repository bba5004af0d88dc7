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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libortho.auditing.attacks.measuring import Level, Progress, general_subset, measure, normal_like
from libortho.auditing.subjects import Subject, dense_copy
from libortho.core.errors import TargetError
from libortho.core.layer import OrthoLinear, ortho_layers, touched
from libortho.core.streams import OrthoStream
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded


def support_weight(layer: OrthoLinear) -> Tensor:
    """The supports of all streams of a layer as one dense fp32 weight (out_features, in_features)."""
    weight = torch.zeros(layer.out_features, layer.in_features, device=touched(layer).device)
    for stream in layer.streams.values():
        if isinstance(stream, OrthoStream) and stream.support is not None:
            stream.support.add_to(weight)
    return weight


def edited_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    """The split layers that have any support.

    Raises:
        TargetError: if there is none.
    """
    found = {n: m for n, m in ortho_layers(model).items() if bool(touched(m).any())}
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no layer with a column or sparse ortho stream; this attack needs a model from "
            "libortho.isolate, or from libortho.split with a ratio above 0"
        )
    return found


def gaussian(places: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of Frobenius norm ``norm`` where ``places`` (out_features, in_features) is True, fp32."""
    drawn = normal_like(places, generator) * places
    return drawn * (norm / drawn.norm())


@dataclass(frozen=True)
class NoiseRow:
    """Noise in one place at one scale, and what the model does at alpha = 1.

    Attributes:
        where: "ortho" or "base".
        scale: Norm of the noise / norm of the layer's ortho support.
        level: What was measured.
    """

    where: str
    scale: float
    level: Level


@dataclass(frozen=True)
class Noise:
    """Every place and scale; scale 0 is the undisturbed model."""

    rows: tuple[NoiseRow, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict per row."""
        return [{"where": r.where, "scale": r.scale, **r.level.to_dict()} for r in self.rows]


@torch.no_grad()
def noise(
    subject: Subject,
    forget: Sequence[Encoded],
    general: Sequence[Encoded],
    *,
    seed: int,
    scales: Sequence[float] = (1.0, 3.0, 10.0),
    progress: Progress | None = None,
) -> Noise:
    """Disturb a split model at alpha = 1 and measure.

    Args:
        subject: The split model at alpha = 1; it is not changed.
        forget: The records that the ortho stream holds.
        general: General text for the perplexity; its first tokens are used.
        seed: Seed of the noise.
        scales: Norms, as fractions of each layer's ortho norm.
        progress: Called after every measurement.

    Raises:
        TargetError: if the model has no layer with a support.
        DataError: if ``forget`` is empty.
    """
    layers = edited_layers(subject.model)
    text = general_subset(general)
    with subject.enter():
        clean = measure(subject.language_model(), forget, text)
    rows, done = [], 0
    for place in ("ortho", "base"):
        rows.append(NoiseRow(place, 0.0, clean))
        for scale in scales:
            generator = torch.Generator().manual_seed(seed)
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
            rows.append(NoiseRow(place, scale, measure(LanguageModel(copied), forget, text)))
            done += 1
            if progress is not None:
                progress("noise", done, 2 * len(scales))
    return Noise(tuple(rows))
