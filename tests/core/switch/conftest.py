"""Models whose switch is tested."""

import pytest
import torch

from libortho.core.layer import ortho_layers
from libortho.core.streams import Columns, OrthoStream
from libortho.core.switch.alpha import get_switch


@pytest.fixture
def two_streams(split_llama):
    """Streams ``default`` and ``hr``."""
    get_switch(split_llama).add_stream("hr", 1.0)
    for layer in ortho_layers(split_llama).values():
        index = torch.arange(8, dtype=torch.int32)
        layer.add_stream("hr", OrthoStream(Columns(index, torch.randn(8, layer.out_features))))
    return split_llama
