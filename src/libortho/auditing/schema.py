"""The layout of a report and of what it is made from: one type for each part, and the keys of the subjects.

A report is JSON: numbers that are not finite are None, lists follow the order of the records, and the audited subject
is the first. What each attack adds has its type beside the attack.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, TypedDict, cast

from libortho.evaluation.intervals import Estimate

SCHEMA = "libortho-audit/1"

MODEL, OFF, ON, ORIGINAL, REFERENCE = "model", "off", "on", "original", "reference"
QUANTISED, RANDOM, MAGNITUDE = "quantised", "random", "magnitude"
BASELINES = (ON, ORIGINAL)
"""Subjects that have the memory; the first that takes part is what others diverge from."""
Role = Literal["audited", "switch on", "control", "other", "reference"]


def baseline_key(keys: Collection[str]) -> str | None:
    """The subject with its memory, with which the others are compared; None if no subject has any."""
    return next((k for k in BASELINES if k in keys), None)


class Measurement(TypedDict, total=False):
    """Raw figures of one subject. Lists have one number for each record, in the order of the records.

    Attributes:
        nll: Mean negative log-likelihood per completion token, in nats, of forget records and of holdout records.
        correct: Per token, whether teacher-forced argmax is the label.
        scores: Membership score, to one number for each forget record and each holdout record; higher is a member.
        log_p: Per-token log-probabilities of forget and holdout records, for scores that compare two models.
        exposure: Bits, of probed forget records and of holdout records; None for prose.
        sampled: For each probed record, how many samples hold its completion.
        generated: Greedy answers to the prompts of the probed records.
        said: For each probed record, 1 if that answer is the record's, as a person would read it; None for texts
            without a question and for answers longer than what is generated.
        similarity: Levenshtein ratio of each generated answer with the completion.
        rouge_l: ROUGE-L recall of each generated answer.
        prefixes: Share of the completion given, to one 0 or 1 for each record: the rest was extracted.
        variants: Name of the changed prompt, to {"greedy": 0 or 1 each, "nll": nats per token each}.
        association: 0 or 1 for each association record.
        truth_ratio: TOFU truth ratio of each forget record that brings wrong answers.
        paraphrase: Probability of each such record's paraphrased answer.
        question_sets: Set name, to {"probability", "rouge_l", "truth_ratio"}, one number for each question.
        answers: Greedy answers to holdout (else forget) prompts, to see whether they differ.
        general: Summed negative log-likelihood of each window of general text, and its judged tokens.
        kl: Divergence from the model that has its memory, in nats per token.
        top1: Share of tokens on which both have the same most likely one.
        tasks: Task, to {"correct": 0 or 1 each, "nll": nats per token of the right answer} row by row.
        retain: Mean negative log-likelihood of each retain record.
        gradient: Norm of the forget gradient and its cosine with that of the model that has its memory.
    """

    nll: dict[str, list[float]]
    correct: dict[str, list[list[int]]]
    scores: dict[str, dict[str, list[float]]]
    log_p: dict[str, list[list[float]]]
    exposure: dict[str, list[float] | None]
    sampled: list[int]
    generated: list[str]
    said: list[int | None]
    similarity: list[float]
    rouge_l: list[float]
    prefixes: dict[str, list[int]]
    variants: dict[str, dict[str, list[float]]]
    association: list[int]
    truth_ratio: list[float]
    paraphrase: list[float]
    question_sets: dict[str, dict[str, list[float]]]
    answers: list[str]
    general: dict[str, list[float]]
    kl: float
    top1: float
    tasks: dict[str, dict[str, list[float]]]
    retain: list[float]
    gradient: dict[str, float]


class EstimateData(TypedDict):
    """A number, the ends of its 95 % interval, and how many records are behind it."""

    value: float
    low: float | None
    high: float | None
    n: int


def estimate_data(estimate: Estimate) -> EstimateData:
    """An estimate as it stands in a report."""
    return cast(EstimateData, estimate.to_dict())


class MembershipData(TypedDict):
    """One membership attack: its AUC, the difference from the never-trained model's, and its ROC curve."""

    auc: EstimateData
    difference: EstimateData | None
    tpr_at_1: float
    tpr_at_01: float
    roc: list[list[float]]


