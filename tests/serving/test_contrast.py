"""One prompt under two alphas, over a real connection; the figures are those of forward passes of the model itself."""

import asyncio
import json

import httpx
import pytest
import torch
from server import served

import libortho
from libortho.core.layer import ortho_layers
from libortho.serving.acts import shares
from libortho.serving.answers import merged
from libortho.serving.batch import Batch
from libortho.serving.config import ServeConfig
from libortho.serving.contrast import contrast, paired
from libortho.serving.engine import EngineError, Row, Sampling
from libortho.serving.keys import digest, entry
from libortho.serving.local import LocalEngine
from libortho.serving.server import local_app
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = {"hr": "lo-hr", "both": "lo-both", "half": "lo-half"}
ALLOWED = {"hr": {"hr": 1.0}, "both": {"hr": 1.0, "legal": 1.0}, "half": {"hr": 0.5}}
OFF = {"hr": 0.0, "legal": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contrast")


@pytest.fixture(scope="module")
def address(two_streams, tokenizer, folder):
    path = folder / "keys.toml"
    path.write_text("\n".join(entry(n, digest(k), ALLOWED[n], None) for n, k in KEYS.items()))
    config = ServeConfig(keys=path, audit_log=folder / "audit.jsonl", most_rows=4)
    with served(local_app(two_streams, tokenizer, config, "tiny")) as found:
        yield found


def post(address, key, **body):
    headers = {} if key is None else {"authorization": f"Bearer {KEYS[key]}"}
    return httpx.post(f"{address}/v1/contrast", json={"model": "tiny", **body}, headers=headers, timeout=60)


def contrasted(address, key, **body):
    """The events."""
    found = post(address, key, temperature=0, **body)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("text/event-stream")
    *events, last = [e.removeprefix("data: ") for e in found.text.strip().split("\n\n")]
    assert last == "[DONE]"
    return [json.loads(e) for e in events]


def of(events, side):
    """Tokens of a side, and their log-probabilities on both."""
    own = [e for e in events if e.get("side") == side and "token" in e]
    other = {e["place"]: e["other"] for e in events if e.get("side") == side and "other" in e}
    assert sorted(other) == list(range(len(own)))
    return [e["token"] for e in own], [e["logprob"] for e in own], [other[i] for i in range(len(own))]


def direct(model, tokenizer, prompt, said, alpha):
    """Log-probabilities of ``said``, from one pass over the whole."""
    begun, ids = tokenizer(prompt)["input_ids"], tokenizer(said)["input_ids"]
    with libortho.alpha(model, alpha), torch.no_grad():
        found = model(input_ids=torch.tensor([begun + ids])).logits.float().log_softmax(-1)[0]
    return [float(found[len(begun) + i - 1, t]) for i, t in enumerate(ids)]


@pytest.mark.parametrize(
    ("alpha_a", "alpha_b", "row"),
    [({}, {"hr": 1}, HR[0]), ({"hr": 1.0}, {"legal": 0.5}, HR[1]), ({"legal": 0.3}, {"hr": 0.7, "legal": 1}, LEGAL[0])],
)
def test_figures_are_those_of_the_model_under_both_alphas(address, two_streams, tokenizer, alpha_a, alpha_b, row):
    events = contrasted(address, "both", prompt=row["prompt"], alpha_a=alpha_a, alpha_b=alpha_b, max_tokens=8)
    alphas = {"a": {**OFF, **alpha_a}, "b": {**OFF, **alpha_b}}
    for side, other in ("ab", "ba"):
        tokens, own, under = of(events, side)
        said = "".join(tokens)
        assert said == "".join(e["text"] for e in events if e.get("side") == side and "text" in e)
        assert own == pytest.approx(direct(two_streams, tokenizer, row["prompt"], said, alphas[side]), abs=1e-4)
        assert under == pytest.approx(direct(two_streams, tokenizer, row["prompt"], said, alphas[other]), abs=1e-4)
    told = events[-1]["layers"]
    assert set(told) == {n for n in OFF if alphas["a"][n] != alphas["b"][n]}
    whole = tokenizer(row["prompt"] + "".join(of(events, "b")[0]))["input_ids"]
    for stream, layers in told.items():
        expected = by_hand(two_streams, whole, alphas["b"], stream)
        assert {x["layer"]: x["share"] for x in layers} == pytest.approx(expected, rel=1e-3)
        assert [x["share"] for x in layers] == sorted((x["share"] for x in layers), reverse=True)


def by_hand(model, ids, alpha, stream):
    """Shares from dense weights."""
    inputs, found = {}, {}
    layers = {n: m for n, m in ortho_layers(model).items() if stream in m.streams}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.update({n: args[0][0].float()}))
        for n, m in layers.items()
    ]
    with libortho.alpha(model, alpha), torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        base = layer.dense_weight(0.0)
        part = layer.dense_weight({stream: 1.0}) - base
        found[name] = float((inputs[name] @ part.T).norm() / (inputs[name] @ base.T).norm())
    assert found
    return found


