"""Trees to tensors: one row holds a prompt and its K responses, the prompt computed once.

A row is `[prompt, response 1, ..., response K]`. Positions restart at the prompt's length for every response,
and a token sees earlier tokens of the prompt and of its own response only, so each response gets exactly the
numbers it would get in a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steelyard.data.encode import Tree

_PADDING = -1


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Rows of trees with K responses each, padded on the right.

    `response_BKT` are the response tokens, valid where `mask_BKT`; `at_BKT` is each one's place in its row and
    `before_BKT` the place of the token that precedes it in its own sequence (for a response's first token the
    prompt's last): where the state is read from which the token was drawn. `last_BK` is the place at which the
    response is scored.
    """

    ids_BL: Int[Tensor, "B L"]
    positions_BL: Int[Tensor, "B L"]
    attend_B1LL: Bool[Tensor, "B 1 L L"]
    response_BKT: Int[Tensor, "B K T"]
    mask_BKT: Bool[Tensor, "B K T"]
    at_BKT: Int[Tensor, "B K T"]
    before_BKT: Int[Tensor, "B K T"]
    last_BK: Int[Tensor, "B K"]

    @property
    def tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.ids_BL.numel()


def collate(trees: Sequence[Tree], pad_id: int, device: torch.device | str = "cpu") -> TreeBatch:
    """Raises ValueError if the trees differ in their number of responses, or a prompt or response is empty."""
    K = len(trees[0].responses)
    if any(len(t.responses) != K for t in trees):
        raise ValueError("all trees of a batch must have the same number of responses")
    if any(not t.prompt or not all(t.responses) for t in trees):
        raise ValueError("every tree needs a prompt and responses of at least one token")
    B, L = len(trees), max(map(len, trees))
    T = max(len(r) for t in trees for r in t.responses)
    ids = torch.full((B, L), pad_id)
    positions = torch.zeros(B, L, dtype=torch.long)
    branch = torch.full((B, L), _PADDING)
    response = torch.full((B, K, T), pad_id)
    mask = torch.zeros(B, K, T, dtype=torch.bool)
    at = torch.zeros(B, K, T, dtype=torch.long)
    before = torch.zeros(B, K, T, dtype=torch.long)
    last = torch.zeros(B, K, dtype=torch.long)
    for b, tree in enumerate(trees):
        P = len(tree.prompt)
        ids[b, :P] = torch.tensor(tree.prompt)
        positions[b, :P] = torch.arange(P)
        branch[b, :P] = 0
        start = P
        for k, tokens in enumerate(tree.responses):
            n = len(tokens)
            row = torch.tensor(tokens)
            ids[b, start : start + n] = row
            positions[b, start : start + n] = torch.arange(P, P + n)
            branch[b, start : start + n] = k + 1
            response[b, k, :n] = row
            mask[b, k, :n] = True
            at[b, k, :n] = torch.arange(start, start + n)
            before[b, k, :n] = torch.arange(start - 1, start + n - 1)
            before[b, k, 0] = P - 1
            last[b, k] = start + n - 1
            start += n
    # Padding sees padding, so that no row of the attention is empty (a softmax over nothing is NaN).
    same = (branch[:, :, None] == branch[:, None, :]) | ((branch[:, None, :] == 0) & (branch[:, :, None] > 0))
    attend = same & torch.ones(L, L, dtype=torch.bool).tril()
    parts = (ids, positions, attend[:, None], response, mask, at, before, last)
    return TreeBatch(*(x.to(device) for x in parts))


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that a padded group holds at most `max_tokens` tokens.

    A single row longer than that makes a group of its own. The grouping depends on the lengths alone.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The group's first row is its longest.
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
