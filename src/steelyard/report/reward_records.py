"""The shapes of examine/reward.json and examine/benchmarks.json."""

from __future__ import annotations

from pydantic import Field

from steelyard.report.records import Record

Estimate = tuple[float | None, float | None, float | None]
"""A value with the ends of its interval."""
UNKNOWN: Estimate = (None, None, None)


class RewardRow(Record):
    """One reward model on one validation set, with the interval of its accuracy."""

    arm: str
    set: str
    n: int
    accuracy: float
    low: float | None = None
    high: float | None = None
    nll: float | None = None
    ece: float | None = None
    margin_mean: float | None = None
    reward_mean: float | None = None
    reward_std: float | None = None
    prompts: int | None = None
    unit: str = "prompts"
    left_out: str = ""


class ReliabilityBin(Record):
    """Pairs of similar confidence."""

    confidence: float | None
    accuracy: float | None
    n: int


class Reliability(Record):
    """Reliability diagram of one reward model on one set."""

    arm: str
    set: str
    bins: list[ReliabilityBin]


class AccuracyGroup(Record):
    """Pairs of similar strength, or of similar length difference; `low` and `high` bound the accuracy."""

    mean: float
    accuracy: float | None
    n: int
    low: float | None = None
    high: float | None = None


class ByStrength(Record):
    """Accuracy of one reward model on one set by strength of the pair."""

    arm: str
    set: str
    groups: list[AccuracyGroup]


class Temperature(Record):
    """Calibration of one reward model on one set before and after a cross-fitted temperature."""

    arm: str
    set: str
    temperature: float | None = None
    reason: str = ""
    ece: float | None = None
    ece_floor: float | None = None
    ece_scaled: float | None = None
    ece_scaled_floor: float | None = None
    nll: Estimate = UNKNOWN
    nll_scaled: Estimate = UNKNOWN
    nll_gain: Estimate = UNKNOWN
    bins_scaled: list[ReliabilityBin] = Field(default_factory=list)


class LengthSide(Record):
    """Accuracy where the chosen response is the longer one, the shorter one, or about as long."""

    side: str
    n: int
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None


class ByLength(Record):
    """Accuracy of one reward model on one set by length difference; the accuracy of the rule "longer wins"."""

    arm: str
    set: str
    groups: list[AccuracyGroup] = Field(default_factory=list)
    sides: list[LengthSide] = Field(default_factory=list)
    longer_is_right: Estimate = UNKNOWN


class LengthBias(Record):
    """How the reward goes with length, whatever the labels say."""

    arm: str
    set: str
    pearson: Estimate = UNKNOWN
    spearman: Estimate = UNKNOWN
    pair_pearson: Estimate = UNKNOWN
    pair_spearman: Estimate = UNKNOWN
    prefers_longer: Estimate = UNKNOWN


class RewardScale(Record):
    """Location and spread of the rewards of one model on one set; `normal` is what its checkpoint recorded."""

    arm: str
    set: str
    mean: Estimate = UNKNOWN
    std: Estimate = UNKNOWN
    positive: Estimate = UNKNOWN
    prompt_std: float | None = None
    between: float | None = None
    skew: float | None = None
    percentiles: dict[str, float] = Field(default_factory=dict)
    normal: tuple[float, float] | None = None
    drift: float | None = None
    stretch: float | None = None


class RewardFile(Record):
    """examine/reward.json"""

    rows: list[RewardRow] = Field(default_factory=list)
    reliability: list[Reliability] = Field(default_factory=list)
    by_strength: list[ByStrength] = Field(default_factory=list)
    temperature: list[Temperature] = Field(default_factory=list)
    by_length: list[ByLength] = Field(default_factory=list)
    length: list[LengthBias] = Field(default_factory=list)
    scale: list[RewardScale] = Field(default_factory=list)


class BenchmarkScore(Record):
    """One score of a benchmark; None where anything is `missing`, and then `present` is the average of the rest."""

    name: str
    part: str = ""
    n: int | None = None
    score: Estimate | None = None
    present: Estimate = UNKNOWN
    missing: list[str] = Field(default_factory=list)


class BenchmarkResult(Record):
    """One reward model on one benchmark. `matrix`: RM-Bench's, right styles by wrong styles."""

    arm: str
    benchmark: str
    overall: BenchmarkScore
    parts: list[BenchmarkScore] = Field(default_factory=list)
    details: list[BenchmarkScore] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    matrix: list[list[float]] | None = None


class BenchmarkFile(Record):
    """examine/benchmarks.json"""

    results: list[BenchmarkResult] = Field(default_factory=list)
