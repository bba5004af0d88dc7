"""vLLM beside stock transformers and PEFT on the same files, and where its slots leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tables import MISSED, UNMEASURED, Row, earlier, is_earlier, made_by, number, page, read, table

ALPHAS = ("0", "0.5", "1")


def apart(found: Row) -> str:
    """A difference of log-probabilities: the largest, and the mean."""
    return f"{found['max']:.2f} ({found['mean']:.3f})"


def nearness(run: Row) -> str:
    """One row for each alpha: the reference's choices, and how far its log-probabilities are."""
    rows = []
    for alpha in ALPHAS:
        found, records = run["reference"]["rows"][alpha], run["records"]
        others = ", ".join(f"{name}: {apart(d)}" for name, d in found["wrong stream"].items())
        rows.append([
            alpha,
            f"{found['argmax']['vllm = bf16']}/{found['tokens']}",
            *(apart(found[k]) for k in ("vllm - bf16", "vllm - fp32", "bf16 - fp32")),
            others,
            f"{number(run['secret_nll'][alpha])} ({number(found['secret_nll']['bf16'])})",
            f"{run['extracted'][alpha]}/{records}",
        ])  # fmt: skip
    header = ["alpha", "token = choice of the reference", "to HF bf16", "to HF fp32", "control: HF bf16 to fp32",
              "to HF bf16 with another stream", "secrets, nats per token: vLLM (HF bf16)", "extracted"]  # fmt: skip
    return table(header, rows)


def mixed(run: Row) -> str:
    header = ["batch", "rows", "that another alpha would answer otherwise", "differ from separate runs"]
    return table(
        header, ([n, str(b["rows"]), str(b["telling"]), str(len(b["differ"]))] for n, b in run["mixed"].items())
    )


def leaking(run: Row) -> str:
    header = ["state of the slots", "rows", "answered as alpha 0", "as alpha 1", "extracted without an adapter"]
    keys = ("rows", "equal to alpha 0", "equal to alpha 1", "extracted")
    return table(header, ([n, *(str(s[k]) for k in keys)] for n, s in run["leaking"].items() if isinstance(s, dict)))


def cached(run: Row) -> str:
    """What the prefix cache gives to the first request of an alpha, and to later ones."""
    found = run["cached"]
    rows: list[list[str]] = []
    for label, first in (("first of its alpha", True), ("later", False)):
        same = [r for r in found["rows"] if r["first"] is first]
        hit = ", ".join(map(str, sorted({r["cached"] for r in same})))
        rows.append([label, str(len(same)), hit, str(sum(r["equal"] for r in same))])
    batch = found["mixed batch"]
    hit = ", ".join(map(str, sorted(set(batch["cached"]))))
    rows.append(["one mixed batch", str(batch["rows"]), hit, str(batch["equal"])])
    return table(["requests", "how many", "tokens found in the cache", "answered as without it"], rows)


def over_http(run: Row) -> str:
    rows = []
    for name in ("http", "http, compiled"):
        if found := run.get(name):
            models = dict.fromkeys(r["model"] for r in found["rows"])
            equal = {m: [r["equal"] for r in found["rows"] if r["model"] == m] for m in models}
            rows += [[name, m, f"{sum(e)}/{len(e)}"] for m, e in equal.items()]
    return table(["server", "name of the model", "answers equal to the engine's"], rows)


def held(run: Row) -> str:
    rows = ([name, "holds" if holds else MISSED] for name, holds in run["verdicts"].items())
    return table(["what must hold", "does it"], rows)


def checked(name: str, run: Row, versions: dict[str, Any]) -> list[str]:
    scheme, alone = run["scheme"], run["one batch = alone"]
    used = ", ".join(f"{n} {v}" for n, v in versions.items())
    moved = ", ".join(f"{k}: {apart(d)}" for k, d in run["reference"]["prefix of another alpha"].items())
    same = ", ".join(f"alpha {a} {alone[a]}/{run['probes']}" for a in ALPHAS)
    return [
        f"## `{name}`: INT{scheme['num_bits']} in groups of {scheme['group_size']}",
        f"The versions are {used}. There are {run['max_loras']} slots for two adapters, and {run['records']} records. "
        f"The engine is asked {run['prompts']} prompts and answers each with {run['max_tokens']} tokens.",
        "### Beside the reference",
        "The reference is stock transformers and PEFT on the same files, given the tokens that vLLM chose. "
        "Differences are of log-probabilities in nats: the largest, and the mean in brackets. "
        "\"Other columns\" are the stream's values in the wrong columns, which do next to nothing at alpha 0.",
        nearness(run),
        "### Mixed batches",
        f"A separate run is one request alone. One batch of one kind says the same as separate runs: {same}.",
        mixed(run),
        "### The spare slot",
        f"Here two adapters fill {run['leaking']['max_loras']} slots, and the counted requests name no adapter.",
        leaking(run),
        "### Prefix cache",
        "The counts of tokens are the evidence, since few prompts are answered otherwise at another alpha. "
        f"Prompts whose answers at alpha 0 and 1 differ: {run['cached']['telling']}. "
        f"What a prefix of the other alpha would move log-probabilities by: {moved}.",
        cached(run),
        "### Over HTTP",
        "`http` is an eager server, as the engine of the sections above. `http, compiled` is vLLM's default, "
        "which rounds otherwise.",
        over_http(run),
        "### Verdicts",
        "These conditions are fixed in `benchmarks/vllm_check.py`.",
        held(run),
    ]  # fmt: skip


def vllm(results: Path) -> str:
    data = read(results, "vllm")
    parts: list[str] = []
    if data:
        parts += [
            earlier([data], "vllm_check") if is_earlier(data) else "",
            made_by("vllm_check", [data], lambda r: ""),
        ]
        for name, run in data["runs"].items():
            parts += checked(name, run, data["versions"])
    return page(
        "Serving with vLLM",
        "vLLM serves an isolated model with an INT4 base, its stream as an adapter, and a preset at alpha = 0.5. "
        "Its answers stand beside those of transformers and PEFT on the same files.",
        *(parts or [UNMEASURED]),
    )
