"""Strength: hand-derived numbers, a loop in float64, planted label errors found."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from steelyard.errors import InputError
from steelyard.strength import (
    ActionRule,
    detection,
    fit_temperature,
    groups,
    out_of_fold_plan,
    spearman,
    summarise,
)

NAN = math.nan
LN3, LN9 = math.log(3), math.log(9)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# summarise


def test_summarise_by_hand() -> None:
    # Pair 0: mean (1 + 3) / 2 = 2, deviations -1 and 1, so std 1 (not the sample's sqrt 2).
    # Pair 1: votes: 0 is a tie (half), -2 is none. Pair 2: member 1 did not vote.
    got = summarise(np.array([[1.0, 0.0, 4.0], [3.0, -2.0, NAN]]))
    assert [(s.mean, s.std, s.votes, s.voters) for s in got] == [
        (2.0, 1.0, 2.0, 2),
        (-1.0, 1.0, 0.5, 2),
        (4.0, 0.0, 1.0, 1),
    ]
    assert all(type(v) is t for s in got for v, t in ((s.mean, float), (s.votes, float), (s.voters, int)))


def test_p_flip_by_hand() -> None:
    # sigmoid(-ln 3) = 1/4 and sigmoid(ln 9) = 9/10: mean 23/40. With T = 2 the first pair, d = 2 ln 3, gives 1/4.
    assert summarise(np.array([[LN3], [-LN9]]))[0].p_flip == pytest.approx(23 / 40)
    assert summarise(np.array([[2 * LN3]]), temperature=2)[0].p_flip == pytest.approx(1 / 4)


def test_summarise_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(size=(5, 40))
    d[rng.random(d.shape) < 0.3] = NAN
    d[0, np.isnan(d).all(0)] = 0.0
    for i, s in enumerate(summarise(d, temperature=0.7)):
        votes = [x for x in d[:, i] if x == x]
        mean = sum(votes) / len(votes)
        assert s.mean == pytest.approx(mean, abs=1e-12)
        assert s.std == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in votes) / len(votes)), abs=1e-12)
        assert s.votes == sum(1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in votes)
        assert s.voters == len(votes)
        assert s.p_flip == pytest.approx(sum(sigmoid(-x / 0.7) for x in votes) / len(votes), abs=1e-12)


def test_swapping_the_responses_turns_strength_round() -> None:
    d = np.random.default_rng(0).normal(size=(4, 10))
    for s, t in zip(summarise(d), summarise(-d), strict=True):
        assert t.mean == -s.mean
        assert t.std == pytest.approx(s.std)
        assert t.votes == s.voters - s.votes
        assert t.p_flip == pytest.approx(1 - s.p_flip)


def test_reasons_in_plain_words() -> None:
    # Nine members at -LN9 (p = 0.9 each) and one at +LN9 (p = 0.1): p_flip = 0.82.
    column = np.array([-LN9] * 9 + [LN9])[:, None]
    assert summarise(column)[0].reason == (
        "9 of 10 reward models prefer the rejected response; a fresh annotator would disagree with probability 0.82"
    )
    assert summarise(-column)[0].reason == (
        "9 of 10 reward models prefer the chosen response; a fresh annotator would disagree with probability 0.18"
    )
    single, sure = summarise(np.array([[LN3, -20.0]]))
    assert single.reason.startswith("1 of 1 reward model prefers the chosen response")
    assert sure.reason.endswith("probability over 0.99")


def test_actions() -> None:
    # p = 0.9 with no vote for chosen: flip. p = 0.5: soften. p = 0.1: keep.
    # 3 of 10 for chosen by a hair, 7 strongly against: p = 0.3 * 0.5 + 0.7 * 0.9 = 0.78 > 0.75, but too many votes.
    hair = 1e-9
    divided = [hair] * 3 + [-math.log(9)] * 7
    d = np.array([[-LN9] * 10, [0.0] * 10, [LN9] * 10, divided]).T
    assert [s.action for s in summarise(d)] == ["flip", "soften", "keep", "soften"]
    lenient = ActionRule(flip_votes=0.3)
    assert [s.action for s in summarise(d, thresholds=lenient)] == ["flip", "soften", "keep", "flip"]
    assert summarise(d, thresholds=ActionRule(flip_above=0.9 + 1e-9))[0].action == "soften"
    assert summarise(d, thresholds=ActionRule(soften_above=0.05))[2].action == "soften"


def test_action_rule_refuses_contradictions() -> None:
    with pytest.raises(ValidationError, match="soften_above must not exceed flip_above"):
        ActionRule(flip_above=0.6, soften_above=0.7)
    for bad in ({"flip_above": 1.1}, {"flip_votes": 0.6}, {"soften_above": -0.1}, {"flip": 0.5}):
        with pytest.raises(ValidationError):
            ActionRule(**bad)


def test_summarise_refuses_what_it_cannot_weigh() -> None:
    with pytest.raises(InputError, match=r"none for 1 pairs \(first at position 1\)"):
        summarise(np.array([[1.0, NAN], [1.0, NAN]]))
    with pytest.raises(InputError, match="infinite"):
        summarise(np.array([[math.inf]]))
    with pytest.raises(InputError, match="members by pairs"):
        summarise(np.ones(3))
    for temperature in (0.0, -1.0, NAN, math.inf):
        with pytest.raises(InputError, match="temperature"):
            summarise(np.ones((1, 1)), temperature=temperature)


# groups


def test_groups_by_hand() -> None:
    # Sorted means -2, -1, 0, 1, 5 in two groups: 3 and 2 pairs.
    mean = np.array([5.0, -1.0, 0.0, -2.0, 1.0])
    std = np.array([9.0, 2.0, 3.0, 1.0, 5.0])
    agreement = np.array([1, 1, 0, -1, 1])
    low, high = groups(mean, std, n=2, agreement=agreement)
    # stds 1, 2, 3; verdicts -1, 1 and an undecided one.
    assert (low.low, low.high, low.n, low.mean, low.std, low.agreement) == (-2, 0, 3, -1, 2, 0.5)
    assert (high.low, high.high, high.n, high.mean, high.std, high.agreement) == (1, 5, 2, 3, 7, 1.0)


def test_groups_without_verdicts_have_no_agreement() -> None:
    assert [g.agreement for g in groups(np.arange(4.0), np.ones(4), n=2)] == [None, None]
    assert groups(np.arange(2.0), np.ones(2), n=2, agreement=np.array([0, -1]))[0].agreement is None
    assert groups(np.arange(2.0), np.ones(2), n=2, agreement=np.array([0, -1]))[1].agreement == 0.0


def test_groups_ignore_the_input_order_and_differ_by_one_at_most() -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(2, 103))
    order = rng.permutation(103)
    got = groups(mean, std)
    for one, other in zip(got, groups(mean[order], std[order]), strict=True):
        assert one.mean == pytest.approx(other.mean)
        assert (one.low, one.high, one.n) == (other.low, other.high, other.n)
    assert sorted(g.n for g in got) == [5] * 17 + [6] * 3
    assert all(a.high <= b.low for a, b in itertools.pairwise(got))


def test_groups_refuse_bad_input() -> None:
    with pytest.raises(InputError, match=r"1\.\.3"):
        groups(np.ones(3), np.ones(3), n=4)
    with pytest.raises(InputError, match="pair up"):
        groups(np.ones(3), np.ones(2), n=1)
    with pytest.raises(InputError, match="agreement"):
        groups(np.ones(1), np.ones(1), n=1, agreement=np.array([2]))
    with pytest.raises(InputError, match="finite"):
        groups(np.array([NAN]), np.ones(1), n=1)


# out-of-fold plan


def test_every_pair_is_held_out_once_in_each_split() -> None:
    plan = out_of_fold_plan([f"p{i}" for i in range(23)], members=6, folds=3, seed=0)
    assert plan.shape == (6, 23)
    assert plan.dtype == bool
    for split in (plan[:3], plan[3:]):
        assert (split.sum(0) == 1).all()
        # 23 = 8 + 8 + 7.
        assert sorted(split.sum(1)) == [7, 8, 8]
    assert not (plan[:3] == plan[3:]).all()


def test_identical_prompts_stay_together_and_folds_balance() -> None:
    # One prompt with 6 pairs, two with 3, six with 1: 18 pairs in 3 folds of 6, exactly.
    keys = [("a",)] * 6 + [("b",)] * 3 + [("c",)] * 3 + [(i,) for i in range(6)]
    keys = [keys[i] for i in np.random.default_rng(0).permutation(18)]
    for seed in range(5):
        plan = out_of_fold_plan(keys, members=3, folds=3, seed=seed)
        assert plan.sum(1).tolist() == [6, 6, 6]
        for key in set(keys):
            rows = [i for i, k in enumerate(keys) if k == key]
            assert all((plan[:, i] == plan[:, rows[0]]).all() for i in rows)


def test_the_plan_follows_the_seed() -> None:
    keys = list(range(50))
    first = out_of_fold_plan(keys, members=4, folds=2, seed=7)
    assert (first == out_of_fold_plan(keys, members=4, folds=2, seed=7)).all()
    assert (first != out_of_fold_plan(keys, members=4, folds=2, seed=8)).any()


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(InputError, match="2 prompts and 3 folds"):
        out_of_fold_plan(["a", "b", "a", "b"], members=3, folds=3, seed=0)
    with pytest.raises(InputError, match=r"1 prompts and 2 folds; add data$"):
        out_of_fold_plan("aa", members=2, folds=2, seed=0)
    with pytest.raises(InputError, match="multiple of folds"):
        out_of_fold_plan("abcdef", members=5, folds=2, seed=0)
    with pytest.raises(InputError, match="multiple of folds"):
        out_of_fold_plan("abcdef", members=0, folds=2, seed=0)
    with pytest.raises(InputError, match="at least 2"):
        out_of_fold_plan("abcdef", members=1, folds=1, seed=0)
    with pytest.raises(InputError, match="seed must be at least 0, got -1"):
        out_of_fold_plan("abcdef", members=2, folds=2, seed=-1)


# temperature, detection, rank correlation


def test_temperature_by_hand() -> None:
    # Three votes of +1 and one of -1: likelihood is best where sigmoid(1 / T) = 3/4, so T = 1 / ln 3.
    assert fit_temperature(np.array([[1.0, 1.0], [1.0, -1.0]])) == pytest.approx(1 / LN3, rel=1e-9)
    # Nine to one at +-5: T = 5 / ln 9; NaN does not vote.
    assert fit_temperature(np.array([5.0] * 9 + [-5.0, NAN])) == pytest.approx(5 / LN9, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_temperature_recovers_the_annotators(scale: float) -> None:
    # Annotators who follow sigmoid(d / T) with T = 2 choose the order of each pair.
    rng = np.random.default_rng(0)
    gap = rng.normal(scale=3, size=40_000)
    kept = rng.random(gap.size) < 1 / (1 + np.exp(-gap / 2))
    assert fit_temperature(scale * np.where(kept, gap, -gap)) == pytest.approx(2 * scale, rel=0.05)


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, -2.0], [1.0, -1.0], [NAN, NAN], [0.0, 0.0]])
def test_a_temperature_without_an_optimum_is_refused(margins: list[float]) -> None:
    with pytest.raises(InputError, match="can be fitted only if"):
        fit_temperature(np.array([margins]))


def test_detection_by_hand() -> None:
    # Ranked: wrong, right, wrong, right. Wrong beats right in 3 of 4 comparisons. Precision at the hits: 1, 2/3.
    got = detection(np.array([0.1, 0.9, 0.5, 0.3]), np.array([False, True, False, True]))
    assert got is not None
    assert (got.auroc, got.n, got.positives) == (0.75, 4, 2)
    assert got.average_precision == pytest.approx((1 + 2 / 3) / 2)


def test_detection_is_undefined_without_both_kinds() -> None:
    assert detection(np.arange(3.0), np.zeros(3, bool)) is None
    assert detection(np.arange(3.0), np.ones(3, bool)) is None
    with pytest.raises(InputError, match="finite"):
        detection(np.array([NAN, 1.0]), np.array([True, False]))
    with pytest.raises(InputError, match="pair up"):
        detection(np.ones(2), np.ones(3, bool))


def test_spearman_by_hand() -> None:
    # Ranks 1, 2, 3, 4 against 1, 3, 2, 4: 1 - 6 * (1 + 1) / (4 * 15) = 0.8. Ranks see no monotone change.
    first, second = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert spearman(first, second) == pytest.approx(0.8)
    assert spearman(np.exp(first), second**3) == pytest.approx(0.8)
    assert spearman(first, -second) == pytest.approx(-0.8)
    # Ties share their rank: 1.5, 1.5, 3 against 1, 2, 3: 1.5 / sqrt(1.5 * 2).
    assert spearman(np.array([0.0, 0, 1]), np.array([1.0, 2, 3])) == pytest.approx(1.5 / 3**0.5)
    for bad in (np.ones(4), np.array([1.0, NAN, 2, 3]), np.ones(3)):
        with pytest.raises(InputError):
            spearman(first, bad)


def test_an_ensemble_finds_planted_flips_better_than_one_member() -> None:
    # True gaps of 1 or more; 20 % of labels turned round; ten members that see the gap through noise.
    rng = np.random.default_rng(0)
    n = 2000
    wrong = rng.random(n) < 0.2
    gap = (1 + rng.exponential(size=n)) * np.where(wrong, -1, 1)
    d = gap + rng.normal(scale=2, size=(10, n))
    strengths = summarise(d)
    mean = np.array([s.mean for s in strengths])
    ensemble, single = detection(-mean, wrong), detection(-d[0], wrong)
    assert ensemble is not None
    assert single is not None
    assert ensemble.auroc > 0.97
    assert ensemble.auroc > single.auroc + 0.05
    flips = np.array([s.action == "flip" for s in strengths])
    assert wrong[flips].mean() > 0.95
    assert Counter(wrong[mean < -1.0].tolist())[True] > 0.6 * wrong.sum()
