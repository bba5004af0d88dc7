import pytest

from libortho.auditing.attacks import pruning, requantisation
from libortho.auditing.attacks.measuring import measure
from libortho.auditing.attacks.perturbation import decoder_weights
from libortho.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_linear_layer_but_the_head_is_attacked(tiny_llama, tiny_gpt2):
    names = decoder_weights(tiny_llama)
    assert len(names) == 2 * 7
    assert not any("lm_head" in n or "embed" in n for n in names)
    weights = decoder_weights(tiny_gpt2)
    assert weights["h.0.mlp.c_fc"].shape == (128, 64)  # (out, in), although GPT-2 stores the transpose
    weights["h.0.mlp.c_fc"].zero_()
    assert not tiny_gpt2.transformer.h[0].mlp.c_fc.weight.any()


def test_the_reference_is_damaged_in_the_same_way(audited, clean, alone, asked, forget):
    for run, changes in ((requantisation.run, ["int3"]), (pruning.run, [0.9])):
        rows = run(asked(audited), changes)
        for figure in ("nll", "extraction"):
            other = [r[f"reference_{figure}"] for r in rows]
            assert other == [r[figure] for r in run(asked(alone(clean)), changes)]
        assert rows[0]["reference_nll"] == measure(LanguageModel(clean), forget)["nll"] != rows[1]["reference_nll"]
