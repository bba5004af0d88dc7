"""A server over weeks: keys and streams come and go, clients leave, disks fill."""

import json
import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server import served

from libortho import load
from libortho.serving.config import ServeConfig
from libortho.serving.keys import digest, entry
from libortho.serving.server import local_app
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "lo-both"


@pytest.fixture(scope="module")
def place(directory, tmp_path_factory):
    """A checkpoint of its own, for streams leave it."""
    path = tmp_path_factory.mktemp("operated")
    shutil.copytree(directory, path / "model")
    (path / "keys.toml").write_text(entry("both", digest(KEY), {"hr": 1.0, "legal": 1.0}, None))
    return path


@pytest.fixture(scope="module")
def address(place):
    config = ServeConfig(
        keys=place / "keys.toml", audit_log=place / "audit.jsonl", most_rows=2, most_waiting=2, body_seconds=0.5
    )
    model, tokenizer = load(place / "model")
    with served(local_app(model, tokenizer, config, "tiny", place / "model")) as found:
        yield found


def ask(address, row=None, alpha=None, key=KEY, **more):
    body = {"model": "tiny", "prompt": (row or HR[0])["prompt"], "max_tokens": 6, "temperature": 0, **more}
    body |= {} if alpha is None else {"alpha": alpha}
    return httpx.post(f"{address}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def says(answer, row):
    return answer.json()["choices"][0]["text"].startswith(row["completion"])


def eventually(check, seconds=20):
    until = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.1)
    return found


def test_each_request_leaves_a_line_and_no_prompt(address, place):
    ask(address, HR[0], {"hr": 1.0})
    ask(address, HR[0], {"none": 1.0})
    *_, granted, refused = map(json.loads, (place / "audit.jsonl").read_text().splitlines())
    assert (granted["key"], granted["asked"], granted["used"], granted["status"]) == ("both", {"hr": 1}, {"hr": 1}, 200)
    assert len(granted["streams"]["hr"]) == 64
    assert (refused["used"], refused["status"]) == (None, 403)
    assert "Eli" not in (place / "audit.jsonl").read_text()
    assert (place / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_keys_are_read_again_when_their_file_changes(address, place):
    path, new = place / "keys.toml", "lo-new"
    before = path.read_text()
    assert ask(address, key=new).status_code == 401
    path.write_text(before + "\n" + entry("new", digest(new), {"hr": 0.5}, 2))
    assert ask(address, alpha={"hr": 0.5}, key=new).status_code == 200
    assert ask(address, alpha={"hr": 0.6}, key=new).status_code == 403
    limited = ask(address, key=new)
    assert limited.status_code == 429
    assert 1 <= int(limited.headers["retry-after"]) <= 60
    path.write_text(before + "\nnonsense = [")
    assert ask(address, key=KEY).status_code == 200  # the last keys stay in force
    path.unlink()
    assert ask(address, key=KEY).status_code == 401
    path.write_text(before)
    assert ask(address, key=KEY).status_code == 200
    assert ask(address, key=new).status_code == 401


def test_a_stream_whose_folder_goes_is_gone_and_comes_back_with_it(address, place, tmp_path):
    assert says(ask(address, LEGAL[0], {"legal": 1.0}), LEGAL[0])
    shutil.move(place / "model" / "ortho" / "legal", tmp_path / "legal")
    eventually(lambda: ask(address, LEGAL[0], {"legal": 1.0}).status_code == 403)
    assert says(ask(address, HR[0], {"hr": 1.0}), HR[0])
    shutil.move(tmp_path / "legal", place / "model" / "ortho" / "legal")
    answer = eventually(lambda: (a := ask(address, LEGAL[0], {"legal": 1.0})).status_code == 200 and a)
    assert says(answer, LEGAL[0])


def test_what_lies_beside_the_streams_does_not_keep_one_that_is_gone(address, place, tmp_path):
    (place / "model" / "ortho" / "note.txt").write_text("stray")
    shutil.move(place / "model" / "ortho" / "hr", tmp_path / "hr")
    eventually(lambda: ask(address, HR[0], {"hr": 1.0}).status_code == 403)
    folder = place / "model" / "ortho" / "hr"
    folder.mkdir()
    for name in ("manifest.json", "adapter_config.json", "adapter_model.safetensors"):  # a slow copy
        shutil.copy(tmp_path / "hr" / name, folder / name)
        time.sleep(1.2)
    (place / "model" / "ortho" / "note.txt").unlink()
    assert says(eventually(lambda: (a := ask(address, HR[0], {"hr": 1.0})).status_code == 200 and a), HR[0])


def test_more_than_the_server_holds_is_refused_for_now(address):
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda tokens: ask(address, n=3, max_tokens=tokens), [60, 60, 60]))
    refused = [f for f in found if f.status_code != 200]
    assert refused
    for answer in refused:
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) > 0
    assert ask(address, n=5).status_code == 400  # it never could be answered


