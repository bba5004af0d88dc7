"""What a checkpoint weighs and what loading it costs, beside the dense model.

    python benchmarks/disk.py CHECKPOINT DENSE [--also CHECKPOINT ...]

Sizes come from the files, also those of further checkpoints. Times and memory come from fresh processes, one for each
way of loading and repeat, the files read once before (page cache warm), in turns so that a busy moment meets all ways;
medians. Each process loads the model and runs one forward pass over eight tokens, since weights that are mapped from
the file take time and memory only when they are used. Memory is resident memory (mapped pages of the file included)
above that of the process after its imports, which are the same for all ways, the model's class among them: the highest
until after the pass, and what is left then. ``libortho.load`` also verifies every hash and loads the tokenizer.
Targets: INT8 base of the split layers at most 0.55 of bf16; at 0.5 % density the values of the columns at most 1.1 % of
the base and the whole PEFT adapter at most 4 %; a tail is reported apart.
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
from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.stream_files import ADAPTER_WEIGHTS, StreamManifest

LOAD = """
import sys, time
import compressed_tensors, torch, transformers, libortho
transformers.utils.logging.disable_progress_bar()
transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(transformers.AutoConfig.from_pretrained(sys.argv[2]))]  # imports it
def memory(key):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[key].split()[0]) * 1024
before, start = memory("VmRSS"), time.perf_counter()
model = {load}
loaded = time.perf_counter()
with torch.no_grad():
    model(torch.arange(1, 9)[None])
print(loaded - start, time.perf_counter() - loaded, memory("VmHWM") - before, memory("VmRSS") - before)
"""
COLUMNS = ("load_seconds", "forward_seconds", "peak_bytes", "resident_bytes")
WAYS = {
    "libortho.load": "libortho.load(sys.argv[1], alpha=1.0)[0]",
    "libortho.load, no stream": "libortho.load(sys.argv[1], streams=None)[0]",
    "from_pretrained, the checkpoint": "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])",
    "from_pretrained, the dense model": "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])",
}


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
            "tail_density": stream.tail_density,
            "layers": stream.layers,
            "values_bytes": values,
            "values_of_base": values / info.base_bytes,
            "adapter_bytes": on_disk,
            "adapter_of_base": on_disk / info.base_bytes,
            "adapter_without_tail_of_base": (on_disk - tail) / info.base_bytes,
            "one_hot_bytes": one_hot,
            "tail_bytes": tail,
            "tail_of_base": tail / info.base_bytes,
            "is_adapter": (folder / ADAPTER_WEIGHTS).is_file(),
        }
    return {
        "layers": info.layers,
        "bits": info.bits,
        "bits_per_weight": info.bits_per_weight,
        "base_bytes": info.base_bytes,
        "base_of_bf16": info.base_bytes / dense,
        "weights_files_bytes": files_bytes(directory),
        "streams": streams,
    }


def files_bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def show_sizes(name: str, found: dict[str, Any]) -> None:
    width, int8 = "dense" if found["bits"] is None else f"INT{found['bits']}", found["bits"] == 8
    print(
        f"{name}: {width} base of {found['layers']} split layers {found['base_bytes'] / 1e6:.2f} MB, "
        f"{found['base_of_bf16']:.4f} of bf16{' (<= 0.55)' if int8 else ''}; "
        f"files of weights {found['weights_files_bytes'] / 1e6:.1f} MB"
    )
    for stream, s in found["streams"].items():
        print(
            f"  stream {stream}: density {s['density']:.3%}, values {s['values_of_base']:.3%} of the base"
            f"{' (<= 1.1 %)' if int8 else ''}, folder without tail {s['adapter_without_tail_of_base']:.3%}"
            f"{' (<= 4 %)' if int8 else ''}, one-hot rows {s['one_hot_bytes'] / 1e6:.2f} MB"
        )
        if s["tail_bytes"]:
            print(
                f"  tail of {stream}: density {s['tail_density']:.2%}, {s['tail_bytes'] / 1e6:.2f} MB, "
                f"{s['tail_of_base']:.2%} of the base; whole folder {s['adapter_of_base']:.2%}"
            )


def loading(directory: Path, dense: Path, repeats: int) -> dict[str, Any]:
    runs: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for repeat in range(repeats + 1):
        for name, load in WAYS.items():
            command = [sys.executable, "-c", LOAD.format(load=load), str(directory), str(dense)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if repeat:  # the first one fills the page cache
                runs[name].append([float(x) for x in done.stdout.split()])
    return {
        name: {
            key: {"median": statistics.median(column), "runs": list(column)}
            for key, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)
        }
        for name, rows in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="further checkpoints, for their sizes alone")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    dense_bytes = files_bytes(arguments.dense)
    found = {place.name: sizes(place) for place in [arguments.checkpoint, *arguments.also]}
    print(f"dense model: files of weights {dense_bytes / 1e6:.1f} MB")
    for name, data in found.items():
        show_sizes(name, data)
    times = loading(arguments.checkpoint, arguments.dense, arguments.repeats)
    print(f"\n{'':34} {'load s':>8} {'forward s':>9} {'peak MB':>8} {'after MB':>8}")
    for name, row in times.items():
        load, forward, peak, after = (row[key]["median"] for key in COLUMNS)
        print(f"{name:34} {load:8.2f} {forward:9.3f} {peak / 1e6:8.0f} {after / 1e6:8.0f}")
    data = {"repeats": arguments.repeats, "dense_files_bytes": dense_bytes, "sizes": found, "loading": times}
    print(f"\nsaved to {_common.save('disk', data).name}")


if __name__ == "__main__":
    main()
