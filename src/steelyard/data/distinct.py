"""Every response once: pairs that share a prompt or a response are computed as fewer, larger trees.

A ranking comes as many pairs of a few responses, and a validation set is examined under several labels; but a
response's states and reward depend on its prompt and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

from steelyard.data.collate import pack
from steelyard.data.encode import Tree


def distinct(trees: Iterable[Tree], max_tokens: int) -> list[Tree]:
    """Trees that hold every response to a prompt exactly once, in the order in which they first occur.

    A prompt gets a second tree where its responses would exceed `max_tokens` together.
    """
    responses: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for tree in trees:
        responses.setdefault(tree.prompt, {}).update(dict.fromkeys(tree.responses))
    found = []
    for prompt, own in responses.items():
        held: list[tuple[int, ...]] = []
        tokens = len(prompt)
        for response in own:
            if held and tokens + len(response) > max_tokens:
                found.append(Tree(prompt, tuple(held)))
                held, tokens = [], len(prompt)
            held.append(response)
            tokens += len(response)
        found.append(Tree(prompt, tuple(held)))
    return found


def batches(trees: Iterable[Tree], max_tokens: int) -> list[list[Tree]]:
    """The trees in groups that `collate` takes: equally many responses, similar lengths, at most `max_tokens`."""
    alike: dict[int, list[Tree]] = {}
    for tree in trees:
        alike.setdefault(len(tree.responses), []).append(tree)
    return [
        [group[i] for i in packed]
        for _, group in sorted(alike.items())
        for packed in pack([len(t) for t in group], max_tokens)
    ]


def tokens_of(trees: Iterable[Tree], max_tokens: int) -> int:
    """Tokens that are computed where every response is computed once."""
    return sum(map(len, distinct(trees, max_tokens)))
