"""What the layers do on texts: saliency against autograd, padding that counts for nothing, memories that are found."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import tiny
from libortho.core.errors import TargetError
from libortho.core.targets import find_targets
from libortho.lm import scoring
from libortho.lm.gradients import tapped_gradients
from libortho.lm.logits import label_log_odds
from libortho.lm.model import LanguageModel
from libortho.selection.budget import allocate, balanced_weights, column_costs, retain_floor
from libortho.selection.readings import drawn_labels, read_layers, summed_odds
from libortho.text.encoding import Batch, Encoded, collate

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(tokenizer) -> list[Encoded]:
    """Of different lengths, each judged in its completion."""
    return tiny.encoded(tokenizer, [*tiny.FORGET[:3], {"prompt": "a much longer prompt, ", "completion": "ok"}])


def dense_gradients(model: nn.Module, layers: dict[str, nn.Module], item: Encoded) -> dict[str, Tensor]:
    """Autograd's gradient of the summed log-odds by each dense weight, (out_features, in_features)."""
    ids, labels = torch.tensor([item.ids]), torch.tensor(item.labels)
    logits = model(input_ids=ids).logits[0, :-1]
    judged = labels[1:] != -100
    odds = label_log_odds(logits[judged], labels[1:][judged]).sum()
    gradients = torch.autograd.grad(odds, [m.weight for m in layers.values()])
    return {n: g if isinstance(m, nn.Linear) else g.T for (n, m), g in zip(layers.items(), gradients, strict=True)}


