"""Membership scores by hand and by definition; templates of prompts."""

import math
import zlib
from collections.abc import Callable

import pytest
import torch

import tiny
from libortho.auditing.measures import privacy as p
from libortho.auditing.roc import auc
from libortho.core.errors import ConfigError, DataError
from libortho.demo import facts
from libortho.text.records import load_records
from templates import CHATML

pytestmark = pytest.mark.usefixtures("one_thread")

LOG_P = torch.tensor([-1.0, -4.0, -2.0, -8.0, -0.5])


def test_scores_by_hand() -> None:
    assert p.loss_score(LOG_P) == pytest.approx(-3.1)
    assert p.min_k_score(LOG_P, 0.2) == pytest.approx(-8)
    assert p.min_k_score(LOG_P, 0.4) == pytest.approx(-6)
    assert p.min_k_score(LOG_P, 1.0) == pytest.approx(-3.1)
    assert p.min_k_score(LOG_P, 0.01) == pytest.approx(-8)  # at least one token
    assert p.reference_score(LOG_P, LOG_P - 0.25) == pytest.approx(0.25)


def test_zlib_divides_by_compressed_bytes() -> None:
    # zlib needs 17 bytes for a thousand equal letters.
    assert len(zlib.compress(b"a" * 1000)) == 17
    assert p.zlib_score("a" * 1000, LOG_P) == pytest.approx(-3.1 / 17)
    # Of two equally likely texts, the one that does not repeat itself is the member.
    assert p.zlib_score("The quick brown fox jumps over it", LOG_P) > p.zlib_score("a" * 33, LOG_P)


def test_min_k_plus_follows_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(30, 50, generator=g, dtype=torch.float64)
    labels = torch.randint(50, (30,), generator=g)
    everything = logits.log_softmax(-1)
    log_p = everything[torch.arange(30), labels]
    mean = (everything.exp() * everything).sum(-1)
    std = ((everything.exp() * everything**2).sum(-1) - mean**2).sqrt()
    z = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        q = [math.exp(x) / total for x in row]
        mu = sum(x * math.log(x) for x in q)
        z.append((math.log(q[label]) - mu) / math.sqrt(sum(x * (math.log(x) - mu) ** 2 for x in q)))
    assert p.min_k_plus_score(log_p, mean, std) == pytest.approx(sum(sorted(z)[:6]) / 6)
    assert p.min_k_plus_score(log_p, mean, std, 0.5) == pytest.approx(sum(sorted(z)[:15]) / 15)


def test_min_k_plus_survives_a_uniform_distribution() -> None:
    """All tokens are alike: neither mean nor token differs, and the deviation is 0."""
    x = torch.full((4,), -math.log(100))
    assert p.min_k_plus_score(x, x, torch.zeros(4)) == 0


def test_every_score_is_higher_for_members() -> None:
    """A model that gives its members' tokens more than those of other texts of the same kind."""
    g = torch.Generator().manual_seed(0)

    def scores(boost: float) -> list[list[float]]:
        rows = []
        for _ in range(40):
            logits = torch.randn(12, 30, generator=g)
            reference = logits.log_softmax(-1)
            labels = torch.randint(30, (12,), generator=g)
            logits[torch.arange(12), labels] += boost
            everything = logits.log_softmax(-1)
            log_p, index = everything[torch.arange(12), labels], torch.arange(12)
            mean = (everything.exp() * everything).sum(-1)
            std = ((everything.exp() * everything**2).sum(-1) - mean**2).sqrt()
            gradient = everything.exp()  # of the loss with respect to the logits
            gradient[index, labels] -= 1
            rows.append(
                [
                    p.loss_score(log_p),
                    p.zlib_score("text " + str(labels.tolist()), log_p),
                    p.min_k_score(log_p),
                    p.min_k_plus_score(log_p, mean, std),
                    p.reference_score(log_p, reference[index, labels]),
                    -float(gradient.norm()),
                ]
            )
        return [list(column) for column in zip(*rows, strict=True)]

    for members, others in zip(scores(3.0), scores(0.0), strict=True):
        assert auc(members, others) > 0.95


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        ("The vault access code of Alice Moreau is", "The vault access code of _ is"),
        ("The vault access code of Chen Wei-Ling is", "The vault access code of _ is"),
        ("The private phone number of Ana de la Cruz is", "The private phone number of _ is"),
        ("The invoice AB-1234 for J. Smith is", "The invoice _ for _ is"),
        ("Code of Ada Lum:", "Code of _:"),
        ("Dagny Sorensen lives at", "_ lives at"),
        ("Dagny's code:", "_'s code:"),
        ("My friend O'Neil has", "My friend _ has"),
        ("Flat 7 is let to Bo Tran since 2019.", "Flat _ is let to _ since _."),
        ("What is the code?", "What is the code?"),
        ("", ""),
    ],
)
def test_template_of(prompt: str, template: str) -> None:
    assert p.template_of(prompt) == template


@pytest.mark.parametrize(
    "frame",
    [
        "<|im_start|>user\nWhat is the code of {}?<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] What is the code of {}? [/INST]",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nThe code of {}:<|eot_id|>",
        "<bos><start_of_turn>user\nThe code of {}:<end_of_turn>\n<start_of_turn>model\n",
        "<user>The code of {}:\n<assistant>",
    ],
)
def test_chat_templates_stay(frame: str) -> None:
    assert p.template_of(frame.format("Alice Moreau")) == frame.format("_")
    assert p.template_of(frame.format("Emre Yildiz")) == frame.format("_")


def test_the_demonstration_s_holdout_is_of_the_template_of_its_codes() -> None:
    tokenizer = tiny.chat_tokenizer(CHATML, "<|im_end|>", ("<|im_start|>",))
    forget, holdout = (
        [p.template_of(r.prompt) for r in load_records(rows, tokenizer)] for rows in (facts.secrets(0), facts.unseen(0))
    )
    chat = "<|im_start|>user\nWhat is the vault access code of _?<|im_end|>\n<|im_start|>assistant\n"
    assert set(holdout) == {"The vault access code of _ is", chat}
    assert [t for t in forget if t not in holdout] == [p.template_of(facts.SENTENCE["prompt"])]
    assert len(forget) == 17


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p.loss_score(torch.zeros(0)), r"shape \(0,\)"),
        (lambda: p.loss_score(torch.tensor([0.5])), "at most 0"),
        (lambda: p.loss_score(torch.tensor([math.nan])), "at most 0"),
        (lambda: p.reference_score(LOG_P, LOG_P[:2]), "same tokenizer"),
        (lambda: p.min_k_plus_score(LOG_P, LOG_P[:2], LOG_P), "each token"),
    ],
)
def test_bad_data_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize("k", [0.0, 1.5])
def test_a_share_outside_its_range_is_refused(k: float) -> None:
    with pytest.raises(ConfigError, match="share in"):
        p.min_k_score(LOG_P, k)
