"""What earlier requests left in a model, and how a new one leaves it alone.

    base'       = base, edited once more on a support that no earlier stream has
    new stream  = base - base' on that support
    original    = the model with all earlier streams at alpha = 0: what is public before the new request

Off the new support the codes stay as they are, and scales stay everywhere: nothing is quantised a second time. So each
stream still restores what it took, whichever others are on.
"""

from __future__ import annotations

from torch import nn

from libortho.core.errors import ConfigError, TargetError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.streams.base import check_shape
from libortho.core.switch.alpha import Switch
from libortho.isolation.config import IsolateConfig


def earlier_switch(model: nn.Module, config: IsolateConfig) -> Switch | None:
    """The switch of a model that is split already, after a look whether ``config`` fits; None for a dense model.

    Raises:
        ConfigError: if the stream exists, or if ``config`` asks for another base than the model has.
        TargetError: if parts of the model were split apart.
    """
    layers = ortho_layers(model)
    switches = {id(m.switch): m.switch for m in layers.values()}
    if len(switches) > 1:
        raise TargetError(f"{len(switches)} parts of this model were split apart; start from the original model")
    existing = sorted({n for m in layers.values() for n in (*m.switch.streams, *m.streams)})
    if config.stream in existing:
        raise ConfigError(f"stream {config.stream!r} exists already; streams are {existing}, give another name")
    for name, layer in layers.items():
        _check_base(name, layer, config)
    return next(iter(switches.values()), None)


def _check_base(name: str, layer: OrthoLinear, config: IsolateConfig) -> None:
    size, base = config.resolved_group_size, layer.base
    check_shape(layer.in_features, config.bits, size)
    wanted = None if config.bits is None else layer.in_features if size == -1 else size
    found = None if base.bits is None else base.group_size
    if (base.bits, found) != (config.bits, wanted):
        raise ConfigError(
            f"{name} has a base of bits {base.bits} with {found} inputs per scale, the configuration asks for bits "
            f"{config.bits} with {wanted}; a base is never quantised again: give the bits and group_size that it has"
        )