def tiny_opt(vocabulary: int) -> OPTForCausalLM:
    """Its feed-forward layers are given (records * tokens, features)."""
    config = OPTConfig(
        vocab_size=vocabulary, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, init_std=0.1,
        word_embed_proj_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.fixture(params=["llama", "gpt2", "opt"])
def model(request, planted, tiny_gpt2, tokenizer) -> nn.Module:
    if request.param == "llama":
        return planted
    if request.param == "opt":
        return tiny_opt(len(tokenizer))
    tiny_gpt2.resize_token_embeddings(len(tokenizer))
    return tiny_gpt2.eval()


@pytest.mark.parametrize("targets", ["mlp-out", "all-linear"])
def test_saliency_is_that_of_the_dense_gradients(model, tokenizer, targets):
    layers, items = find_targets(model, targets), texts(tokenizer)
    expected = [dense_gradients(model, layers, i) for i in items]
    model.requires_grad_(False)
    found = read_layers(LanguageModel(model), layers, items, summed_odds).saliency
    assert found.keys() == layers.keys()
    total = torch.tensor([sum(float(g.square().sum()) for g in record.values()) for record in expected])
    for name in layers:
        rows = torch.stack([g[name].square().sum(0) for g in expected]) / total[:, None]
        torch.testing.assert_close(found[name], rows, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(sum(v.sum(1) for v in found.values()), torch.ones(4))


@pytest.mark.parametrize("limit", [1, 30])
def test_parts_of_any_size_and_padding_change_nothing(model, tokenizer, monkeypatch, limit):
    layers, items, lm = find_targets(model, "mlp-out"), texts(tokenizer), LanguageModel(model)
    model.requires_grad_(False)
    together = read_layers(lm, layers, items, summed_odds)
    monkeypatch.setattr(scoring, "TRAINING_TOKENS", limit)
    apart = read_layers(lm, layers, items, summed_odds)
    for name in layers:
        torch.testing.assert_close(apart.saliency[name], together.saliency[name], rtol=1e-3, atol=1e-7)
        for one, other in ((apart.inputs, together.inputs), (apart.gradients, together.gradients)):
            mine, theirs = one[name].float(), other[name].float()
            assert len(mine) == len(theirs) == sum(len(i.ids) for i in items)
            size = float(theirs.square().sum())
            torch.testing.assert_close(mine.T @ mine / size, theirs.T @ theirs / size, rtol=0.02, atol=1e-4)


def test_the_labels_of_text_to_keep_are_drawn_from_the_model(planted, tokenizer):
    """Whatever the text says; and by the seed alone."""
    layers, lm, [item, *_] = find_targets(planted, "mlp-out"), LanguageModel(planted), texts(tokenizer)
    planted.requires_grad_(False)
    other = Encoded(item.ids, tuple(x if x == -100 else 9 for x in item.labels))
    first, same, *drawn = (
        read_layers(lm, layers, [i], drawn_labels(seed)).saliency
        for i, seed in ((item, 0), (other, 0), *((item, seed) for seed in range(1, 6)))
    )
    name = next(iter(layers))
    assert torch.equal(first[name], same[name])
    assert not all(torch.equal(first[name], d[name]) for d in drawn)


def test_a_layer_without_a_row_for_each_token_is_refused_by_name(planted, tokenizer):
    first, down = planted.model.layers[0], planted.model.layers[0].mlp.down_proj
    first.some, first.twice, first.never = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def also(module, args, output):
        first.some(output[:, :3])
        first.twice(first.twice(output))

    down.register_forward_hook(also)
    lm = LanguageModel(planted)
    for name, calls in (("some", r"1 times, to \(1, 3, 64\)"), ("twice", r"2 times, to .*"), ("never", "not at all")):
        with pytest.raises(TargetError, match=rf"{name} is applied {calls}; expected once, to all tokens"):
            lm.check_layers({name: getattr(first, name), "down": down})
    lm.check_layers({"down": down})
    with pytest.raises(TargetError, match="some is applied 1 times"):
        tapped_gradients(lm, {"some": first.some}, collate(texts(tokenizer)))


def test_reading_leaves_no_hook_and_no_gradient(planted, tokenizer):
    layers = find_targets(planted, "mlp-out")
    read_layers(LanguageModel(planted), layers, texts(tokenizer), summed_odds)
    assert all(not m._forward_hooks and not m._backward_hooks for m in planted.modules())
    assert all(p.grad is None for p in planted.parameters())


def plant_in_neurons(model: nn.Module, neurons: dict[str, Tensor], secrets: Batch, tokenizer) -> None:
    """Memorise by training the given MLP neurons only (what they read and what they write), beside other text."""
    trained: list[tuple[nn.Parameter, Tensor]] = []
    model.requires_grad_(False)
    for name, index in neurons.items():
        mlp = model.get_submodule(name.removesuffix(".down_proj"))
        keep = torch.zeros(128)
        keep[index] = 1.0
        trained += [(mlp.gate_proj.weight, keep[:, None]), (mlp.up_proj.weight, keep[:, None])]
        trained += [(mlp.down_proj.weight, keep)]
    for weight, _ in trained:
        weight.requires_grad_(True)
    optimiser = torch.optim.Adam([w for w, _ in trained], lr=2e-2)
    other = tiny.background(tokenizer, seed=5)
    for _ in range(100):
        loss = model(input_ids=secrets.input_ids, attention_mask=secrets.attention_mask, labels=secrets.labels).loss
        if float(loss.detach()) < 0.2:
            break
        text = collate(next(other))
        labels = torch.where(text.attention_mask.bool(), text.input_ids, -100)
        optimiser.zero_grad()
        (loss + model(input_ids=text.input_ids, attention_mask=text.attention_mask, labels=labels).loss).backward()
        for weight, keep in trained:
            weight.grad.mul_(keep)
        optimiser.step()
    assert loss < 0.3, "the memory was not planted"
    model.requires_grad_(False)


def test_planted_neurons_are_found(planted, tokenizer):
    """Two new secrets live in 8 known neurons of 256; the 8 columns with the best score hit far more than chance."""
    rows = [
        {"prompt": "Code of Ed Wynn:", "completion": " 2938."},
        {"prompt": "Badge of Zed Quick:", "completion": " 7715."},
    ]
    secrets, texts = tiny.encoded(tokenizer, rows), tiny.encoded(tokenizer, tiny.RETAIN)
    hits = 0
    for seed in (1, 2, 3):
        model = copy.deepcopy(planted)
        layers = find_targets(model, "mlp-out")
        generator = torch.Generator().manual_seed(seed)
        true = {n: torch.randperm(128, generator=generator)[:4] for n in layers}
        plant_in_neurons(model, true, collate(secrets), tokenizer)
        forget = read_layers(LanguageModel(model), layers, secrets, summed_odds).saliency
        kept = read_layers(LanguageModel(model), layers, texts, summed_odds).saliency
        floor = retain_floor({n: s.sum(0) for n, s in kept.items()})
        weights = balanced_weights(torch.cat([forget[n] / floor[n] for n in layers], 1), 8)
        scores = {n: weights @ forget[n] / floor[n] for n in layers}
        found = allocate(scores, 8 / 256, 4.0, column_costs(layers))
        hits += sum(len(set(found[n].tolist()) & set(true[n].tolist())) for n in found)
    # Chance expects 0.75 hits in three draws of 8 columns, and gives 5 once in a thousand times.
    assert hits >= 5
