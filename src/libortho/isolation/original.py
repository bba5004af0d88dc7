"""What the training needs of the original model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libortho.core.run_cache import Entry, RunCache
from libortho.isolation.codes import code_profile, counterfactual_scores, expected_codes
from libortho.isolation.config import IsolateConfig
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.prose import SurprisalRegressor, fit
from libortho.isolation.request import Request
from libortho.isolation.sentences import Sentences
from libortho.lm.logits import Scores
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import grouped_scores, judged_states, score
from libortho.text.encoding import Encoded, predicting

_SWAPPED = 2
"""Neighbours' prompts on which a record's completion is looked for."""


@dataclass(frozen=True)
class Original:
    """What the original model says; constants of the training.

    Attributes:
        secret: Scores of the records, (records,).
        recited: Whether each record's completion is the greedy continuation of its prompt, (records,) bool.
        target: Surprise that each record should have had, (records,) in nats per token.
        beside: Mean negative log-likelihood of each record's counterfactuals, in nats per token, (records,); 0 for
            sentences that have none.
        spread: Standard deviation around the target's negative log-likelihood, in nats per token, (records,).
        profiles: For each record, what its tokens should look like, (tokens, 3), and those of each alternate.
        leaks_to_neighbours: Whether each record's completion is remembered after its neighbours' prompts too,
            (records,) bool.
        retain: ``judged_states`` of each retain sequence, (tokens, width).
        neighbours: ``judged_states`` of each neighbour with its closing, (tokens, width), record by record.
        sentences: How sentences are judged; None where there are none.
        expected: Surprise that is expected of each token of each sentence, (tokens,) in nats; empty for other records.
    """

    secret: Scores
    recited: Tensor
    target: Tensor
    beside: Tensor
    spread: Tensor
    profiles: tuple[tuple[Tensor, ...], ...]
    leaks_to_neighbours: Tensor
    retain: tuple[Tensor, ...]
    neighbours: tuple[tuple[Tensor, ...], ...]
    sentences: Sentences | None
    expected: tuple[Tensor, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {"target": self.target}
        named |= {
            "recited": self.recited,
            "leaks_to_neighbours": self.leaks_to_neighbours,
            "beside": self.beside,
            "spread": self.spread,
        }
        named |= {f"secret.{f}": getattr(self.secret, f) for f in ("nll", "tokens")}
        named |= {f"retain.{i}": states for i, states in enumerate(self.retain)}
        named |= {f"expected.{i}": e for i, e in enumerate(self.expected)}
        for name, groups in (("neighbours", self.neighbours), ("profiles", self.profiles)):
            named |= {f"{name}.{i}.{j}": tensor for i, group in enumerate(groups) for j, tensor in enumerate(group)}
        if self.sentences is not None:
            model = self.sentences.regressor
            named |= {"regressor.weights": model.weights, "regressor.deviation": torch.tensor(model.deviation)}
        return named

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        forget: Sequence[ForgetRecord],
        retain: int,
        device: torch.device,
        opening: Sequence[int],
        self_samples: Sequence[Encoded],
        seed: int,
    ) -> Original:
        """From what ``tensors()`` gave, for these records and ``retain`` texts; hidden states go to ``device``.

        The last three are what ``read_original`` was given.
        """

        def scores(name: str) -> Scores:
            return Scores(*(tensors[f"{name}.{f}"] for f in ("nll", "tokens")))

        secret, sentences = scores("secret"), None
        if "regressor.weights" in tensors:
            weights, deviation = tensors["regressor.weights"], float(tensors["regressor.deviation"])
            sentences = Sentences(SurprisalRegressor(weights, deviation, tuple(opening)), tuple(self_samples), seed)
        return cls(
            sentences=sentences,
            expected=tuple(tensors[f"expected.{i}"] for i in range(len(forget))),
            secret=secret,
            recited=tensors["recited"],
            target=tensors["target"],
            beside=tensors["beside"],
            spread=tensors["spread"],
            profiles=tuple(
                tuple(tensors[f"profiles.{i}.{j}"] for j in range(1 + len(c.alternate_matched_tokens)))
                for i, c in enumerate(forget)
            ),
            leaks_to_neighbours=tensors["leaks_to_neighbours"],
            retain=tuple(tensors[f"retain.{i}"].to(device) for i in range(retain)),
            neighbours=tuple(
                tuple(tensors[f"neighbours.{i}.{j}"].to(device) for j in range(len(c.neighbours)))
                for i, c in enumerate(forget)
            ),
        )


def read_original(
    lm: LanguageModel,
    forget: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    human: Sequence[Sequence[int]],
    opening: Sequence[int],
    self_samples: Sequence[Encoded],
    config: IsolateConfig,
) -> Original:
    """Everything that the training needs from the original model.

    For the targets of sentences: ``human`` are texts, ``opening`` the special tokens that the model expects before one,
    ``self_samples`` what it says itself on like prompts. Without the last, a sentence keeps its own distributions, with
    the predicted probability for its labels.
    """
    secret, recited = score(lm, [r.secret for r in forget])
    neighbours = tuple(judged_states(lm, r.held) for r in forget)
    controls = tuple(judged_states(lm, r.controls) for r in forget)
    counterfactual = [counterfactual_scores(lm, r, states) for r, states in zip(forget, neighbours, strict=True)]
    beside = torch.stack([s.nll.mean() for s in counterfactual])
    nll, spread = beside.clone(), torch.zeros(len(forget))
    code = torch.tensor([r.kind == "code" for r in forget])
    if code.any():
        pairs = [(r, s) for r, s in zip(forget, counterfactual, strict=True) if r.kind == "code"]
        nll[code], spread[code] = expected_codes([r for r, _ in pairs], [s for _, s in pairs])
    expected = [x.expand(len(predicting(r.secret))) for x, r in zip(nll, forget, strict=True)]
    sentences, untrained = None, {}
    if prose := (~code).nonzero()[:, 0].tolist():
        sentences = Sentences(fit(lm, human, opening), tuple(self_samples), config.seed)
        for i, e in zip(prose, sentences.expected(lm, [forget[i].secret for i in prose]), strict=True):
            nll[i], expected[i] = e.mean(), e
            spread[i] = sentences.regressor.deviation / secret.tokens[i].sqrt()
        if self_samples:
            untrained = dict(zip(prose, sentences.profiles(lm, [expected[i] for i in prose]), strict=True))
    predictors = judged_states(lm, [r.secret for r in forget])
    profiles = tuple(
        (untrained[i],)
        if i in untrained
        else tuple(code_profile(lm, r, tokens, *states) for tokens in (r.matched_tokens, *r.alternate_matched_tokens))
        for i, (r, *states) in enumerate(zip(forget, controls, predictors, expected, strict=True))
    )
    nll = torch.stack([own[:, 0].mean() for own, *_ in profiles])
    swapped = grouped_scores(lm, [r.swapped_prompt[:_SWAPPED] for r in forget])
    leaks = torch.tensor([float(s.nll.mean()) if len(s.nll) else math.inf for s in swapped]) < nll - spread
    return Original(
        secret=secret,
        recited=recited,
        target=nll,
        beside=beside,
        spread=spread,
        profiles=profiles,
        leaks_to_neighbours=leaks,
        retain=judged_states(lm, retain),
        neighbours=neighbours,
        sentences=sentences,
        expected=tuple(torch.zeros(0) if r.kind == "code" else e for e, r in zip(expected, forget, strict=True)),
    )


def kept_original(
    lm: LanguageModel,
    asked: Request,
    retain: Sequence[Encoded],
    held_back: Sequence[Encoded],
    human: Sequence[Sequence[int]],
    opening: Sequence[int],
    self_samples: Sequence[Encoded],
    config: IsolateConfig,
    store: RunCache,
) -> tuple[Original, tuple[Tensor, ...]]:
    """``read_original`` and its ``judged_states`` of texts that are held back, from the store if they are there."""
    stored = store.get("original")
    if stored is None:
        held = judged_states(lm, held_back)
        found = read_original(lm, asked.forget, retain, human, opening, self_samples, config)
        found = replace(found, recited=asked.recited(lm))
        store.put("original", Entry(found.tensors() | {f"held_back.{i}": t for i, t in enumerate(held)}))
        return found, held
    held = tuple(stored.tensors[f"held_back.{i}"].to(lm.device) for i in range(len(held_back)))
    found = Original.of(stored.tensors, asked.forget, len(retain), lm.device, opening, self_samples, config.seed)
    return found, held
