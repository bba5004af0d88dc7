"""A small model with two streams, each of an owner's codes."""

import copy

import pytest

from libortho import TuneConfig, save, tune
from tiny import HR, LEGAL, RETAIN


@pytest.fixture(scope="package")
def two_streams(_planted, tokenizer):
    """Shared by all: no test changes it."""
    model = copy.deepcopy(_planted)
    for name, data in (("hr", HR), ("legal", LEGAL)):
        config = TuneConfig(ratio=0.25, bits=8, epochs=60)
        result = tune(model, tokenizer, data, name, config, retain=RETAIN[:8])
        assert len(result.recited) == len(data)
    return model


@pytest.fixture(scope="package")
def directory(two_streams, tokenizer, tmp_path_factory):
    """The model, saved."""
    path = tmp_path_factory.mktemp("served") / "model"
    save(two_streams, tokenizer, path)
    return path
