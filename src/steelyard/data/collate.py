"""Trees to tensors: a prompt and its K responses, the prompt computed once, no padding between trees.

The tokens of all trees of a batch stand in one flat row `[prompt, response 1, ..., response K, prompt, ...]`.
Positions restart at the prompt's length for every response, and a token sees earlier tokens of the prompt and of its
own response only, so each response gets exactly the numbers it would get in a sequence of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steelyard.data.encode import Tree

Reads = Literal["scored", "responses"]

# Queries are taken in pieces of this length, so that keys after a piece are not looked at and its probabilities stay
# in the processor's cache; a block holds at most so many entries per head, for the same reason.
_PIECE = 64
_ENTRIES = 65536
# Attention pads a segment's queries and keys to multiples of these. Few shapes make few blocks, and products in
# bfloat16 pay a millisecond for every shape that they have not met before.
_QUERIES = 8
_KEYS = 32


@dataclass(frozen=True)
class AttentionBlock:
    """n segments (a piece of a prompt or of a response) whose attention is computed together.

    `queries_nQ` and `keys_nS` are places in the flat row; padded places repeat a real one and are False in
    `real_nQ`, and hidden from every real query by `attend_nQS`. No row of `attend_nQS` is empty. The `open` first keys
    are seen by every query.
    """

    queries_nQ: Int[Tensor, "n Q"]
    keys_nS: Int[Tensor, "n S"]
    real_nQ: Bool[Tensor, "n Q"]
    attend_nQS: Bool[Tensor, "n Q S"]

    @functools.cached_property
    def open(self) -> int:
        hidden = ~self.attend_nQS.flatten(0, 1).all(0)
        return int(hidden.float().argmax()) if bool(hidden.any()) else len(hidden)


class AttentionBlocks(tuple[AttentionBlock, ...]):
    """Blocks in which every token that asks is a real query once.

    What all layers need of them, forward and backward, is derived once and kept.
    """

    @functools.cached_property
    def kept(self) -> dict[tuple[object, ...], Any]:
        """What was derived, by name and by what it depends on."""
        return {}


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Trees with K responses each as one flat row of T tokens.

    `tree_T` and `branch_T` say to which tree a token belongs, and to its prompt (0) or its response (1 ... K).
    `response_BKR` are the response tokens, valid where `mask_BKR`: at `real_r` of its flat places. `at_BKR` is each
    one's place in the row and `before_BKR` the place of the token that precedes it in its own sequence (for the first
    of a response the prompt's last): where the state is read from which the token was drawn. `last_BK` is the place at
    which the response is scored. `blocks` say who attends to whom; every token is a query of exactly one of them.
    `read_n`, rising, are the places whose last state will be read, by `reads`: `last_BK` or the distinct `before_BKR`.
    In `read_blocks` these alone are queries, numbered from 0. On a GPU there are no blocks: attention follows `tree_T`
    and `branch_T` there.
    """

    ids_T: Int[Tensor, "T"]
    positions_T: Int[Tensor, "T"]
    tree_T: Int[Tensor, "T"]
    branch_T: Int[Tensor, "T"]
    response_BKR: Int[Tensor, "B K R"]
    mask_BKR: Bool[Tensor, "B K R"]
    real_r: Int[Tensor, "r"]
    at_BKR: Int[Tensor, "B K R"]
    before_BKR: Int[Tensor, "B K R"]
    last_BK: Int[Tensor, "B K"]
    blocks: AttentionBlocks
    reads: Reads
    read_n: Int[Tensor, "n"]
    read_blocks: AttentionBlocks

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return self.ids_T.numel()