def test_a_stream_changes_what_is_said_where_it_acts(address):
    events = contrasted(address, "hr", prompt=HR[0]["prompt"], alpha_b={"hr": 1.0}, max_tokens=6)
    tokens, own, other = of(events, "b")
    assert "".join(tokens).startswith(HR[0]["completion"])
    assert "".join(of(events, "a")[0]) != "".join(tokens)
    assert max(o - x for o, x in zip(own, other, strict=True)) > 1
    ends = [e for e in events if "finish" in e]
    assert sorted(e["side"] for e in ends) == ["a", "b"]


def test_equal_sides_do_not_differ(address):
    events = contrasted(address, None, prompt="Code of Eli Fox:", max_tokens=8)
    for side in "ab":
        _, own, other = of(events, side)
        assert own == pytest.approx(other, abs=1e-4)
    assert of(events, "a")[0] == of(events, "b")[0]
    assert events[-1] == {"layers": {}}


def test_a_chat_and_draws_with_the_same_numbers_on_both_sides(address):
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 1, "max_tokens": 12}
    found = post(address, None, **body)
    events = [json.loads(e.removeprefix("data: ")) for e in found.text.strip().split("\n\n")[:-1]]
    assert of(events, "a")[0] == of(events, "b")[0]


@pytest.mark.parametrize(
    ("key", "a", "b"),
    [
        ("hr", {}, {"legal": 1.0}),
        ("hr", {"legal": 1.0}, {}),
        ("hr", {"hr": 1.0}, {"legal": 0.0}),
        ("half", {}, {"hr": 0.6}),
        ("half", {"hr": 0.6}, {"hr": 0.5}),
        ("hr", {}, {"none": 1.0}),
        (None, {"hr": 0.1}, {}),
    ],
)
def test_both_sides_need_the_right(address, folder, key, a, b):
    found = post(address, key, prompt="Hi", alpha_a=a, alpha_b=b)
    assert found.status_code == 403
    assert found.json()["error"]["message"] == "this key may not ask for these streams"
    lines = [json.loads(x) for x in (folder / "audit.jsonl").read_text().splitlines()[-2:]]
    assert [x["asked"] for x in lines] == [a, b]
    assert [(x["used"], x["status"]) for x in lines] == [(None, 403)] * 2


def test_a_line_is_written_for_each_side(address, folder):
    contrasted(address, "half", prompt="Hi", alpha_b={"hr": 0.5}, max_tokens=2)
    first, second = [json.loads(x) for x in (folder / "audit.jsonl").read_text().splitlines()[-2:]]
    assert first["id"] == second["id"]
    assert (first["used"], second["used"]) == ({}, {"hr": 0.5})
    assert list(second["streams"]) == ["hr"]
    assert first["rows"] == second["rows"] == 1


