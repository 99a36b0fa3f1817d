"""Intervals over training seeds and examples together, for runs that were all examined on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def mean_over_seeds(
    values_SN: Float[np.ndarray, "S N"],
    *,
    clusters: Sequence[str] | Sequence[int],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high) of S runs on the same N examples: seeds and clusters (prompts) are both drawn anew.

    A percentile bootstrap of a crossed design. Of S seeds the draws alone would show (S - 1) / S of the variance
    between them, so the seeds' deviations are stretched by sqrt(S / (S - 1)) first. With one seed the interval is
    over clusters alone, and says nothing about another seed. For differences between two arms give the values'
    differences: what the arms share (examples, data order, head) then cancels.

    Raises:
        ValueError: `values` is not (S, N) with one cluster for each of the N.
    """
    values = np.asarray(values_SN, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or values.shape[1] != len(clusters):
        raise ValueError(f"values must be (seeds, examples) with {len(clusters)} examples, got {values.shape}")
    S = len(values)
    if S > 1:
        deviation_S1 = values.mean(1, keepdims=True) - values.mean()
        stretched_SN = values + (np.sqrt(S / (S - 1)) - 1) * deviation_S1
    else:
        stretched_SN = values
    place = np.unique(np.asarray(clusters), return_inverse=True)[1]
    n = int(place.max()) + 1
    sums_SC = np.stack([np.bincount(place, row, n) for row in stretched_SN])
    counts_C = np.bincount(place, minlength=n)
    rng = np.random.default_rng(seed)
    seeds_RS = rng.multinomial(S, np.full(S, 1 / S), size=draws)
    clusters_RC = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    means = ((seeds_RS @ sums_SC) * clusters_RC).sum(1) / (S * (clusters_RC @ counts_C))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def compare_arms(
    arms: Mapping[str, Float[np.ndarray, "S N"]], *, clusters: Sequence[str] | Sequence[int], control: str
) -> list[dict[str, Any]]:
    """One row an arm: value, interval, the value of each seed; and the same of its paired difference to `control`."""
    rows = []
    for name, values_SN in arms.items():
        rows.append({"arm": name, "n": values_SN.shape[1], "clusters": len(set(clusters)), **_row(values_SN, clusters)})
        if name != control:
            rows[-1]["difference"] = _row(values_SN - arms[control], clusters)
    return rows


def _row(values_SN: Float[np.ndarray, "S N"], clusters: Sequence[str] | Sequence[int]) -> dict[str, Any]:
    value, low, high = mean_over_seeds(values_SN, clusters=clusters)
    return {"value": value, "low": low, "high": high, "seeds": values_SN.mean(1).tolist()}
