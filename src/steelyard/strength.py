"""How strong is each preference? A vote of M reward models (Secrets of RLHF II, arXiv 2401.06080, section 2.2).

Margins d_mi = r_m(chosen_i) - r_m(rejected_i) come in as one array of M members by N pairs, NaN where a member
did not vote. What goes out is one `Strength` per pair, and measures of how well strength tells wrong labels.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Num
from pydantic import Field, model_validator
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.types import Action, Strength


class ActionRule(Config):
    """When to suggest what: flip if the vote is clear, soften if the label is in doubt, else keep."""

    flip_above: float = Field(default=0.75, ge=0.5, le=1, description="suggest a flip above this p_flip")
    flip_votes: float = Field(
        default=0.2,
        ge=0,
        le=0.5,
        description="and only if at most this share of the members prefers the chosen response",
    )
    soften_above: float = Field(default=0.4, ge=0, le=1, description="suggest a soft label above this p_flip")

    @model_validator(mode="after")
    def _ordered(self) -> ActionRule:
        if self.soften_above > self.flip_above:
            raise ValueError(f"soften_above must not exceed flip_above, got {self.soften_above} > {self.flip_above}")
        return self


DEFAULT_RULE = ActionRule()


@dataclass(frozen=True, slots=True)
class Group:
    """One of n equal groups of pairs by strength, `low` to `high` being the means at its ends.

    `mean` and `std` average the pairs' own; `agreement` is the share of judged pairs whose label the judge
    shares (None if no pair of the group was judged).
    """

    low: float
    high: float
    n: int
    mean: float
    std: float
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Detection:
    """How well a score finds wrong labels: threshold-free, over n pairs of which `positives` are wrong."""

    auroc: float
    average_precision: float
    n: int
    positives: int


def summarise(
    margins_MN: Float[np.ndarray, "M N"],
    *,
    temperature: float = 1.0,
    thresholds: ActionRule = DEFAULT_RULE,
) -> list[Strength]:
    """The strength of each pair, from the margins of the members that voted on it (Eq. 4, population form).

        mu_i = mean_m d_mi,   sigma_i = sqrt(mean_m (d_mi - mu_i)^2),   p_flip_i = mean_m sigmoid(-d_mi / T)

    p_flip is not in the paper: it is the Bradley-Terry chance, averaged over members, that a fresh annotator
    decides the other way. It is only as good as T (`fit_temperature`).

    Args:
        margins_MN: units of reward; NaN where a member did not vote.
        temperature: T > 0, units of reward.
        thresholds: what to suggest when.

    Raises:
        InputError: not a matrix, an infinite margin, a pair without a vote, or T <= 0.
    """
    if not 0 < temperature < np.inf:
        raise InputError(f"temperature must be finite and > 0, got {temperature}")
    d = _checked(margins_MN)
    voted = ~np.isnan(d)
    voters = voted.sum(0)
    if not voters.all():
        silent = np.flatnonzero(voters == 0)
        raise InputError(
            f"every pair needs the vote of at least one member, got none for {silent.size} pairs "
            f"(first at position {silent[0]}); score them or leave them out"
        )
    mean = np.nanmean(d, 0)
    std = np.sqrt(np.nanmean((d - mean) ** 2, 0))
    votes = np.where(voted, (np.sign(d) + 1) / 2, 0.0).sum(0)
    p_flip = np.nanmean(expit(-d / temperature), 0)
    columns = (column.tolist() for column in (mean, std, votes, voters, p_flip))
    return [
        Strength(m, s, v, n, p, action=_action(v / n, p, thresholds), reason=_reason(v, n, p))
        for m, s, v, n, p in zip(*columns, strict=True)
    ]


def groups(
    mean: Float[np.ndarray, "N"],
    std: Float[np.ndarray, "N"],
    *,
    n: int = 20,
    agreement: Num[np.ndarray, "N"] | None = None,
) -> list[Group]:
    """Sort the pairs by mean and cut them into n groups of equal count, weakest first (section 2.2, Figs. 2, 3).

    Counts differ by at most one (the first groups are the larger); ties keep their input order.

    Args:
        mean, std: of each pair, units of reward.
        n: number of groups.
        agreement: per pair 1 if a judge shares the label, -1 if not, 0 if it is undecided or was not asked.

    Raises:
        InputError: lengths differ, fewer pairs than groups, a mean that is not finite, or another agreement value.
    """
    mean, std = np.asarray(mean, float), np.asarray(std, float)
    judged = np.zeros(len(mean)) if agreement is None else np.asarray(agreement)
    if not mean.shape == std.shape == judged.shape:
        raise InputError(f"mean, std and agreement must pair up, got {mean.shape}, {std.shape}, {judged.shape}")
    if not 1 <= n <= len(mean):
        raise InputError(f"the number of groups must lie in 1..{len(mean)} (one pair each), got {n}")
    if not np.isfinite(mean).all() or not np.isin(judged, (-1, 0, 1)).all():
        raise InputError("means must be finite and agreement 1, 0 or -1; got another value")
    result = []
    for rows in np.array_split(np.argsort(mean, kind="stable"), n):
        verdicts = judged[rows][judged[rows] != 0]
        result.append(
            Group(
                low=float(mean[rows[0]]),
                high=float(mean[rows[-1]]),
                n=len(rows),
                mean=float(mean[rows].mean()),
                std=float(std[rows].mean()),
                agreement=float((verdicts == 1).mean()) if verdicts.size else None,
            )
        )
    return result


def out_of_fold_plan(
    prompt_keys: Sequence[Hashable], *, members: int, folds: int, seed: int
) -> Bool[np.ndarray, "M N"]:
    """Which member must not train on which pair, so that it can judge the pair unbiased: true = held out.

    Member m holds out fold m % folds of split m // folds. So every pair is held out by exactly members / folds
    members, each from another split. Identical prompts share a fold: their pairs share responses. Folds are
    balanced by pair count: the most frequent prompts are placed first, each in the emptiest fold.

    Args:
        prompt_keys: one hashable per pair; equal keys are the same prompt.
        members, folds: members must be a multiple of folds, folds >= 2.
        seed: >= 0; splits differ from each other and with the seed.

    Raises:
        InputError: one of these conditions does not hold, or there are fewer distinct prompts than folds.
    """
    if folds < 2:
        raise InputError(f"folds must be at least 2 (something must be left to train on), got {folds}")
    if members < folds or members % folds:
        raise InputError(f"members must be a multiple of folds, got {members} members and {folds} folds")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}")
    counts = Counter(prompt_keys)
    if len(counts) < folds:
        raise InputError(
            f"out-of-fold scoring needs at least as many distinct prompts as folds, "
            f"got {len(counts)} prompts and {folds} folds; {'lower folds or ' if len(counts) > 1 else ''}add data"
        )
    held_out_MN = np.zeros((members, len(prompt_keys)), bool)
    for split in range(members // folds):
        fold_of = _balanced_folds(counts, folds, np.random.default_rng([seed, split]))
        fold_N = np.array([fold_of[key] for key in prompt_keys])
        for fold in range(folds):
            held_out_MN[split * folds + fold] = fold_N == fold
    return held_out_MN


def fit_temperature(margins: Float[np.ndarray, "*M N"]) -> float:
    """The T > 0 under which the observed labels are most likely: min_T mean log(1 + exp(-d / T)).

    Every label says "chosen", so a negative margin is a surprise and a large T admits more of them. Each
    member's vote counts on its own (NaN: no vote). Give it margins of held-out pairs: in-sample ones were
    trained to be positive, and T comes out too small. The loss is convex in 1/T; its slope is solved for 0.

    Raises:
        InputError: no finite optimum: no negative margin (T -> 0), or a mean margin <= 0 (T -> infinity).
    """
    d = _checked(np.atleast_2d(margins))
    d = d[~np.isnan(d)]
    if d.size == 0 or d.min() >= 0 or d.mean() <= 0:
        raise InputError(
            "a temperature can be fitted only if some margins are negative and their mean is positive, "
            f"got {int((d < 0).sum())} negative of {d.size}; score held-out pairs, or set the temperature"
        )

    def slope(inverse: float) -> float:
        return -float(np.mean(d * expit(-inverse * d)))

    # In units of the typical margin the bracket is found in a few doublings, whatever the reward's scale.
    high = 1.0 / float(np.abs(d).mean())
    while slope(high) < 0:
        high *= 2
    return 1.0 / float(brentq(slope, 0.0, high, xtol=1e-12 * high, rtol=1e-12))


def detection(scores: Float[np.ndarray, "N"], wrong: Bool[np.ndarray, "N"]) -> Detection | None:
    """How well `scores` (higher = more suspicious; -mean or p_flip) finds the pairs that are `wrong`.

    AUROC is the chance that a wrong pair scores above a right one (ties count half); average precision is the
    area under precision against recall. None if all pairs are right or all are wrong: neither is defined,
    and a kind of noise that is absent is no mistake of the caller.

    Raises:
        InputError: lengths differ, or a score is not finite.
    """
    scores, wrong = np.asarray(scores, float), np.asarray(wrong, bool)
    if scores.ndim != 1 or scores.shape != wrong.shape:
        raise InputError(f"scores and truth must pair up, got shapes {scores.shape} and {wrong.shape}")
    if not np.isfinite(scores).all():
        raise InputError(f"scores must be finite, got {int((~np.isfinite(scores)).sum())} that are not")
    positives = int(wrong.sum())
    if positives in (0, len(wrong)):
        return None
    return Detection(
        auroc=float(roc_auc_score(wrong, scores)),
        average_precision=float(average_precision_score(wrong, scores)),
        n=len(wrong),
        positives=positives,
    )


def spearman(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "N"]) -> float:
    """Rank correlation of two strengths of the same pairs, in [-1, 1]: the correlation of ranks, ties averaged.

    Raises:
        InputError: lengths differ, a value is not finite, or one side is constant (undefined).
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.ndim != 1 or first.shape != second.shape:
        raise InputError(f"the two strengths must pair up, got shapes {first.shape} and {second.shape}")
    for values in (first, second):
        if not np.isfinite(values).all() or values.size < 2 or values.min() == values.max():
            raise InputError("a rank correlation needs at least two different, finite values on each side")
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _checked(margins: Float[np.ndarray, "M N"]) -> Float[np.ndarray, "M N"]:
    d = np.asarray(margins, float)
    if d.ndim != 2 or d.shape[0] == 0:
        raise InputError(f"margins must be members by pairs (M, N) with M >= 1, got shape {d.shape}")
    if np.isinf(d).any():
        raise InputError(f"margins must be finite (NaN: no vote), got {int(np.isinf(d).sum())} infinite ones")
    return d


