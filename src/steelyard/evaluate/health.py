"""A reward model's bill of health on one preference file: temperature, length, strength, scale.

Pure functions of rewards, lengths (tokens) and prompts. Where a figure has an interval, it is [value, low, high]: a
95 % percentile bootstrap that resamples whole prompts, or other units (`evaluate.reward.resampled_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from steelyard.data.split import ranks
from steelyard.errors import InputError
from steelyard.evaluate.reward import (
    BINS,
    estimate,
    expected_calibration_error,
    reliability,
    resampled_sums,
    wins,
)
from steelyard.evaluate.units import Clusters, Units, as_units
from steelyard.strength import fit_temperature, out_of_fold_plan

GROUPS = 10
NEAR_EQUAL = 0.1
_LEAST_IN_GROUP = 5
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_FLOOR_DRAWS = 200
_SIDES = ("chosen longer", "near equal", "chosen shorter")

Estimate = list[float | None]


def checkup(
    chosen_N: Float[np.ndarray, "N"],
    rejected_N: Float[np.ndarray, "N"],
    *,
    prompts: Sequence[str],
    units: Units | None = None,
    chosen_length_N: Int[np.ndarray, "N"],
    rejected_length_N: Int[np.ndarray, "N"],
    strength_N: Float[np.ndarray, "N"] | None = None,
    normal: tuple[float, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything below for one model and one file.

    `strength_N` holds the pairs' mean margins, nan where a pair was not weighed; `normal` is the (mean, std) that the
    checkpoint recorded of its training data, None if it recorded none. `units` are what the bootstrap draws; none
    given: prompts.
    """
    units = units or as_units(prompts)
    chosen, rejected = chosen_N.astype(np.float64), rejected_N.astype(np.float64)
    margin, longer = chosen - rejected, (chosen_length_N - rejected_length_N).astype(np.float64)
    found: dict[str, Any] = {
        "temperature": cross_fit(margin, prompts, units, seed=seed),
        "by_length": by_length(margin, chosen_length_N, rejected_length_N, units, seed=seed),
        "length": length_bias(chosen, rejected, chosen_length_N, rejected_length_N, units, seed=seed),
        "scale": scale(chosen, rejected, prompts, units, normal=normal, seed=seed),
        "longer_is_right": estimate(_mean(wins(longer), units, seed)),
    }
    if strength_N is not None and np.isfinite(strength_N).any():
        weighed = np.isfinite(strength_N)
        known = units.take(weighed)
        found["by_strength"] = accuracy_groups(wins(margin[weighed]), strength_N[weighed], known, seed=seed)
    return found


# ---- calibration ---------------------------------------------------------------------------------------------------


