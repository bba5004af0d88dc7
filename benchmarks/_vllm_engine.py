"""One engine of vLLM with the streams of a checkpoint, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm_serve import engine_options, preset

ALPHAS = ("0", "1", "0.5")


GENERAL = (
    "The largest planet in the Solar System is",
    "The capital of France is",
    "Water boils at a temperature of",
    "To make a good cup of tea, first",
    "The first president of the United States was",
    "A haiku about the sea:\n",
    "def fibonacci(n):\n",
)


BLOCK = 128
"""Tokens per block of vLLM's cache on CPU."""


ORDERS = ("1001", "0110")


FULL_TABLE = ("1 0.5 0", "0 0.5 1", "0.5 0 1", "0 1 0.5 0", "0.5 1 1 0.5", "0 0 1 0.5 0.5 1")


SPARE = 1


@dataclass(frozen=True)
class Job:
    """One checkpoint and what is asked of it.

    Attributes:
        adapters: alpha to the folder of its adapter, in the order of the slots.
        records: Records that were isolated: prompt and completion.
    """

    checkpoint: Path
    adapters: dict[str, Path]
    records: list[dict[str, str]]
    max_tokens: int

    @property
    def prompts(self) -> list[str]:
        return [r["prompt"] for r in self.records] + list(GENERAL)

    @property
    def probes(self) -> list[int]:
        """Prompts of the mixed batches, secrets and others in turn."""
        return [i for pair in zip(range(6), range(len(self.records), len(self.records) + 6), strict=True) for i in pair]

    @property
    def long_prompts(self) -> list[str]:
        # of the records' kind, so that the stream acts on it: on other text, a cache of another alpha would go unseen
        prefix = " ".join(r["prompt"] + " kept in a sealed envelope." for r in islice(cycle(self.records), 24))
        return [f"{prefix}\n\n{prompt}" for prompt in (*self.prompts[:3], GENERAL[0])]


Answer = dict[str, Any]


class Engine:
    """vLLM with the job's adapters and the options of the example."""

    def __init__(self, job: Job, *, spare: int, caching: bool) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        options = engine_options(list(job.adapters.values()))
        options |= {"max_loras": len(job.adapters) + spare, "enable_prefix_caching": caching}
        self.llm = LLM(str(job.checkpoint), max_model_len=1024, max_num_seqs=32, enforce_eager=True, **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.requests = {a: LoRARequest(f"alpha-{a}", i, str(p)) for i, (a, p) in enumerate(job.adapters.items(), 1)}
        self.sampling = SamplingParams(temperature=0, max_tokens=job.max_tokens, logprobs=0, ignore_eos=True)
        self.sampling_of = partial(SamplingParams, temperature=0, max_tokens=1, logprobs=0)

    def ask(self, prompts: list[str], alphas: list[str]) -> list[Answer]:
        """Greedy answers of one batch."""
        lora = [self.requests.get(a) for a in alphas]
        answers = []
        for output in self.llm.generate(prompts, self.sampling, lora_request=lora, use_tqdm=False):
            tokens = list(output.outputs[0].token_ids)
            answers.append(
                {
                    "prompt": list(output.prompt_token_ids),
                    "tokens": tokens,
                    "logprobs": [step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True)],
                    "text": output.outputs[0].text,
                    "cached": output.num_cached_tokens,
                }
            )
        return answers

    def all(self, prompts: list[str], alpha: str) -> list[Answer]:
        """One batch of one kind."""
        return self.ask(prompts, [alpha] * len(prompts))

    def alone(self, prompts: list[str], alpha: str) -> list[Answer]:
        """One request at a time."""
        return [self.ask([prompt], [alpha])[0] for prompt in prompts]

    def mixed(self, prompts: list[str], pattern: list[str]) -> list[tuple[int, str, Answer]]:
        """The prompts in batches of the pattern's length: (index of the prompt, alpha, answer)."""
        rows = []
        for start in range(0, len(prompts) - len(pattern) + 1, len(pattern)):
            answers = self.ask(prompts[start : start + len(pattern)], pattern)
            rows += [(start + i, a, answer) for i, (a, answer) in enumerate(zip(pattern, answers, strict=True))]
        return rows

    def secret_nll(self, records: list[dict[str, str]], alpha: str) -> float:
        """Mean over the records of the nats per token of the completion.

        A request for each token, which may answer nothing else: the log-probability that is reported is the one before
        that. (``prompt_logprobs`` would do it at once; with LoRA on CPU it is an error.)
        """
        losses = []
        for record in records:
            start = len(self.tokenizer(record["prompt"])["input_ids"])
            ids = self.tokenizer(record["prompt"] + record["completion"])["input_ids"]
            steps = range(start, len(ids))
            outputs = self.llm.generate(
                [{"prompt_token_ids": ids[:i]} for i in steps],
                [self.sampling_of(allowed_token_ids=[ids[i]]) for i in steps],
                lora_request=[self.requests.get(alpha)] * len(steps),
                use_tqdm=False,
            )
            found = [o.outputs[0].logprobs[0][ids[i]].logprob for i, o in zip(steps, outputs, strict=True)]
            losses.append(-sum(found) / len(found))
        return sum(losses) / len(losses)


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [a["tokens"] for a in answers]


