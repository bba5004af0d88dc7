"""How a decoder is run: which attention, and with which gradients."""

import pytest
import torch

from libortho.lm.model import PLAIN_ATTENTION, LanguageModel
from libortho.lm.scoring import judged_logits, judged_states
from libortho.text.encoding import IGNORE, Batch, Encoded, collate, predicting

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(tokens: int) -> Batch:
    return collate([Encoded(tuple(range(2, 2 + n)), tuple(range(2, 2 + n))) for n in (tokens, max(3, tokens // 2))])


@pytest.mark.parametrize(
    ("dtype", "tokens", "gradients", "plain"),
    [
        (torch.bfloat16, 20, True, True),
        (torch.bfloat16, PLAIN_ATTENTION, True, True),
        (torch.bfloat16, PLAIN_ATTENTION + 1, True, False),
        (torch.bfloat16, 20, False, False),
        (torch.float32, 20, True, False),
    ],
    ids=str,
)
def test_plain_attention_where_short_bf16_sequences_are_trained(tiny_llama, dtype, tokens, gradients, plain):
    lm, seen = LanguageModel(tiny_llama.to(dtype)), []
    lm.decoder.register_forward_pre_hook(lambda *_: seen.append(not torch.backends.cuda.flash_sdp_enabled()))
    with torch.set_grad_enabled(gradients):
        lm.hidden(Batch(*(t % 120 for t in vars(batch(tokens)).values())))
    assert seen == [plain]
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_its_gradients_are_those_of_the_other_attention(request, family, monkeypatch):
    model = request.getfixturevalue(family).bfloat16()
    weight = next(p for n, p in model.named_parameters() if "attn" in n)
    found = {}
    for limit in (0, PLAIN_ATTENTION):
        monkeypatch.setattr("libortho.lm.model.PLAIN_ATTENTION", limit)
        logits, labels, _ = judged_logits(LanguageModel(model), batch(24))
        [found[limit]] = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), weight)
    apart = (found[0] - found[PLAIN_ATTENTION]).float().norm() / found[0].float().norm()
    assert float(apart) < 0.02


def test_states_are_those_that_predict_judged_tokens_whatever_the_batches(tiny_llama):
    lm = LanguageModel(tiny_llama)
    items = [Encoded(tuple(range(2, n)), (IGNORE, IGNORE, *range(4, n))) for n in (9, 30, 6, 17)]
    whole, alone = judged_states(lm, items), judged_states(lm, items, 1)
    for item, one, other in zip(items, whole, alone, strict=True):
        with torch.no_grad():
            expected = lm.hidden(collate([item]))[0, list(predicting(item))]
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
