"""How long phases take."""

import pytest

from libortho.core import progress
from libortho.core.progress import Stopwatch


def test_a_phase_within_another_counts_for_itself_alone(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 10.0, 20.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    watch = Stopwatch()
    with watch.phase("outer"), watch.phase("inner"):
        pass
    with pytest.raises(KeyError), watch.phase("inner"):
        raise KeyError
    assert watch.seconds == {"inner": 3.0 + 2.0, "outer": 10.0 - 3.0}
