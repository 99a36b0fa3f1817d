"""The shape of study.json of `steelyard study strength`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steelyard.report.records import Record


class Spread(Record):
    """A number over seeds: mean and sample standard deviation; None where it is not defined."""

    mean: float | None = None
    std: float | None = None
    seeds: list[float | None] = Field(default_factory=list)


class Found(Record):
    """How well something finds wrong labels."""

    auroc: Spread = Field(default_factory=Spread)
    average_precision: Spread = Field(default_factory=Spread)


class StrengthRow(Found):
    """The first `members` of a kind of ensemble: quality and cost.

    `auroc_interval` and `auroc_difference` (to the whole reference) are (value, low, high) over seeds and units.
    """

    backend: str
    scoring: str
    members: int
    votes: Spread = Field(default_factory=Spread)
    voted: Spread = Field(default_factory=Spread)
    auroc_interval: tuple[float, float, float] | None = None
    auroc_difference: tuple[float, float, float] | None = None
    monotonicity: Spread = Field(default_factory=Spread)
    rank_correlation: Spread = Field(default_factory=Spread)
    tokens: Spread = Field(default_factory=Spread)
    wall: Spread = Field(default_factory=Spread)
    cpu: Spread = Field(default_factory=Spread)
    memory: Spread = Field(default_factory=Spread)
    tokens_of_one: Spread = Field(default_factory=Spread)
    cpu_of_one: Spread = Field(default_factory=Spread)


class ScorerRow(Found):
    """One way of reading the votes of a whole ensemble."""

    backend: str
    scoring: str
    scorer: str


class ConfidentRow(Found):
    """cleanlab's filter on one backend's out-of-fold probabilities, and what else chooses pairs."""

    backend: str
    flagged: Spread = Field(default_factory=Spread)
    filter_precision: Spread = Field(default_factory=Spread)
    filter_recall: Spread = Field(default_factory=Spread)
    weakest_precision: Spread = Field(default_factory=Spread)
    weakest_recall: Spread = Field(default_factory=Spread)
    negative_precision: Spread = Field(default_factory=Spread)
    negative_recall: Spread = Field(default_factory=Spread)


class BetweenRow(Record):
    """Two ensembles that differ in their seed alone."""

    backend: str
    scoring: str
    rank_correlation: float


class StrengthStudyFile(Record):
    """study.json of `steelyard study strength`"""

    kind: Literal["strength"]
    reference: str
    seeds: list[int]
    unit: str = ""
    pairs: int
    wrong: int
    rows: list[StrengthRow] = Field(default_factory=list)
    scorers: list[ScorerRow] = Field(default_factory=list)
    longer: Found = Field(default_factory=Found)
    confident: list[ConfidentRow] = Field(default_factory=list)
    confident_note: str = ""
    between_seeds: list[BetweenRow] = Field(default_factory=list)
