"""What checkpoints weigh, what loading one costs, and how long the command line takes to start."""

from __future__ import annotations

from pathlib import Path

from .tables import UNMEASURED, Row, judged, made_by, page, read, table

BASE, VALUES, FOLDER = 0.55, 0.011, 0.04
"""Limits of an INT8 checkpoint: its base relative to bf16, values and folder of a stream relative to the base."""


def megabytes(count: float, digits: int = 2) -> str:
    return f"{count / 1e6:.{digits}f}"


def within(value: float, limit: float | None, form: str) -> str:
    """A share beside its limit, in the same form; without a limit the share alone."""
    text = format(value, form)
    return text if limit is None else judged(f"{text}, limit {format(limit, form)}", value <= limit)


def bases(sizes: dict[str, Row]) -> str:
    rows = [
        [
            name,
            "dense" if s["bits"] is None else f"INT{s['bits']}",
            str(s["layers"]),
            megabytes(s["base_bytes"]),
            within(s["base_of_bf16"], BASE if s["bits"] == 8 else None, ".4f"),
            megabytes(s["weights_files_bytes"], 1),
        ]
        for name, s in sizes.items()
    ]
    return table(["checkpoint", "base", "split layers", "base, MB", "base / bf16", "files of weights, MB"], rows)


def streams(sizes: dict[str, Row]) -> str:
    rows = [
        [
            f"{name}: {stream}",
            f"{s['density']:.3%}",
            within(s["values_of_base"], VALUES if found["bits"] == 8 else None, ".3%"),
            within(s["adapter_without_tail_of_base"], FOLDER if found["bits"] == 8 else None, ".3%"),
            megabytes(s["one_hot_bytes"]),
            f"{s['tail_density']:.2%}, {megabytes(s['tail_bytes'])}" if s["tail_bytes"] else "-",
            f"{s['adapter_of_base']:.2%}",
        ]
        for name, found in sizes.items()
        for stream, s in found["streams"].items()
    ]
    header = ["stream", "density", "values / base", "folder without tail / base", "one-hot rows, MB",
              "tail: density, MB", "whole folder / base"]  # fmt: skip
    return table(header, rows)


def loading(ways: dict[str, Row], form: dict[str, str]) -> str:
    """The median of each way of loading, and in brackets the least and the most."""

    def cell(found: Row, form: str) -> str:
        scale = 1e-6 if form == ".0f" else 1
        median, low, high = (format(x * scale, form) for x in (found["median"], min(found["runs"]), max(found["runs"])))
        return f"{median} [{low}, {high}]"

    rows = [[name, *(cell(way[k], f) for k, f in form.items())] for name, way in ways.items()]
    return table(["way", "load, s", "one forward pass, s", "memory at its highest, MB", "memory afterwards, MB"], rows)


def starting(results: Path) -> list[str]:
    """Seconds of ``libortho --help`` and of the import; empty if nothing is stored."""
    if not (data := read(results, "startup")):
        return []
    rows = [[r["what"], judged(f"{r['seconds']:.3f}, limit {r['target']:g}", r["seconds"] <= r["target"])]
            for r in data["rows"]]  # fmt: skip
    others = [[name, f"{seconds:.3f}"] for name, seconds in data["median_seconds"].items()]
    return [
        "## Starting",
        made_by("startup", [data], lambda r: ""),
        f"Each time is that of a new process, the median of {data['rounds']} interleaved rounds. "
        "`COMMAND --help` is the slowest command.",
        table(["what", "seconds"], rows),
        table(["process", "seconds"], others),
    ]


def disk(results: Path) -> str:
    parts: list[str] = []
    if data := read(results, "disk"):
        form = {"load_seconds": ".2f", "forward_seconds": ".3f", "peak_bytes": ".0f", "resident_bytes": ".0f"}
        parts += [
            "## Sizes",
            made_by("disk", [data], lambda r: ""),
            f"The dense model's files of weights have {megabytes(data['dense_files_bytes'], 1)} MB.",
            bases(data["sizes"]),
            streams(data["sizes"]),
            "## Loading",
            f"Each figure is the median of {data['repeats']} fresh processes in turns, with the extremes in brackets. "
            "The page cache is warm. Memory is what is resident above the process after its imports.",
            loading(data["loading"], form),
        ]
    parts += starting(results)
    return page(
        "Disk, loading and starting",
        "The files of SmolLM2-135M are weighed as a dense model, isolated, and split. After each load one forward "
        "pass over eight tokens runs, since weights that are mapped from the file cost nothing until they are used.",
        *(parts or [UNMEASURED]),
    )
