import pytest
import torch

from libortho.auditing.attacks import ATTACKS, noise, recovery
from libortho.auditing.attacks.measuring import support_weight
from libortho.auditing.attacks.noise import gaussian
from libortho.core.errors import TargetError
from libortho.core.layer import ortho_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_noise_has_the_norm_it_is_given_and_stays_in_its_place():
    places = torch.zeros(30, 40, dtype=torch.bool)
    places[:, [3, 7]] = True
    drawn = gaussian(places, 2.5, torch.Generator().manual_seed(0))
    assert float(drawn.norm()) == pytest.approx(2.5)
    assert not drawn[~places].any()
    assert drawn[places].all()
    anywhere = gaussian(torch.ones_like(places), 2.5, torch.Generator().manual_seed(0))
    assert float(anywhere.norm()) == pytest.approx(2.5)
    assert anywhere.all()


def test_noise_where_the_memory_sits_hurts_more(audited, asked, isolated, unchanged):
    for layer in ortho_layers(isolated).values():
        part = layer.dense_weight(1.0) - layer.dense_weight(0.0)
        assert torch.allclose(support_weight(layer), part, atol=1e-6)
    found = noise.run(asked(audited), [1.0])
    levels = {(r["where"], r["scale"]): (r["extraction"], r["nll"]) for r in found}
    assert list(levels) == [("ortho", 0.0), ("ortho", 1.0), ("base", 0.0), ("base", 1.0)]
    assert levels["ortho", 0.0] == levels["base", 0.0]
    assert levels["ortho", 0.0][0] == 1.0
    assert levels["ortho", 1.0][1] > levels["base", 1.0][1] > levels["base", 0.0][1]
    assert found == noise.run(asked(audited), [1.0]) != noise.run(asked(audited, seed=1), [1.0])


def test_attacks_on_the_stream_need_a_stream(clean, alone, audited, asked):
    without = asked(alone(clean))
    assert [a.name for a in ATTACKS if not a.applies(without)] == ["noise", "recovery"]
    assert all(a.applies(asked(audited)) for a in ATTACKS)
    with pytest.raises(TargetError, match="no layer with a column or sparse"):
        noise.run(without)
    with pytest.raises(TargetError, match="no layer with a column or sparse"):
        recovery.run(without)