def _balanced_folds(counts: Counter[Hashable], folds: int, rng: np.random.Generator) -> dict[Hashable, int]:
    keys = list(counts)
    shuffled = [keys[i] for i in rng.permutation(len(keys))]
    shuffled.sort(key=lambda key: -counts[key])
    load = [(0, fold) for fold in range(folds)]
    fold_of = {}
    for key in shuffled:
        pairs, fold = load[0]
        fold_of[key] = fold
        heapq.heapreplace(load, (pairs + counts[key], fold))
    return fold_of


def _action(vote_share: float, p_flip: float, rule: ActionRule) -> Action:
    if p_flip > rule.flip_above and vote_share <= rule.flip_votes:
        return "flip"
    return "soften" if p_flip > rule.soften_above else "keep"


def _reason(votes: float, voters: int, p_flip: float) -> str:
    majority, side = (votes, "chosen") if 2 * votes >= voters else (voters - votes, "rejected")
    members = "reward models prefer" if voters > 1 else "reward model prefers"
    # Two decimals must not claim certainty.
    chance = "over 0.99" if p_flip > 0.995 else "under 0.01" if p_flip < 0.005 else f"{p_flip:.2f}"
    return (
        f"{majority:g} of {voters} {members} the {side} response; "
        f"a fresh annotator would disagree with probability {chance}"
    )
