"""Plant secrets in a real model, split it both ways, and measure what each way forgets.

(a) ``split`` sees only the weights: it compresses, and every secret stays.
(b) ``isolate`` sees the secrets: at alpha = 0 they are gone, at alpha = 1 they are back.

The never-trained model, which is the same model before planting, stands beside every figure.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from libortho.auditing.measures.utility import general_items
from libortho.auditing.roc import auc
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
from libortho.demo.kept import Kept
from libortho.demo.model import move_off_grid, packaged_model
from libortho.isolation.config import IsolateConfig
from libortho.isolation.isolate import isolate
from libortho.isolation.result import IsolateResult
from libortho.lm.asking import sampled_extractions
from libortho.lm.checks import training_dtype
from libortho.lm.generation import generate
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity, score, text_perplexity
from libortho.splitting.config import SplitConfig
from libortho.splitting.split import split
from libortho.text.encoding import Encoded, encode
from libortho.text.records import Record, load_records
from libortho.text.tokens import decoded, prompt_ids

logger = logging.getLogger(__name__)

ALPHAS = (1.0, 0.5, 0.0)
ENDS = (1.0, 0.0)
SPLITS = (
    SplitConfig(rank_ratio=0.95),
    SplitConfig(use_low_rank=False),
    SplitConfig(rank_ratio=0.98),
)
"""The three settings of the original note."""
USABLE = SPLITS[1:2]
"""The one whose base is good enough to be of use."""
SAMPLES = 20
UNSEEN, GENERAL = 60, 8
"""Unseen codes beside which the planted ones are ranked, and windows of general text, in every measurement: the
interval of the AUC is that of 16 planted codes, whatever their number."""


@dataclass(frozen=True)
class Measured:
    """One row of the main table.

    Attributes:
        label: Which model.
        extracted: Secrets whose greedy continuation is exact.
        sampled: Secrets found in any of 20 samples at temperature 1; None where not drawn.
        secret_perplexity: Of the secrets' completions, tokens pooled.
        membership_auc: Trained-on codes against unseen codes by log-likelihood, of plain prompts and of chats apart;
            0.5 cannot tell them apart.
        retain_perplexity: Of the original experiment's retain sentence.
        general_perplexity: Of text that isolate never saw.
    """

    label: str
    extracted: int
    sampled: int | None
    secret_perplexity: float
    membership_auc: float
    retain_perplexity: float
    general_perplexity: float


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
    """Everything the demonstration measured."""

    model: str
    seed: int
    secrets: int
    implant_steps: int
    splits: tuple[SplitRow, ...]
    never_trained: Measured
    implanted: Measured
    isolated: tuple[Measured, ...]
    isolate: IsolateResult
    generations: tuple[Generation, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**asdict(self), "isolate": self.isolate.to_dict()}


class _Bench:
    """The fixed material of one demonstration, and how a model is measured on it."""

    def __init__(self, tokenizer: Any, seed: int, text: Path | None) -> None:
        self.tokenizer = tokenizer
        self.secrets = load_records(facts.secrets(seed), tokenizer, name="secrets")
        self.unseen = load_records(facts.unseen(seed)[:UNSEEN], tokenizer, name="unseen")
        self.members = [i for i, r in enumerate(self.secrets) if r.prompt != facts.SENTENCE["prompt"]]
        self.general = general_items(tokenizer, text, GENERAL)

    def measure(self, model: nn.Module, label: str, *, samples: int = 0) -> Measured:
        lm = LanguageModel(model)
        secrets, greedy = score(lm, self._encode(self.secrets))
        unseen, _ = score(lm, self._encode(self.unseen))
        sampled = None
        if samples:
            sampled = sum(h > 0 for h in sampled_extractions(model, self.tokenizer, self.secrets, samples))
        return Measured(
            label=label,
            extracted=int(greedy.sum()),
            sampled=sampled,
            secret_perplexity=float((secrets.nll * secrets.tokens).sum().div(secrets.tokens.sum()).exp()),
            membership_auc=self._membership(secrets.nll, unseen.nll),
            retain_perplexity=text_perplexity(model, self.tokenizer, facts.RETAIN_SENTENCE),
            general_perplexity=perplexity(lm, self.general),
        )

    def _membership(self, secrets: Tensor, unseen: Tensor) -> float:
        """Mean over plain prompts and chats of the AUC of each, weighted by the members that it has."""
        total = 0.0
        for rendered in (False, True):
            mine = [i for i in self.members if self.secrets[i].rendered == rendered]
            others = [i for i, r in enumerate(self.unseen) if r.rendered == rendered]
            total += len(mine) * auc(-secrets[mine], -unseen[others]) if mine else 0.0
        return total / len(self.members)

    def _encode(self, records: list[Record]) -> list[Encoded]:
        return [encode(r, self.tokenizer) for r in records]

    def weights_only(self, model: nn.Module, config: SplitConfig) -> SplitRow:
        reports = layer_report(split(model, config))
        totals = reports.totals()
        sentence = facts.SENTENCE["prompt"] + facts.SENTENCE["completion"]
        forget, retain, extracted = [], [], []
        for value in (1.0, 0.0):
            with alpha(model, value):
                forget.append(text_perplexity(model, self.tokenizer, sentence))
                retain.append(text_perplexity(model, self.tokenizer, facts.RETAIN_SENTENCE))
                extracted.append(int(score(LanguageModel(model), self._encode(self.secrets))[1].sum()))
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
        full: Also alpha = 0.5, and all settings of the split by weights alone.
        progress: Called with (phase, done, total).

    Raises:
        LibOrthoError: if ``out`` holds anything else, cannot be written or has not enough room, or the model is
            missing or not of the Llama family.
    """
    config = config or IsolateConfig(seed=seed)
    dtype = dtype or training_dtype(device)
    name = model or "SmolLM2-135M-Instruct"
    kept = Kept(out, {"model": name, "seed": seed, "dtype": str(dtype), "libortho": __version__})
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
    bench = _Bench(tokenizer, seed, text)
    clock.lap("load")
    tell(progress, "measure never-trained", 0, 1)
    never = bench.measure(net, "never trained")
    clock.lap("measure")
    kept.begin(net, tokenizer)
    if (steps := kept.take_up(net)) is None:
        steps = implant(net, tokenizer, bench.secrets, seed=seed, progress=progress)
        kept.planted(net, tokenizer, steps)
    clock.lap("implant")
    tell(progress, "measure implanted", 0, 1)
    implanted = bench.measure(net, "implanted")
    clock.lap("measure")
    rows, settings = [], SPLITS if full else USABLE
    for number, setting in enumerate(settings):
        tell(progress, "split (weights only)", number, len(settings))
        rows.append(bench.weights_only(copy.deepcopy(net), setting))
    clock.lap("split")
    result = isolate(net, tokenizer, bench.secrets, config=config, progress=progress)
    clock.lap("isolate")
    if out is not None:
        save(net, tokenizer, out / "isolated")
    isolated, alphas = [], ALPHAS if full else ENDS
    for number, value in enumerate(alphas):
        tell(progress, "measure isolated", number, len(alphas))
        with alpha(net, value):
            isolated.append(bench.measure(net, f"alpha = {value:g}", samples=SAMPLES if value == 0 else 0))
    clock.lap("measure")
    tell(progress, "generate", 0, 1)
    generations = tuple(_generate(net, tokenizer, p) for p in _prompts(bench))
    clock.lap("generate")
    return DemoReport(
        model=name,
        seed=seed,
        secrets=len(bench.secrets),
        implant_steps=steps,
        splits=tuple(rows),
        never_trained=never,
        implanted=implanted,
        isolated=tuple(isolated),
        isolate=result,
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
