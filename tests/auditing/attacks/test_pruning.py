import pytest
import torch

from libortho.auditing.attacks import pruning
from libortho.auditing.attacks.measuring import measure
from libortho.auditing.attacks.perturbation import decoder_weights
from libortho.auditing.attacks.pruning import pruned
from libortho.auditing.subjects import dense_copy
from libortho.core.errors import DataError
from libortho.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
def test_pruning_zeroes_exactly_the_smallest_share(share):
    weight = torch.randint(1, 20, (20, 30)).float() * torch.randn(20, 30).sign()  # many ties, no zero
    after = pruned(weight, share)
    gone = after == 0
    assert int(gone.sum()) == round(share * 600)
    assert torch.equal(after[~gone], weight[~gone])
    if 0 < share < 1:
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


def test_pruning_measures_the_pruned_model(audited, asked, forget, general, unchanged):
    stored, row = pruning.run(asked(audited[:1]), [0.9])
    copied = dense_copy(audited[0])
    for weight in decoder_weights(copied).values():
        weight.copy_(pruned(weight, 0.9))
    assert (stored["share"], row["share"]) == (0.0, 0.9)
    assert measure(LanguageModel(copied), forget, general).items() <= row.items()
    assert row["perplexity"] > stored["perplexity"]
    with pytest.raises(DataError, match="fractions"):
        pruning.run(asked(audited[:1]), [50])
