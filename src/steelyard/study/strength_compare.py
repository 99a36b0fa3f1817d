"""What ensembles found, and what they cost: the numbers of `steelyard study strength`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from steelyard.errors import InputError
from steelyard.members.cost import Cost
from steelyard.report.blocks import over, seeds_of
from steelyard.strength import detection, groups, spearman
from steelyard.study.strength_intervals import auroc_intervals
from steelyard.study.strength_runs import Run

GROUPS = 20
Row = dict[str, Any]


def compare(runs: Sequence[Run], sizes: Sequence[int], reference: str, *, same_pairs: bool) -> Row:
    """Everything that study.json holds. `same_pairs`: whether all seeds weigh the same pairs."""
    kinds = list(dict.fromkeys((r.backend, r.scoring) for r in runs))
    by_kind = {kind: [r for r in runs if (r.backend, r.scoring) == kind] for kind in kinds}
    one = {seed: full_model(runs, reference, seed) for seed in dict.fromkeys(r.seed for r in runs)}
    rows = []
    for (backend, scoring), held in by_kind.items():
        whole = {r.seed: r.strength() for r in by_kind.get((reference, scoring), [])}
        for M in sorted(sizes):
            values = [quality(r, M, whole.get(r.seed)) | price(r, M, one[r.seed]) for r in held]
            rows.append({"backend": backend, "scoring": scoring, "members": M, **spread(values)})
    intervals = auroc_intervals(by_kind, sizes, reference, same_pairs=same_pairs)
    rows = [row | intervals[row["backend"], row["scoring"], row["members"]] for row in rows]
    scorers = []
    for (backend, scoring), held in by_kind.items():
        for name, score in SCORERS.items():
            values = [detected(-score(r.margins_MN), r.truth_N) for r in held]
            scorers.append({"backend": backend, "scoring": scoring, "scorer": name, **spread(values)})
    confident, note = confident_rows([(k, held) for k, held in by_kind.items() if k[1] == "out-of-fold"])
    alone = [next(r for r in runs if r.seed == seed) for seed in one]
    return {
        "kind": "strength",
        "reference": reference,
        "seeds": list(one),
        "unit": runs[0].drawn().name,
        "pairs": int(np.mean([len(r.truth_N) for r in alone])),
        "wrong": int(np.mean([(r.truth_N < 0).sum() for r in alone])),
        "one_model": spread([{"tokens": c.tokens, "cpu": c.cpu, "wall": c.wall} for c in one.values() if c]),
        "rows": rows,
        "scorers": scorers,
        "longer": spread([detected(-r.longer_N, r.truth_N) for r in alone]),
        "confident": confident,
        "confident_note": note,
        "between_seeds": _between_seeds(by_kind) if same_pairs else [],
    }


def full_model(runs: Sequence[Run], reference: str, seed: int) -> Cost | None:
    """The mean cost of one reference member by itself, training and judging, on all pairs (or as its folds are)."""
    found = [r for r in runs if r.backend == reference and r.seed == seed]
    run = next((r for r in found if r.scoring == "in-sample"), found[0] if found else None)
    if run is None:
        return None
    tokens, wall, cpu = (float(np.mean([getattr(c, n) for c in run.members])) for n in ("tokens", "wall", "cpu"))
    return run.shared.plus(Cost(tokens, wall, cpu, max(c.memory for c in run.members)))


def quality(run: Run, M: int, whole_N: Float[np.ndarray, "N"] | None) -> dict[str, float | None]:
    """How well the first M members find wrong labels, and how like the whole reference ensemble they rank."""
    mean = run.strength(M)
    voted = ~np.isnan(mean)
    found = detected(-mean, run.truth_N)
    found["voted"] = float(voted.mean())
    found["votes"] = float((~np.isnan(run.margins_MN[:M])).sum(0)[voted].mean())
    n = min(GROUPS, int(voted.sum()))
    cut = groups(mean[voted], np.zeros(int(voted.sum())), n=n, agreement=run.truth_N[voted])
    found["monotonicity"] = _spearman([g.mean for g in cut if g.agreement is not None],
                                      [g.agreement for g in cut if g.agreement is not None])  # fmt: skip
    found["rank_correlation"] = None
    if whole_N is not None:
        both = voted & ~np.isnan(whole_N)
        found["rank_correlation"] = _spearman(mean[both], whole_N[both])
    return found


def price(run: Run, M: int, one: Cost | None) -> dict[str, float | None]:
    """What they cost, in itself and in units of one reference model."""
    cost = run.cost(M)
    return {
        "tokens": cost.tokens,
        "wall": cost.wall,
        "cpu": cost.cpu,
        "memory": cost.memory,
        "tokens_of_one": cost.tokens / one.tokens if one and one.tokens else None,
        "cpu_of_one": cost.cpu / one.cpu if one and one.cpu else None,
    }


def detected(scores_N: Float[np.ndarray, "N"], truth_N: Int[np.ndarray, "N"]) -> dict[str, float | None]:
    """AUROC and average precision for wrong labels among pairs that have a score and a known truth."""
    use = ~np.isnan(scores_N) & (truth_N != 0)
    found = detection(scores_N[use], truth_N[use] < 0)
    if found is None:
        return {"auroc": None, "average_precision": None}
    return {"auroc": found.auroc, "average_precision": found.average_precision}


def _mean(margins_MN: Float[np.ndarray, "M N"]) -> Float[np.ndarray, "N"]:
    voters = (~np.isnan(margins_MN)).sum(0)
    return np.where(voters > 0, np.nansum(margins_MN, 0) / np.maximum(voters, 1), np.nan)


def _votes(margins_MN: Float[np.ndarray, "M N"]) -> Float[np.ndarray, "N"]:
    return _mean(np.where(np.isnan(margins_MN), np.nan, (np.sign(margins_MN) + 1) / 2))


def _certainty(margins_MN: Float[np.ndarray, "M N"]) -> Float[np.ndarray, "N"]:
    """Mean over std: NaN for pairs with fewer than two votes, which have no spread."""
    mean = _mean(margins_MN)
    std = np.sqrt(_mean((margins_MN - mean) ** 2))
    two = (~np.isnan(margins_MN)).sum(0) > 1
    return np.where(two, mean / np.maximum(std, 1e-12), np.nan)


SCORERS: dict[str, Callable[[Float[np.ndarray, "M N"]], Float[np.ndarray, "N"]]] = {
    "mean strength": _mean,
    "vote fraction": _votes,
    "mean / std": _certainty,
}


def confident_rows(kinds: Iterable[tuple[tuple[str, str], Sequence[Run]]]) -> tuple[list[Row], str]:
    """cleanlab's filter on the out-of-fold probabilities of every backend, or why it is left out."""
    held = list(kinds)
    if not held:
        return [], "Confident learning needs probabilities of pairs not trained on: add the scoring out-of-fold."
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return [], "Confident learning is left out: cleanlab is not installed (pip install 'steelyard[study]')."
    rows = []
    for (backend, _), runs in held:
        values = [confident(r, find_label_issues, get_label_quality_scores) for r in runs]
        rows.append({"backend": backend, **spread(values)})
    return rows, ""


