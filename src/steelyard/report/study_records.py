"""The shapes of the JSON files of feature examinations and of studies over seeds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from steelyard.report.records import Record


class FeatureRow(Record):
    """One figure of overlap: 1 (AUROC) or near 1 (silhouette) for clouds apart, 1/2 or 0 for clouds in one place."""

    features: str
    measure: str
    value: float
    low: float | None = None
    high: float | None = None


class FeaturePicture(Record):
    """t-SNE coordinates of the same pairs' chosen and rejected features."""

    perplexity: float | None = None
    chosen: list[tuple[float, float]]
    rejected: list[tuple[float, float]]


class FeatureModel(Record):
    """The features of one reward model."""

    name: str
    pairs: int
    prompts: int | None = None
    unit: str = "prompts"
    rows: list[FeatureRow] = Field(default_factory=list)
    tsne: FeaturePicture | None = None


class FeatureFile(Record):
    """examine/features.json"""

    set: str = ""
    models: list[FeatureModel] = Field(default_factory=list)


class Difference(Record):
    """A value with its interval over seeds and prompts (or other units), and the value of each seed."""

    value: float
    low: float | None = None
    high: float | None = None
    seeds: list[float] = Field(default_factory=list)


class SeedRow(Difference):
    """One arm of a study by one measure; `difference` is its paired difference to the control arm.

    `unit` is what the bootstrap draws beside seeds.
    """

    set: str
    measure: str
    arm: str
    n: int
    unit: str = "prompts"
    difference: Difference | None = None


class SeedCurve(Record):
    """A metric over training steps: the seeds' mean, least and greatest value."""

    arm: str
    metric: str
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    @model_validator(mode="after")
    def _equally_long(self) -> SeedCurve:
        if len({len(x) for x in (self.steps, self.mean, self.low, self.high)}) > 1:
            raise ValueError("steps, mean, low and high must be equally long")
        return self


class ContrastiveFile(Record):
    """study.json of `steelyard study contrastive`"""

    kind: Literal["contrastive"]
    control: str
    seeds: list[int]
    features_set: str = ""
    accuracy: list[SeedRow] = Field(default_factory=list)
    overlap: list[SeedRow] = Field(default_factory=list)
    curves: list[SeedCurve] = Field(default_factory=list)


class SpreadHistogram(Record):
    """Shares of the reward differences of k responses to one prompt, by size in some unit."""

    set: str
    unit: str
    arm: str
    mean: float
    edges: list[float]
    shares: list[float]

    @model_validator(mode="after")
    def _fit(self) -> SpreadHistogram:
        if len(self.edges) != len(self.shares) + 1:
            raise ValueError("there must be one edge more than shares")
        return self


class PolicyShift(Record):
    """How far a policy has moved."""

    policy: str
    prompts: int | None = None
    gold: float | None = None
    length: float | None = None
    ended: float | None = None
    kl: float | None = None


class MetaRMFile(Record):
    """study.json of `steelyard study metarm`"""

    kind: Literal["metarm"]
    control: str
    seeds: list[int]
    k: int | None = None
    policies: list[PolicyShift] = Field(default_factory=list)
    accuracy: list[SeedRow] = Field(default_factory=list)
    spread: list[SeedRow] = Field(default_factory=list)
    histograms: list[SpreadHistogram] = Field(default_factory=list)
    curves: list[SeedCurve] = Field(default_factory=list)
