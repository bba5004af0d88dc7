import copy
import json
import random
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import libortho
import tiny
from libortho import IsolateConfig, isolate
from libortho.auditing import attacks
from libortho.auditing.attacks.measuring import decoder_weights, general_subset, halves, measure
from libortho.auditing.attacks.noise import gaussian, support_weight
from libortho.auditing.attacks.prefix import SENTENCES, mutated, search_prefix, with_prefix
from libortho.auditing.attacks.pruning import pruned
from libortho.auditing.attacks.recovery import column_scores, fit_ridge, left_out_auc, predict_columns
from libortho.auditing.attacks.relearning import recovery
from libortho.auditing.attacks.requantisation import FORMATS, NF4, integer, nf4
from libortho.auditing.subjects import Subject, at, dense_copy, subjects_of, touched
from libortho.core.errors import ConfigError, DataError, TargetError
from libortho.core.layer import ortho_layers
from libortho.core.streams import BaseStream, Columns, OrthoStream
from libortho.lm.metrics import general_perplexity
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded, encode
from libortho.text.records import load_records

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def isolated(_planted, tokenizer) -> nn.Module:
    """The planted model with its memory in the ortho stream."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = copy.deepcopy(_planted)
    isolate(
        model, tokenizer, tiny.FORGET, retain=tiny.RETAIN,
        config=IsolateConfig(ratio=0.1, damping=10.0, learning_rate=2e-2, max_steps=60),
    )  # fmt: skip
    torch.set_num_threads(threads)
    return model


@pytest.fixture(scope="module")
def forget(tokenizer) -> list[Encoded]:
    return tiny.encoded(tokenizer)


@pytest.fixture(scope="module")
def general(tokenizer) -> list[Encoded]:
    return [encode(r, tokenizer, 64) for r in load_records(tiny.RETAIN[:12])]


@pytest.fixture(scope="module")
def audited(isolated, _clean) -> list[Subject]:
    return subjects_of(isolated, original=None, reference=_clean, others={}, seed=0)


@pytest.fixture
def unchanged(isolated):
    """The audited model must leave the test with the same tensors and the same alpha = 0 logits."""
    before = copy.deepcopy(isolated.state_dict())
    flags = {n: p.requires_grad for n, p in isolated.named_parameters()}
    yield isolated
    after = isolated.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert {n: p.requires_grad for n, p in isolated.named_parameters()} == flags
    assert all(p.grad is None for p in isolated.parameters())


# -- measuring --------------------------------------------------------------------------------------------------------


def test_levels_are_those_of_the_models_own_loss_and_generation(planted, tokenizer, forget, general):
    level = measure(LanguageModel(planted), forget, general)
    losses = [
        float(planted(input_ids=torch.tensor([e.ids]), labels=torch.tensor([e.labels])).loss.detach()) for e in forget
    ]
    hits = []
    for row in tiny.FORGET:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        output = planted.generate(**prompt, max_new_tokens=6, do_sample=False)
        hits.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == row["completion"])
    assert level.nll == pytest.approx(statistics.fmean(losses), abs=1e-5)
    assert level.extraction == statistics.fmean(hits) == 1.0
    assert level.perplexity == pytest.approx(general_perplexity(LanguageModel(planted), general))
    assert measure(LanguageModel(planted), forget).perplexity is None
    with pytest.raises(DataError, match="no forget record"):
        measure(LanguageModel(planted), [])


def test_halves_part_all_records_and_follow_the_seed():
    first, second = halves(17, 0)
    assert sorted(first + second) == list(range(17))
    assert (len(first), len(second)) == (8, 9)
    assert halves(17, 0) == (first, second) != halves(17, 1)
    with pytest.raises(DataError, match="at least 2"):
        halves(1, 0)


def test_the_subset_of_general_text_stops_once_it_is_long_enough():
    texts = [Encoded((1,) * 40, (1,) * 40)] * 5
    assert len(general_subset(texts, 100)) == 3
    assert len(general_subset(texts, 1000)) == 5


def test_every_linear_layer_but_the_head_is_attacked(tiny_llama, tiny_gpt2):
    names = decoder_weights(tiny_llama)
    assert len(names) == 2 * 7
    assert not any("lm_head" in n or "embed" in n for n in names)
    weights = decoder_weights(tiny_gpt2)
    assert weights["h.0.mlp.c_fc"].shape == (128, 64)  # (out, in), although GPT-2 stores the transpose
    weights["h.0.mlp.c_fc"].zero_()
    assert not tiny_gpt2.transformer.h[0].mlp.c_fc.weight.any()


# -- relearning -------------------------------------------------------------------------------------------------------


def test_relearning_teaches_the_shown_half_and_leaves_the_model_alone(audited, forget, general, unchanged):
    found = attacks.relearning(audited, forget, general, seed=0, epochs=6, learning_rate=1e-3)
    shown, benign = found.curves[:2]
    assert [(c.subject, c.data) for c in found.curves] == [
        ("off", "forget half"), ("off", "general text"), ("reference", "forget half"), ("reference", "general text"),
    ]  # fmt: skip
    assert found.steps == (0, 1, 2, 3, 4, 5, 6)
    assert shown.trained_nll[0] > 1.0 > 0.5 > shown.trained_nll[-1]
    assert shown.trained_extraction[0] < shown.trained_extraction[-1] == 1.0
    assert benign.trained_nll[-1] > shown.trained_nll[-1] + 0.5
    with audited[0].enter():
        lm = audited[0].language_model()
        assert shown.nll[0] == pytest.approx(measure(lm, [forget[i] for i in found.judged]).nll, abs=1e-3)
    assert found.full is not None
    assert found.full.extraction == 1.0
    expected = (shown.nll[0] - min(shown.nll)) / (shown.nll[0] - found.full.nll)
    assert found.recovery["forget half"] == pytest.approx(expected)
    other = (found.curves[2].nll[0] - min(found.curves[2].nll)) / (found.curves[2].nll[0] - found.full.nll)
    assert found.excess["forget half"] == pytest.approx(expected - other)
    again = attacks.relearning(audited, forget, general, seed=0, epochs=6, learning_rate=1e-3)
    assert again == found
    as_json = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert as_json["curves"][0]["nll"] == list(shown.nll)


def test_relearning_finds_memory_in_what_isolate_hides_and_none_in_a_model_that_has_none(
    audited, planted, clean, forget, general
):
    options = {"seed": 0, "epochs": 6, "learning_rate": 1e-3}
    hidden = attacks.relearning(audited, forget, general, **options)
    nothing = attacks.relearning(
        subjects_of(clean, original=planted, reference=clean, others={}, seed=0), forget, general, **options
    )
    assert nothing.full.extraction == 1.0
    assert nothing.excess == {"forget half": 0.0, "general text": 0.0}  # it is its own reference
    assert hidden.excess["forget half"] > 0.1


def test_relearning_says_none_where_there_is_no_memory_to_recover(clean, forget, general):
    alone = subjects_of(clean, original=None, reference=None, others={}, seed=0)
    found = attacks.relearning(alone, forget, general, seed=0, epochs=1)
    assert found.full is None
    assert found.recovery == found.excess == {"forget half": None, "general text": None}
    assert recovery(2.0, 2.0, 2.0) is None
    assert recovery(4.0, 3.0, 0.0) == 0.25
    with pytest.raises(DataError, match="at least 2"):
        attacks.relearning(alone, forget[:1], general, seed=0)
    with pytest.raises(DataError, match="general text"):
        attacks.relearning(alone, forget, [], seed=0)


# -- requantisation ---------------------------------------------------------------------------------------------------


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


def test_rounding_to_the_grid_that_the_base_is_on_changes_almost_nothing(audited, forget, general, unchanged):
    found = attacks.requantisation(audited[0], forget, general)
    rows = {r.format: r.level for r in found.rows}
    assert list(rows) == ["as stored", "int8", "int4", "nf4", "int3"]
    assert rows["int8"].nll == pytest.approx(rows["as stored"].nll, abs=0.05)
    assert abs(rows["int3"].nll - rows["as stored"].nll) > 3 * abs(rows["int8"].nll - rows["as stored"].nll)
    assert len({level.nll for level in rows.values()}) == 5
    assert found == attacks.requantisation(audited[0], forget, general)
    keys = {"format", "extraction", "nll", "perplexity", "reference_nll", "reference_extraction"}
    assert [set(r) for r in found.to_dict()] == [keys] * 5
    assert {r["reference_nll"] for r in found.to_dict()} == {None}


def test_requantisation_rounds_every_layer_and_not_the_head(planted, forget, general):
    alone = subjects_of(planted, original=None, reference=None, others={}, seed=0)[0]
    row = attacks.requantisation(alone, forget, general, formats=("nf4",))
    by_hand = copy.deepcopy(planted)
    with torch.no_grad():
        for module in by_hand.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(FORMATS["nf4"](module.weight))
    assert row.rows[1].level == measure(LanguageModel(by_hand), forget, general)
    assert row.rows[1].level != row.rows[0].level
    with pytest.raises(ConfigError, match="int8, int4, nf4, int3"):
        attacks.requantisation(alone, forget, general, formats=("fp4",))


# -- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
def test_pruning_zeroes_exactly_the_smallest_share(share):
    weight = torch.randint(1, 20, (20, 30)).float() * torch.randn(20, 30).sign()  # many ties, no zero
    after = pruned(weight, share)
    gone = after == 0
    assert int(gone.sum()) == round(share * 600)
    assert torch.equal(after[~gone], weight[~gone])
    if 0 < share < 1:
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


def test_pruning_measures_the_pruned_model(audited, forget, general, unchanged):
    found = attacks.pruning(audited[0], forget, general, shares=(0.9,))
    copied = dense_copy(audited[0])
    for weight in decoder_weights(copied).values():
        weight.copy_(pruned(weight, 0.9))
    assert [r.share for r in found.rows] == [0.0, 0.9]
    assert found.rows[1].level == measure(LanguageModel(copied), forget, general)
    assert found.rows[1].level.perplexity > found.rows[0].level.perplexity
    with pytest.raises(DataError, match="fractions"):
        attacks.pruning(audited[0], forget, general, shares=(50,))


def test_the_reference_is_damaged_in_the_same_way(audited, clean, forget, general):
    for attack, option in ((attacks.requantisation, {"formats": ("int3",)}), (attacks.pruning, {"shares": (0.9,)})):
        row = attack(audited[0], forget, general, reference=audited[-1], **option).rows
        alone = attack(audited[-1], forget, (), **option).rows
        assert [r.reference for r in row] == [r.level for r in alone]
        assert row[0].reference == measure(LanguageModel(clean), forget) != row[1].reference


# -- noise ------------------------------------------------------------------------------------------------------------


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


def test_noise_where_the_memory_sits_hurts_more(audited, isolated, forget, general, unchanged):
    for layer in ortho_layers(isolated).values():
        part = layer.dense_weight(1.0) - layer.dense_weight(0.0)
        assert torch.allclose(support_weight(layer), part, atol=1e-6)
    found = attacks.noise(audited[1], forget, general, seed=0, scales=(1.0,))
    levels = {(r.where, r.scale): r.level for r in found.rows}
    assert list(levels) == [("ortho", 0.0), ("ortho", 1.0), ("base", 0.0), ("base", 1.0)]
    assert levels["ortho", 0.0] == levels["base", 0.0]
    assert levels["ortho", 0.0].extraction == 1.0
    assert levels["ortho", 1.0].nll > levels["base", 1.0].nll > levels["base", 0.0].nll
    assert found == attacks.noise(audited[1], forget, general, seed=0, scales=(1.0,))
    assert found != attacks.noise(audited[1], forget, general, seed=1, scales=(1.0,))


def test_attacks_on_the_stream_need_a_stream(clean, forget, general):
    alone = subjects_of(clean, original=None, reference=None, others={}, seed=0)[0]
    with pytest.raises(TargetError, match="no layer with a column or sparse"):
        attacks.noise(alone, forget, general, seed=0)
    with pytest.raises(TargetError, match="no layer with a column or sparse"):
        attacks.stream_recovery(clean, forget, seed=0)


# -- adversarial prefix -----------------------------------------------------------------------------------------------


def test_the_search_finds_what_it_looks_for_and_never_does_worse_than_nothing():
    def wants(words: int) -> Callable[[str], float]:
        return lambda text: abs(len(text.split()) - words)

    best, empty, lowest = search_prefix(wants(15), 60, random.Random(0))
    assert (empty, lowest) == (15.0, 0.0)
    assert len(best.split()) == 15
    assert search_prefix(wants(0), 30, random.Random(0)) == ("", 0.0, 0.0)
    tried: list[str] = []
    search_prefix(lambda text: tried.append(text) or float(len(text)), 20, random.Random(0))
    assert len(tried) == 21
    assert tuple(tried[1 : 1 + len(SENTENCES)]) == SENTENCES


def test_a_mutation_changes_the_text():
    rng = random.Random(0)
    texts = {mutated("one two three", ["word"], rng) for _ in range(60)}
    assert {"two three", "word two three", "one word two three", f"one two three {SENTENCES[0]}"} <= texts
    assert "one two three" not in texts
    assert mutated("", ["word"], rng) in {"word", *SENTENCES}


def test_a_prefix_goes_after_a_beginning_of_text(tokenizer):
    assert with_prefix(tiny.record("Code:", " 1"), "Now.", tokenizer).prompt == "Now. Code:"
    assert with_prefix(tiny.record("<s>Code:", " 1"), "Now.", tokenizer).prompt == "<s>Now. Code:"
    assert with_prefix(tiny.record("Code:", " 1"), "", tokenizer) == tiny.record("Code:", " 1")


def test_the_prefix_is_judged_on_the_other_half(audited, tokenizer, forget, unchanged):
    records = load_records(tiny.FORGET)
    found = attacks.adversarial_prefix(audited, records, tokenizer, seed=0, evaluations=20)
    search, judged = halves(len(records), 0)
    own = found.audited
    assert own.search_after <= own.search_before
    assert found.reference.search_after <= found.reference.search_before
    with audited[0].enter():
        lm = audited[0].language_model()
        assert own.before == measure(lm, [forget[i] for i in judged])
        assert own.search_before == pytest.approx(measure(lm, [forget[i] for i in search]).nll)
        texts = [f"{own.best} {records[i].prompt}".lstrip() + records[i].completion for i in judged]
        ids = [tokenizer(t)["input_ids"] for t in texts]
        assert max(map(len, ids)) <= 128  # the model's positions
        labels = [[-100] * (len(i) - 6) + i[-6:] for i in ids]
        with torch.no_grad():
            losses = [
                float(lm.model(input_ids=torch.tensor([i]), labels=torch.tensor([y])).loss)
                for i, y in zip(ids, labels, strict=True)
            ]
    assert own.after.nll == pytest.approx(statistics.fmean(losses), abs=1e-4)
    assert found == attacks.adversarial_prefix(audited, records, tokenizer, seed=0, evaluations=20)
    assert found.to_dict()["reference"]["best"] == found.reference.best


# -- stream recovery --------------------------------------------------------------------------------------------------


def with_streams(model: nn.Module, make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> nn.Module:
    """Exchange base and support of every split layer: ``make`` gets a random weight and random columns."""
    generator = torch.Generator().manual_seed(5)
    for layer in ortho_layers(model).values():
        columns = torch.randperm(layer.in_features, generator=generator)[:6].sort().values
        weight, values = make(torch.randn(layer.out_features, layer.in_features, generator=generator) * 0.2, columns)
        layer.base = BaseStream(None, weight=weight)
        layer.streams["default"] = OrthoStream(Columns(columns, values))
    return model


def split_everywhere(model: nn.Module) -> nn.Module:
    return libortho.split(model, libortho.SplitConfig(target_modules=("all-linear",), bits=8, ratio=0.1))


def loud(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    weight[:, columns] *= 10
    return weight, torch.randn(len(columns), len(weight))


def silent(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return weight, torch.randn(len(columns), len(weight))


def proportional(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return weight, -0.7 * weight[:, columns].T


def constant(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return weight, torch.linspace(-1, 1, len(weight)).repeat(len(columns), 1) + 0.01 * torch.randn(
        len(columns), len(weight)
    )


@pytest.fixture
def prompts() -> list[Encoded]:
    rng = random.Random(0)
    rows = [tuple(rng.randrange(2, 128) for _ in range(12)) for _ in range(4)]
    return [Encoded(r, (-100,) * 6 + r[6:]) for r in rows]


def test_loud_columns_are_found_and_silent_ones_are_not(tiny_llama, prompts):
    model = split_everywhere(tiny_llama)
    found = attacks.stream_recovery(with_streams(model, loud), prompts, seed=0)
    assert found.location_auc == pytest.approx(1.0, abs=1e-3)
    assert found.features["norm"] == pytest.approx(1.0, abs=1e-3)
    found = attacks.stream_recovery(with_streams(model, silent), prompts, seed=0)
    assert abs(found.location_auc - 0.5) < 0.15
    assert found.value_r2 < 0.02
    assert found.columns == 14 * 6


def test_a_stream_that_the_base_implies_is_recovered(tiny_llama, prompts):
    model = with_streams(split_everywhere(tiny_llama), proportional)
    found = attacks.stream_recovery(model, prompts, seed=0)
    assert found.value_r2 == pytest.approx(1.0, abs=1e-3)
    with libortho.alpha(model, 1.0):
        full = measure(LanguageModel(model), prompts)
    assert abs(found.before.nll - full.nll) > 0.05
    assert found.after.nll == pytest.approx(full.nll, abs=1e-3)
    found = attacks.stream_recovery(with_streams(model, constant), prompts, seed=0)
    assert found.value_r2 > 0.99


def test_the_attack_on_a_real_stream_changes_nothing(isolated, forget, unchanged):
    found = attacks.stream_recovery(isolated, forget, seed=0)
    again = attacks.stream_recovery(isolated, forget, seed=0)
    assert found == again
    with at(isolated, 0.0).enter():
        assert found.before == measure(LanguageModel(isolated), forget)
    assert 0 <= found.location_auc <= 1
    # With half of the stream's columns in hand a part of the values can be told, but not the stream: of so small a
    # model's four codes none to two come back, by processor.
    assert found.value_r2 < 0.9
    assert found.before.extraction == 0.0 <= found.after.extraction < 1.0
    assert found.after.nll > 0.1
    json.dumps(found.to_dict(), allow_nan=False)


def test_each_support_column_is_predicted_without_its_own_half(tiny_llama):
    layers = ortho_layers(with_streams(split_everywhere(tiny_llama), silent))
    predicted, _ = predict_columns(layers, random.Random(0))
    name, layer = next(iter(layers.items()))
    where = touched(layer).any(0)
    before = predicted[name].clone()
    assert not before[:, ~where].any()
    layer.streams["default"].support.values[0] += 1000.0  # its own value must not reach its own prediction
    after = predict_columns(layers, random.Random(0))[0][name]
    column = int(where.nonzero()[0])
    assert torch.equal(before[:, column], after[:, column])


def test_ridge_agrees_with_the_primal_solution_where_it_is_best():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator)
    y = x @ torch.randn(8, 8, generator=generator) + 0.3 * torch.randn(40, 8, generator=generator)
    predict = fit_ridge(x, y)
    fresh = torch.randn(200, 8, generator=generator)
    least_squares = torch.linalg.lstsq(x, y).solution
    assert (predict(fresh) - fresh @ least_squares).norm() < 0.1 * (fresh @ least_squares).norm()
    assert not fit_ridge(x, torch.zeros(40, 8))(fresh).any()


def test_unstructured_streams_are_located_entry_by_entry(tiny_llama, prompts):
    model = libortho.split(
        tiny_llama,
        libortho.SplitConfig(target_modules=("down_proj",), bits=8, ratio=0.02, structure="unstructured"),
    )
    for layer in ortho_layers(model).values():
        layer.base = BaseStream(None, weight=torch.where(touched(layer), 5.0, layer.base.dense()))
    found = attacks.stream_recovery(model, prompts, seed=0)
    assert found.location_auc == pytest.approx(1.0, abs=1e-3)
    assert found.value_r2 is None
    assert found.after is None
    assert found.to_dict()["extraction"] is None


def test_column_scores_are_what_they_say():
    base = BaseStream.from_weight(torch.randn(32, 24), 8)
    scores, weight, codes = column_scores(base), base.dense(), base.codes.float()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    low = u[:, :6] @ torch.diag(s[:6]) @ v[:6]
    cosine = torch.nn.functional.cosine_similarity(weight.T[:, None], weight.T[None], dim=-1)
    for j in range(24):
        column = weight[:, j]
        z = (column - column.mean()) / column.std(correction=0)
        assert float(scores["norm"][j]) == pytest.approx(float(column.norm()), rel=1e-5)
        assert float(scores["kurtosis"][j]) == pytest.approx(float(z.pow(4).mean()), rel=1e-4)
        assert float(scores["size"][j]) == pytest.approx(float(codes[:, j].abs().mean()))
        assert float(scores["clipped"][j]) == pytest.approx(float((codes[:, j].abs() == 127).float().mean()))
        remainder = (column - low[:, j]).norm() / column.norm()
        assert float(scores["remainder"][j]) == pytest.approx(float(remainder), rel=1e-3)
        others = [float(cosine[i, j].abs()) for i in range(24) if i != j]
        assert float(scores["alikeness"][j]) == pytest.approx(max(others), abs=1e-5)


def test_the_left_out_layer_has_no_part_in_choosing():
    layers = [{"a": 0.9, "b": 0.5}, {"a": 0.9, "b": 0.5}, {"a": 0.2, "b": 1.0}]
    # Without the third, a is best and fails there; without the first, b leans more (0.75) than a (0.55).
    assert left_out_auc(layers) == pytest.approx((0.5 + 0.5 + 0.2) / 3)
    assert left_out_auc([{"a": 0.1}, {"a": 0.2}]) == pytest.approx((0.9 + 0.8) / 2)
    assert left_out_auc(layers[:1]) is None