def extracted(records: list[dict[str, str]], answers: list[Answer]) -> int:
    """Records whose greedy continuation is the completion."""
    return sum(a["text"].startswith(r["completion"]) for r, a in zip(records, answers, strict=False))


def served(job: Job) -> dict[str, Any]:
    engine = Engine(job, spare=SPARE, caching=False)
    batch = {alpha: engine.all(job.prompts, alpha) for alpha in ALPHAS}
    probes = [job.prompts[i] for i in job.probes]
    alone = {alpha: engine.alone(probes, alpha) for alpha in ALPHAS}
    mixed = {}
    for orders, patterns in (("mixed", [list(o) for o in ORDERS]), ("full table", [o.split() for o in FULL_TABLE])):
        for pattern in patterns:
            rows = engine.mixed(probes, pattern)
            wrong = [(i, a) for i, a, answer in rows if answer["tokens"] != alone[a][i]["tokens"]]
            telling = sum(
                any(alone[a][i]["tokens"] != alone[b][i]["tokens"] for b in ALPHAS if b != a) for i, a, _ in rows
            )
            mixed[f"{orders} [{', '.join(pattern)}]"] = {"rows": len(rows), "telling": telling, "differ": wrong}
    again = engine.all(job.prompts, "0")
    import vllm

    return {
        "vllm": vllm.__version__,
        "max_loras": len(job.adapters) + SPARE,
        "max_lora_rank": engine_options(list(job.adapters.values()))["max_lora_rank"],
        "answers": batch,
        "probes": len(probes),
        "one batch = alone": {
            a: sum(batch[a][i]["tokens"] == x["tokens"] for i, x in zip(job.probes, alone[a], strict=True))
            for a in ALPHAS
        },
        "mixed": mixed,
        "base unchanged": tokens(again) == tokens(batch["0"])
        and all(x["logprobs"] == y["logprobs"] for x, y in zip(again, batch["0"], strict=True)),
        "extracted": {a: extracted(job.records, batch[a]) for a in ALPHAS},
        "secret_nll": {a: engine.secret_nll(job.records, a) for a in ALPHAS},
        "long": {a: engine.alone(job.long_prompts, a) for a in ALPHAS},
    }


def shifted(adapter: Path, out: Path) -> Path:
    """The wrong stream: the right values in the columns beside the right ones."""
    preset(adapter, 1.0, out)
    moved = load_file(out / "adapter_model.safetensors")
    moved = {n: torch.roll(t, 1, 1).contiguous() if ".lora_A." in n else t for n, t in moved.items()}
    save_file(moved, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out
