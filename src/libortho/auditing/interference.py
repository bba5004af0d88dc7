"""``interference``: with each subset of streams on, what is recited of each owner's records, and what else is left.

    up to 4 streams     every subset
    more                none, each alone, all but one, all

Each subset is one alpha context; the model's own alphas are what they were afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from libortho.auditing.inputs import FEW
from libortho.auditing.interference_report import InterferenceReport, OwnerFigures, SubsetFigures, label_of
from libortho.auditing.measures.utility import agreement, general_items
from libortho.auditing.roc import auc_difference, auc_estimate
from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.errors import ConfigError, DataError
from libortho.core.models import plain_torch, unwrapped
from libortho.core.progress import Progress, tell
from libortho.core.surgery import frozen
from libortho.core.switch.alpha import alpha, get_switch
from libortho.lm.asking import heard
from libortho.lm.checks import check_causal, check_tokens
from libortho.lm.generation import token_limit
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import PASS_TOKENS, judged_states, score
from libortho.text.encoding import Encoded, encode
from libortho.text.overlap import overlaps
from libortho.text.records import Record, Source, load_records

EVERY_SUBSET = 4
"""Most streams of which every subset is measured."""
_WINDOW = 256
"""Tokens of a window of general text, at most."""


def interference(
    model: nn.Module,
    tokenizer: Any,
    data: Mapping[str, Source],
    *,
    holdout: Mapping[str, Source] | None = None,
    text: str | Path | None = None,
    subsets: Iterable[Collection[str]] | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> InterferenceReport:
    """Measure what each subset of a model's streams recites of each owner's records. Changes nothing.

    Args:
        model: A model with two streams or more.
        tokenizer: Its tokenizer.
        data: Name of a stream, to the records that it holds; of two streams or more. Other streams take part too.
        holdout: Name of a stream, to records of the same form that nobody trained on.
        text: File of general text; by default text of the package that was never trained on.
        subsets: Sets of names that are on; all off is measured in any case. By default every subset of up to 4 streams,
            and of more: none, each alone, all but one, all.
        name: What the report calls the model.
        seed: Seed of the intervals.
        progress: Called with ("subsets", done, total).

    Returns:
        Figures of each subset, and verdicts.

    Raises:
        AlphaError: if the model is not split.
        ConfigError: if it has less than two streams, or a name is none of them.
        DataError: if records are missing or malformed, or a holdout record is one of the owner's own.
        TargetError: if the model is no causal LM in memory, or its output head is split.
    """
    began = time.monotonic()
    check_model(model)
    check_tokenizer(tokenizer)
    with plain_torch():
        model = unwrapped(model)
        check_causal(model)
        streams = get_switch(model).streams
        check_owners(streams, data, holdout or {})
        chosen, measured = subsets_of(streams, subsets)
        owners = tuple(s for s in streams if s in data)
        records = {o: load_records(data[o], tokenizer, name=f"data of {o}") for o in owners}
        unseen = {o: load_records(s, tokenizer, name=f"holdout of {o}") for o, s in (holdout or {}).items()}
        warnings = _overlaps(records, unseen)
        limit = token_limit(model, None)
        general = general_items(tokenizer, text, tokens=min(_WINDOW, limit or _WINDOW))
        named = [(f"{kind} of {o}", r) for kind, of in (("data", records), ("holdout", unseen)) for o, r in of.items()]
        check_tokens(model, tokenizer, ((f"{n} record {r.number}", r.text) for n, own in named for r in own))
        check_tokens(model, tokenizer, ((f"window {i} of the general text", w.ids) for i, w in enumerate(general, 1)))
        items = {n: [encode(r, tokenizer, limit, name=n) for r in own] for n, own in named}
        rows: list[SubsetFigures] = []
        losses: dict[str, tuple[Tensor, Tensor]] = {}  # with all streams off
        states: Sequence[Tensor] = ()
        total, done = len(chosen) * (1 + len(owners)), 0
        tell(progress, "subsets", done, total)
        with frozen(model, None):
            for on in chosen:
                with alpha(model, dict.fromkeys(on, 1.0) if on else 0.0):
                    lm = LanguageModel(model)
                    own = judged_states(lm, general, PASS_TOKENS)
                    states = states or own
                    seen = agreement(lm, general, states, lm, own)
                    tokens = int(seen.tokens.sum())
                    perplexity = math.exp(float(seen.nll.sum()) / tokens)
                    tell(progress, "subsets", done := done + 1, total)
                    found = {}
                    for owner in owners:
                        found[owner] = _figures(
                            lm, tokenizer, records[owner], items[f"data of {owner}"],
                            items.get(f"holdout of {owner}", []), owner, losses, seed,
                        )  # fmt: skip
                        tell(progress, "subsets", done := done + 1, total)
                ratio = perplexity / (rows[0].perplexity if rows else perplexity)
                rows.append(SubsetFigures(on, label_of(on, streams), found, perplexity, ratio, max(0.0, seen.mean_kl)))
    for owner, figures in rows[0].owners.items():
        if figures.recited:
            warnings.append(
                f"the base says {len(figures.recited)} of {owner}'s {figures.records} records by itself, with all "
                "streams off: they count as nobody's"
            )
    if idle := [s for s in streams if s not in owners]:
        warnings.append(f"no records were given for {', '.join(idle)}: what is recited of theirs is not measured")
    return InterferenceReport(
        streams, owners, measured, tuple(rows), tokens, tuple(warnings), name, time.monotonic() - began
    )


def check_owners(streams: Sequence[str], data: Iterable[str], holdout: Iterable[str]) -> None:
    """Refuse what no matrix can be made of.

    Args:
        streams: Those of the model.
        data: Owners of records.
        holdout: Owners of holdout records.

    Raises:
        ConfigError: if there are less than two streams, less than two owners, or an owner has no stream.
    """
    data, known = list(data), ", ".join(streams)
    if len(streams) < 2:
        there = (
            f"the one stream {known}; audit its records as a forget set" if streams else "no stream; tune two of them"
        )
        raise ConfigError(f"what streams do to each other takes two of them or more, and this model has {there}")
    for what, owners in (("data", data), ("holdout", list(holdout))):
        if strange := [o for o in owners if o not in streams]:
            raise ConfigError(f"{what} names the stream {strange[0]!r}; the model has {known}")
    if len(data) < 2:
        raise ConfigError(
            f"data are given of {data[0] if data else 'no stream'}{' alone' if data else ''}; expected records of two "
            f"streams or more of {known}, to see what dropping one leaves of the others"
        )
    if lonely := [o for o in holdout if o not in data]:
        raise ConfigError(f"holdout names {lonely[0]!r}, but data does not; give the records of {lonely[0]} as well")


def subsets_of(
    streams: Sequence[str], given: Iterable[Collection[str]] | None = None
) -> tuple[list[tuple[str, ...]], str]:
    """The subsets to measure, all off first, and which they are, in words.

    Raises:
        ConfigError: if a given subset names no stream.
    """
    n = len(streams)
    if given is not None:
        named = [{s} if isinstance(s, str) else set(s) for s in given]
        if strange := sorted(set().union(*named) - set(streams)):
            raise ConfigError(f"subsets name the stream {strange[0]!r}; the model has {', '.join(streams)}")
        chosen = [tuple(s for s in streams if s in own) for own in named]
        words = f"all off, and the subsets of {n} streams that were asked for"
    elif n <= EVERY_SUBSET:
        chosen = [c for size in range(n + 1) for c in combinations(streams, size)]
        words = f"every subset of {n} streams"
    else:
        chosen = [c for size in (1, n - 1, n) for c in combinations(streams, size)]
        words = f"none, each alone, all but one, and all of {n} streams"
    return list(dict.fromkeys([(), *chosen])), words


def _figures(
    lm: LanguageModel,
    tokenizer: Any,
    records: Sequence[Record],
    items: Sequence[Encoded],
    unseen: Sequence[Encoded],
    owner: str,
    losses: dict[str, tuple[Tensor, Tensor]],
    seed: int,
) -> OwnerFigures:
    """What the model says of an owner; ``losses`` takes those of the first call, (records,) and (holdout,) nats."""
    scores, first = score(lm, [*items, *unseen])
    mine, others = -scores.nll[: len(items)], -scores.nll[len(items) :]
    said, _ = heard(lm, tokenizer, records, items, first[: len(items)])
    off = losses.setdefault(owner, (mine, others))
    return OwnerFigures(
        records=len(records),
        recited=tuple(r.number for r, s in zip(records, said.tolist(), strict=True) if s),
        loss=-float(mine.double().mean()),
        auc=auc_estimate(mine, others, seed=seed) if unseen else None,
        auc_moved=auc_difference(mine, others, *off, seed=seed) if unseen else None,
    )


def _overlaps(records: Mapping[str, Sequence[Record]], unseen: Mapping[str, Sequence[Record]]) -> list[str]:
    """Warnings of facts that two owners share, and of few records.

    Raises:
        DataError: if a holdout record is one of the owner's own.
    """
    found = []
    for owner, own in records.items():
        if both := overlaps(own, unseen.get(owner, ())):
            i, j = next(iter(both.items()))
            raise DataError(
                f"{len(both)} holdout records of {owner} are in its data (data {own[j].number} = holdout "
                f"{unseen[owner][i].number}); a holdout holds records that were never trained on; remove them"
            )
        if len(own) < FEW:
            found.append(f"only {len(own)} records of {owner}: a verdict can rest on one of them")
    for a, b in combinations(records, 2):
        if both := overlaps(records[a], records[b]):
            i, j = next(iter(both.items()))
            found.append(
                f"{len(both)} records of {a} are {b}'s too ({a} {records[a][j].number} = {b} {records[b][i].number}): "
                "dropping one of the two does not take them"
            )
    return found
