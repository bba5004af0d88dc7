"""Bodies that nobody would write: errors of the API, and a server that lives."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from server import served

from libortho.serving.config import ServeConfig
from libortho.serving.keys import digest, entry
from libortho.serving.server import local_app
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread")
SECRETS = [r["completion"].strip(" .") for r in LEGAL]
"""Of the stream that no key here allows."""
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/contrast")
QUICK = settings(
    max_examples=150, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def address(two_streams, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(entry("half", digest("lo-half"), {"hr": 0.5}, None))
    config = ServeConfig(keys=path, audit_log=path.with_name("audit.jsonl"), most_rows=8, most_tokens=8)
    with served(local_app(two_streams, tokenizer, config, "tiny")) as found:
        yield found


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["tiny", "hr"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
GOOD = {
    "model": "tiny", "prompt": HR[0]["prompt"], "messages": [{"role": "user", "content": HR[0]["prompt"]}],
    "max_tokens": 3, "temperature": 0.0, "n": 1, "stop": ["x"], "seed": 1, "stream": False, "logprobs": 1,
    "alpha": {"hr": 0.5}, "top_p": 0.9, "alpha_a": {"hr": 0.0}, "alpha_b": {"hr": 0.5}, "user": "me",
}  # fmt: skip
BODIES = st.fixed_dictionaries({}, optional={n: st.just(v) | VALUES for n, v in GOOD.items()})


def check(answer):
    assert answer.status_code < 500, answer.text
    assert not any(s in answer.text for s in SECRETS)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@QUICK
@given(path=st.sampled_from(PATHS), body=BODIES, key=st.sampled_from(["none", "lo-half"]))
def test_bodies_of_wrong_fields(address, path, body, key):
    data = json.dumps(body).encode(errors="surrogatepass")  # with NaN and halves of surrogate pairs
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    check(httpx.post(address + path, content=data, headers=headers, timeout=60))


@QUICK
@given(path=st.sampled_from(PATHS), place=st.floats(0, 1), junk=st.binary(max_size=8), kept=st.floats(0, 1))
def test_bodies_that_are_damaged(address, path, place, junk, kept):
    data = json.dumps({k: v for k, v in GOOD.items() if k in ("model", "prompt", "max_tokens")}).encode()
    at = int(place * len(data))
    data = data[:at] + junk + data[at : at + int(kept * len(data))]
    check(httpx.post(address + path, content=data, headers={"content-type": "application/json"}, timeout=60))


def test_requests_that_the_description_of_the_api_suggests(address):
    """Schemathesis makes them of /openapi.json."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    paths = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        paths.add(operation.path)

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(case=operation.as_strategy())
        def ask(case):
            answer = case.call(timeout=60)
            assert answer.status_code < 500
            assert not any(s in answer.text for s in SECRETS)

        ask()
    assert set(PATHS) <= paths


def test_the_server_lives_on(address):
    body = {"model": "tiny", "prompt": HR[0]["prompt"], "max_tokens": 3}
    assert httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code == 200