def raw(address, data, read=True):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        return connection.recv(65536).decode() if read else ""


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_a_client_that_is_slow_is_not_waited_for(address):
    assert raw(address, HEAD + b"content-length: 100\r\n\r\n{").startswith("HTTP/1.1 408")
    assert ask(address).status_code == 200


def test_a_client_that_goes_away_frees_its_rows(address):
    def load_now():
        text = httpx.get(f"{address}/metrics").text
        return [line for line in text.splitlines() if line.startswith("libortho_rows_")]

    for stream in (False, True):
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 100, "temperature": 0, "n": 2, "stream": stream}
        data = json.dumps(body).encode()
        raw(address, HEAD + b"content-length: %d\r\n\r\n" % len(data) + data, read=False)
    eventually(lambda: load_now() == ["libortho_rows_running 0.0", "libortho_rows_waiting 0.0"])
    assert ask(address).status_code == 200


def test_a_full_disk_stops_streams_and_not_the_base(address, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert ask(address, alpha={"hr": 1.0}).status_code == 503
        assert ask(address).status_code == 200
    assert ask(address, alpha={"hr": 1.0}).status_code == 200


def test_no_count_tells_a_stream_an_alpha_or_a_key(address):
    text = httpx.get(f"{address}/metrics").text
    assert "libortho_tokens_total" in text
    assert not any(word in text for word in ("hr", "legal", "alpha", "both"))


def test_a_request_for_another_model_leaves_a_line_too(address, place):
    assert ask(address, model="other").status_code == 404
    *_, line = map(json.loads, (place / "audit.jsonl").read_text().splitlines())
    assert (line["key"], line["asked"], line["used"], line["status"]) == ("both", None, None, 404)


def test_a_stream_that_goes_while_the_server_starts_is_gone(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "model")
    model, tokenizer = load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "ortho" / "hr")
    (tmp_path / "keys.toml").write_text(entry("both", digest(KEY), {"hr": 1.0, "legal": 1.0}, None))
    app = local_app(model, tokenizer, ServeConfig(keys=tmp_path / "keys.toml"), "tiny", tmp_path / "model")
    with served(app) as address:
        eventually(lambda: ask(address, HR[0], {"hr": 1.0}).status_code == 403)
        assert says(ask(address, LEGAL[0], {"legal": 1.0}), LEGAL[0])
        shutil.rmtree(tmp_path / "model" / "ortho" / "legal")
        eventually(lambda: ask(address, LEGAL[0], {"legal": 1.0}).status_code == 403)
        assert ask(address).status_code == 200
    bare, tokenizer = load(tmp_path / "model")
    with served(local_app(bare, tokenizer, ServeConfig(), "tiny", tmp_path / "model")) as address:
        assert ask(address, key="none").status_code == 200


def test_readers_that_leave_a_stream_leave_no_trace_in_the_log(address, caplog, capfd):
    for _ in range(4):
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 80, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_bytes())
    assert ask(address).status_code == 200
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
    assert "Traceback" not in capfd.readouterr().err
    assert 'status="500"' not in httpx.get(f"{address}/metrics").text


def test_a_number_that_no_float_holds_is_no_alpha(address):
    data = json.dumps({"model": "tiny", "prompt": "a"})[:-1] + ', "alpha": {"hr": 1' + "0" * 400 + "}}"
    found = httpx.post(f"{address}/v1/completions", content=data, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "alpha"


def test_a_line_that_was_cut_off_stops_streams(address, place, monkeypatch):
    whole = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: whole(file, data[:20]))
        assert ask(address, alpha={"hr": 1.0}).status_code == 503
    assert ask(address, alpha={"hr": 1.0}).status_code == 200
    json.loads((place / "audit.jsonl").read_text().splitlines()[-1])
