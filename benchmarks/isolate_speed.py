"""What a step of `isolate` costs beside the least that it could cost, and how it grows.

    python benchmarks/isolate_speed.py [--rounds 9]

A step: the gradients of the forget and the retain terms through the quantised layers, the metric, Adam, clamping. The
least: forward and backward of the same sequences through the dense model, cross-entropy on every token, gradients for
the same columns alone. SmolLM2-135M in the dtype that this processor trains fastest, every `down_proj`, INT8, 0.5 %
columns; one thread, interleaved rounds. Peak memory is that of a whole `isolate` in a process of its own, above the
loaded model.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from _common import save
from _timing import ratio, rounds, shown
from libortho import IsolateConfig
from libortho.checkpoint.dense import load_model
from libortho.core.surgery import linear_weight, swap
from libortho.core.targets import find_targets
from libortho.demo.model import packaged_model
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import read_original
from libortho.isolation.retain import RETAIN_LENGTH
from libortho.isolation.state import RECORDS_PER_STEP, Epochs, Training
from libortho.isolation.train import step
from libortho.lm.checks import training_dtype
from libortho.lm.model import LanguageModel
from libortho.selection.curvature import curvature
from libortho.text.encoding import Encoded, collate, predicting
from libortho.training.edit import EditLinear

STEP_TARGET, MEMORY_TARGET = 1.15, 1e9
RECORD_TOKENS = 24

MEMORY = """
import torch
from libortho import IsolateConfig, isolate
from libortho.demo.facts import secrets
from libortho.demo.model import packaged_model
from libortho.checkpoint.dense import load_model
from libortho.lm.checks import training_dtype
def resident():
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))["VmRSS"].split()[0]) * 1024
torch.set_num_threads(1)
model, tokenizer = load_model(packaged_model(), training_dtype())
with torch.no_grad():
    model(torch.arange(10).unsqueeze(0))
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
isolate(model, tokenizer, secrets(0), config=IsolateConfig(max_steps=5))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024 - before)
"""


class DenseColumns(nn.Module):
    """A frozen dense layer with trainable additions to some of its columns."""

    def __init__(self, weight: torch.Tensor, index: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("index", index)
        self.delta = nn.Parameter(torch.zeros(len(index), weight.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + x.index_select(-1, self.index) @ self.delta.to(x.dtype)


def sequences(count: int, length: int, seed: int, judged: int | None = None) -> list[Encoded]:
    rng = random.Random(seed)
    texts = [tuple(rng.randrange(1000, 40000) for _ in range(length)) for _ in range(count)]
    return [Encoded(t, (-100,) * (length - judged) + t[length - judged :] if judged else t) for t in texts]


class Bench:
    """One model, its quantised edit and its dense counterpart, and steps of both on the same sequences."""

    def __init__(self, layers: int | None, retain_tokens: int) -> None:
        model, _ = load_model(packaged_model(), training_dtype())
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
        model.requires_grad_(False)
        self.model, self.lm = model, LanguageModel(model)
        self.config = IsolateConfig()
        targets = find_targets(model, ["down_proj"])
        generator = torch.Generator().manual_seed(0)
        index = {n: torch.randperm(m.in_features, generator=generator)[:8].sort().values for n, m in targets.items()}
        self.edited = {n: EditLinear(linear_weight(m), None, index[n], 8, -1) for n, m in targets.items()}
        self.dense = {n: DenseColumns(linear_weight(m), index[n]) for n, m in targets.items()}
        count = RECORDS_PER_STEP
        secrets = sequences(count, RECORD_TOKENS, 0, 8)
        others = sequences(count, RECORD_TOKENS, 1, 8)
        neighbours, strangers = (sequences(count, RECORD_TOKENS, s, 8) for s in (3, 4))
        matched = tuple((0, n) for n in range(len(predicting(strangers[0]))))
        self.forget = [
            ForgetRecord(
                number=i, secret=s, alternates=(o,), neighbours=(n,), held=(n,), controls=(w,), swapped_prompt=(),
                kind="code", like=(), matched_tokens=matched, aligned_controls=(0,),
                alternate_matched_tokens=(matched,),
            )
            for i, (s, o, n, w) in enumerate(zip(secrets, others, neighbours, strangers, strict=True))
        ]  # fmt: skip
        self.retain = sequences(retain_tokens // RETAIN_LENGTH, RETAIN_LENGTH, 2)
        self.all = [*secrets, *others, *neighbours, *self.retain]
        self.original = read_original(self.lm, self.forget, self.retain, [], [], [], self.config)
        kept = [collate([t]) for t in self.retain]
        metrics = curvature(self.lm, targets, index, kept, damping=self.config.damping, seed=0)
        values = [m.values for m in self.edited.values()]
        self.state = Training(values, count, self.retain, self.config, [metrics[n] for n in self.edited])
        every = len(self.retain)
        self.state.texts = Epochs(every, every, self.state.rng)  # a step of isolate reads 256 tokens of them

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.all)

    def step(self) -> None:
        swap(self.model, self.edited)
        step(self.lm, self.edited, self.forget, self.retain, self.original, self.config, self.state, 1.0)

    def least(self) -> None:
        swap(self.model, self.dense)
        values = [m.delta for m in self.dense.values()]
        for length in sorted({len(e.ids) for e in self.all}):
            batch = collate([e for e in self.all if len(e.ids) == length])
            logits = self.lm.logits(self.lm.hidden(batch)[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten())
            torch.autograd.grad(loss, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    count = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    bench = Bench(None, 256)
    seconds = rounds({"step": bench.step, "least": bench.least}, count)
    against = ratio(seconds, "step", "least")
    print(
        f"step of {bench.tokens} tokens, {1000 * min(seconds['step']):.0f} ms; / forward + backward: {shown(against)}"
    )
    print(f"  target <= {STEP_TARGET}: {'met' if against['median'] <= STEP_TARGET else 'MISSED'}")
    data: dict[str, Any] = {"step": against, "seconds": seconds, "target": STEP_TARGET, "tokens": [], "layers": []}
    for retain in (256, 1024, 2048):
        bench = Bench(10, retain)
        taken = min(rounds({"step": bench.step}, 3, 1)["step"])
        data["tokens"].append({"tokens": bench.tokens, "seconds": taken})
        print(f"10 layers, {bench.tokens:5} tokens: {1000 * taken / bench.tokens:.2f} ms per token")
    for layers in (10, 20, 30):
        bench = Bench(layers, 256)
        taken = min(rounds({"step": bench.step}, 3, 1)["step"])
        data["layers"].append({"layers": layers, "seconds": taken})
        print(f"{layers} layers, {bench.tokens} tokens: {1000 * taken:.0f} ms")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    data["peak_bytes_above_model"] = int(done.stdout)
    print(f"peak memory above the model: {int(done.stdout) / 1e6:.0f} MB (target <= {MEMORY_TARGET / 1e6:.0f})")
    print(f"saved to {save('isolate_speed', data).name}")


if __name__ == "__main__":
    main()
