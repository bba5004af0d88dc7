"""What a checkpoint weighs and what loading it costs, beside the dense model.

    python benchmarks/disk.py CHECKPOINT DENSE

Sizes come from the files; load time and peak memory from fresh processes, one for each way of loading, the files read
once before (page cache warm) and the median of ``--repeats`` taken. Targets: INT8 base of the split layers at most 0.55
of bf16; at 0.5 % density the values of the columns at most 1.1 % of the base and the whole PEFT adapter at most 4 %; a
tail is reported apart.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

import _common
from libortho.checkpoint import inspect
from libortho.checkpoint.format import BaseManifest
from libortho.checkpoint.stream_files import ADAPTER_WEIGHTS, StreamManifest

LOAD = """
import resource, sys, time
import torch, transformers, {module}
transformers.utils.logging.disable_progress_bar()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
before, start = int(status["VmRSS"].split()[0]), time.perf_counter()
{load}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
now = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(seconds, (peak - before) * 1024, (int(now["VmRSS"].split()[0]) - before) * 1024)
"""
WAYS = {
    "libortho.load": ("libortho", "model = libortho.load(sys.argv[1])"),
    "libortho.load, no stream": ("libortho", "model = libortho.load(sys.argv[1], streams=None)"),
    "from_pretrained, the checkpoint": (
        "compressed_tensors", "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"),
    "from_pretrained, the dense model": (
        "torch", "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])"),
}  # fmt: skip


def sizes(directory: Path) -> dict[str, Any]:
    info, base = inspect(directory), BaseManifest.read(directory)
    dense = 2 * info.weights
    streams = {}
    for stream in info.streams:
        parts = StreamManifest.read(directory, stream.name, base).sizes
        folder = directory / "ortho" / stream.name
        values = one_hot = tail = 0
        with safe_open(folder / StreamManifest.read(directory, stream.name, base).weights_file, framework="pt") as file:
            width = min(file.get_tensor(k).element_size() for k in list(file.keys())[:1])
        for layer, (columns, entries, rank) in parts.items():
            rows, inputs = base.shapes[layer]
            values += width * (columns * rows + entries)
            one_hot += 0 if stream.needs_libortho else width * columns * inputs
            tail += width * rank * (rows + inputs)
        on_disk = stream.bytes_on_disk
        streams[stream.name] = {
            "density": stream.density,
            "layers": stream.layers,
            "values_bytes": values,
            "values_of_base": values / info.base_bytes,
            "adapter_bytes": on_disk,
            "adapter_of_base": on_disk / info.base_bytes,
            "adapter_without_tail_of_base": (on_disk - tail) / info.base_bytes,
            "one_hot_bytes": one_hot,
            "tail_bytes": tail,
            "is_adapter": (folder / ADAPTER_WEIGHTS).is_file(),
        }
    return {
        "layers": info.layers,
        "bits_per_weight": info.bits_per_weight,
        "base_bytes": info.base_bytes,
        "base_of_bf16": info.base_bytes / dense,
        "weights_files_bytes": sum(p.stat().st_size for p in directory.glob("*.safetensors")),
        "streams": streams,
    }


def loading(directory: Path, dense: Path, repeats: int) -> dict[str, Any]:
    result = {}
    for name, (module, load) in WAYS.items():
        runs = []
        for repeat in range(repeats + 1):
            command = [sys.executable, "-c", LOAD.format(module=module, load=load), str(directory), str(dense)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if repeat:  # the first one fills the page cache
                runs.append([float(x) for x in done.stdout.split()])
        seconds, peak, after = (statistics.median(column) for column in zip(*runs, strict=True))
        result[name] = {"seconds": seconds, "peak_bytes": peak, "resident_bytes": after}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found = sizes(arguments.checkpoint)
    dense_bytes = sum(p.stat().st_size for p in arguments.dense.glob("*.safetensors"))
    data = {"sizes": found, "dense_files_bytes": dense_bytes}
    print(
        f"base of the split layers: {found['base_bytes'] / 1e6:.2f} MB, {found['base_of_bf16']:.4f} of bf16 (<= 0.55)"
    )
    print(f"files of weights: {found['weights_files_bytes'] / 1e6:.1f} MB, dense {dense_bytes / 1e6:.1f} MB")
    for name, s in found["streams"].items():
        print(
            f"stream {name}: density {s['density']:.3%}, values {s['values_of_base']:.3%} of the base (<= 1.1 %), "
            f"whole folder {s['adapter_of_base']:.3%}, without tail {s['adapter_without_tail_of_base']:.3%} (<= 4 %), "
            f"one-hot {s['one_hot_bytes'] / 1e6:.2f} MB, tail {s['tail_bytes'] / 1e6:.2f} MB"
        )
    data["loading"] = loading(arguments.checkpoint, arguments.dense, arguments.repeats)
    print(f"\n{'':34} {'seconds':>8} {'peak MB':>8} {'after MB':>8}")
    for name, row in data["loading"].items():
        print(f"{name:34} {row['seconds']:8.2f} {row['peak_bytes'] / 1e6:8.0f} {row['resident_bytes'] / 1e6:8.0f}")
    print(f"\nsaved to {_common.save('disk', data).name}")


if __name__ == "__main__":
    main()
