"""Where a memory sits: saliency against autograd, budgets that hold, and planted memories that are found."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import tiny
from libortho.core.errors import TargetError
from libortho.core.targets import find_targets
from libortho.lm.gradients import tapped_gradients
from libortho.lm.logits import label_log_odds
from libortho.lm.model import LanguageModel
from libortho.selection.budget import allocate, balanced_weights, column_costs, retain_floor
from libortho.selection.saliency import column_saliency
from libortho.text.encoding import Batch, collate

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(tokenizer, sizes=(3, 1)) -> list[Batch]:
    items = tiny.encoded(tokenizer, [*tiny.FORGET[:3], {"prompt": "a much longer prompt, ", "completion": "ok"}])
    out, start = [], 0
    for size in sizes:
        out.append(collate(items[start : start + size]))
        start += size
    return out


def dense_gradients(model: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> list[dict[str, Tensor]]:
    """Per record: autograd's gradient of its mean log-odds by each dense weight, (out_features, in_features)."""
    found = []
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0, :-1]
        judged = labels[1:] != -100
        odds = label_log_odds(logits[judged], labels[1:][judged]).mean()
        weights = [m.weight for m in layers.values()]
        gradients = torch.autograd.grad(odds, weights)
        found.append(
            {n: g if isinstance(m, nn.Linear) else g.T for (n, m), g in zip(layers.items(), gradients, strict=True)}
        )
    return found


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
def test_column_saliency_is_that_of_the_dense_gradients(model, tokenizer, targets):
    layers = find_targets(model, targets)
    data = batches(tokenizer)
    expected = [g for b in data for g in dense_gradients(model, layers, b)]
    model.requires_grad_(False)
    found = column_saliency(LanguageModel(model), layers, data)
    assert found.keys() == layers.keys()
    total = torch.tensor([sum(float(g.square().sum()) for g in record.values()) for record in expected])
    for name in layers:
        rows = torch.stack([g[name].square().sum(0) for g in expected]) / total[:, None]
        torch.testing.assert_close(found[name], rows, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(sum(v.sum(1) for v in found.values()), torch.ones(4))


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
    data = batches(tokenizer)
    with pytest.raises(TargetError, match="some is applied 1 times"):
        tapped_gradients(lm, {"some": first.some}, data[0])


def test_saliency_leaves_no_hook_and_no_gradient(planted, tokenizer):
    layers = find_targets(planted, "mlp-out")
    planted.requires_grad_(False)
    column_saliency(LanguageModel(planted), layers, batches(tokenizer))
    assert all(not m._forward_hooks and not m._backward_hooks for m in planted.modules())
    assert all(p.grad is None for p in planted.parameters())


# -- budgets ----------------------------------------------------------------------------------------------------------


def scores_of(sizes: dict[str, int]) -> dict[str, Tensor]:
    return {n: torch.rand(s) for n, s in sizes.items()}


@pytest.mark.parametrize("ratio", [0.005, 0.03, 0.2, 1.0])
@pytest.mark.parametrize("cap", [0.5, 1.0, 4.0])
def test_the_budget_and_the_cap_hold(ratio, cap):
    unit = {"a": 64, "b": 48, "c": 100}
    scores = scores_of({"a": 300, "b": 200, "c": 500})
    found = allocate(scores, ratio, cap, unit)
    weights = sum(len(scores[n]) * unit[n] for n in unit)
    assert 0 < sum(len(i) * unit[n] for n, i in found.items()) <= ratio * weights
    for name, index in found.items():
        assert len(index) <= max(1, cap * ratio * len(scores[name]))
        assert index.tolist() == sorted(set(index.tolist()))


def test_the_best_of_all_layers_are_taken():
    scores = {"a": torch.tensor([1.0, 9.0, 2.0, 8.0]), "b": torch.tensor([3.0, 0.0, 7.0, 0.0])}
    found = allocate(scores, 3 / 8, 4.0, {"a": 10, "b": 10})
    assert {n: i.tolist() for n, i in found.items()} == {"a": [1, 3], "b": [2]}


def test_a_layer_with_no_memory_gets_nothing():
    scores = {"a": torch.full((10,), 5.0), "b": torch.zeros(10)}
    assert set(allocate(scores, 0.2, 4.0, {"a": 1, "b": 1})) == {"a"}


def test_the_cap_moves_the_rest_elsewhere():
    scores = {"a": torch.full((10,), 5.0), "b": torch.ones(10)}
    found = allocate(scores, 0.2, 1.0, {"a": 1, "b": 1})
    assert {n: len(i) for n, i in found.items()} == {"a": 2, "b": 2}


def test_entries_are_flat_indices():
    scores = {"a": torch.zeros(3, 4)}
    scores["a"][1, 2] = scores["a"][2, 3] = 1.0
    assert allocate(scores, 2 / 12, 4.0, {"a": 1})["a"].tolist() == [6, 11]


def test_one_column_is_given_even_where_it_exceeds_the_budget():
    assert allocate({"a": torch.tensor([1.0, 2.0])}, 0.001, 4.0, {"a": 64})["a"].tolist() == [1]


def test_the_floor_damps_columns_that_retain_text_uses():
    floor = retain_floor({"a": torch.tensor([0.0, 3.0])})["a"]
    torch.testing.assert_close(floor, torch.tensor([1.5, 4.5]))


def test_units_are_the_rows_of_a_column():
    layers = {"a": nn.Linear(8, 3)}
    assert column_costs(layers) == {"a": 3}


# -- balance ----------------------------------------------------------------------------------------------------------


def test_a_rare_record_gets_its_columns():
    """Nine records share columns 0-3; the tenth sits in 4-5, and plain sums would never choose those."""
    saliency = torch.zeros(10, 20)
    saliency[:9, :4] = torch.tensor([0.3, 0.28, 0.22, 0.2])
    saliency[9, 4:6] = 0.5
    assert sorted(saliency.sum(0).topk(4).indices.tolist()) == [0, 1, 2, 3]
    weights = balanced_weights(saliency, 4)
    assert weights[9] > 2 * weights[0]
    chosen = set((weights @ saliency).topk(4).indices.tolist())
    assert chosen & {4, 5}
    assert chosen & {0, 1}


def test_equal_records_get_equal_weights():
    weights = balanced_weights(torch.eye(6), 3)
    assert weights.sum() == pytest.approx(6.0, rel=0.05)
    same = balanced_weights(torch.rand(1, 30).expand(5, 30), 4)
    torch.testing.assert_close(same, torch.ones(5))


def test_a_record_without_any_gradient_does_no_harm():
    saliency = torch.rand(4, 10)
    saliency[2] = 0.0
    assert torch.isfinite(balanced_weights(saliency, 3) * saliency.sum(1)).all()


# -- ground truth -----------------------------------------------------------------------------------------------------


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
    secrets = collate(tiny.encoded(tokenizer, rows))
    texts = [collate([e]) for e in tiny.encoded(tokenizer, tiny.RETAIN)]
    hits = 0
    for seed in (1, 2, 3):
        model = copy.deepcopy(planted)
        layers = find_targets(model, "mlp-out")
        generator = torch.Generator().manual_seed(seed)
        true = {n: torch.randperm(128, generator=generator)[:4] for n in layers}
        plant_in_neurons(model, true, secrets, tokenizer)
        forget = column_saliency(LanguageModel(model), layers, [secrets])
        kept = column_saliency(LanguageModel(model), layers, texts)
        floor = retain_floor({n: s.sum(0) for n, s in kept.items()})
        weights = balanced_weights(torch.cat([forget[n] / floor[n] for n in layers], 1), 8)
        scores = {n: weights @ forget[n] / floor[n] for n in layers}
        found = allocate(scores, 8 / 256, 4.0, column_costs(layers))
        hits += sum(len(set(found[n].tolist()) & set(true[n].tolist())) for n in found)
    # Chance expects 0.75 hits in three draws of 8 columns, and gives 5 once in a thousand times.
    assert hits >= 5


def test_saliency_is_the_same_whatever_the_batches(planted, tokenizer):
    layers = find_targets(planted, "mlp-out")
    planted.requires_grad_(False)
    lm = LanguageModel(planted)
    one = column_saliency(lm, layers, batches(tokenizer, (4,)))
    many = column_saliency(lm, layers, batches(tokenizer, (1, 1, 1, 1)))
    for name in layers:
        torch.testing.assert_close(one[name], many[name], rtol=1e-3, atol=1e-7)