def collate(
    trees: Sequence[Tree], pad_id: int, device: torch.device | str = "cpu", *, reads: Reads = "scored"
) -> TreeBatch:
    """Raises ValueError if the trees differ in their number of responses, or a prompt or response is empty.

    `reads`: of which tokens the last states will be read: those where responses are scored, or those before response
    tokens. The last layer computes no others for who asks for them; all stay to be had for who asks for all.
    `pad_id` fills `response_BKR` where a response has ended; the row itself holds no padding.
    """
    K = len(trees[0].responses)
    if any(len(t.responses) != K for t in trees):
        raise ValueError("all trees of a batch must have the same number of responses")
    if any(not t.prompt or not all(t.responses) for t in trees):
        raise ValueError("every tree needs a prompt and responses of at least one token")
    B, R = len(trees), max(len(r) for t in trees for r in t.responses)
    ids: list[int] = []
    positions, tree_of, branch_of = [], [], []
    response, at = np.full((B, K, R), pad_id), np.zeros((B, K, R), dtype=np.int64)
    mask, before = np.zeros((B, K, R), dtype=bool), np.zeros((B, K, R), dtype=np.int64)
    last = np.zeros((B, K), dtype=np.int64)
    segments: list[_Segment] = []
    read: list[_Segment] = []
    start = 0
    for b, tree in enumerate(trees):
        P, root = len(tree.prompt), start
        segments += _pieces(root, 0, root, P)
        if reads == "responses":
            read.append(_Segment(root, 0, root, P - 1, 1))
        ids += tree.prompt
        positions.append(np.arange(P))
        branch_of.append(np.zeros(P, dtype=np.int64))
        start += P
        for k, tokens in enumerate(tree.responses):
            n = len(tokens)
            segments += _pieces(root, P, start, n)
            read += [_Segment(root, P, start, n - 1, 1)] if reads == "scored" else _pieces(root, P, start, n - 1)
            ids += tokens
            positions.append(np.arange(P, P + n))
            branch_of.append(np.full(n, k + 1))
            response[b, k, :n] = tokens
            mask[b, k, :n] = True
            at[b, k, :n] = np.arange(start, start + n)
            before[b, k, :n] = np.arange(start - 1, start + n - 1)
            before[b, k, 0] = root + P - 1
            last[b, k] = start + n - 1
            start += n
        tree_of.append(np.full(start - root, b))

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)

    read_n = last.ravel() if reads == "scored" else np.unique(before[mask])
    in_blocks = torch.device(device).type == "cpu"
    return TreeBatch(
        ids_T=torch.tensor(ids, device=device),
        positions_T=tensor(np.concatenate(positions)),
        tree_T=tensor(np.concatenate(tree_of)),
        branch_T=tensor(np.concatenate(branch_of)),
        response_BKR=tensor(response),
        mask_BKR=tensor(mask),
        real_r=tensor(np.flatnonzero(mask)),  # found here: on a GPU, looking for them would wait for it
        at_BKR=tensor(at),
        before_BKR=tensor(before),
        last_BK=tensor(last),
        blocks=AttentionBlocks(_blocks(segments) if in_blocks else ()),
        reads=reads,
        read_n=tensor(read_n),
        read_blocks=AttentionBlocks(_renumber(block, read_n) for block in (_blocks(read) if in_blocks else ())),
    )


def fill(batch: TreeBatch, multiple: int) -> TreeBatch:
    """The batch on a CPU with a tree of its own at the end of the row, which nothing reads: T becomes a multiple."""
    T = batch.tokens
    extra = _up(T, multiple) - T
    if not extra:
        return batch
    (own,) = _blocks([_Segment(T, 0, T, 0, extra)])
    zeros = batch.ids_T.new_zeros(extra)
    return replace(
        batch,
        ids_T=torch.cat([batch.ids_T, zeros]),
        positions_T=torch.cat([batch.positions_T, zeros]),
        tree_T=torch.cat([batch.tree_T, zeros + len(batch.last_BK)]),
        branch_T=torch.cat([batch.branch_T, zeros]),
        blocks=AttentionBlocks((*batch.blocks, own)),
    )


class _Segment(NamedTuple):
    """`queries` tokens from the `before`-th of a text that begins at `start` and sees `P` tokens at `root` as well."""

    root: int
    P: int
    start: int
    before: int
    queries: int

    @property
    def keys(self) -> int:
        return self.P + self.before + self.queries


def _pieces(root: int, P: int, start: int, n: int) -> list[_Segment]:
    return [_Segment(root, P, start, i, min(_PIECE, n - i)) for i in range(0, n, _PIECE)]


def _blocks(segments: Sequence[_Segment]) -> list[AttentionBlock]:
    """Blocks of segments of one padded shape."""
    of_shape: dict[tuple[int, int], list[_Segment]] = {}
    for segment in sorted(segments, key=lambda s: (-s.keys, -s.queries, s.start, s.before)):
        of_shape.setdefault((_up(segment.queries, _QUERIES), _up(segment.keys, _KEYS)), []).append(segment)
    blocks = []
    for (Q, S), those in of_shape.items():
        n = max(1, _ENTRIES // (Q * S))
        blocks += [_block(those[i : i + n], Q, S) for i in range(0, len(those), n)]
    return blocks


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _block(segments: Sequence[_Segment], Q: int, S: int) -> AttentionBlock:
    root, P, start, before, n = (x[:, None] for x in np.array(segments).T)
    query, key = np.arange(Q)[None], np.arange(S)[None]
    # A padded query repeats the segment's last token and sees what that one sees.
    place = before + np.minimum(query, n - 1)
    keys = np.where(key < P, root + key, start + np.minimum(key - P, before + n - 1))
    attend = key[:, None, :] <= (P + place)[:, :, None]
    arrays = (start + place, keys, query < n, attend)
    return AttentionBlock(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))


def _renumber(block: AttentionBlock, read_n: Int[np.ndarray, "n"]) -> AttentionBlock:
    """The block with its queries numbered among the tokens that are read."""
    number = torch.searchsorted(torch.from_numpy(read_n), block.queries_nQ)
    return replace(block, queries_nQ=number)


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group trees of similar length so that a group holds at most `max_tokens` tokens.

    A single tree longer than that makes a group of its own. The grouping depends on the lengths alone.
    """
    groups: list[list[int]] = []
    held = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and held + lengths[i] <= max_tokens:
            groups[-1].append(i)
            held += lengths[i]
        else:
            groups.append([i])
            held = lengths[i]
    return groups
