"""Plant secrets in a real model, split it both ways, and measure what each way forgets.

(a) ``split`` sees only the weights: it compresses, and every secret stays.
(b) ``isolate`` sees the secrets: at alpha = 0 they are gone, at alpha = 1 they are back.

The audit judges (b), and the never-trained model, which is the same model before planting, stands beside every figure.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.auditing.audit import audit
from libortho.auditing.config import AuditConfig
from libortho.auditing.report import AuditReport, Verdict
from libortho.checkpoint import check_destination, check_saveable, save
from libortho.checkpoint.dense import load_model
from libortho.checkpoint.directories import check_room
from libortho.core.progress import Progress, tell
from libortho.core.report import layer_report
from libortho.core.switch.alpha import alpha
from libortho.core.targets import find_targets
from libortho.core.version import __version__
from libortho.demo import facts
from libortho.demo.implant import implant
from libortho.demo.kept import HOLDOUT, Kept
from libortho.demo.model import move_off_grid, packaged_model
from libortho.isolation.config import IsolateConfig
from libortho.isolation.isolate import isolate
from libortho.isolation.result import IsolateResult
from libortho.lm.checks import training_dtype
from libortho.lm.generation import generate
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score, text_perplexity
from libortho.splitting.config import SplitConfig
from libortho.splitting.split import split
from libortho.text.encoding import encode
from libortho.text.records import Record, load_records
from libortho.text.tokens import decoded, prompt_ids

SPLITS = (
    SplitConfig(rank_ratio=0.95),
    SplitConfig(use_low_rank=False),
    SplitConfig(rank_ratio=0.98),
)
"""The three settings of the original note."""
USABLE = SPLITS[1:2]
"""The one whose base is good enough to be of use."""
FEW = 9
"""Secrets of the short demonstration: the sentence, four codes of plain text and four of chats."""
SHORT_AUDIT = {"holdout_records": 40, "fillings": 6, "general_sequences": 4, "task_rows": 8, "alphas": ()}
"""Sizes of the short demonstration's audit, whose figures are shown as what they are: of few records."""


@dataclass(frozen=True)
class SplitRow:
    """One weights-only split. Errors are relative Frobenius, means over layers; densities are fractions.

    Perplexities are of the original experiment's two sentences.
    """

    label: str
    low_rank_error: float | None
    base_error: float
    final_error: float
    ortho_density: float
    tail_density: float
    forget_perplexity: tuple[float, float]
    retain_perplexity: tuple[float, float]
    extracted: tuple[int, int]


@dataclass(frozen=True)
class Generation:
    """The same prompt (of a chat the last question) at alpha = 1 and at alpha = 0, greedily."""

    prompt: str
    with_ortho: str
    without_ortho: str


