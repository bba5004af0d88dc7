"""Write the pages of docs/results, pictures, and the marked blocks of README.md, from what the benchmarks stored.

    python -m benchmarks.report            write them
    python -m benchmarks.report --check    exit with 1 if any differs from what would be written

Pictures go to docs/images. A block of README.md is what stands between ``<!-- report: NAME -->`` and
``<!-- /report -->``; names: summary, cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import audits, forgetting, others, pictures, readme, server, serving, storage, targets, tuning
from .tables import page

ROOT = Path(__file__).parents[2]
PAGES = {
    "canaries": (forgetting.canaries, "random codes in plain text: said, guessed, relearned, rounded"),
    "chats": (forgetting.chats, "the same in chats of one and of three turns"),
    "tofu": (audits.tofu, "answers about made-up authors, beside a retrained model and other methods"),
    "audit": (audits.audit, "verdicts on the demonstration's model"),
    "isolating": (others.isolating, "seconds and memory of `isolate` beside planting"),
    "tuning": (tuning.tuning, "private facts in a stream, beside LoRA and plain fine-tuning"),
    "server": (server.server, "requests of mixed alphas under load, and what serving costs"),
    "speed": (others.speed, "what the switch costs in decode and prefill"),
    "rounding": (others.rounding, "what the base loses by rounding"),
    "known-support": (others.known_support, "whether scores find the columns that secrets lie in"),
    "targets": (targets.targets, "what `isolate` aims at, beside what untrained models say"),
    "split": (others.split, "the split by weights alone"),
    "disk": (storage.disk, "what checkpoints weigh, what loading costs, and how long the command line takes to start"),
    "vllm": (serving.vllm, "vLLM beside transformers and PEFT on the same files"),
}


def generated(results: Path, docs: Path, front: Path) -> dict[Path, str]:
    """Every file and its text. ``front`` is README.md, whose text stays outside its marked blocks."""
    index = "\n".join(f"- [{name}]({name}.md): {words}." for name, (_, words) in PAGES.items())
    about = "These pages are written from the files in `benchmarks/results`."
    made = "The command, commit, date, machine and settings of a section stand above its first table."
    marks = "A figure beyond its limit is marked **not reached**. One that too few records decide is marked undecided."
    texts = {docs / f"{name}.md": write(results) for name, (write, _) in PAGES.items()}
    texts[docs / "index.md"] = page("Results", f"{about} {made}", marks, index)
    drawn = {docs.parent / "images" / f"{name}.svg": draw(results) for name, draw in pictures.PICTURES.items()}
    texts |= {path: picture for path, picture in drawn.items() if picture is not None}
    texts[front] = readme.rewritten(front.read_text(), results)
    return texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="of a checkout")
    given = parser.parse_args(arguments)
    docs = given.root / "docs" / "results"
    texts = generated(given.root / "benchmarks" / "results", docs, given.root / "README.md")
    differ = [p for p, text in texts.items() if not p.is_file() or p.read_text() != text]
    unknown = [p for p in sorted(docs.glob("*.md")) if p not in texts]
    if given.check:
        for path in (*differ, *unknown):
            print(f"{path.relative_to(given.root)} is not what `python -m benchmarks.report` writes")
        return int(bool(differ or unknown))
    for path in differ:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path])
        print(f"wrote {path.relative_to(given.root)}")
    for path in unknown:
        print(f"{path.relative_to(given.root)} is no page of the report")
    return int(bool(unknown))


if __name__ == "__main__":
    raise SystemExit(main())
