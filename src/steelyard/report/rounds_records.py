"""The shapes of rounds.json, and of the study of rounds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steelyard.report.records import Record
from steelyard.report.study_records import SeedCurve, SeedRow


class RoundAccuracy(Record):
    """One reward model on one set, examined after a round."""

    model: str
    set: str
    n: int
    accuracy: float
    low: float | None = None
    high: float | None = None


class RoundRow(Record):
    """The examination of one round's policy; round 0 is the SFT model."""

    round: int
    gold: float | None = None
    gold_low: float | None = None
    gold_high: float | None = None
    judge: float | None = None
    judge_low: float | None = None
    judge_high: float | None = None
    first: float | None = None
    first_low: float | None = None
    first_high: float | None = None
    current: float | None = None
    current_low: float | None = None
    current_high: float | None = None
    kl: float | None = None
    ppl_sft: float | None = None
    length: float | None = None
    ended: float | None = None
    accuracy: list[RoundAccuracy] = Field(default_factory=list)


class Between(Record):
    """A value with its interval."""

    value: float
    low: float | None = None
    high: float | None = None


class BestRound(Record):
    """The round that is kept: chosen on one half of the prompts, measured on the other."""

    round: int
    score: float
    rest: Between
    gain: Between


class Criterion(Record):
    """What the best round was chosen by; `by` is None where nothing could."""

    by: str | None = None
    why: str = ""
    kl_price: float = 0.0
    keep: Literal["best", "earliest"] = "best"


class RoundsFile(Record):
    """rounds.json of `steelyard iterate`"""

    reward: str = ""
    baselines: str | None = None
    meta_prompts: str | None = None
    criterion: Criterion = Field(default_factory=Criterion)
    rounds: list[RoundRow] = Field(min_length=1)
    best: BestRound | None = None
    stopped: str = ""


class Turn(Record):
    """Which round one run kept, of how many."""

    arm: str
    seed: int
    best: int
    rounds: int
    gain: float


class Kept(Record):
    """Which round of one run a rule keeps, and its gold on the prompts that did not choose it."""

    rule: str
    arm: str
    seed: int
    round: int
    gold: float


class FailedRun(Record):
    """A run that a guard of PPO's, or diverging training, ended."""

    arm: str
    seed: int
    error: str


class RoundsStudyFile(Record):
    """study.json of `steelyard study rounds`"""

    kind: Literal["rounds"]
    control: str
    seeds: list[int]
    failed: list[FailedRun] = Field(default_factory=list)
    rows: list[SeedRow] = Field(default_factory=list)
    turns: list[Turn] = Field(default_factory=list)
    choices: list[SeedRow] = Field(default_factory=list)
    kept: list[Kept] = Field(default_factory=list)
    by_round: list[SeedCurve] = Field(default_factory=list)
    by_step: list[SeedCurve] = Field(default_factory=list)
