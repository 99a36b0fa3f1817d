"""Trees to tensors, checked place by place, and grouping under a token budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.collate import collate, pack
from steelyard.data.encode import Tree

TREES = [Tree((11, 12, 13), ((21, 22), (31, 32, 33))), Tree((41,), ((51,), (61, 62)))]


def test_rows_hold_prompt_then_responses_padded_on_the_right() -> None:
    batch = collate(TREES, 0)
    assert batch.ids_BL.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33], [41, 51, 61, 62, 0, 0, 0, 0]]
    assert batch.positions_BL.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 1, 2, 0, 0, 0, 0]]
    assert batch.response_BKT.tolist() == [[[21, 22, 0], [31, 32, 33]], [[51, 0, 0], [61, 62, 0]]]
    assert batch.mask_BKT.sum(-1).tolist() == [[2, 3], [1, 2]]
    assert batch.last_BK.tolist() == [[4, 7], [1, 3]]
    assert batch.tokens == 16


def test_places_of_the_tokens_and_of_those_before_them() -> None:
    batch = collate(TREES, 0)
    assert batch.at_BKT[0].tolist() == [[3, 4, 0], [5, 6, 7]]
    assert batch.before_BKT[0].tolist() == [[2, 3, 0], [2, 5, 6]]
    assert batch.before_BKT[1].tolist() == [[0, 0, 0], [0, 2, 0]]


def test_a_token_sees_the_prompt_and_its_own_response_up_to_itself() -> None:
    sees = [[j for j, seen in enumerate(row) if seen] for row in collate(TREES, 0).attend_B1LL[1, 0].tolist()]
    assert sees == [[0], [0, 1], [0, 2], [0, 2, 3], [4], [4, 5], [4, 5, 6], [4, 5, 6, 7]]


def test_what_cannot_be_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="same number of responses"):
        collate([TREES[0], Tree((1,), ((2,),))], 0)
    for tree in (Tree((), ((2,),)), Tree((1,), ((2,), ()))):
        with pytest.raises(ValueError, match="at least one token"):
            collate([tree], 0)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(16, 200))
def test_groups_cover_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = pack(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= budget
    assert pack(lengths, budget) == groups


def test_a_row_longer_than_the_budget_stands_alone_and_similar_lengths_meet() -> None:
    assert pack([5, 100, 6, 50, 49], 100) == [[1], [3, 4], [2, 0]]
