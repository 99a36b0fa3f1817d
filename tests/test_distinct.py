"""Every response once, and as many tokens at once as were allowed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.distinct import batches, distinct, tokens_of
from steelyard.data.encode import Tree

ids = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)
trees = st.lists(st.builds(Tree, ids, st.lists(ids, min_size=1, max_size=4).map(tuple)), max_size=12)


def pairs(some: list[Tree]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(t.prompt, r) for t in some for r in t.responses]


@given(trees, st.integers(1, 30))
def test_every_response_occurs_once_within_the_limit(given_trees: list[Tree], max_tokens: int) -> None:
    found = distinct(given_trees, max_tokens)
    assert len(set(pairs(found))) == len(pairs(found))
    assert set(pairs(found)) == set(pairs(given_trees))
    assert all(len(t) <= max_tokens or len(t.responses) == 1 for t in found)
    assert distinct(found, 10**6) == distinct(given_trees, 10**6)


@given(trees, st.integers(1, 30))
def test_batches_hold_every_tree_once_with_equally_many_responses(given_trees: list[Tree], max_tokens: int) -> None:
    found = batches(given_trees, max_tokens)
    assert sorted((t for group in found for t in group), key=repr) == sorted(given_trees, key=repr)
    for group in found:
        assert len({len(t.responses) for t in group}) == 1
        assert sum(map(len, group)) <= max_tokens or len(group) == 1


def test_a_ranking_of_four_costs_its_prompt_once_and_four_responses() -> None:
    prompt, responses = tuple(range(10)), [(k, k, k) for k in range(4)]
    ranking = [Tree(prompt, (a, b)) for i, a in enumerate(responses) for b in responses[:i]]
    assert tokens_of(ranking, 100) == 10 + 4 * 3
    assert sum(map(len, ranking)) == 6 * (10 + 2 * 3)
    # Two trees where a batch holds no more than two responses.
    assert [len(t.responses) for t in distinct(ranking, 16)] == [2, 2]
