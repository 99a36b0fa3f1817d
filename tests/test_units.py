"""What a bootstrap draws: prompts, responses that pairs share, or pairs; by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steelyard.evaluate.reward import bootstrap_mean, examine
from steelyard.evaluate.seeds import compare_arms, mean_over_seeds
from steelyard.evaluate.units import Units, units_of
from steelyard.types import Preference


def pairs(*texts: tuple[str, str, str]) -> list[Preference]:
    return [Preference(str(i), *text) for i, text in enumerate(texts)]


def round_robin(K: int) -> tuple[list[Preference], np.ndarray]:
    """All pairs of K responses to one prompt, and a value of each pair in which response 0 alone matters."""
    both = [(i, j) for i in range(K) for j in range(i)]
    return pairs(*(("p", str(i), str(j)) for i, j in both)), np.array([float(0 in ij) for ij in both])


class TestUnits:
    def test_prompts_where_there_are_thirty(self) -> None:
        many = pairs(*((f"p{i % 30}", "a", "b") for i in range(60)))
        assert units_of(many).name == "prompts"
        assert units_of(many).count == 30
        assert units_of(many[:29]).name == "pairs"

    def test_responses_where_prompts_are_few_and_pairs_where_none_recurs(self) -> None:
        shared = units_of(pairs(("p", "a", "b"), ("p", "c", "a"), ("q", "a", "b")))
        assert shared.name == "responses"
        assert shared.count == 5  # a, b, c to p; a, b to q: one text under two prompts is two responses
        a_b, c_a, other = shared.places_NE.tolist()
        assert a_b[0] == c_a[1]
        assert not set(other) & {*a_b, *c_a}
        alone = units_of(pairs(("p", "a", "b"), ("p", "c", "d")))
        assert (alone.name, alone.count) == ("pairs", 2)

    def test_a_pair_weighs_the_product_of_its_responses_counts(self) -> None:
        units = units_of(pairs(("p", "a", "b"), ("p", "c", "a")))
        counts = np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])  # of a, b, c
        assert units.weights(counts).tolist() == [[2, 0], [1, 1], [0, 0]]
        table = np.array([[1.0, 10.0], [5.0, 100.0]])
        assert units.sums(counts, table).tolist() == [[2, 20], [6, 110], [0, 0]]

    def test_parts_and_both_sides(self) -> None:
        units = units_of(pairs(("p", "a", "b"), ("p", "c", "d"), ("p", "e", "c")))
        assert units.take(np.array([False, True, True])).places_NE.tolist() == [[0, 1], [2, 0]]
        assert units.twice().places_NE.tolist() == [*units.places_NE.tolist()] * 2
        assert len(units.twice()) == 6


class TestIntervals:
    def test_three_pairs_of_three_responses_by_hand(self) -> None:
        # Pairs ab, ac, bc with values 1, 0, 0; counts of a, b, c with the sum 3. Drawn means: (1, 1, 1) 6 / 27 -> 1/3;
        # (2, 1, 0) and (1, 2, 0), 3 / 27 each -> 1; c with one other, 12 / 27 -> 0; one alone: no pair, does not count.
        units = units_of(pairs(("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c")))
        values = np.array([1.0, 0.0, 0.0])
        for level in (0.95, 0.6):  # of 24: 12 zeros, 6 thirds, 6 ones
            mean, low, high = bootstrap_mean(values, clusters=units, level=level, draws=4000)
            assert (mean, low, high) == pytest.approx((1 / 3, 0.0, 1.0))
        assert bootstrap_mean(values, clusters=units, level=0.4, draws=4000) == pytest.approx((1 / 3, 0.0, 1 / 3))
        assert mean_over_seeds(values[None], clusters=units, level=0.4, draws=4000) == pytest.approx((1 / 3, 0, 1 / 3))

    def test_without_shared_responses_it_is_the_bootstrap_of_pairs(self) -> None:
        given = pairs(*(("p", f"a{i}", f"b{i}") for i in range(40)))
        values = np.arange(40.0) % 3
        assert bootstrap_mean(values, clusters=units_of(given)) == bootstrap_mean(values)

    def test_a_response_in_many_pairs_widens(self) -> None:
        # Response 0 is in 39 of 780 pairs, drawn about Poisson(1) times; of pairs alone the spread is .0078.
        given, values = round_robin(40)
        _, low, high = bootstrap_mean(values, clusters=units_of(given), draws=4000)
        _, low_pairs, high_pairs = bootstrap_mean(values, draws=4000)
        assert high_pairs - low_pairs == pytest.approx(2 * 1.96 * np.sqrt(0.05 * 0.95 / 780), rel=0.1)
        # A count of 3 (98 % of Poisson(1) lies at or below): weight 3 of 40 drawn, share about 6 / 40.
        assert low == 0.0
        assert high == pytest.approx(2 * 3 * 37 / (40 * 39), abs=0.01)

    def test_one_response_in_all_pairs_tells_of_the_others_alone(self) -> None:
        # All pairs hold response x: its count cancels from every weighted mean, what varies is the other response.
        given = pairs(*(("p", "x", f"b{i}") for i in range(100)))
        values = np.arange(100.0) % 2
        _, low, high = bootstrap_mean(values, clusters=units_of(given), draws=4000)
        _, low_pairs, high_pairs = bootstrap_mean(values, draws=4000)
        assert high - low == pytest.approx(high_pairs - low_pairs, rel=0.1)

    def test_seeds_are_crossed_with_responses(self) -> None:
        given, values = round_robin(30)
        units = units_of(given)
        alike = np.stack([values, values])
        rows = compare_arms({"a": alike, "b": alike + np.array([[0.1], [0.1]])}, clusters=units, control="a")
        assert [(r["unit"], r["clusters"]) for r in rows] == [("responses", 30)] * 2
        # What the arms share cancels: the difference is .1 whatever is drawn.
        assert [rows[1]["difference"][k] for k in ("value", "low", "high")] == pytest.approx([0.1] * 3)
        # Seeds that differ widen; seeds alike do not.
        one, two = mean_over_seeds(values[None], clusters=units), mean_over_seeds(alike, clusters=units)
        assert one == pytest.approx(two, abs=0.01)
        _, low, high = mean_over_seeds(np.stack([values - 1, values + 1]), clusters=units)
        assert high - low > 2.5

    def test_it_covers_where_pairs_do_not(self) -> None:
        # Responses with qualities of their own; a value of a pair is the sum of its two plus little noise.
        rng = np.random.default_rng(0)
        given, _ = round_robin(25)
        units = units_of(given)
        hits = np.zeros(2)
        for _ in range(60):
            quality = rng.normal(size=25)
            values = quality[units.places_NE].sum(1) + 0.1 * rng.normal(size=len(given))
            found: list[Any] = [bootstrap_mean(values, clusters=c, draws=300) for c in (units, None)]
            hits += [low <= 0 <= high for _, low, high in found]
        assert hits[0] >= 50
        assert hits[1] <= 30


def test_an_examination_says_what_was_drawn() -> None:
    given, values = round_robin(12)
    found = examine(values, 1 - values, prompts=["p"] * len(given), units=units_of(given))
    assert found["row"]["unit"] == "responses"
    assert found["row"]["low"] < found["row"]["accuracy"] < found["row"]["high"]
    alone = examine(values, 1 - values, prompts=["p"] * len(given))["row"]
    assert (alone["unit"], alone["low"], alone["high"]) == ("prompts", alone["accuracy"], alone["accuracy"])
    assert Units.of("prompts", ["b", "a", "b"]).places_NE.tolist() == [[1], [0], [1]]