def cross_fit(
    margin_N: Float[np.ndarray, "N"], prompts: Sequence[str], units: Units | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Temperature scaling (Guo et al. 2017), cross-fitted: T of one half of the prompts divides the other's margins.

    So no pair is judged by a temperature that saw it, and every pair is judged once. `nll` and `ece` are before,
    `nll_scaled` and `ece_scaled` after; `nll_gain` is their difference, positive where T helps. `ece_floor` is what a
    perfectly calibrated model with these confidences would show on as many pairs: an ECE near it is no fault.
    `temperature` is fitted on all pairs: the one to use elsewhere. `reason` says why there is none.
    """
    found: dict[str, Any] = {
        "ece": expected_calibration_error(margin_N),
        "ece_floor": ece_floor(margin_N, seed=seed),
        "temperature": None,
        "halves": [],
        "reason": "",
    }
    try:
        held_out_2N = out_of_fold_plan(prompts, members=2, folds=2, seed=seed)
        scaled = np.array(margin_N, dtype=np.float64)
        for held_out in held_out_2N:
            temperature = fit_temperature(margin_N[~held_out])
            scaled[held_out] = margin_N[held_out] / temperature
            found["halves"].append({"temperature": temperature, "fitted": int((~held_out).sum())})
        found["temperature"] = fit_temperature(margin_N)
    except InputError as error:
        return found | {"halves": [], "reason": str(error)}
    losses = np.stack([_nll(margin_N), _nll(scaled), _nll(margin_N) - _nll(scaled), np.ones(len(scaled))], axis=1)
    sums = resampled_sums(losses, clusters=units or prompts, seed=seed)
    for i, name in enumerate(("nll", "nll_scaled", "nll_gain")):
        found[name] = estimate(_ratio(sums[:, i], sums[:, 3]))
    return found | {
        "ece_scaled": expected_calibration_error(scaled),
        "ece_scaled_floor": ece_floor(scaled, seed=seed),
        "bins_scaled": reliability(scaled),
    }


def ece_floor(margin_N: Float[np.ndarray, "N"], *, bins: int = BINS, seed: int = 0) -> float:
    """Mean ECE of these confidences if each were the true chance: labels drawn from them, 200 times."""
    rng = np.random.default_rng(seed)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margin_N)))
    size = np.abs(margin_N)
    drawn = (np.where(rng.random(len(size)) < confidence, size, -size) for _ in range(_FLOOR_DRAWS))
    return float(np.mean([expected_calibration_error(d, bins) for d in drawn]))


def _nll(margin_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    return np.logaddexp(0.0, -margin_N)


# ---- accuracy in groups --------------------------------------------------------------------------------------------


def accuracy_groups(
    correct_N: Float[np.ndarray, "N"],
    value_N: Float[np.ndarray, "N"],
    clusters: Clusters,
    *,
    groups: int = GROUPS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Mean of `correct` in groups of equal count by `value`, ascending. Equal values share a group, so some may merge.

    Each: `from`, `to`, `mean` of the values, `n`, `accuracy` with `low` and `high`.
    """
    groups = max(1, min(groups, len(value_N) // _LEAST_IN_GROUP))
    edges = np.unique(np.quantile(value_N, np.arange(1, groups) / groups)) if groups > 1 else np.empty(0)
    place = np.searchsorted(edges, value_N, side="right")
    masks = [place == g for g in np.unique(place)]
    rows = _accuracies(correct_N, masks, clusters, seed)
    return [
        {
            "from": float(value_N[mask].min()),
            "to": float(value_N[mask].max()),
            "mean": float(value_N[mask].mean()),
            **row,
        }
        for mask, row in zip(masks, rows, strict=True)
    ]


def by_length(
    margin_N: Float[np.ndarray, "N"],
    chosen_length_N: Int[np.ndarray, "N"],
    rejected_length_N: Int[np.ndarray, "N"],
    clusters: Clusters,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy by length difference (chosen - rejected, tokens): `groups` of it, and `sides`: which one is longer.

    Near equal means that the lengths differ by at most a tenth of the longer one.
    """
    difference = (chosen_length_N - rejected_length_N).astype(np.float64)
    near = np.abs(difference) <= NEAR_EQUAL * np.maximum(chosen_length_N, rejected_length_N)
    masks = [(difference > 0) & ~near, near, (difference < 0) & ~near]
    correct = wins(margin_N)
    rows = _accuracies(correct, masks, clusters, seed)
    return {
        "groups": accuracy_groups(correct, difference, clusters, seed=seed),
        "sides": [{"side": side, **row} for side, row in zip(_SIDES, rows, strict=True)],
    }


def _accuracies(
    correct_N: Float[np.ndarray, "N"], masks: Sequence[Bool[np.ndarray, "N"]], clusters: Clusters, seed: int
) -> list[dict[str, Any]]:
    """n and accuracy with its interval for each part; accuracy is None where a part is empty."""
    columns = [column for mask in masks for column in (mask * correct_N, mask)]
    sums = resampled_sums(np.stack(columns, axis=1), clusters=clusters, seed=seed)
    rows = []
    for i, mask in enumerate(masks):
        accuracy, low, high = estimate(_ratio(sums[:, 2 * i], sums[:, 2 * i + 1]))
        rows.append({"n": int(mask.sum()), "accuracy": accuracy, "low": low, "high": high})
    return rows


# ---- length --------------------------------------------------------------------------------------------------------


def length_bias(
    chosen_N: Float[np.ndarray, "N"],
    rejected_N: Float[np.ndarray, "N"],
    chosen_length_N: Int[np.ndarray, "N"],
    rejected_length_N: Int[np.ndarray, "N"],
    clusters: Clusters,
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """How reward goes with length; no figure here depends on the labels.

    `pearson`, `spearman`: over all responses. `pair_pearson`, `pair_spearman`: of the reward difference with the
    length difference of a pair, each pair taken both ways round (so a pair's own level, easy prompt or long answer,
    does not count). `prefers_longer`: share of pairs in which the longer response gets the higher reward (ties of
    reward count half, pairs of equal length do not count). Ranks are those of the whole file in every resample.
    """
    reward = np.concatenate([chosen_N, rejected_N])
    length = np.concatenate([chosen_length_N, rejected_length_N]).astype(np.float64)
    margin = chosen_N - rejected_N
    longer = (chosen_length_N - rejected_length_N).astype(np.float64)
    both = np.concatenate([margin, -margin]), np.concatenate([longer, -longer])
    twice = as_units(clusters).twice()
    unequal = longer != 0
    share = np.stack([unequal * wins(margin * np.sign(longer)), unequal], axis=1)
    sums = resampled_sums(share, clusters=clusters, seed=seed)
    return {
        "pearson": correlation(reward, length, twice, seed=seed),
        "spearman": correlation(rankdata(reward), rankdata(length), twice, seed=seed),
        "pair_pearson": correlation(*both, twice, seed=seed),
        "pair_spearman": correlation(rankdata(both[0]), rankdata(both[1]), twice, seed=seed),
        "prefers_longer": estimate(_ratio(sums[:, 0], sums[:, 1])),
    }


def correlation(
    x_N: Float[np.ndarray, "N"], y_N: Float[np.ndarray, "N"], clusters: Clusters, *, seed: int = 0
) -> Estimate:
    """Pearson's correlation with its interval; all None where one side is constant."""
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return [None, None, None]
    # Standardised first: raw moments of large lengths would cancel.
    x, y = (x_N - x_N.mean()) / x_N.std(), (y_N - y_N.mean()) / y_N.std()
    sums = resampled_sums(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1), clusters=clusters, seed=seed)
    mean = _ratio(sums, sums[:, :1])
    covariance = mean[:, 5] - mean[:, 1] * mean[:, 2]
    variance = (mean[:, 3] - mean[:, 1] ** 2) * (mean[:, 4] - mean[:, 2] ** 2)
    return estimate(_ratio(covariance, np.sqrt(np.where(variance > 1e-20, variance, 0.0))))


# ---- scale ---------------------------------------------------------------------------------------------------------


def scale(
    chosen_N: Float[np.ndarray, "N"],
    rejected_N: Float[np.ndarray, "N"],
    prompts: Sequence[str],
    units: Units | None = None,
    *,
    normal: tuple[float, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Location and spread of the rewards of all responses, against what the checkpoint recorded in training.

    `prompt_std`: mean over prompts of the std of their rewards; `between`: share of the rewards' variance that lies
    between prompts (which no comparison of responses can use). `drift` = (mean - recorded mean) / recorded std,
    `stretch` = std / recorded std: 0 and 1 where the recorded scale holds on this file.
    """
    reward = np.concatenate([chosen_N, rejected_N])
    place = np.tile(ranks(prompts), 2)
    counts = np.bincount(place)
    means = np.bincount(place, reward) / counts
    within = np.bincount(place, (reward - means[place]) ** 2) / counts
    centre, std = float(reward.mean()), float(reward.std())
    shifted = reward - centre
    table = np.stack([np.ones_like(reward), shifted, shifted**2, reward > 0], axis=1)
    sums = resampled_sums(table, clusters=(units or as_units(prompts)).twice(), seed=seed)
    mean = _ratio(sums, sums[:, :1])
    found = {
        "n": len(reward),
        "mean": estimate(mean[:, 1] + centre),
        "std": estimate(np.sqrt(np.maximum(mean[:, 2] - mean[:, 1] ** 2, 0))),
        "positive": estimate(mean[:, 3]),
        "prompt_std": float(np.sqrt(within).mean()),
        "between": float(((means - centre) ** 2 * counts).sum() / len(reward) / std**2) if std > 0 else None,
        "skew": float((shifted**3).mean() / std**3) if std > 0 else None,
        "percentiles": {str(q): float(np.percentile(reward, q)) for q in _PERCENTILES},
        "normal": None,
        "drift": None,
        "stretch": None,
    }
    if normal is None:
        return found
    known = normal[1] > 0
    drift = (centre - normal[0]) / normal[1] if known else None
    return found | {"normal": list(normal), "drift": drift, "stretch": std / normal[1] if known else None}


def _mean(values_N: Float[np.ndarray, "N"], clusters: Clusters, seed: int) -> Float[np.ndarray, "1+draws"]:
    sums = resampled_sums(np.stack([values_N, np.ones_like(values_N)], axis=1), clusters=clusters, seed=seed)
    return _ratio(sums[:, 0], sums[:, 1])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, nan where below is 0: of few units, some resamples hold no row at all."""
    whole = np.broadcast_to(below, above.shape)
    return np.divide(above, whole, out=np.full(above.shape, np.nan), where=whole != 0)