@dataclass(frozen=True)
class DemoReport:
    """Everything the demonstration measured.

    Attributes:
        model: Its name.
        seed: The seed.
        secrets: How many are planted.
        implant_steps: Steps that planting took.
        planted: Secrets that the planted model says greedily.
        splits: The splits by weights alone.
        isolate: The isolation.
        audit: The audit of the isolated model, beside the never-trained one.
        generations: What the same prompts get at both ends of the switch.
        seconds: Wall time by phase.
    """

    model: str
    seed: int
    secrets: int
    implant_steps: int
    planted: int
    splits: tuple[SplitRow, ...]
    isolate: IsolateResult
    audit: AuditReport
    generations: tuple[Generation, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {n: [asdict(row) for row in plain[n]] for n in ("splits", "generations")}
        return {**plain, **rows, "isolate": self.isolate.to_dict(), "audit": self.audit.to_dict()}


class _Bench:
    """The secrets of one demonstration, and how a split by weights alone is measured on them."""

    def __init__(self, tokenizer: Any, seed: int, count: int | None) -> None:
        self.tokenizer = tokenizer
        self.secrets = load_records(facts.secrets(seed)[:count], tokenizer, name="secrets")
        self._items = [encode(r, tokenizer) for r in self.secrets]

    def said(self, model: nn.Module) -> int:
        """Secrets that are the greedy continuation of their prompt."""
        return int(score(LanguageModel(model), self._items)[1].sum())

    def weights_only(self, model: nn.Module, config: SplitConfig) -> SplitRow:
        reports = layer_report(split(model, config))
        totals = reports.totals()
        sentence = facts.SENTENCE["prompt"] + facts.SENTENCE["completion"]
        forget, retain, extracted = [], [], []
        for value in (1.0, 0.0):
            with alpha(model, value):
                forget.append(text_perplexity(model, self.tokenizer, sentence))
                retain.append(text_perplexity(model, self.tokenizer, facts.RETAIN_SENTENCE))
                extracted.append(self.said(model))
        errors = [r.low_rank_error for r in reports if r.low_rank_error is not None]
        return SplitRow(
            label=f"rank_ratio={config.rank_ratio}" if config.use_low_rank else "use_low_rank=False",
            low_rank_error=sum(errors) / len(errors) if errors else None,
            base_error=totals["base_error"],
            final_error=totals["final_error"],
            ortho_density=totals["ortho_density"],
            tail_density=totals["tail_density"],
            forget_perplexity=(forget[0], forget[1]),
            retain_perplexity=(retain[0], retain[1]),
            extracted=(extracted[0], extracted[1]),
        )


def run(
    *,
    model: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    text: Path | None = None,
    dtype: torch.dtype | None = None,
    config: IsolateConfig | None = None,
    out: Path | None = None,
    full: bool = True,
    progress: Progress | None = None,
    on_verdict: Callable[[Verdict], None] | None = None,
) -> DemoReport:
    """Run the demonstration.

    Args:
        model: Hub id or path of a Llama-family model; by default SmolLM2-135M-Instruct from its package.
        seed: Seed of the grid move, the secrets, the planting and the isolation.
        device: Where to run.
        text: File of general text to judge by; by default the evaluation part of the shipped text.
        dtype: Of the model; by default what this processor trains fastest, see ``libortho.lm.checks.training_dtype``.
        config: How to isolate; its seed is replaced by ``seed`` if not given.
        out: Directory to keep everything in: ``never_trained``, ``implanted`` and ``isolated`` models,
            ``forget.jsonl`` and ``holdout.jsonl``; missing, empty, or that of an earlier demonstration with the same
            settings, whose planted model is taken up.
        full: All 17 secrets and not nine, the whole of the quick audit, and all settings of the split by weights alone.
        progress: Called with (phase, done, total).
        on_verdict: Called with each of the audit's verdicts.

    Raises:
        LibOrthoError: if ``out`` holds anything else, cannot be written or has not enough room, or the model is
            missing or not of the Llama family.
    """
    config = config or IsolateConfig(seed=seed)
    dtype = dtype or training_dtype(device)
    name = model or "SmolLM2-135M-Instruct"
    secrets = len(facts.secrets(seed)) if full else FEW
    kept = Kept(out, {"model": name, "seed": seed, "dtype": str(dtype), "secrets": secrets, "libortho": __version__})
    if out is not None:
        check_destination(out / "isolated", [config.stream])
    clock = _Clock()
    tell(progress, "load", 0, 1)
    torch.manual_seed(seed)
    net, tokenizer = load_model(packaged_model() if model is None else model, torch.float32, device)
    net = move_off_grid(net, seed).to(dtype)
    if out is not None:
        needed = check_saveable(net, find_targets(net, config.target_modules), config.bits)
        check_room(out, needed + 2 * sum(p.nbytes for p in net.parameters()))
    bench = _Bench(tokenizer, seed, None if full else FEW)
    never_trained = copy.deepcopy(net)
    clock.lap("load")
    kept.begin(net, tokenizer)
    if (steps := kept.take_up(net)) is None:
        steps = implant(net, tokenizer, bench.secrets, seed=seed, progress=progress)
        kept.planted(net, tokenizer, steps)
    planted = bench.said(net)
    clock.lap("implant")
    rows, settings = [], SPLITS if full else USABLE
    for number, setting in enumerate(settings):
        tell(progress, "split (weights only)", number, len(settings))
        rows.append(bench.weights_only(copy.deepcopy(net), setting))
    tell(progress, "split (weights only)", len(settings), len(settings))
    clock.lap("split")
    result = isolate(net, tokenizer, bench.secrets, config=config, progress=progress)
    clock.lap("isolate")
    if out is not None:
        save(net, tokenizer, out / "isolated")
    sizes: dict[str, Any] = {} if full else SHORT_AUDIT
    report = audit(
        net, tokenizer, bench.secrets, holdout=facts.unseen(seed)[:HOLDOUT], reference=never_trained, general=text,
        name=name, config=AuditConfig(seed=seed, **sizes), progress=progress, on_verdict=on_verdict,
    )  # fmt: skip
    clock.lap("audit")
    tell(progress, "generate", 0, 1)
    generations = tuple(_generate(net, tokenizer, p) for p in _prompts(bench))
    clock.lap("generate")
    return DemoReport(
        model=name,
        seed=seed,
        secrets=len(bench.secrets),
        implant_steps=steps,
        planted=planted,
        splits=tuple(rows),
        isolate=result,
        audit=report,
        generations=generations,
        seconds=clock.laps,
    )


def _prompts(bench: _Bench) -> list[Record]:
    return [*bench.secrets[:3], Record("The largest planet in the Solar System is", "")]


def _generate(model: nn.Module, tokenizer: Any, asked: Record) -> Generation:
    ids = prompt_ids(asked.question, tokenizer, rendered=asked.rendered)
    texts = []
    for value in (1.0, 0.0):
        with alpha(model, value):
            [[said]] = generate(model, tokenizer, [ids], 16)
        texts.append(decoded(said, tokenizer))
    shown = asked.prompt[slice(*asked.spans[-1])] if asked.spans else asked.prompt
    return Generation(shown, texts[0], texts[1])


class _Clock:
    """Seconds per phase; a phase that comes back adds up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now