REFUSED = [
    ({}, None),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, None),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "a", "alpha": {"hr": 1.0}}, "alpha"),
    ({"prompt": "a", "stream": True}, "stream"),
    ({"prompt": "a", "n": 2}, "n"),
    ({"prompt": "a", "alpha_a": {"hr": 2}}, "alpha_a"),
    ({"prompt": "a", "alpha_b": {"hr": "1"}}, "alpha_b"),
    ({"prompt": "a", "alpha_b": [1]}, "alpha_b"),
    ({"prompt": "a", "alpha_b": None}, "alpha_b"),
    ({"prompt": "a", "max_tokens": 257}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "temperature": 3}, "temperature"),
    ({"prompt": "a", "model": "tiny+hr"}, "alpha_a"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_malformed_is_refused(address, body, param):
    found = post(address, "hr", **body)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param


def test_models_say_how_much_of_each_stream_a_key_may_have(address):
    def listed(key):
        headers = {} if key is None else {"authorization": f"Bearer {KEYS[key]}"}
        return httpx.get(f"{address}/v1/models", headers=headers).json()["data"][0]["alpha"]

    assert [listed(k) for k in ("hr", "both", "half", None)] == [ALLOWED["hr"], ALLOWED["both"], ALLOWED["half"], {}]


class Unforced(LocalEngine):
    forces = False


def test_an_engine_that_cannot_force_rows_answers_without_comparing(two_streams, tokenizer):
    async def main():
        engine = Unforced(two_streams, tokenizer, most_rows=2, most_waiting=4)
        await engine.start()
        sampling = Sampling(max_tokens=3, temperature=0.0, logprobs=0)
        ids = tuple(tokenizer("Once")["input_ids"])
        rows = paired([Row(ids, OFF, sampling), Row(ids, {**OFF, "hr": 1.0}, sampling)])

        async def pieces():
            for side, row in enumerate(engine.generate(rows)):
                async for piece in row:
                    yield side, piece

        events = [e async for e in contrast(engine, rows, pieces())]
        await engine.close()
        return events

    events = asyncio.run(main())
    assert sum("token" in e for e in events) >= 2
    assert not any("other" in e or "layers" in e for e in events)


def test_tokens_are_told_as_they_are_said_and_an_answer_that_nobody_reads_ends(two_streams, tokenizer):
    async def main():
        engine = LocalEngine(two_streams, tokenizer, most_rows=2, most_waiting=4)
        await engine.start()
        sampling = Sampling(max_tokens=60, temperature=0.0, logprobs=0)
        rows = paired([Row(tuple(tokenizer("Once")["input_ids"]), OFF, sampling)] * 2)
        events = contrast(engine, rows, merged(engine.generate(rows)))
        first = await anext(events)
        running = engine.load()
        await events.aclose()
        await asyncio.wait_for(engine.close(), 20)
        return first, running, engine.load()

    first, running, left = asyncio.run(main())
    assert {"side", "token", "text", "logprob"} == set(first)
    assert running == (2, 0)
    assert left == (0, 0)


def test_a_forced_row_says_what_it_is_given_even_an_end(two_streams, tokenizer):
    said = (*tokenizer("zq")["input_ids"], tokenizer.eos_token_id, *tokenizer("!")["input_ids"])
    sampling = Sampling(max_tokens=len(said), temperature=1.0, logprobs=0, forced=said)
    batch = Batch(two_streams, tokenizer)
    answer = batch.answer(Row(tuple(tokenizer("Hi")["input_ids"]), OFF, sampling))
    pieces = [p for _, p in batch.admit([answer])]
    while batch.answers:
        pieces += [p for _, p in batch.step()]
    assert tuple(i for p in pieces for i in p.ids) == said
    assert all(len(p.logprobs) == 1 for p in pieces)
    assert [p.finish for p in pieces] == [None, None, None, "length"]


def test_which_layers_act_is_told_between_steps_and_failures_are_no_more_than_that(two_streams, tokenizer, monkeypatch):
    ids, on = tuple(tokenizer("Code of Eli Fox: 1834.")["input_ids"]), {**OFF, "hr": 1.0}

    async def main():
        engine = LocalEngine(two_streams, tokenizer, most_rows=2, most_waiting=2)
        with pytest.raises(EngineError, match="does not run"):
            await engine.acts(ids, on)
        await engine.start()
        rows = engine.generate([Row(ids, OFF, Sampling(max_tokens=20, temperature=0.0))])
        told = await asyncio.gather(engine.acts(ids, on), *[anext(r) for r in rows])
        with monkeypatch.context() as patch:
            patch.setattr("libortho.serving.acts.ortho_layers", lambda model: 1 / 0)
            with pytest.raises(EngineError, match="could not tell"):
                await engine.acts(ids, on)
        assert await engine.acts(ids, on) == told[0]
        await engine.close()
        return told[0]

    found = asyncio.run(main())
    assert found == shares(two_streams, ids, on, ("hr", "legal"))
    assert set(found) == {"hr", "legal"}
    assert all(not m._forward_hooks for m in ortho_layers(two_streams).values())
