"""The hub's own client sends a checkpoint over HTTP: exactly the files that were asked for, and they load again."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from making import contents, flip, logits, write

from libortho import CheckpointError
from libortho.checkpoint import load, push_to_hub

TOKEN = "hf_right"
REPOSITORY = "me/model"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that creating, uploading and downloading a model needs; large files take the LFS way."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def reply(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self) -> None:
        """One request: remembered, refused if the test says so, and handed to the method of its path."""
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self.body()
        hub.requests.append(f"{self.command} {path}")
        if hub.refuse is not None and re.fullmatch(hub.refuse[0], f"{self.command} {path}"):
            return self.reply(hub.refuse[1], {"error": "not for you"})
        if path.startswith("/lfs/"):  # an address that is its own permission, as a store's is
            hub.objects[path.removeprefix("/lfs/")] = body
            return self.reply(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound")
        model = f"/api/models/{REPOSITORY}"
        routes = {
            "POST /api/repos/create": self.create,
            "POST /api/validate-yaml": lambda _: self.reply(200, {}),
            f"POST {model}/preupload/main": self.preupload,
            f"POST /{REPOSITORY}.git/info/lfs/objects/batch": self.batch,
            f"POST {model}/commit/main": self.commit,
            f"GET {model}": self.info,
            f"GET {model}/revision/main": self.info,
            f"GET {model}/tree/{hub.revision}": self.tree,
        }
        route = routes.get(f"{self.command} {path}")
        found = re.fullmatch(rf"/{REPOSITORY}/resolve/(main|{hub.revision})/(.+)", path)
        if route is not None:
            return route(body)
        if found and self.command in ("GET", "HEAD"):
            return self.resolve(found[2])
        return self.reply(500, {"error": f"the stand-in knows no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def create(self, body: bytes) -> None:
        asked, address = json.loads(body), {"url": f"{self.server.address}/{REPOSITORY}"}
        if self.server.private is not None:
            return self.reply(409, address | {"error": "You already created this model repo"})
        assert f"{asked.get('organization')}/{asked['name']}" == REPOSITORY, asked
        self.server.private = asked.get("private", asked.get("visibility") == "private")
        return self.reply(200, address)

    def preupload(self, body: bytes) -> None:
        paths = [f["path"] for f in json.loads(body)["files"]]
        modes = {p: "lfs" if p.endswith(".safetensors") else "regular" for p in paths}
        self.reply(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def batch(self, body: bytes) -> None:
        objects = [
            o | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        content = json.dumps({"transfer": "basic", "objects": objects}).encode()
        self.reply(200, content, Content_Type="application/vnd.git-lfs+json")

    def commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                assert value["encoding"] == "base64"
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
                assert len(self.server.files[value["path"]]) == value["size"]
            else:
                assert key == "header", key
        self.server.commits += 1
        oid = self.server.revision
        self.reply(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{REPOSITORY}/commit/{oid}"}
        )

    def info(self, _: bytes) -> None:
        if self.server.private is None:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": f} for f in self.server.files]
        return self.reply(200, {"id": REPOSITORY, "sha": self.server.revision, "siblings": siblings})

    def tree(self, _: bytes) -> None:
        assert "recursive" in parse_qs(urlsplit(self.path).query)
        entries = [
            {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for p, c in self.server.files.items()
        ]
        self.reply(200, entries)

    def resolve(self, name: str) -> None:
        if name not in self.server.files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.server.revision)
        content = self.server.files[name]
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.reply(200, content, ETag=tag, X_Repo_Commit=self.server.revision)


class Server(ThreadingHTTPServer):
    """A hub with one repository, and what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: bool | None = None
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse: tuple[str, int] | None = None
        self.commits = 0
        self.failure: BaseException | None = None

    @property
    def revision(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what an assertion of the server says for the test."""
        self.failure = sys.exc_info()[1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server, which the client takes for the hub. It reads its settings when it is imported."""
    server = Server()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # an earlier one might have a proxy
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
    assert server.failure is None


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """The streams "default" and "hr", and a file that is nobody's business."""
    return write(tmp_path / "in", contents(made) | {"notes.jsonl": b"the secret is 6311"})


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def written(directory: Path, *streams: str) -> dict[str, bytes]:
    """What ``save`` wrote: the base, and the files of the named streams."""
    kept = tuple(f"ortho/{s}/" for s in streams)
    found = contents(directory).items()
    return {n: c for n, c in found if n != "notes.jsonl" and (not n.startswith("ortho/") or n.startswith(kept))}


def test_the_base_arrives_byte_for_byte_and_nothing_of_a_stream(source: Path, hub: Server, tmp_path: Path) -> None:
    before = contents(source)
    address = push_to_hub(source, REPOSITORY, token=TOKEN)
    assert address == f"{hub.address}/{REPOSITORY}/commit/{hub.revision}"
    assert contents(source) == before
    card = hub.files.pop("README.md").decode()
    assert hashes(hub.files) == hashes(written(source))
    assert hub.private is True
    assert "`default`" not in card
    assert "`hr`" not in card
    secrets = [c for n, c in before.items() if n.startswith("ortho/") or n == "notes.jsonl"]
    assert set(hub.objects) == {hashlib.sha256(before["model.safetensors"]).hexdigest()}
    assert not set(hashes(dict(enumerate(secrets))).values()) & set(hashes(hub.files).values())
    assert not any("ortho" in r or "notes" in r for r in hub.requests)


def test_a_named_stream_arrives_too_and_the_download_is_the_same_model(
    source: Path, hub: Server, tmp_path: Path
) -> None:
    push_to_hub(source, REPOSITORY, streams=["hr"], token=TOKEN)
    card = hub.files["README.md"].decode()
    assert "`hr`" in card
    assert "`default`" not in card
    assert hashes(hub.files) == hashes(written(source, "hr") | {"README.md": hub.files["README.md"]})
    place = snapshot_download(REPOSITORY, token=TOKEN, local_dir=tmp_path / "copy")
    assert hashes(written(Path(place), "hr")).items() >= hashes(written(source, "hr")).items()
    cached = snapshot_download(REPOSITORY, token=TOKEN)  # links into the client's cache
    expected = logits(load(source, streams=["hr"], alpha=1.0)[0])
    for again in (place, cached):
        model, tokenizer = load(again, alpha=1.0)
        assert [*next(m for m in model.modules() if hasattr(m, "streams")).streams] == ["hr"]
        assert torch.equal(logits(model), expected)
        assert tokenizer is not None
    base = logits(load(source, streams=None)[0])
    assert not torch.equal(expected, base)


def test_a_second_upload_keeps_the_card_and_a_card_of_ones_own_is_sent(source: Path, hub: Server) -> None:
    push_to_hub(source, REPOSITORY, token=TOKEN, private=False)
    assert hub.private is False
    card = hub.files["README.md"]
    push_to_hub(source, REPOSITORY, token=TOKEN)
    assert hub.private is False  # a repository that is there stays as it is
    assert hub.files["README.md"] == card
    (source / "README.md").write_text("---\nlicense: mit\n---\nmine")
    push_to_hub(source, REPOSITORY, token=TOKEN)
    assert hub.files["README.md"] == b"---\nlicense: mit\n---\nmine"


@pytest.mark.parametrize(
    "request_line", ["POST /api/repos/create", "POST .*/preupload/main", "POST .*/objects/batch", "PUT /lfs/.*"]
)
def test_a_refusal_is_the_hub_s_own_error_and_leaves_nothing_there(
    request_line: str, source: Path, hub: Server
) -> None:
    hub.refuse = (request_line, 403)
    with pytest.raises(HfHubHTTPError, match="403") as caught:
        push_to_hub(source, REPOSITORY, token=TOKEN)
    assert caught.value.response.status_code == 403
    assert hub.commits == 0
    assert hub.files == {}


def test_a_wrong_token_is_refused(source: Path, hub: Server) -> None:
    with pytest.raises(RepositoryNotFoundError):
        push_to_hub(source, REPOSITORY, token="hf_wrong")
    assert hub.private is None


def test_a_damaged_checkpoint_and_a_stream_that_is_not_there_ask_the_hub_nothing(source: Path, hub: Server) -> None:
    for streams, message in ((["x"], "no stream 'x'"), ([], "no stream to upload"), ("hr", r"a list such as \['hr'\]")):
        with pytest.raises(CheckpointError, match=message):
            push_to_hub(source, REPOSITORY, streams=streams, token=TOKEN)
    flip(source / "model.safetensors")
    with pytest.raises(CheckpointError, match="has the hash"):
        push_to_hub(source, REPOSITORY, token=TOKEN)
    assert hub.requests == []
