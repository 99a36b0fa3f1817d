"""Trees to one flat row, checked place by place, and grouping under a token budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.collate import TreeBatch, collate, fill, pack
from steelyard.data.encode import Tree
from steelyard.models import attention

TREES = [Tree((11, 12, 13), ((21, 22), (31, 32, 33))), Tree((41,), ((51,), (61, 62)))]


def test_the_row_holds_prompt_then_responses_tree_after_tree() -> None:
    batch = collate(TREES, 0)
    assert batch.ids_T.tolist() == [11, 12, 13, 21, 22, 31, 32, 33, 41, 51, 61, 62]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2]
    assert batch.tree_T.tolist() == [0] * 8 + [1] * 4
    assert batch.branch_T.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2, 2]
    assert batch.response_BKR.tolist() == [[[21, 22, 0], [31, 32, 33]], [[51, 0, 0], [61, 62, 0]]]
    assert batch.mask_BKR.sum(-1).tolist() == [[2, 3], [1, 2]]
    assert batch.last_BK.tolist() == [[4, 7], [9, 11]]
    assert batch.tokens == 12


def test_places_of_the_tokens_and_of_those_before_them() -> None:
    batch = collate(TREES, 0)
    assert batch.at_BKR[0].tolist() == [[3, 4, 0], [5, 6, 7]]
    assert batch.before_BKR[0].tolist() == [[2, 3, 0], [2, 5, 6]]
    assert batch.before_BKR[1].tolist() == [[8, 0, 0], [8, 10, 0]]


def seen_by_each(batch: TreeBatch) -> dict[int, set[int]]:
    """Query place -> places it sees, read from the blocks; every token must be a query once."""
    seen: dict[int, set[int]] = {}
    for block in batch.blocks:
        assert block.queries_nQ.shape[1] % 8 == 0
        assert block.keys_nS.shape[1] % 32 == 0
        assert block.attend_nQS[..., : block.open].all()
        assert block.open == block.attend_nQS.shape[-1] or not block.attend_nQS[..., block.open].all()
        for queries, keys, real, attend in zip(
            block.queries_nQ.tolist(),
            block.keys_nS.tolist(),
            block.real_nQ.tolist(),
            block.attend_nQS.tolist(),
            strict=True,
        ):
            for query, is_real, row in zip(queries, real, attend, strict=True):
                assert any(row)
                visible = [key for key, sees in zip(keys, row, strict=True) if sees]
                assert len(visible) == len(set(visible)), "a key counted twice would weigh double"
                if is_real:
                    assert query not in seen
                    seen[query] = set(visible)
    queries = torch.cat([block.queries_nQ.flatten() for block in batch.blocks])
    back = attention._back(batch.blocks, 1)
    assert queries[back].tolist() == list(range(batch.tokens))
    assert torch.cat([block.real_nQ.flatten() for block in batch.blocks])[back].all()
    return seen


def test_a_token_sees_the_prompt_and_its_own_response_up_to_itself() -> None:
    seen = seen_by_each(collate(TREES, 0))
    assert [sorted(seen[q]) for q in range(8, 12)] == [[8], [8, 9], [8, 10], [8, 10, 11]]
    assert sorted(seen[7]) == [0, 1, 2, 5, 6, 7]
    assert len(seen) == 12


lengths_of_trees = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=2, max_size=2)), min_size=1, max_size=8
)


@given(lengths_of_trees)
def test_blocks_of_any_batch_say_who_sees_whom(lengths: list[tuple[int, list[int]]]) -> None:
    trees = [Tree(tuple(range(1, P + 1)), tuple(tuple(range(1, n + 1)) for n in rs)) for P, rs in lengths]
    seen = seen_by_each(collate(trees, 0))
    start = 0
    for P, rs in lengths:
        for i in range(P):
            assert seen.pop(start + i) == set(range(start, start + i + 1))
        own = start + P
        for n in rs:
            for i in range(n):
                assert seen.pop(own + i) == set(range(start, start + P)) | set(range(own, own + i + 1))
            own += n
        start = own
    assert not seen


def test_a_filled_row_ends_in_a_tree_that_sees_and_shows_itself_alone() -> None:
    batch = collate(TREES, 0)
    filled = fill(batch, 8)
    assert filled.tokens == len(filled.positions_T) == len(filled.tree_T) == len(filled.branch_T) == 16
    assert filled.ids_T[:12].tolist() == batch.ids_T.tolist()
    assert set(filled.tree_T[12:].tolist()) == {2}
    own = {q: set(range(12, q + 1)) for q in range(12, 16)}
    assert seen_by_each(filled) == seen_by_each(batch) | own
    assert filled.last_BK is batch.last_BK
    assert fill(filled, 8) is filled


def test_what_cannot_be_a_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="same number of responses"):
        collate([TREES[0], Tree((1,), ((2,),))], 0)
    for tree in (Tree((), ((2,),)), Tree((1,), ((2,), ()))):
        with pytest.raises(ValueError, match="at least one token"):
            collate([tree], 0)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(16, 200))
def test_groups_cover_every_tree_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = pack(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget
    assert pack(lengths, budget) == groups


def test_a_tree_longer_than_the_budget_stands_alone_and_similar_lengths_meet() -> None:
    assert pack([5, 120, 6, 50, 49], 100) == [[1], [3, 4], [2, 0]]