class PrivacyData(TypedDict):
    """Membership attacks by name, and what else compares forget records with those of the holdout."""

    attacks: dict[str, MembershipData]
    stratified: bool
    privleak: float | None
    forget_quality: float | None
    gradient: dict[str, float] | None


class UtilityData(TypedDict):
    """Ability on general text, on retain records and on tasks; differences are from the model with its memory."""

    perplexity: EstimateData
    kl: float | None
    top1_agreement: float | None
    distinct_answers: float | None
    retain_nll: EstimateData | None
    tasks: dict[str, EstimateData]
    task_differences: dict[str, EstimateData] | None
    task_nll_differences: dict[str, EstimateData] | None
    tofu: dict[str, float] | None


class RecordFigures(TypedDict):
    """Figures record by record; None where a record was not probed."""

    nll: list[float]
    greedy: list[int]
    extraction_strength: list[float]
    exact_memorization: list[float]
    sampled: list[int | None] | None
    exposure: list[float | None] | None


class PrefixData(TypedDict):
    """Extraction of the rest where a share of the completion is given."""

    given: float
    extraction: float
    n: int


class VariantData(TypedDict):
    """Extraction and surprise under one changed prompt."""

    name: str
    extraction: float
    nll: float
    n: int


Memory = dict[str, EstimateData | None]


class SubjectData(TypedDict):
    """One subject, measured; ``unseen`` are the figures of memory on holdout records."""

    key: str
    label: str
    role: Role
    memory: Memory
    unseen: Memory | None
    per_record: RecordFigures
    prefixes: list[PrefixData]
    variants: list[VariantData]
    privacy: PrivacyData | None
    utility: UtilityData | None


class CurvePoint(TypedDict):
    """The main figures at one alpha."""

    alpha: float
    greedy_extraction: float
    extraction_strength: float
    nll: float
    auc: float | None
    perplexity: float
    kl: float | None


class GoldilocksData(TypedDict):
    """Where on the curve privacy and ability are both acceptable, and what counts as acceptable."""

    intervals: list[list[float]]
    criteria: str


class DepthScoreData(TypedDict):
    """The depth score, why it is withheld, records without a score, and the drop of log p by layer."""

    uds: EstimateData | None
    withheld: str | None
    unscored: int | None
    layers: list[dict[str, Any]]


class DepthData(DepthScoreData):
    """The audited model's depth, the score of other models, and the logit lens of each subject in nats per token."""

    records: int
    others: dict[str, EstimateData | None]
    logit_lens: dict[str, list[float]]


class CheckData(TypedDict):
    """One condition of a verdict; see :class:`~libortho.auditing.report.Check`."""

    name: str
    value: float | None
    target: str
    ok: bool | None


class VerdictData(TypedDict):
    """One verdict; see :class:`~libortho.auditing.report.Verdict`."""

    key: str
    status: str
    text: str
    checks: list[CheckData]


class ModelData(TypedDict):
    """The audited model: its name, and how it is split."""

    name: str | None
    split: bool
    streams: list[str]
    layers: int
    bits: int | None
    density: float | None
    base_sha256: str | None


class CountsData(TypedDict):
    """Records, tokens and draws behind the figures."""

    forget: int
    holdout: int
    retain: int
    probed: int
    general_tokens: int
    unigram_perplexity: float
    samples: int
    fillings: int


class RecordData(TypedDict):
    """One forget record, its secret masked, its length in tokens, and the template of its prompt."""

    number: int
    prompt: str
    completion: str
    tokens: int
    template: str


class GenerationData(TypedDict):
    """What each subject answers to one prompt, secrets masked."""

    number: int
    prompt: str
    texts: dict[str, str]


class LayerData(TypedDict):
    """Columns that a layer gave to the ortho stream, and its share of the stream's squared norm."""

    name: str
    index: int
    columns: int
    share: float


class ReportData(TypedDict):
    """The whole report."""

    schema: str
    libortho: str
    profile: str
    seed: int
    config: dict[str, Any]
    model: ModelData
    counts: CountsData
    verdicts: list[VerdictData]
    warnings: list[str]
    records: list[RecordData]
    subjects: list[SubjectData]
    curve: list[CurvePoint]
    goldilocks: GoldilocksData | None
    attacks: dict[str, Any] | None
    depth: DepthData | None
    layer_map: list[LayerData]
    generations: list[GenerationData]
    composite: dict[str, dict[str, float | None] | None] | None
