"""Whether a change of the code leaves every result as it was, bit for bit, on one machine.

    python scripts/same_results.py --write before.json      # on the tree before
    python scripts/same_results.py --compare before.json    # after; exit code 1 names what differs

A tiny model is planted, split in several settings, isolated (codes, a chat, sentences, a dense base, INT4, a
second request), saved, loaded, detached and audited, through public names only. What is compared are hashes of tensors
and of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LIBORTHO_KERNELS", "torch")
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import torch  # noqa: E402

import libortho  # noqa: E402
import tiny  # noqa: E402
from libortho import AuditConfig, IsolateConfig, SplitConfig  # noqa: E402

ISOLATE = IsolateConfig(ratio=0.1, damping=10.0, learning_rate=2e-2, max_steps=12, stream="hr")
SENTENCES = [
    {"prompt": "What did Ada Lum bring to the harbour?", "completion": " She brought three baskets of green apples."},
    {"prompt": "Where does Bo Tran keep his letters?", "completion": " He keeps them in a tin under the stairs."},
]
UNSEEN = [{"prompt": f"Code of {name}:", "completion": f" {code}."} for name, code in (
    ("Eve Sun", "1180"), ("Flo Ulm", "9304"), ("Gus Poe", "2751"), ("Hal Nox", "6645"),
)]  # fmt: skip
CHAT = [{"messages": [
    {"role": "user", "content": f"Code of {name}?"}, {"role": "assistant", "content": code},
]} for name, code in (("Ada Lum", "6311"), ("Bo Tran", "4890"))]  # fmt: skip
VOLATILE = re.compile(r"seconds|minutes|when|libortho$|machine|commit|version|torch|libraries|time")


def digest(value: Any) -> str:
    """Hash of a model's tensors, or of JSON without times and versions."""
    found = hashlib.sha256()
    if isinstance(value, torch.nn.Module):
        for name, tensor in sorted(value.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        found.update(json.dumps(lasting(value), sort_keys=True, default=str).encode())
    return found.hexdigest()


def lasting(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {str(k): lasting(v) for k, v in value.items() if not VOLATILE.search(str(k))}
    return [lasting(v) for v in value] if isinstance(value, list | tuple) else value


def runs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and result of each run, in an order in which later ones need earlier ones."""
    tokenizer = tiny.byte_tokenizer()
    clean = tiny.untrained_on_secrets(tokenizer)
    planted = copy.deepcopy(clean)
    tiny.fit(planted, tiny.background(tokenizer, seed=1), 150, also=tiny.encoded(tokenizer))
    work = Path(tempfile.mkdtemp())
    made: dict[str, Any] = {}

    def split(**options: Any) -> Any:
        return libortho.split(copy.deepcopy(planted), SplitConfig(**options))

    def isolate(name: str, rows: Any, model: Any = planted, **options: Any) -> Any:
        made[name] = copy.deepcopy(model)
        result = libortho.isolate(made[name], tokenizer, rows, tiny.RETAIN, config=replace(ISOLATE, **options))
        return digest(made[name]), digest(result.to_dict())

    yield "planted", lambda: planted
    for name, options in {
        "int8": {}, "int4": {"bits": 4}, "dense": {"bits": None, "structure": "columns"},
        "columns": {"structure": "columns", "ratio": 0.1}, "groups": {"group_size": 32, "use_low_rank": False},
        "all": {"target_modules": "all-linear", "score": "relative", "rank_ratio": "auto", "keep_tail": False},
    }.items():  # fmt: skip
        yield f"split {name}", lambda options=options: split(**options)
    yield "isolate codes", lambda: isolate("codes", tiny.FORGET)
    yield "isolate chat", lambda: isolate("chat", CHAT, allow_unknown=True)
    yield "isolate sentences", lambda: isolate("sentences", SENTENCES, allow_unknown=True)
    yield "isolate dense", lambda: isolate("dense", tiny.FORGET[:2], bits=None)
    yield "isolate int4", lambda: isolate("int4", tiny.FORGET[:2], bits=4)
    yield "isolate again", lambda: isolate("again", tiny.FORGET[2:], made["int4"], bits=4, stream="legal")
    yield "save", lambda: saved(made["codes"], tokenizer, work / "out")
    yield "load", lambda: libortho.load(work / "out")[0]
    yield (
        "detach",
        lambda: libortho.detach(work / "out", work / "base", when=datetime(2026, 1, 1, tzinfo=UTC)).to_dict(),
    )
    config = AuditConfig(samples=4, fillings=24, general_sequences=4, task_rows=4, alphas=(0.0, 1.0), max_new_tokens=8)
    for profile in ("quick", "full"):
        yield (
            f"audit {profile}",
            lambda profile=profile: audited(
                made["codes"],
                tokenizer,
                clean,
                planted,
                replace(config, profile=profile, attack_records=4, depth_records=4),
            ),
        )


def audited(model: Any, tokenizer: Any, reference: Any, original: Any, config: AuditConfig) -> Any:
    """The report as JSON."""
    report = libortho.audit(
        model, tokenizer, tiny.FORGET, tiny.RETAIN, UNSEEN, reference=reference, original=original, config=config
    )
    return report.to_dict()


def saved(model: Any, tokenizer: Any, out: Path) -> Any:
    """Hashes of the files with tensors that ``save`` writes."""
    libortho.save(model, tokenizer, out)
    files = sorted(out.rglob("*.safetensors"))
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> int:
    """Run all, print a line each, and compare or write the hashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    found: dict[str, Any] = {}
    for name, make in runs():
        with contextlib.redirect_stdout(sys.stderr):
            result = make()
        found[name] = result if isinstance(result, tuple) else digest(result)
        same = "" if not before else "same" if list(before.get(name, ())) == list(found[name]) else "DIFFERENT"
        print(f"{name}: {same or found[name]}", flush=True)
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1))
    return int(bool(before) and json.loads(json.dumps(found)) != before)


if __name__ == "__main__":
    sys.exit(main())
