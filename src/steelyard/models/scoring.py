"""Rewards of many trees, every distinct response computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from steelyard.data.distinct import batches, distinct
from steelyard.data.encode import Tree


def score_sets(
    rewards: Callable[[list[Tree]], Float[Tensor, "B K"]],
    sets: Mapping[str, Sequence[Tree]],
    max_tokens: int,
) -> dict[str, Float[np.ndarray, "N K"]]:
    """Raw rewards of the trees of each set, in their order; `rewards` computes those of one batch.

    The trees of one set must have the same number of responses. Sets, and trees of a set, may share prompts and
    responses.
    """
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for group in batches(distinct((t for trees in sets.values() for t in trees), max_tokens), max_tokens):
        for tree, row in zip(group, rewards(group).tolist(), strict=True):
            known |= {(tree.prompt, response): reward for response, reward in zip(tree.responses, row, strict=True)}
    return {
        name: np.array([[known[t.prompt, r] for r in t.responses] for t in trees], dtype=np.float32).reshape(
            len(trees), len(trees[0].responses) if trees else 0
        )
        for name, trees in sets.items()
    }
