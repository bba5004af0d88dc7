"""Settings of a server: where they come from, and that each does something."""

import json

import httpx
import pytest
from server import served

from libortho import ConfigError
from libortho.core.switch.alpha import get_switch
from libortho.serving.config import ServeConfig, read_config
from libortho.serving.keys import digest, entry, parse_keys
from libortho.serving.server import check_port, local_app
from tiny import HR

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_given_counts_before_the_environment_and_that_before_the_file(tmp_path, monkeypatch):
    path = tmp_path / "serve.toml"
    path.write_text('port = 1\nhost = "file"\nname = "file"\n')
    monkeypatch.setenv("LIBORTHO_SERVE_HOST", "environment")
    monkeypatch.setenv("LIBORTHO_SERVE_NAME", "environment")
    found = read_config(path, name="given", keys=None)
    assert (found.port, found.host, found.name, found.keys) == (1, "environment", "given", None)


@pytest.mark.parametrize(
    ("text", "told"),
    [("most_row = 1", "unknown setting most_row"), ("port = 70000", "setting port"), ("port = [", "TOML")],
)
def test_a_file_of_wrong_settings_is_refused(tmp_path, text, told):
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_config(path)


def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, two_streams, tokenizer):
    with pytest.raises(ConfigError, match="no file"):
        read_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="timing"):
        read_config(timing="nonsense")
    with pytest.raises(ConfigError, match="cannot be listened at"):
        check_port(ServeConfig(host="192.0.2.1"))
    with pytest.raises(ConfigError, match="audit_log"):
        local_app(two_streams, tokenizer, ServeConfig(audit_log=tmp_path / "none" / "audit"), "tiny")
    with pytest.raises(ConfigError, match="without"):
        local_app(two_streams, tokenizer, ServeConfig(), "tiny+hr")


def test_keys_may_be_required_and_prompts_kept(two_streams, tokenizer, tmp_path):
    (tmp_path / "keys.toml").write_text(entry("me", digest("lo-me"), {}, None))
    config = ServeConfig(
        keys=tmp_path / "keys.toml", require_key=True, audit_log=tmp_path / "audit", log_prompts=True, body_bytes=200
    )
    body = {"model": "tiny", "prompt": HR[0]["prompt"], "max_tokens": 2}
    with served(local_app(two_streams, tokenizer, config, "tiny")) as address:
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 401
        headers = {"authorization": "Bearer lo-me"}
        assert httpx.post(f"{address}/v1/completions", json=body, headers=headers).status_code == 200
        longer = {**body, "user": "u" * 200}
        assert httpx.post(f"{address}/v1/completions", json=longer, headers=headers).status_code == 413
    [line] = map(json.loads, (tmp_path / "audit").read_text().splitlines())
    assert line["prompts"] == [HR[0]["prompt"]]


def test_an_answer_takes_no_longer_than_it_may(two_streams, tokenizer):
    config = ServeConfig(answer_seconds=1e-6)
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 90}
    with served(local_app(two_streams, tokenizer, config, "tiny")) as address:
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 504
        events = httpx.post(f"{address}/v1/completions", json={**body, "stream": True}).text
        assert "took too long" in events
        assert events.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("timing", ["plain", "constant"])
def test_timing_says_whether_streams_that_are_off_are_computed(two_streams, tokenizer, timing):
    local_app(two_streams, tokenizer, ServeConfig(timing=timing), "tiny")
    switch = get_switch(two_streams)
    assert switch.constant is (timing == "constant")
    switch.constant = False


def test_an_entry_is_what_the_file_of_keys_holds():
    [key] = parse_keys(entry("a", digest("lo-a"), {"hr": 0.5}, 7), "the file")
    assert (key.id, key.sha256, key.streams, key.requests_per_minute) == ("a", digest("lo-a"), {"hr": 0.5}, 7)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("0.5", "1.5", "largest alpha"),
        ("0.5", "nan", "largest alpha"),
        ('id = "a"', 'id = "anonymous"', "id is"),
        ("requests_per_minute = 7", "requests_per_minute = 0", "requests_per_minute"),
        ("requests_per_minute = 7", "rate = 7", "expected"),
        (digest("lo-a"), "abc", "hexadecimal"),
    ],
)
def test_a_wrong_entry_is_refused(old, new, told):
    with pytest.raises(ConfigError, match=told):
        parse_keys(entry("a", digest("lo-a"), {"hr": 0.5}, 7).replace(old, new), "the file")
