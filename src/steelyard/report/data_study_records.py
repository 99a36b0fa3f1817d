"""The shape of study.json as `steelyard study data` writes it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from steelyard.report.records import Record
from steelyard.report.study_records import Difference


class HeldOutSet(Record):
    """One validation set; `unit` is what the bootstrap draws: prompts; where they are few, responses or pairs."""

    set: str
    n: int
    prompts: int
    unit: str


class ComputeRow(Record):
    """What the models of one analysis cost; steps and pairs a step are the same for all of them."""

    analysis: str
    models: int
    steps: int
    pairs_per_step: int
    passes_least: float
    passes_most: float
    tokens: int | None = None
    seconds: float | None = None


class Accuracy(Difference):
    """Accuracy on one validation set, mean over seeds; `difference` is the paired one to plain training."""

    set: str
    n: int
    difference: Difference | None = None


class TrainedOn(Accuracy):
    """Accuracy of models trained on a part of the pairs; `right` is the share of right labels in it, where known."""

    pairs: int
    strength_low: float
    strength_high: float
    strength_mean: float
    right: float | None = None


class BandRow(TrainedOn):
    """One band of strength, 1 being the weakest."""

    band: int


class GrowthRow(TrainedOn):
    """A set grown from one end."""

    end: str
    fraction: float


class TreatmentRow(Accuracy):
    """One band under one treatment; the difference is to the untouched band."""

    kind: str
    band: int
    treatment: str


class ArmRow(Accuracy):
    """One arm; `models` is how many trainings it took."""

    arm: str
    models: int = 1
    nll: float | None = None
    ece: float | None = None
    margin: float | None = None
    reward_std: float | None = None


class LengthRow(Accuracy):
    """One arm on the pairs of a set whose better response is the longer, or the shorter, one."""

    arm: str
    better: str


class ControlRow(Difference):
    """Accuracy of one arm less that of its own control, on one set."""

    arm: str
    against: str
    set: str


class OverSteps(Record):
    """Over training steps: the seeds' mean, least and greatest."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    @model_validator(mode="after")
    def _equally_long(self) -> OverSteps:
        if len({len(x) for x in (self.steps, self.mean, self.low, self.high)}) > 1:
            raise ValueError("steps, mean, low and high must be equally long")
        return self


class SegmentRow(OverSteps):
    """Accuracy on one validation segment, 1 being the weakest; `right` is the share of right labels, where known."""

    segment: int
    n: int
    strength_mean: float
    right: float | None = None


class SetCurve(OverSteps):
    """Accuracy on one validation set."""

    set: str


class Segments(Record):
    """The plain run on validation segments and on whole sets."""

    segments: list[SegmentRow] = Field(min_length=1)
    sets: list[SetCurve] = Field(default_factory=list)


class InflationRow(OverSteps):
    """Mean reward of chosen or of rejected responses, or their gap."""

    on: str
    what: str


class DataStudyFile(Record):
    """study.json of `steelyard study data`"""

    kind: Literal["data"]
    seeds: list[int]
    pairs: int
    scoring: str
    sets: list[HeldOutSet]
    compute: list[ComputeRow] = Field(default_factory=list)
    steps_per_pass: int | None = None
    bands: list[BandRow] = Field(default_factory=list)
    growth: list[GrowthRow] = Field(default_factory=list)
    bands_repair: list[TreatmentRow] = Field(default_factory=list)
    segments: Segments | None = None
    inflation: list[InflationRow] = Field(default_factory=list)
    arms: list[ArmRow] = Field(default_factory=list)
    findings: list[str] = Field(default_factory=list)
    arms_by_length: list[LengthRow] = Field(default_factory=list)
    controls: list[ControlRow] = Field(default_factory=list)