def confident(run: Run, find: Any, rank: Any) -> dict[str, float | None]:
    """Confident learning (Northcutt et al. 2021, arXiv 1911.00068) on p = mean_m sigmoid(d_m), as cleanlab has it.

    A label must be one of two classes: half of the pairs, drawn by the seed, are shown swapped. Its filter chooses a
    number of pairs; the same number of weakest pairs by mean strength stands beside it.
    """
    known = (run.truth_N != 0) & ~np.isnan(run.strength())
    wrong = run.truth_N[known] < 0
    margins = run.margins_MN[:, known]
    p = _mean(expit(margins))
    label = np.random.default_rng(run.seed).integers(0, 2, len(p))
    first = np.where(label == 1, p, 1 - p)
    probabilities = np.stack([1 - first, first], 1)
    flagged = np.asarray(find(label, probabilities, n_jobs=1), dtype=bool)
    quality = np.asarray(rank(label, probabilities, method="self_confidence"), dtype=float)
    found = detection(-quality, wrong)
    weakest = np.zeros(len(p), dtype=bool)
    weakest[np.argsort(run.strength()[known], kind="stable")[: int(flagged.sum())]] = True
    row: dict[str, float | None] = {
        "auroc": found.auroc if found else None,
        "average_precision": found.average_precision if found else None,
        "flagged": float(flagged.mean()),
    }
    for name, chosen in (("filter", flagged), ("weakest", weakest), ("negative", run.strength()[known] < 0)):
        row |= {f"{name}_{key}": value for key, value in _hits(chosen, wrong).items()}
    return row


