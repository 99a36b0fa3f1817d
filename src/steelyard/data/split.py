"""Split preferences into training and validation by prompt, never by row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from steelyard.errors import InputError
from steelyard.types import Preference, Prompt


def prompt_key(prompt: Prompt) -> str:
    """A text that names a prompt: equal prompts share it, and so do a text and the same text as one user turn."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\0".join(f"{message.role}:{message.content}" for message in prompt)


def ranks(keys: Sequence[str]) -> np.ndarray:
    """(N,) each text's place among the distinct ones in order.

    As `np.unique(..., return_inverse=True)`, which would first store all texts at the length of the longest.
    """
    rank = {key: i for i, key in enumerate(sorted(set(keys)))}
    return np.array([rank[key] for key in keys], dtype=np.int64)


def split_by_prompt(
    preferences: Sequence[Preference],
    *,
    validation_share: float,
    seed: int,
    by: Literal["prompt", "first turn"] = "prompt",
) -> tuple[list[Preference], list[Preference]]:
    """Return (train, validation), each in input order; a prompt is wholly on one side.

    A prompt's side depends on nothing but its text and the seed: u = hash(seed, prompt) / 2^64 < validation_share.
    So adding or removing rows moves no other row, and the share is met on average over prompts. With `by` "first
    turn", dialogues that begin alike stay together: later turns of one conversation then never cross the split.
    Raises `InputError` when `validation_share` is not in (0, 1) or one side would be empty.
    """
    if not 0.0 < validation_share < 1.0:
        raise InputError(f"validation_share must lie between 0 and 1, got {validation_share}")
    if by not in ("prompt", "first turn"):
        raise InputError(f"by must be 'prompt' or 'first turn', got {by!r}")
    train: list[Preference] = []
    validation: list[Preference] = []
    for preference in preferences:
        prompt = preference.prompt
        if by == "first turn" and not isinstance(prompt, str):
            prompt = prompt[:1]
        (validation if _uniform(prompt_key(prompt), seed) < validation_share else train).append(preference)
    if not train or not validation:
        empty = "training" if not train else "validation"
        prompts = len({prompt_key(preference.prompt) for preference in preferences})
        raise InputError(
            f"validation_share={validation_share} with seed={seed} leaves the {empty} side empty ({prompts} distinct "
            "prompts): use another share or seed, more data, or a validation file of its own"
        )
    return train, validation


def _uniform(key: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
