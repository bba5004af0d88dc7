"""How long the command line and the package take to start.

    python benchmarks/startup.py [--rounds 9]

Each time is that of a new process, from start to exit: ``libortho --help``, ``libortho COMMAND --help`` (the slowest
command), an empty Python, ``import torch``, and ``import torch, libortho``. Rounds are interleaved; the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from _common import save, spread
from libortho.cli.commands import app

CALL = "import sys; sys.argv[0] = 'libortho'; from libortho.cli import main; main()"
TARGETS = {"--help": 0.5, "COMMAND --help": 1.0, "import libortho beyond torch": 0.3}


def seconds(*arguments: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    count = parser.parse_args().rounds
    verbs = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None]
    commands = {
        "python": ("pass",), "import torch": ("import torch",), "import torch, libortho": ("import torch, libortho",),
        "--help": (CALL, "--help"), **{f"{verb} --help": (CALL, verb, "--help") for verb in verbs},
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(count):
        for name, arguments in commands.items():
            times[name].append(seconds(*arguments))
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, values in times.items():
        print(f"{name:24} {spread(values)} s")
    measured = {
        "--help": median["--help"],
        "COMMAND --help": max(median[f"{verb} --help"] for verb in verbs),
        "import libortho beyond torch": median["import torch, libortho"] - median["import torch"],
    }
    rows = [{"what": what, "seconds": value, "target": TARGETS[what]} for what, value in measured.items()]
    for row in rows:
        print(f"{row['what']:30} {row['seconds']:.3f} s, target {row['target']} s")
    save("startup", {"rows": rows, "median_seconds": median, "rounds": count})


if __name__ == "__main__":
    main()
