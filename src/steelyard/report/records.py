"""The shapes of the JSON files that a report reads. Unknown fields are ignored, damaged ones refused."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Record(BaseModel):
    """Base of all records: immutable; a newer writer may add fields."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class RunFile(Record):
    """run.json"""

    name: str = ""
    version: str = ""
    commit: str | None = None
    versions: dict[str, Any] = Field(default_factory=dict)
    seed: int | str | None = None
    started: str | float | None = None
    seconds: float | None = None
    command: str | list[str] = ""


class SummaryTable(Record):
    """One table of summary.json; every row has one cell for each column."""

    title: str = ""
    columns: list[str]
    rows: list[list[Any]]
    note: str | None = ""

    @model_validator(mode="after")
    def _rectangular(self) -> SummaryTable:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"every row must have {len(self.columns)} cells, one has {len(row)}")
        return self


class StageCost(Record):
    """One stage of summary.json."""

    name: str
    seconds: float | None = None
    note: str | None = ""


class SummaryFile(Record):
    """summary.json"""

    tables: list[SummaryTable] = Field(default_factory=list)
    stages: list[StageCost] = Field(default_factory=list)


class StrengthGroup(Record):
    """Pairs of similar strength; `agreement` is the share whose label agrees with the truth."""

    low: float | None = None
    high: float | None = None
    n: int
    mean: float
    std: float
    agreement: float | None = None


class Detection(Record):
    """How well a scorer finds wrong labels."""

    scorer: str
    noise: str
    auroc: float | None = None
    average_precision: float | None = None
    n: int
    positives: int


class StrengthFile(Record):
    """strength/<scoring>/result.json"""

    members: int | None = None
    backend: str | None = None
    scoring: str = ""
    folds: int | None = None
    seconds: float | None = None
    tokens: float | None = None
    share_negative: float | None = None
    groups: list[StrengthGroup] = Field(default_factory=list)
    detection: list[Detection] | None = None


class PolicyArm(Record):
    """One policy at the end of its training."""

    arm: str
    gold: float | None = None
    gold_low: float | None = None
    gold_high: float | None = None
    proxy: float | None = None
    proxy_low: float | None = None
    proxy_high: float | None = None
    kl: float | None = None
    length: float | None = None
    ended: float | None = None


class Win(Record):
    """Comparison of two policies on the same prompts. Win, tie and lose are shares or counts.

    The rest is of judge models: how often both orders gave one verdict, how often the answer that stood first won, and
    what was lost on the way.
    """

    a: str
    b: str
    judge: str = ""
    win: float = Field(ge=0)
    tie: float = Field(ge=0)
    lose: float = Field(ge=0)
    score: float | None = None
    low: float | None = None
    high: float | None = None
    n: int
    consistency: float | None = None
    first_share: float | None = None
    replies: int | None = None
    unreadable: int | None = None
    refused: int | None = None
    without_verdict: int | None = None


class JudgeFile(Record):
    """evaluate/judge.json"""

    wins: list[Win]


class FrontierPoint(Record):
    """One checkpoint of one policy."""

    arm: str
    step: int | None = None
    kl: float
    gold: float | None = None
    proxy: float | None = None


class DifficultyPoint(Record):
    """One policy on prompts of one difficulty; `low` and `high` bound what the SFT model earns there."""

    arm: str
    stratum: str | int
    low: float | None = None
    high: float | None = None
    gold: float | None = None
    gold_low: float | None = None
    gold_high: float | None = None
    proxy: float | None = None
    proxy_low: float | None = None
    proxy_high: float | None = None
    n: int


class Response(Record):
    """One response to a sample prompt."""

    text: str
    gold: float | None = None
    proxy: float | None = None


class Sample(Record):
    """One prompt with the responses of several policies, by arm."""

    prompt: str
    responses: dict[str, Response]


class PolicyFile(Record):
    """evaluate/policy.json"""

    arms: list[PolicyArm] = Field(default_factory=list)
    wins: list[Win] = Field(default_factory=list)
    frontier: list[FrontierPoint] = Field(default_factory=list)
    difficulty: list[DifficultyPoint] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
