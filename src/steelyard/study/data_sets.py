"""The training sets of a study of data: bands, growing sets, repairs within bands, arms. Pure functions.

Pairs and strengths go in side by side, every pair measured. Weakest first, ties in input order, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from steelyard.denoise import Repaired, RepairOptions, flip, margin, repair, soften
from steelyard.recipe import build
from steelyard.study.data_config import BandsRepairConfig, DataStudy
from steelyard.types import Preference, Strength

WHOLE = "all"


@dataclass(frozen=True)
class DataSet:
    """One training set. `margin_in_flip` is the loss's option that belongs to the repair."""

    name: str
    pairs: list[Preference]
    margin_in_flip: bool = True


@dataclass(frozen=True)
class Input:
    """What every model of the study begins with: measured pairs with their strengths, held-out pairs, the SFT model.

    `truth` (by id: 1 label right, -1 wrong, 0 unknown) serves the oracle arm and the tables, nothing else.
    """

    pairs: list[Preference]
    strengths: list[Strength]
    truth: dict[str, int] | None
    validation: dict[str, str]
    model: str
    out: Path
    scoring: str

    @property
    def wrong(self) -> set[str] | None:
        """Ids of the labels known to be wrong."""
        return None if self.truth is None else {i for i, t in self.truth.items() if t < 0}


def order(strengths: Sequence[Strength]) -> Int[np.ndarray, "N"]:
    """Positions of the pairs, weakest first."""
    return np.argsort(np.array([s.mean for s in strengths]), kind="stable")


def band_rows(strengths: Sequence[Strength], count: int) -> list[list[int]]:
    """The rows of `count` equal bands, weakest first; sizes differ by at most one, the first being the larger."""
    return [[int(i) for i in rows] for rows in np.array_split(order(strengths), count)]


def band_name(band: int) -> str:
    """Name of the band's data set; 1 is the weakest."""
    return f"band {band:02d}"


def growth_rows(strengths: Sequence[Strength], fraction: float, end: str) -> list[int]:
    """The weakest or the strongest floor(fraction * N) pairs, at least one, starting at the end they grow from."""
    rows = order(strengths) if end == "weakest" else order(strengths)[::-1]
    # 0.29 * 100 is 28.999...: a share that is a whole number of pairs must not lose one to rounding.
    return [int(i) for i in rows[: max(1, math.floor(fraction * len(rows) + 1e-9))]]


def growth_name(fraction: float, end: str) -> str:
    """Name of the grown data set; the whole is the whole, from whichever end it grew."""
    return WHOLE if fraction == 1 else f"{end} {fraction:g}"


def treatments(flipped: bool) -> tuple[str, ...]:
    """What is done to one band, the untouched band first."""
    start = "flipped" if flipped else ""
    kinds = ("", "soft", "margin", "soft+margin")
    named = ["+".join(filter(None, (start, kind))) for kind in kinds]
    return ("plain", *filter(None, named))


def treated(
    pairs: Sequence[Preference], strengths: Sequence[Strength], treatment: str, config: BandsRepairConfig
) -> list[Preference]:
    """One band with its labels flipped, softened, with margins, or several of these, in that order.

    After a flip the strength is |mu| and p_flip is turned round (section 2.4.1), and the later steps read these.
    """
    done: Repaired = (list(pairs), list(strengths))
    for step in treatment.split("+"):
        if step == "flipped":
            done = flip(*done, q=1.0)
        elif step == "soft":
            done = soften(*done, below=math.inf, alpha=config.alpha)
        elif step == "margin":
            done = margin(*done, scale=config.margin_scale, cap=config.margin_cap)
    return done[0]


def treated_name(band: int, treatment: str) -> str:
    """Name of the treated band's data set; the plain one is the band."""
    return band_name(band) if treatment == "plain" else f"{band_name(band)} {treatment}"


def arm_set(
    study: DataStudy,
    arm: str,
    seed: int,
    pairs: Sequence[Preference],
    strengths: Sequence[Strength],
    wrong: Collection[str] | None,
) -> DataSet:
    """The repaired data set of one arm. A control drawn at random is drawn anew with every seed of the study."""
    settings = study.repair[arm]
    options = build(RepairOptions, f"repair.{arm}", settings)
    if options.recipe == "keep":
        return DataSet(WHOLE, list(pairs))
    name = f"arm {arm}"
    if options.drawn:
        options = build(RepairOptions, f"repair.{arm}", settings | {"seed": options.seed + seed})
        name += f", seed {options.seed}"
    return DataSet(name, repair(pairs, strengths, options, wrong=wrong)[0], options.margin_in_flip)


def full_batches(n: int, batch_size: int, seed: int) -> list[int]:
    """Rows 0..n-1, and as many of them once more, drawn by the seed, as the last batch of a pass lacks.

    So every step of every model has exactly `batch_size` pairs, whatever the size of its data set.
    """
    rows = list(range(n))
    rng = np.random.default_rng(seed)
    while len(rows) % batch_size:
        lacking = -len(rows) % batch_size
        rows += [int(i) for i in rng.permutation(n)[:lacking]]
    return rows


def segment_rows(mean_N: np.ndarray, count: int) -> list[list[int]]:
    """Rows of `count` equal segments by the mean margin, weakest first."""
    return [[int(i) for i in rows] for rows in np.array_split(np.argsort(mean_N, kind="stable"), count)]
