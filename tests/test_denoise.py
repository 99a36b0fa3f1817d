"""Repairing preferences: what each recipe edits, exactly; what it refuses; that it helps on planted errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from steelyard import denoise
from steelyard.denoise import RECIPES, Change, RepairOptions, repair
from steelyard.errors import InputError
from steelyard.strength import summarise
from steelyard.types import Preference, Strength

LN3 = math.log(3)


def pair(i: int, **changes: Any) -> Preference:
    return replace(Preference(id=f"p{i}", prompt="x", chosen=f"c{i}", rejected=f"r{i}"), **changes)


def strength(mean: float, p_flip: float = 0.5) -> Strength:
    return Strength(mean=mean, std=0.5, votes=3.0, voters=10, p_flip=p_flip, action="soften", reason="7 of 10")


PAIRS = [pair(i) for i in range(5)]
MEANS = [2.0, -3.0, 0.5, -0.25, 9.0]
STRENGTHS: list[Strength | None] = [strength(m, p) for m, p in zip(MEANS, [0.1, 0.9, 0.4, 0.6, 0.0], strict=True)]


def run(recipe: str, *, wrong: set[str] | None = None, **options: Any) -> list[Preference]:
    return repair(PAIRS, STRENGTHS, RepairOptions(recipe=recipe, **options), wrong=wrong)[0]


def swapped(preferences: list[Preference]) -> list[int]:
    return [i for i, p in enumerate(preferences) if p.chosen.startswith("r")]


# Recipes


def test_keep_changes_nothing() -> None:
    assert repair(PAIRS, STRENGTHS, RepairOptions()) == (PAIRS, [])


def test_flip_takes_the_weakest() -> None:
    # floor(0.4 * 5) = 2: the means -3 and -0.25. floor(0.39 * 5) = 1.
    got = run("flip", q=0.4)
    assert swapped(got) == [1, 3]
    assert (got[1].chosen, got[1].rejected, got[1].id) == ("r1", "c1", "p1")
    assert [got[i] for i in (0, 2, 4)] == [PAIRS[i] for i in (0, 2, 4)]
    assert swapped(run("flip", q=0.39)) == [1]
    assert swapped(run("flip", q=0.0)) == []


def test_pairs_that_the_models_do_not_doubt_are_counted_where_rank_takes_them() -> None:
    # In order: -3, -.25, .5, 2, 9. A share of .4 takes the doubted two; .8 takes two more.
    for recipe, verb in (("flip", "flips"), ("flip+margin", "flips"), ("drop", "drops")):
        assert denoise.undoubted(STRENGTHS, RepairOptions(recipe=recipe, q=0.4)) == ""
        said = denoise.undoubted([*STRENGTHS, None], RepairOptions(recipe=recipe, q=0.8))
        assert said.startswith(f"q = 0.8 {verb} 4 pairs, and with 2 of them the models rather agree with the label")
        assert said.endswith("with q = 0.4 it would stop before those")
    assert denoise.undoubted(STRENGTHS, RepairOptions(recipe="flip", q=0.8, shuffle=True)) == ""
    assert denoise.undoubted(STRENGTHS, RepairOptions(recipe="random flip", q=0.8)) == ""
    assert denoise.undoubted(STRENGTHS, RepairOptions(recipe="soft+margin")) == ""


def test_margin_follows_the_strength() -> None:
    # Scale 1/2: 1, -1.5, 0.25, -0.125, 4.5, bounded to 2.
    assert [p.margin for p in run("margin", margin_scale=0.5)] == [1.0, -1.5, 0.25, -0.125, 2.0]
    assert [p.margin for p in run("margin", margin_cap=1.0)] == [1.0, -1.0, 0.5, -0.25, 1.0]
    assert [p.margin for p in run("margin", negative_margins="zero")] == [2.0, 0.0, 0.5, 0.0, 2.0]


def test_after_a_flip_the_strength_of_the_new_label_is_the_absolute_mean() -> None:
    got = run("flip+margin", q=0.2, margin_cap=100.0)
    assert swapped(got) == [1]
    assert [p.margin for p in got] == [2.0, 3.0, 0.5, -0.25, 9.0]


def test_soft_labels_only_below_zero_and_margins_everywhere() -> None:
    got = run("soft+margin", margin_cap=100.0)
    assert swapped(got) == []
    assert [p.flip_prob for p in got] == [0.0, 0.9, 0.0, 0.6, 0.0]
    assert [p.margin for p in got] == MEANS
    assert [p.flip_prob for p in run("soft+margin", alpha=0.3)] == [0.0, 0.3, 0.0, 0.3, 0.0]
    assert [p.flip_prob for p in run("soft+margin", soft_below=1.0)] == [0.0, 0.9, 0.4, 0.6, 0.0]
    assert [p.margin for p in run("soft+margin", negative_margins="zero")] == [2.0, 0.0, 0.5, 0.0, 2.0]


def test_drop_keeps_the_order_of_the_rest() -> None:
    assert [p.id for p in run("drop", q=0.4)] == ["p0", "p2", "p4"]
    assert run("drop", q=1.0) == []


def test_soft_targets_by_hand() -> None:
    # sigmoid(-ln 3) = 1/4, sigmoid(ln 3) = 3/4; a mean of 1000 does not overflow.
    pairs = [pair(0), pair(1), pair(2), pair(3)]
    strengths = [strength(m) for m in (LN3, -LN3, 1000.0, -1000.0)]
    got, _ = repair(pairs, strengths, RepairOptions(recipe="soft targets"))
    assert [p.flip_prob for p in got] == pytest.approx([0.25, 0.75, 0.0, 1.0], abs=1e-12)


def test_random_flip_draws_as_many_as_flip_and_follows_the_seed() -> None:
    pairs = [pair(i) for i in range(200)]
    strengths = [strength(float(i)) for i in range(200)]

    def draw(seed: int) -> list[int]:
        return swapped(repair(pairs, strengths, RepairOptions(recipe="random flip", q=0.1, seed=seed))[0])

    assert len(draw(0)) == 20
    assert draw(0) == draw(0) != draw(1)
    # Not the weakest: the mean position of 20 of 200 is 99.5 with standard error 12.
    assert 50 < np.mean(draw(0)) < 150


def test_oracle_flip_swaps_exactly_the_wrong_ones() -> None:
    assert swapped(run("oracle flip", wrong={"p0", "p3"})) == [0, 3]
    assert swapped(run("oracle flip", wrong=set())) == []
    with pytest.raises(InputError, match="such as 'p9'"):
        run("oracle flip", wrong={"p9"})
    with pytest.raises(InputError, match="needs the ids"):
        run("oracle flip")


# Selection


def test_a_whole_number_of_pairs_loses_none_to_rounding() -> None:
    # 0.29 * 100 = 28.999999999999996 in floating point.
    pairs, strengths = [pair(i) for i in range(100)], [strength(float(-i)) for i in range(100)]
    assert 0.29 * 100 < 29
    assert len(denoise.drop(pairs, strengths, q=0.29)[0]) == 71


def test_ties_go_by_position() -> None:
    strengths = [strength(m) for m in (1.0, -1.0, -1.0, -1.0, 0.0)]
    assert swapped(denoise.flip(PAIRS, strengths, q=0.4)[0]) == [1, 2]


def test_a_bound_is_strict() -> None:
    assert swapped(denoise.flip(PAIRS, STRENGTHS, below=-0.25)[0]) == [1]
    assert swapped(denoise.flip(PAIRS, STRENGTHS, below=0.0)[0]) == [1, 3]


def test_select_by_one_thing() -> None:
    for bad in ({}, {"q": 0.1, "below": 0.0}, {"q": 1.5}, {"q": math.nan}):
        with pytest.raises(InputError):
            denoise.flip(PAIRS, STRENGTHS, **bad)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_an_unmeasured_pair_is_left_alone_but_counted(recipe: str) -> None:
    strengths = [None, *STRENGTHS[1:4], None]
    options = RepairOptions(recipe=recipe, **({"q": 0.5} if "q" in READS[recipe] else {}))
    got, changes = repair(PAIRS, strengths, options, wrong=set())
    assert PAIRS[0] in got
    assert PAIRS[4] in got
    counted = [c.id for c in changes if c.action == "unmeasured"]
    assert counted == ([] if recipe in ("keep", "oracle flip") else ["p0", "p4"])
    if recipe == "flip":
        # The share is of the three measured pairs: floor(0.5 * 3) = 1.
        assert swapped(got) == [1]


# Steps


def test_flip_of_flip_is_identity() -> None:
    twice = denoise.flip(*denoise.flip(PAIRS, STRENGTHS, q=1.0), q=1.0)
    assert twice[0] == PAIRS
    assert [s.votes for s in twice[1] if s] == [3.0] * 5


def test_flip_turns_the_strength_round() -> None:
    _, strengths = denoise.flip(PAIRS, STRENGTHS, q=0.2)
    s = strengths[1]
    assert s is not None
    assert (s.mean, s.std, s.votes, s.voters, s.action) == (3.0, 0.5, 7.0, 10, "keep")
    assert s.p_flip == pytest.approx(0.1)
    assert s.reason == "before the flip: 7 of 10"


def test_a_flip_keeps_what_the_label_carried() -> None:
    # Turning flip_prob and margin round as well would restate the old label instead of flipping it.
    loaded = pair(0, flip_prob=0.2, margin=0.7, weight=3.0, source="f.jsonl:1", row={"k": 1})
    (got,), _ = denoise.flip([loaded], [strength(-1.0)], q=1.0)
    assert got == replace(loaded, chosen="r0", rejected="c0")


def test_steps_compose_and_never_touch_their_input() -> None:
    before = list(PAIRS), list(STRENGTHS)
    got, strengths = denoise.margin(*denoise.soften(*denoise.drop(PAIRS, STRENGTHS, q=0.2), below=math.inf), scale=2)
    assert [p.id for p in got] == ["p0", "p2", "p3", "p4"]
    assert [p.flip_prob for p in got] == [0.1, 0.4, 0.6, 0.0]
    assert [p.margin for p in got] == [4.0, 1.0, -0.5, 18.0]
    assert len(strengths) == 4
    assert before == (PAIRS, STRENGTHS)


def test_pairs_and_strengths_must_match() -> None:
    for step in (denoise.soft_targets, denoise.margin, lambda p, s: denoise.drop(p, s, q=0.1)):
        with pytest.raises(InputError, match="got 4 for 5"):
            step(PAIRS, STRENGTHS[:4])
    with pytest.raises(InputError, match="unique"):
        repair([pair(0), pair(0)], STRENGTHS[:2], RepairOptions())


# Changes


def test_changes_tell_what_and_why() -> None:
    _, changes = repair(PAIRS, STRENGTHS, RepairOptions(recipe="flip+margin", q=0.2, margin_scale=0.1))
    first = changes[0]
    assert (first.id, first.action, first.before) == ("p1", "flip", PAIRS[1])
    assert first.after is not None
    assert first.after.chosen == "r1"
    assert first.evidence == "chosen and rejected swapped; mean margin -3, std 0.5: 7 of 10"
    assert [(c.id, c.action) for c in changes[1:]] == [(f"p{i}", "margin") for i in range(5)]
    # The second change of p1 starts where the first ended.
    assert changes[2].before == first.after
    assert changes[2].evidence == "margin 0.3; mean margin 3, std 0.5: before the flip: 7 of 10"


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("drop", {"q": 0.2}, [("p1", "drop", "left out; mean margin -3, std 0.5: 7 of 10")]),
        (
            "oracle flip",
            {},
            [("p2", "flip", "chosen and rejected swapped, known to be wrong; mean margin 0.5, std 0.5: 7 of 10")],
        ),
    ],
)
def test_evidence(recipe: str, options: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    _, changes = repair(PAIRS, STRENGTHS, RepairOptions(recipe=recipe, **options), wrong={"p2"})
    assert [(c.id, c.action, c.evidence) for c in changes] == expected
    assert all((c.after is None) == (recipe == "drop") for c in changes)


def test_soften_and_random_flip_give_evidence() -> None:
    _, changes = repair(PAIRS, STRENGTHS, RepairOptions(recipe="soft+margin"))
    assert [c.id for c in changes if c.action == "soften"] == ["p1", "p3"]
    assert changes[0].evidence.startswith("taken as wrong with probability 0.90; mean margin -3")
    _, changes = repair(PAIRS, STRENGTHS, RepairOptions(recipe="random flip", q=1.0))
    assert {c.evidence.split(";")[0] for c in changes} == {"chosen and rejected swapped at random"}


def test_a_shuffle_keeps_what_is_edited_and_leaves_to_chance_where() -> None:
    n = 40
    pairs = [pair(i) for i in range(n)]
    members_MN = np.linspace([-2.0, -1.0], [3.0, 2.0], n).T
    strengths = [None if i % 10 == 9 else s for i, s in enumerate(summarise(members_MN))]

    def edits(**options: Any) -> tuple[list[tuple[float, float]], list[Change]]:
        repaired, changes = repair(pairs, strengths, RepairOptions(recipe="soft+margin", **options))
        return [(p.flip_prob, p.margin) for p in repaired], changes

    plain, _ = edits()
    dealt, changes = edits(shuffle=True)
    assert sorted(dealt) == sorted(plain)
    assert sum(a != b for a, b in zip(dealt, plain, strict=True)) > n / 2
    assert dealt == edits(shuffle=True, seed=0)[0] != edits(shuffle=True, seed=1)[0]
    assert all(dealt[i] == (0.0, 0.0) for i in range(9, n, 10)), "a pair without a strength stays as it is"
    told = {c.evidence.endswith("(of another pair: control)") for c in changes if c.action != "unmeasured"}
    assert told == {True}
    flipped = repair(pairs, strengths, RepairOptions(recipe="flip", q=0.25, shuffle=True))[0]
    assert sum(p.chosen != q.chosen for p, q in zip(flipped, pairs, strict=True)) == 9  # a quarter of 36


# Options

MARGIN = {"margin_scale", "margin_cap", "negative_margins"}
READS = {
    "keep": set(),
    "flip": {"q"},
    "margin": MARGIN,
    "flip+margin": MARGIN | {"q"},
    "soft+margin": MARGIN | {"alpha", "soft_below", "margin_in_flip"},
    "drop": {"q"},
    "soft targets": set(),
    "random flip": {"q", "seed"},
    "oracle flip": set(),
}
READS |= {name: READS[name] | {"shuffle"} for name in READS if name not in ("keep", "random flip", "oracle flip")}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_options_without_effect_are_refused_by_name(recipe: str) -> None:
    defaults = RepairOptions().model_dump(exclude={"recipe"})
    for name, value in defaults.items():
        if name in READS[recipe]:
            assert getattr(RepairOptions(recipe=recipe, **{name: value}), name) == value
        else:
            with pytest.raises(ValidationError, match=f"recipe '{recipe}' does not read {name};".replace("+", r"\+")):
                RepairOptions(recipe=recipe, **{name: value})


def test_a_shuffle_reads_the_seed() -> None:
    assert RepairOptions(recipe="soft+margin", shuffle=True, seed=3).seed == 3
    with pytest.raises(ValidationError, match="does not read seed"):
        RepairOptions(recipe="soft+margin", shuffle=False, seed=3)


def test_a_saved_configuration_reads_back() -> None:
    options = RepairOptions(recipe="flip", q=0.3)
    assert RepairOptions.model_validate(options.model_dump()) == options
    with pytest.raises(ValidationError, match="does not read alpha"):
        RepairOptions.model_validate(options.model_dump() | {"alpha": 0.1})


def test_options_have_bounds() -> None:
    for bad in (
        {"recipe": "flip", "q": 1.1},
        {"recipe": "soft+margin", "alpha": -0.1},
        {"recipe": "margin", "margin_scale": 0.0},
        {"recipe": "margin", "margin_cap": 0.0},
        {"recipe": "invert"},
        {"quantile": 0.1},
    ):
        with pytest.raises(ValidationError):
            RepairOptions(**bad)


# Behaviour


def test_repair_mends_planted_errors() -> None:
    # 20 % of labels turned round; ten noisy members. Flipping the weakest 20 % mends most of them, at random it harms.
    rng = np.random.default_rng(0)
    n = 1000
    wrong = rng.random(n) < 0.2
    pairs = [pair(i, **({"chosen": "bad", "rejected": "good"} if w else {"chosen": "good", "rejected": "bad"}))
             for i, w in enumerate(wrong)]  # fmt: skip
    d = np.where(wrong, -1, 1) * (1 + rng.exponential(size=n)) + rng.normal(scale=2, size=(10, n))
    strengths = summarise(d)

    def errors(recipe: str, **options: Any) -> float:
        repaired, _ = repair(
            pairs,
            strengths,
            RepairOptions(recipe=recipe, **options),
            wrong={p.id for p, w in zip(pairs, wrong, strict=True) if w},
        )
        # A soft label errs by the weight it gives to the wrong side.
        return float(np.mean([p.flip_prob if p.chosen == "good" else 1 - p.flip_prob for p in repaired]))

    noisy = errors("keep")
    assert noisy == pytest.approx(wrong.mean())
    assert errors("oracle flip") == 0
    for recipe in ("flip", "drop"):
        assert errors(recipe, q=0.2) < 0.25 * noisy
    assert errors("soft+margin") < 0.6 * noisy
    assert errors("flip", q=0.2, shuffle=True) > 1.3 * noisy
    assert errors("soft+margin", shuffle=True) > 0.9 * noisy
    assert errors("random flip", q=0.2) > 1.3 * noisy
