"""Intervals over training seeds and examples together, for runs that were all examined on the same examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from steelyard.evaluate.units import Clusters, Units, as_units


def mean_over_seeds(
    values_SN: Float[np.ndarray, "S N"],
    *,
    clusters: Clusters,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high) of S runs on the same N examples: seeds and clusters (prompts, or units) are both drawn anew.

    A percentile bootstrap of a crossed design; see `interval_over_seeds`. With one seed the interval is over clusters
    alone, and says nothing about another seed. Few seeds cover too little: where their variance dominates (std .04,
    N = 800 pairs), 95 % intervals held the truth in 85 / 90 / 93 % of 800 simulations with 2 / 3 / 5 seeds.

    For differences between two arms give the values' differences: what the arms share (examples, data order, head)
    then cancels.

    Raises:
        ValueError: `values` is not (S, N) with one cluster for each of the N.
    """
    values = np.asarray(values_SN, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or values.shape[1] != len(clusters):
        raise ValueError(f"values must be (seeds, examples) with {len(clusters)} examples, got {values.shape}")
    units, n = as_units(clusters), as_units(clusters).count
    rng = np.random.default_rng(seed)
    seeds_RS = draw_seeds(rng, len(values), draws)
    counts_RC = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    sums_RF = units.sums(counts_RC, np.concatenate([values, np.ones((1, values.shape[1]))]).T)
    with np.errstate(invalid="ignore"):
        means_SR = (sums_RF[:, :-1] / sums_RF[:, -1:]).T
    return interval_over_seeds(values.mean(1), means_SR, seeds_RS, level=level)


def draw_seeds(rng: np.random.Generator, S: int, draws: int) -> Int[np.ndarray, "R S"]:
    """How often each seed is drawn in each resample."""
    return rng.multinomial(S, np.full(S, 1 / S), size=draws)


def interval_over_seeds(
    values_S: Float[np.ndarray, "S"],
    drawn_SR: Float[np.ndarray, "S R"],
    seeds_RS: Int[np.ndarray, "R S"],
    *,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """(mean, low, high) of a statistic of S seeds: its values, its values on R resamples of the examples, and seeds.

    Of S seeds the draws alone would show (S - 1) / S of the variance between them, so the seeds' deviations are
    stretched by sqrt(S / (S - 1)) first. Resamples that leave the statistic undefined (nan) do not count.
    """
    S, mean = len(values_S), float(np.mean(values_S))
    stretch = np.sqrt(S / (S - 1)) - 1 if S > 1 else 0.0
    means_R = (seeds_RS.T * (drawn_SR + stretch * (values_S - mean)[:, None])).sum(0) / S
    defined = means_R[np.isfinite(means_R)]
    if not len(defined):
        return mean, mean, mean
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def compare_arms(
    arms: Mapping[str, Float[np.ndarray, "S N"]], *, clusters: Clusters, control: str
) -> list[dict[str, Any]]:
    """One row an arm: value, interval, the value of each seed; and the same of its paired difference to `control`.

    `clusters` and `unit` of a row are how many units the bootstrap draws, and what they are.
    """
    units = as_units(clusters)
    rows = []
    for name, values_SN in arms.items():
        drawn = {"clusters": units.count, "unit": units.name}
        rows.append({"arm": name, "n": values_SN.shape[1], **drawn, **_row(values_SN, units)})
        if name != control:
            rows[-1]["difference"] = _row(values_SN - arms[control], units)
    return rows


def _row(values_SN: Float[np.ndarray, "S N"], units: Units) -> dict[str, Any]:
    value, low, high = mean_over_seeds(values_SN, clusters=units)
    return {"value": value, "low": low, "high": high, "seeds": values_SN.mean(1).tolist()}
