"""How good is a reward model: accuracy, likelihood, calibration, scale; with bootstrap intervals.

Everything here works on margins d = r(chosen) - r(rejected) (a positive one agrees with the label) in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from steelyard.evaluate.units import Clusters, Units, as_units

BINS = 10


def reward_metrics(chosen_N: Float[np.ndarray, "N"], rejected_N: Float[np.ndarray, "N"]) -> dict[str, float]:
    """loss (negative log-likelihood, nats), accuracy (a tie counts half), ece, margin, the rewards' mean, std."""
    chosen, rejected = chosen_N.astype(np.float64), rejected_N.astype(np.float64)
    margin = chosen - rejected
    both = np.concatenate([chosen, rejected])
    return {
        "loss": float(np.logaddexp(0.0, -margin).mean()),
        "accuracy": float(wins(margin).mean()),
        "ece": expected_calibration_error(margin),
        "margin": float(margin.mean()),
        "reward_mean": float(both.mean()),
        "reward_std": float(both.std()),
    }


def wins(margin_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """1 where the margin is positive, 0 where it is negative, 1/2 at a tie."""
    return (np.sign(margin_N) + 1.0) / 2.0


def reliability(margin_N: Float[np.ndarray, "N"], bins: int = BINS) -> list[dict[str, float]]:
    """Pairs binned by confidence sigmoid(|d|), equal widths over [0.5, 1]; no empty bin."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margin_N)))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    correct = wins(margin_N)
    return [
        {
            "confidence": float(confidence[place == b].mean()),
            "accuracy": float(correct[place == b].mean()),
            "n": int((place == b).sum()),
        }
        for b in range(bins)
        if (place == b).any()
    ]


def expected_calibration_error(margin_N: Float[np.ndarray, "N"], bins: int = BINS) -> float:
    """Mean distance of confidence and accuracy over the bins of `reliability`, weighted by n (Guo et al. 2017)."""
    rows = reliability(margin_N, bins)
    return float(sum(r["n"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / len(margin_N))


def bootstrap_mean(
    values_N: Float[np.ndarray, "N"],
    *,
    clusters: Clusters | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap, resampling whole clusters (prompts) or other units where given.

    Values of one prompt are not independent; an interval that ignores it is too narrow.
    """
    values = np.asarray(values_N, dtype=np.float64)
    sums = resampled_sums(np.stack([values, np.ones_like(values)], 1), clusters=clusters, draws=draws, seed=seed)
    with np.errstate(invalid="ignore"):
        _, low, high = estimate(sums[:, 0] / sums[:, 1], level)
    mean = float(values.mean())
    return mean, mean if low is None else low, mean if high is None else high


def resampled_sums(
    table_NF: Float[np.ndarray, "N F"],
    *,
    clusters: Clusters | None = None,
    draws: int = 2000,
    seed: int | Sequence[int] = 0,
) -> Float[np.ndarray, "1+draws F"]:
    """Column sums: row 0 of the table as it is, the others of bootstrap resamples of whole clusters, or of units.

    Any statistic that is a function of sums gets its value and its draws in one stroke; `estimate` reads them.
    """
    table = np.asarray(table_NF, dtype=np.float64)
    units = as_units(range(len(table)) if clusters is None else clusters)
    n = units.count
    rng = np.random.default_rng(seed)
    found = [table.sum(0, keepdims=True)]
    for start in range(0, draws, 100):
        counts = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(min(100, draws - start))]
        found.append(units.sums(np.array(counts, dtype=np.float64), table))
    return np.concatenate(found)


def estimate(values_D: Float[np.ndarray, "1+draws"], level: float = 0.95) -> list[float | None]:
    """[value, low, high] of a statistic of `resampled_sums`; None where it is not defined (0 / 0)."""
    value, drawn = values_D[0], values_D[1:][np.isfinite(values_D[1:])]
    if not np.isfinite(value):
        return [None, None, None]
    if not len(drawn):
        return [float(value), None, None]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return [float(value), float(low), float(high)]


def examine(
    chosen_N: Float[np.ndarray, "N"],
    rejected_N: Float[np.ndarray, "N"],
    *,
    prompts: Sequence[str],
    units: Units | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """One reward model on one validation set: the row of the table, its reliability bins, accuracy by strength.

    `units` are what the bootstrap draws; none given: prompts.
    """
    units = units or as_units(prompts)
    margin = chosen_N.astype(np.float64) - rejected_N.astype(np.float64)
    metrics = reward_metrics(chosen_N, rejected_N)
    accuracy, low, high = bootstrap_mean(wins(margin), clusters=units, seed=seed)
    return {
        "row": {
            "n": len(margin),
            "prompts": len(set(prompts)),
            "unit": units.name,
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "nll": metrics["loss"],
            "ece": metrics["ece"],
            "margin_mean": metrics["margin"],
            "reward_mean": metrics["reward_mean"],
            "reward_std": metrics["reward_std"],
        },
        "bins": reliability(margin),
    }
