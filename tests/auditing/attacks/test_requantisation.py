import copy
import statistics

import pytest
import torch
from torch import nn

from libortho.auditing.attacks import requantisation
from libortho.auditing.attacks.measuring import measure
from libortho.auditing.attacks.requantisation import FORMATS, NF4, integer, nf4
from libortho.core.errors import ConfigError
from libortho.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nf4_codebook_is_made_of_normal_quantiles():
    quantile = statistics.NormalDist().inv_cdf
    offset = 0.9677083
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = sorted(v / max(positive) for v in [*positive, 0.0, *negative])
    assert len(NF4) == 16
    assert {-1.0, 0.0, 1.0} < set(NF4)
    assert pytest.approx(expected, abs=1e-6) == NF4


def test_nf4_maps_every_weight_to_the_nearest_codebook_value():
    weight = torch.randn(5, 48)  # 240 weights: three whole blocks and a part
    weight[0, :10] = 0
    flat, rounded = weight.flatten().tolist(), nf4(weight).flatten().tolist()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        top = max(abs(w) for w in block)
        nearest = [min((v * top for v in NF4), key=lambda v: abs(v - w)) for w in block]
        assert rounded[start : start + 64] == pytest.approx(nearest, abs=1e-6)
    assert not nf4(torch.zeros(2, 64)).any()


@pytest.mark.parametrize(("bits", "group", "levels"), [(8, -1, 255), (4, 32, 15), (3, 32, 7)])
def test_integer_grids_have_their_levels_and_their_groups(bits, group, levels):
    weight = torch.randn(6, 80)  # two whole groups and half of one
    rounded = integer(weight, bits, group)
    assert rounded.shape == weight.shape
    for row, original in zip(rounded, weight, strict=True):
        for part, own in zip(
            row.split(80 if group == -1 else group), original.split(80 if group == -1 else group), strict=True
        ):
            found = part.unique()
            assert 2 < len(found) <= levels
            step = found.diff().min()
            assert torch.allclose(part / step, (part / step).round(), atol=1e-3)
            if bits != 4:  # INT4 may clip the largest weight
                assert float((part - own).abs().max()) <= own.abs().max() / (2 ** (bits - 1) - 1) / 2 * 1.001
    assert (rounded - weight).norm() < (integer(weight, bits - 1, group) - weight).norm()


def test_rounding_to_the_grid_that_the_base_is_on_changes_almost_nothing(audited, asked, unchanged):
    found = requantisation.run(asked(audited[:1]))
    rows = {r["format"]: r for r in found}
    assert list(rows) == ["as stored", "int8", "int4", "nf4", "int3"]
    nll = {n: r["nll"] for n, r in rows.items()}
    assert nll["int8"] == pytest.approx(nll["as stored"], abs=0.05)
    assert abs(nll["int3"] - nll["as stored"]) > 3 * abs(nll["int8"] - nll["as stored"])
    assert len(set(nll.values())) == 5
    assert found == requantisation.run(asked(audited[:1]))
    keys = {"format", "extraction", "nll", "perplexity", "reference_nll", "reference_extraction"}
    assert [set(r) for r in found] == [keys] * 5
    assert {r["reference_nll"] for r in found} == {None}


def test_requantisation_rounds_every_layer_and_not_the_head(planted, alone, asked, forget, general):
    stored, rounded = requantisation.run(asked(alone(planted)), ["nf4"])
    by_hand = copy.deepcopy(planted)
    with torch.no_grad():
        for module in by_hand.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(FORMATS["nf4"](module.weight))
    assert measure(LanguageModel(by_hand), forget, general).items() <= rounded.items()
    assert rounded["nll"] != stored["nll"]
    with pytest.raises(ConfigError, match="int8, int4, nf4, int3"):
        requantisation.run(asked(alone(planted)), ["fp4"])