def _hits(chosen: Bool[np.ndarray, "N"], wrong: Bool[np.ndarray, "N"]) -> dict[str, float | None]:
    hit = int((chosen & wrong).sum())
    return {
        "precision": hit / int(chosen.sum()) if chosen.any() else None,
        "recall": hit / int(wrong.sum()) if wrong.any() else None,
    }


def spread(values: Sequence[dict[str, float | None]]) -> Row:
    """Each number's mean and sample std over the seeds, and the seeds' own; None where a seed has none."""
    row: Row = {}
    for name in values[0] if values else ():
        seeds = [v[name] for v in values]
        known = [x for x in seeds if x is not None]
        whole = len(known) == len(seeds)
        row[name] = {
            "mean": float(np.mean(known)) if whole else None,
            "std": float(np.std(known, ddof=1)) if whole and len(known) > 1 else None,
            "seeds": seeds,
        }
    return row


def _between_seeds(by_kind: dict[tuple[str, str], list[Run]]) -> list[Row]:
    """Rank correlation of two whole ensembles that differ in their seed alone: no other can be expected above it."""
    rows = []
    for (backend, scoring), held in by_kind.items():
        found = []
        for a, b in combinations(held, 2):
            x, y = a.strength(), b.strength()
            both = ~np.isnan(x) & ~np.isnan(y)
            found.append(_spearman(x[both], y[both]))
        known = [f for f in found if f is not None]
        if known:
            rows.append({"backend": backend, "scoring": scoring, "rank_correlation": float(np.mean(known))})
    return rows


def _spearman(first: Any, second: Any) -> float | None:
    try:
        return spearman(np.asarray(first, float), np.asarray(second, float))
    except InputError:
        return None


def tables(found: Row) -> list[Row]:
    """The summary's tables."""
    rows = [
        [r["scoring"], r["backend"], r["members"], _share(r["voted"]), _text(r["auroc"]), _between(r["auroc_interval"]),
         _between(r["auroc_difference"], signed=True), _text(r["average_precision"]), _text(r["monotonicity"]),
         _text(r["rank_correlation"]), _short(r["tokens_of_one"]), _short(r["cpu_of_one"])]
        for r in sorted(found["rows"], key=lambda r: r["scoring"])
    ]  # fmt: skip
    longer = found["longer"]
    rows.append(
        ["", "longer text", None, "", _text(longer["auroc"]), "", "", _text(longer["average_precision"]), *[""] * 4]
    )
    return [
        {
            "title": "Finding wrong labels: quality and cost",
            "columns": ["scoring", "backend", "members", "voted", "AUROC", "95 % interval",
                        f"less all {found['reference']}", "average precision", "monotonicity",
                        f"rank correlation with {found['reference']}", "tokens", "CPU"],
            "rows": rows,
            "note": f"Mean ± std over {seeds_of(found['seeds'])}; bootstrap intervals over "
            f"{over(len(found['seeds']), found['unit'])}. "
            f"Voted: share of pairs that these members judge. Less all {found['reference']}: paired, on the pairs that "
            f"both judge. Tokens and CPU in units of one {found['reference']} model; what members share is in every "
            "row.",
        }
    ]  # fmt: skip


def _share(value: Row) -> str:
    return "" if value["mean"] is None else f"{value['mean']:.0%}"


def _between(value: Sequence[float] | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    mean, low, high = value
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if signed else f"[{low:.3f}, {high:.3f}]"


def _text(value: Row) -> str:
    if value["mean"] is None:
        return ""
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["std"] is not None else "")


def _short(value: Row) -> str:
    return "" if value["mean"] is None else f"{value['mean']:.2f}"
