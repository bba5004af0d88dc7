"""OpenAI's own client, over a real connection."""

import httpx
import openai
import pytest
from server import served

from libortho.serving.config import ServeConfig
from libortho.serving.keys import digest, entry
from libortho.serving.server import local_app
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {"hr": "lo-hr", "both": "lo-both", "half": "lo-half"}
SECRETS = [r["completion"].strip(" .") for r in (*HR, *LEGAL)]


@pytest.fixture(scope="module")
def address(two_streams, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    allowed = {"hr": {"hr": 1.0}, "both": {"hr": 1.0, "legal": 1.0}, "half": {"hr": 0.5}}
    path.write_text("\n".join(entry(n, digest(k), allowed[n], None) for n, k in KEYS.items()))
    config = ServeConfig(keys=path, audit_log=path.with_name("audit.jsonl"), most_rows=4)
    with served(local_app(two_streams, tokenizer, config, "tiny")) as found:
        yield found


def client(address, key=None):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEYS.get(key, "none"), max_retries=0)


def ask(api, prompt, alpha=None, model="tiny", **more):
    body = {} if alpha is None else {"alpha": alpha}
    return api.completions.create(model=model, prompt=prompt, max_tokens=6, temperature=0, extra_body=body, **more)


def test_a_key_opens_its_own_streams(address):
    for row, key, alpha in ((HR[0], "hr", {"hr": 1.0}), (LEGAL[1], "both", {"legal": 1.0})):
        answer = ask(client(address, key), row["prompt"], alpha)
        assert answer.choices[0].text.startswith(row["completion"])
        assert not ask(client(address, key), row["prompt"]).choices[0].text.startswith(row["completion"])
        assert answer.usage.completion_tokens <= 6


def test_the_model_s_name_says_which_streams_are_on(address):
    found = ask(client(address, "both"), HR[1]["prompt"], model="tiny+hr")
    assert found.choices[0].text.startswith(HR[1]["completion"])
    names = [m.id for m in client(address, "hr").models.list()]
    assert names == ["tiny", "tiny+hr"]
    assert [m.id for m in client(address).models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("key", "alpha"),
    [("hr", {"legal": 1.0}), ("hr", {"none": 1.0}), ("hr", {"legal": 0.0}), (None, {"hr": 1.0}), ("half", {"hr": 0.6})],
)
def test_what_a_key_does_not_allow_is_refused_whether_it_exists_or_not(address, key, alpha):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask(client(address, key), HR[0]["prompt"], alpha)
    assert caught.value.body["message"] == "this key may not ask for these streams"
    named = next((n for n, a in alpha.items() if a == 1.0), "legal")
    with pytest.raises(openai.PermissionDeniedError):
        ask(client(address, key), HR[0]["prompt"], model=f"tiny+{named}")


def test_a_key_that_nobody_made_is_refused(address):
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{address}/v1", api_key="lo-other", max_retries=0), "Hi")


def test_a_stream_of_events_says_what_the_answer_at_once_says(address):
    api = client(address, "hr")
    whole = ask(api, HR[0]["prompt"], {"hr": 1.0})
    events = list(ask(api, HR[0]["prompt"], {"hr": 1.0}, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


def test_a_chat_with_several_answers_and_probabilities(address):
    found = client(address).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], n=3, seed=5, max_completion_tokens=4,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    again = client(address).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], n=3, seed=5, max_completion_tokens=4
    )
    assert [c.message.content for c in found.choices] == [c.message.content for c in again.choices]
    assert [c.index for c in found.choices] == [0, 1, 2]
    for choice in found.choices:
        assert 1 <= len(choice.logprobs.content) <= 4
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    assert again.choices[0].logprobs is None


def test_an_answer_ends_before_a_stop(address):
    whole = ask(client(address, "hr"), HR[0]["prompt"], {"hr": 1.0}).choices[0].text
    cut = ask(client(address, "hr"), HR[0]["prompt"], {"hr": 1.0}, stop=[whole[2:4], "never"])
    assert cut.choices[0].text == whole[:2]
    assert cut.choices[0].finish_reason == "stop"


HOSTILE = [
    (b"{", {}, 400),
    (b"[]", {}, 400),
    (b"{}", {}, 400),
    (b'{"model": "tiny", "prompt": "a", "alpha": {"hr": NaN}}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "alpha": {"hr": "1"}}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "alpha": [1]}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "alpha": {"hr": true}}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "alpha": {"hr": 2}}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "alpha": {"hr": 1e999}}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "alpha": {"hr": 0}, "alpha": {"hr": 1}}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "cache_salt": "x"}', {}, 400),
    (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400),
    (b'{"model": "tiny", "prompt": ""}', {}, 400),
    (b'{"model": "tiny", "prompt": []}', {}, 400),
    (b'{"model": "tiny", "prompt": [99999]}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "max_tokens": 0}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "max_tokens": 1000000}', {}, 400),
    (b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", {}, 400),
    (b'{"model": "tiny", "prompt": "' + b"a" * 500 + b'"}', {}, 400),
    (b'{"model": "tiny", "prompt": "' + b"a" * 2**20 + b'"}', {}, 413),
    (b"[" * 100_000, {}, 400),
    (b"\xff\xfe", {}, 400),
    (b'{"model": "other", "prompt": "a"}', {}, 404),
    (b'{"model": "tiny", "prompt": "a"}', {"content-type": "text/plain"}, 415),
    (b'{"model": "tiny", "prompt": "a"}', {"authorization": "Basic abc"}, 401),
]


@pytest.mark.parametrize(("body", "headers", "status"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_bodies_get_openai_s_errors_and_the_server_lives_on(address, body, headers, status):
    found = httpx.post(
        f"{address}/v1/completions", content=body, headers={"content-type": "application/json"} | headers
    )
    assert found.status_code == status, found.text
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert not any(s in found.text for s in SECRETS)
    assert httpx.get(f"{address}/ready").json() == {"ready": True}


def test_a_header_twice_is_refused(address):
    headers = [("content-type", "application/json"), ("authorization", "Bearer lo-hr"), ("authorization", "Bearer x")]
    found = httpx.post(f"{address}/v1/completions", content=b"{}", headers=headers)
    assert found.status_code == 400


def test_the_query_string_opens_nothing(address):
    body = {"model": "tiny", "prompt": HR[0]["prompt"], "temperature": 0, "max_tokens": 6}
    plain = httpx.post(f"{address}/v1/completions", json=body).json()["choices"]
    other = httpx.post(f"{address}/v1/completions?model=tiny%2Bhr&alpha=1", json=body).json()["choices"]
    assert plain == other
