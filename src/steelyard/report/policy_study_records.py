"""The shape of the JSON file of `steelyard study policy`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steelyard.report.records import Record
from steelyard.report.study_records import Difference, SeedCurve


class CellName(Record):
    """What tells a cell from another; `kl_coef` is missing with DPO."""

    world: str
    repair: str
    arm: str
    kl_coef: float | None = None

    @property
    def weight(self) -> str:
        """The KL weight as written."""
        return "offline" if self.kl_coef is None else f"{self.kl_coef:g}"

    @property
    def words(self) -> str:
        """Repair, arm and KL weight in one line."""
        repaired = "" if self.repair == "none" else f" on {self.repair}"
        return f"{self.arm}{repaired}, KL weight {self.weight}" if self.kl_coef is not None else f"{self.arm}{repaired}"


class TrainedReward(Record):
    """A reward model's data and its accuracy by gold."""

    world: str
    repair: str
    wrong: float
    n: int
    value: float
    low: float
    high: float


class Point(CellName):
    """One look at a cell's policies."""

    step: int
    root_kl: float
    gold: Difference
    proxy: Difference


class End(CellName):
    """The last look, and the best one by gold."""

    gold: Difference
    proxy: Difference
    kl: float
    length: float
    ended: float
    best: Difference
    best_kl: float
    lost: Difference
    n_seeds: int


class CellDifference(CellName, Difference):
    """Gold of a cell less gold of another."""

    kind: str
    against: CellName
    at: str
    n_seeds: int
    kl: float | None = None


class CellWin(Record):
    """Win, tie, lose of two cells, over all seeds."""

    a: CellName
    b: CellName
    win: float
    tie: float
    lose: float
    score: float
    low: float
    high: float
    n: int
    n_seeds: int


class Stratum(CellName):
    """Gold on prompts of like difficulty."""

    stratum: str
    low: float
    high: float
    n: int
    gold: Difference
    difference: Difference | None = None


class Correlation(CellName):
    """Scores of current and baseline samples, and what the truth leaves of them."""

    scores: Difference
    errors: Difference


class RewardVariance(Record):
    """Variance of rewards less the mean of k baselines (0: plain), or that mean shrunk."""

    world: str
    repair: str
    policy: str
    k: int
    shrunk: bool = False
    measured: Difference
    predicted: Difference | None = None


class Speed(CellName):
    """Advantages and critic in the first and the last quarter of a run."""

    advantage_first: Difference | None = None
    advantage_last: Difference | None = None
    explained_first: Difference | None = None
    explained_last: Difference | None = None


class CellCurve(CellName, SeedCurve):
    """A metric over steps."""


class Flip(Record):
    """The flip-rate identity, predicted and simulated."""

    c0: float
    c1: float
    policy: float
    baseline: float
    k: int
    draws: int
    plain: float
    predicted: float
    simulated: float
    error: float


class Failure(CellName):
    """A run that its guards ended."""

    seed: int
    error: str


class Settings(Record):
    """The recommended settings."""

    repair: str
    arm: str
    kl_coef: float | None = None


class PolicyStudyFile(Record):
    """study.json of `steelyard study policy`"""

    kind: Literal["policy"]
    seeds: list[int]
    control: str
    kl_coef: float
    at_kl: list[float] = Field(default_factory=list)
    recommended: Settings | None = None
    failed: list[Failure] = Field(default_factory=list)
    rewards: list[TrainedReward] = Field(default_factory=list)
    frontier: list[Point] = Field(default_factory=list)
    ends: list[End] = Field(default_factory=list)
    differences: list[CellDifference] = Field(default_factory=list)
    wins: list[CellWin] = Field(default_factory=list)
    strata: list[Stratum] = Field(default_factory=list)
    correlations: list[Correlation] = Field(default_factory=list)
    variances: list[RewardVariance] = Field(default_factory=list)
    speeds: list[Speed] = Field(default_factory=list)
    curves: list[CellCurve] = Field(default_factory=list)
    flips: list[Flip] = Field(default_factory=list)
