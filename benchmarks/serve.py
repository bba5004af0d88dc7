"""A server under load: whether every answer has its own alpha, and what serving costs.

    python benchmarks/serve.py --part load          32 clients, 10,000 requests, a fifth of them given up
    python benchmarks/serve.py --part throughput    mixed alphas, one alpha, and batched model.generate, in turn
    python benchmarks/serve.py --part gateway       what the gateway costs, over an engine that answers at once
    python benchmarks/serve.py --part timing        whether times tell alpha 0 from 1, with timing="constant"

The model is SmolLM2 in fp32 with two streams of eight facts each, and clients speak HTTP. Under load the server is
`libortho serve` in a process of its own, and what an answer must be is computed before, one prompt at a time, under its
alpha. The other parts have the server in a thread, so that what they compare shares the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from _common import RESULTS, save, stamped
from _private_facts import private_facts
from libortho import TuneConfig, alpha, load, tune
from libortho import save as save_model
from libortho.auditing.roc import auc_estimate
from libortho.checkpoint.dense import load_model
from libortho.core.cache import cache_directory
from libortho.demo.model import packaged_model
from libortho.lm.generation import generate
from libortho.serving.app import make_app
from libortho.serving.config import ServeConfig
from libortho.serving.engine import Piece, Row
from libortho.serving.gateway import Gateway
from libortho.serving.keys import entry, new_key
from libortho.serving.local import LocalEngine
from libortho.serving.prompts import Prompts

FACTS, TOKENS, CLIENTS = 8, 8, 32
ALPHAS = ({}, {"hr": 1.0}, {"legal": 1.0}, {"hr": 1.0, "legal": 1.0}, {"hr": 0.5})
RIGHTS = {"hr": {"hr": 1.0}, "both": {"hr": 1.0, "legal": 1.0}}
CANCELLED = 0.2
"""Share of requests that their clients give up after the first bytes."""
ROUNDS, BATCH, SAID = 5, 16, 32
"""Rounds of throughput, rows of a batch, and tokens of an answer there."""


def served_model() -> Path:
    """SmolLM2 with two streams, made once."""
    path = cache_directory() / "benchmarks" / "served"
    if not path.is_dir():
        model, tokenizer = load_model(packaged_model(), torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for name, first in (("hr", 0), ("legal", 100)):
            facts = private_facts(0, FACTS, first=first)[2]
            tune(model, tokenizer, facts, name, TuneConfig(ratio=0.005))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, path)
    return path


def prompts() -> list[list[dict[str, str]]]:
    """Questions of both owners, and of people that nothing trained."""
    rows = [r for first in (0, 100, 300) for r in private_facts(0, FACTS, first=first)[2]]
    return [r["messages"][:-1] for r in rows]


class Expected:
    """Greedy answers, one prompt at a time."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer = load(path)

    def answer(self, messages: list[dict[str, str]], alphas: dict[str, float]) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        with alpha(self.model, alphas):
            [[said]] = generate(self.model, self.tokenizer, [ids], TOKENS)
        return str(self.tokenizer.decode(said, skip_special_tokens=True))

    def table(self) -> dict[tuple[int, int], str]:
        asked = prompts()
        return {(i, j): self.answer(m, a) for i, m in enumerate(asked) for j, a in enumerate(ALPHAS)}


@contextmanager
def server(path: Path, *options: str) -> Iterator[tuple[str, dict[str | None, str], int]]:
    """Its address, the keys by name, and its process."""
    with tempfile.TemporaryDirectory() as place:
        keys: dict[str | None, str] = {None: "none"}
        lines = []
        for name, rights in RIGHTS.items():
            keys[name], sha256 = new_key()
            lines.append(entry(name, sha256, rights, None))
        (Path(place) / "keys.toml").write_text("\n".join(lines))
        port = str(random.randrange(20000, 60000))
        files = ("--keys", f"{place}/keys.toml", "--audit-log", f"{place}/audit.jsonl")
        program = Path(sys.executable).with_name("libortho")
        command = [str(program), "serve", str(path), "--port", port, *files, *options]
        process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        address = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + 300
            while not ready(address):
                assert process.poll() is None, "the server did not start"
                assert time.monotonic() < until, "the server is not ready"
                time.sleep(0.5)
            yield address, keys, process.pid
        finally:
            process.terminate()
            process.wait(120)


def ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def resident(process: int) -> int:
    """Bytes of memory that a process has now."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) * 1024


async def ask(client: httpx.AsyncClient, key: str, messages: Any, alphas: Any, *, stream: bool, leave: bool) -> Any:
    """Status and text; text is None of a request that was given up."""
    body = {"model": "served", "messages": messages, "max_tokens": TOKENS, "temperature": 0, "alpha": alphas}
    headers = {"authorization": f"Bearer {key}"}
    if not stream:
        call = client.post("/v1/chat/completions", json=body, headers=headers)
        if leave:
            try:
                await asyncio.wait_for(call, random.random())
            except TimeoutError:
                return None, None
            return None, None
        found = await call
        return found.status_code, found.json()["choices"][0]["message"]["content"] if found.status_code == 200 else ""
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}, headers=headers) as found:
        async for line in found.aiter_lines():
            if leave:
                return None, None
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += event["choices"][0]["delta"].get("content") or ""
    return found.status_code, text


def allowed(key: str | None, alphas: dict[str, float]) -> bool:
    rights = RIGHTS.get(key or "", {})
    return all(rights.get(n, -1.0) >= a for n, a in alphas.items())


def part_load(count: int) -> Iterator[dict[str, Any]]:
    """Every answer is compared; every secret is looked for where it may not be."""
    path = served_model()
    expected, asked = Expected(path).table(), prompts()
    secrets = {n: [r["messages"][-1]["content"] for r in private_facts(0, FACTS, first=f)[2]]
               for n, f in (("hr", 0), ("legal", 100))}  # fmt: skip
    found: Counter[str] = Counter()
    memory: list[int] = []

    async def main(address: str, keys: dict[str | None, str], process: int) -> None:
        rng, left = random.Random(0), iter(range(count))

        async def client() -> None:
            async with httpx.AsyncClient(base_url=address, timeout=600) as http:
                for number in left:
                    i, j, key = rng.randrange(len(asked)), rng.randrange(len(ALPHAS)), rng.choice((None, *RIGHTS))
                    stream, leave, alphas = rng.random() < 0.5, rng.random() < CANCELLED, ALPHAS[j]
                    status, text = await ask(http, keys[key], asked[i], alphas, stream=stream, leave=leave)
                    if number and number % 1000 == 0:
                        memory.append(resident(process))
                    if status is None:
                        found["cancelled"] += 1
                        continue
                    found[f"status {status}"] += 1
                    if allowed(key, alphas) != (status == 200):
                        found["wrong rights"] += 1
                    if status == 200 and text != expected[i, j]:
                        found["wrong answers"] += 1
                    if any(s in text for n in secrets if not alphas.get(n) for s in secrets[n]):
                        found["secrets"] += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    with server(path, "--name", "served") as (address, keys, process):
        began = time.monotonic()
        asyncio.run(main(address, keys, process))
        seconds = time.monotonic() - began
        histogram = [x for x in httpx.get(f"{address}/metrics").text.splitlines() if x.startswith("libortho_first")]
    yield {
        "method": "load", "requests": count, "clients": CLIENTS, "seconds": seconds, **found,
        "memory_growth": memory[-1] / memory[0] - 1 if len(memory) > 1 else None, "first_token": histogram,
    }  # fmt: skip


@contextmanager
def in_thread(engine: Any, tokenizer: Any) -> Iterator[str]:
    """The address of a gateway over this engine."""
    config = ServeConfig(most_rows=BATCH)
    app = make_app(Gateway(engine, Prompts(tokenizer, len(tokenizer)), config, "served"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http="h11"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Everyone(LocalEngine):
    """Asks by the seed of a request for its alphas, for who measures needs no rights."""

    def generate(self, rows: Any) -> Any:
        return super().generate([
            replace(r, alpha={**r.alpha, **ALPHAS[(r.sampling.seed or 0) % len(ALPHAS)]}) for r in rows
        ])  # fmt: skip


def engine_of(model: Any, tokenizer: Any, **more: Any) -> Any:
    return Everyone(model, tokenizer, most_rows=BATCH, most_waiting=1000, **more)


async def at_once(address: str, seeds: Sequence[int]) -> float:
    """Seconds of so many requests, BATCH at a time."""
    asked, left = prompts(), iter(seeds)

    async def client(http: httpx.AsyncClient) -> None:
        for seed in left:
            body = {"model": "served", "messages": asked[seed % len(asked)], "max_tokens": SAID, "temperature": 0}
            (await http.post("/v1/chat/completions", json={**body, "seed": seed})).raise_for_status()

    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        began = time.monotonic()
        await asyncio.gather(*(client(http) for _ in range(BATCH)))
        return time.monotonic() - began


def part_throughput(count: int) -> Iterator[dict[str, Any]]:
    """Seconds of the same number of answers, by turns."""
    model, tokenizer = load(served_model())
    texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in prompts()]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    seconds: dict[str, list[float]] = {"mixed": [], "one alpha": [], "model.generate": []}
    with in_thread(engine_of(model, tokenizer), tokenizer) as address:
        for _ in range(ROUNDS):
            seconds["mixed"].append(asyncio.run(at_once(address, range(count))))
            seconds["one alpha"].append(asyncio.run(at_once(address, range(1, count * len(ALPHAS), len(ALPHAS)))))
            began = time.monotonic()
            with alpha(model, ALPHAS[1]):
                for start in range(0, count, BATCH):
                    generate(model, tokenizer, [ids[i % len(ids)] for i in range(start, start + BATCH)], SAID)
            seconds["model.generate"].append(time.monotonic() - began)
    yield {"method": "throughput", "answers": count, "tokens": SAID, "batch": BATCH, "seconds": seconds}


class AtOnce:
    """An engine that has said everything before it is asked."""

    streams: Mapping[str, str] = {}
    context = None
    forces = False

    async def start(self) -> None: ...

    def generate(self, rows: Sequence[Row]) -> list[AsyncIterator[Piece]]:
        async def say() -> AsyncIterator[Piece]:
            yield Piece("ok", 1, finish="stop")

        return [say() for _ in rows]

    def alive(self) -> bool:
        return True

    def load(self) -> tuple[int, int]:
        return 0, 0

    async def close(self) -> None: ...


def part_gateway(count: int) -> Iterator[dict[str, Any]]:
    """Seconds of requests one after the other."""
    _, tokenizer = load(served_model(), streams=None)
    body = {"model": "served", "messages": prompts()[0], "max_tokens": 8}
    with in_thread(AtOnce(), tokenizer) as address, httpx.Client(base_url=address) as http:
        found = []
        for _ in range(count):
            began = time.perf_counter()
            http.post("/v1/chat/completions", json=body).raise_for_status()
            found.append(time.perf_counter() - began)
    found.sort()
    yield {"method": "gateway", "requests": count, "median": found[count // 2], "p95": found[count * 95 // 100]}


def part_timing(count: int) -> Iterator[dict[str, Any]]:
    """How well the time of an answer tells alpha 0 from 1."""
    model, tokenizer = load(served_model())
    for name in ("plain", "constant"):
        rng, found = random.Random(0), ([], [])
        engine = engine_of(model, tokenizer, constant=name == "constant")
        with in_thread(engine, tokenizer) as address, httpx.Client(base_url=address, timeout=600) as http:
            for _ in range(count):
                on = rng.randrange(2)
                body = {"model": "served", "messages": prompts()[16], "max_tokens": 1, "temperature": 0, "seed": on}
                began = time.perf_counter()
                http.post("/v1/chat/completions", json=body).raise_for_status()
                found[on].append(time.perf_counter() - began)
        auc = auc_estimate(torch.tensor(found[1]), torch.tensor(found[0]), seed=0)
        medians = [sorted(f)[len(f) // 2] for f in found]
        yield {"method": name, "timings": count, "auc": [auc.value, auc.low, auc.high], "medians": medians}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "load": lambda given: part_load(given.count or 10_000),
    "throughput": lambda given: part_throughput(given.count or 64),
    "gateway": lambda given: part_gateway(given.count or 500),
    "timing": lambda given: part_timing(given.count or 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--count", type=int, help="requests")
    given = parser.parse_args()
    for row in PARTS[given.part](given):
        path = RESULTS / "serve.json"
        kept = json.loads(path.read_text())["rows"] if path.is_file() else []
        kept = [r for r in kept if (r["part"], r["method"]) != (given.part, row["method"])]
        save("serve", {"rows": [*kept, stamped({"part": given.part, **row})]})
        print({k: v for k, v in row.items() if k != "first_token"})


if __name__ == "__main__":
    main()
