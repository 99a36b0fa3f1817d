"""Intervals of how well ensembles find wrong labels: seeds are drawn anew, and pairs, or what pairs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from steelyard.evaluate.seeds import draw_seeds, interval_over_seeds
from steelyard.evaluate.units import Units
from steelyard.study.strength_runs import Run

DRAWS = 1000
_CHUNK = 100  # draws at once (memory, not results)
Row = dict[str, Any]
Kind = tuple[str, str]


def weighted_auroc(
    scores_N: Float[np.ndarray, "N"], positive_N: Bool[np.ndarray, "N"], weights_RN: Float[np.ndarray, "R N"]
) -> Float[np.ndarray, "R"]:
    """P(score of a positive > score of a negative), ties counting half, for each row of weights; nan without one."""
    order = np.argsort(scores_N, kind="stable")
    place = np.unique(scores_N[order], return_inverse=True)[1]
    first, last = np.searchsorted(place, place, "left"), np.searchsorted(place, place, "right")
    found = []
    for start in range(0, len(weights_RN), _CHUNK):
        weights = weights_RN[start : start + _CHUNK][:, order]
        positive = weights * positive_N[order]
        below = np.pad(np.cumsum(weights - positive, axis=1), ((0, 0), (1, 0)))
        above_half = (positive * (below[:, first] + below[:, last])).sum(1) / 2
        with np.errstate(invalid="ignore"):
            found.append(above_half / (positive.sum(1) * below[:, -1]))
    return np.concatenate(found)


def drawn_weights(units: Units, seed: int, draws: int = DRAWS) -> Float[np.ndarray, "1+R N"]:
    """What each pair weighs: 1 in the first row, then in each resample of the units."""
    n = units.count
    counts_RC = np.random.default_rng([seed, 1]).multinomial(n, np.full(n, 1 / n), size=draws)
    return np.concatenate([np.ones((1, len(units))), units.weights(counts_RC.astype(np.float64))])


def over_file(run: Run, M: int | None, n: int) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Of all n pairs of the file: minus the strength by the first M members (nan: not judged), and whether wrong."""
    scores, wrong = np.full(n, np.nan), np.zeros(n, dtype=bool)
    scores[run.index_N] = np.where(run.truth_N != 0, -run.strength(M), np.nan)
    wrong[run.index_N] = run.truth_N < 0
    return scores, wrong


def auroc_intervals(
    by_kind: Mapping[Kind, Sequence[Run]], sizes: Sequence[int], reference: str, *, same_pairs: bool
) -> dict[tuple[str, str, int], Row]:
    """(backend, scoring, M) -> `auroc_interval` and `auroc_difference`, [value, low, high] each, None where undefined.

    The difference is to all members of the reference with the same scoring and seed, on the pairs that both judge and
    with the same draws, so what they share cancels. Seeds are crossed with the pairs where all weigh the same ones
    (`same_pairs`). Where each seed has pairs of its own, these are drawn for each seed; the spread between seeds then
    holds the sampling of pairs already, and the intervals are rather too wide.
    """
    own: dict[tuple[str, str, int], list[Float[np.ndarray, "1+R"]]] = {}
    less: dict[tuple[str, str, int], list[Float[np.ndarray, "1+R"]]] = {}
    weights_RN: Float[np.ndarray, "1+R N"] | None = None
    for seed in dict.fromkeys(r.seed for runs in by_kind.values() for r in runs):
        held = {kind: next(r for r in runs if r.seed == seed) for kind, runs in by_kind.items()}
        if weights_RN is None or not same_pairs:
            weights_RN = drawn_weights(next(iter(held.values())).drawn(), 0 if same_pairs else seed)
        for ((backend, scoring), run), M in product(held.items(), sizes):
            whole = held.get((reference, scoring))
            found, difference = _paired(run, M, whole, weights_RN)
            own.setdefault((backend, scoring, M), []).append(found)
            if difference is not None and not (whole is run and max(sizes) == M):
                less.setdefault((backend, scoring, M), []).append(difference)
    return {
        key: {"auroc_interval": _interval(values), "auroc_difference": _interval(less[key]) if key in less else None}
        for key, values in own.items()
    }


def _paired(
    run: Run, M: int, whole: Run | None, weights_RN: Float[np.ndarray, "1+R N"]
) -> tuple[Float[np.ndarray, "1+R"], Float[np.ndarray, "1+R"] | None]:
    """AUROC of the first M members on what they judge, and less that of the whole reference on what both judge."""

    def auroc(scores_N: Float[np.ndarray, "N"], use_N: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "1+R"]:
        return weighted_auroc(scores_N[use_N], wrong[use_N], weights_RN[:, use_N])

    scores, wrong = over_file(run, M, weights_RN.shape[1])
    judged = ~np.isnan(scores)
    found = auroc(scores, judged)
    if whole is None:
        return found, None
    other, _ = over_file(whole, None, weights_RN.shape[1])
    both = judged & ~np.isnan(other)
    mine = found if (both == judged).all() else auroc(scores, both)
    return found, mine - auroc(other, both)


def _interval(seeds: Sequence[Float[np.ndarray, "1+R"]]) -> list[float] | None:
    values_SR = np.stack(seeds)
    if not np.isfinite(values_SR[:, 0]).all():
        return None
    seeds_RS = draw_seeds(np.random.default_rng(0), len(values_SR), values_SR.shape[1] - 1)
    return list(interval_over_seeds(values_SR[:, 0], values_SR[:, 1:], seeds_RS))
