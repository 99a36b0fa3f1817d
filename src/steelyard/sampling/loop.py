"""The loop over tokens: groups of prompts, streams of random numbers, finished samples leave.

What reads the tokens is a `Reader`; the loop knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steelyard.sampling.settings import Sample, SamplingConfig
from steelyard.sampling.tokens import draw


class Reader(Protocol):
    """A language model that reads k samples each of several prompts side by side."""

    def start(self, prompts: Sequence[tuple[int, ...]], *, k: int, room: int) -> Float[Tensor, "R V"]:
        """Read the prompts; the logits after them, k rows each, R = k prompts. At most `room` tokens will follow."""
        ...

    def leave(self, keep_R: Bool[Tensor, "R"]) -> Int[Tensor, "r"]:
        """Keep these rows alone. Returns which old row each new one is."""
        ...

    def read(self, token_R: Int[Tensor, "R"]) -> Float[Tensor, "R V"]:
        """Read one token a row; the logits after it."""
        ...


def sample_in_groups(
    reader: Reader,
    prompts: Sequence[tuple[int, ...]],
    keys: Sequence[str],
    *,
    k: int,
    config: SamplingConfig,
    end_id: int,
    seed: int,
) -> list[list[Sample]]:
    """k responses for each prompt, in the prompts' order; about `config.rows` samples at a time."""
    results: list[list[Sample]] = [[] for _ in prompts]
    # Prompts of similar length together: little padding.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    step = max(1, config.rows // k)
    for start in range(0, len(order), step):
        group = order[start : start + step]
        streams = np.stack([stream(seed, keys[i], j, config.max_new_tokens) for i in group for j in range(k)])
        drawn = _sample_group(reader, [prompts[i] for i in group], k, streams, config, end_id)
        for n, i in enumerate(group):
            results[i] = drawn[n * k : (n + 1) * k]
    return results


def _sample_group(
    reader: Reader,
    prompts: Sequence[tuple[int, ...]],
    k: int,
    streams_RT: Float[np.ndarray, "R T"],
    config: SamplingConfig,
    end_id: int,
) -> list[Sample]:
    """Draw k responses for each of a few prompts; finished samples leave the batch."""
    longest, width = config.max_new_tokens, max(map(len, prompts))
    logits = reader.start(prompts, k=k, room=longest - 1)
    device = logits.device
    streams = torch.from_numpy(streams_RT).to(device)
    drawn_RT = torch.full(streams.shape, -1, device=device)
    said = torch.empty(len(prompts) * k, width + longest, dtype=torch.long, device=device)
    if config.repetition_penalty != 1.0:
        # Filled up with tokens of the prompt itself: a token counts once however often it stands there.
        filled = torch.tensor([list(p) + [p[-1]] * (width - len(p)) for p in prompts], device=device)
        said[:, :width] = filled.repeat_interleave(k, 0)
    rows = torch.arange(len(streams), device=device)
    for t in range(longest):
        if t < config.min_new_tokens:
            logits[:, end_id] = -torch.inf
        token = draw(logits, streams[rows, t], config, said[:, : width + t])
        drawn_RT[rows, t] = token
        going = token != end_id
        left, bad = torch.stack((going.sum(), (token < 0).sum())).tolist()  # both at once: reading waits for a GPU
        if bad:
            raise FloatingPointError(
                f"the policy's logits at token {t + 1} of {bad} responses are not finite: its training has diverged"
            )
        if t + 1 == longest or not left:
            break
        if left < len(rows):
            order = reader.leave(going)
            rows, token, said = rows[order], token[order], said[order]
        said[:, width + t] = token
        logits = reader.read(token)
    return [_response(row, end_id) for row in drawn_RT.tolist()]


def _response(row: list[int], end_id: int) -> Sample:
    tokens = tuple(x for x in row if x >= 0)
    return Sample(tokens, tokens[-1] == end_id)


def stream(seed: int, key: str, number: int, length: int) -> Float[np.ndarray, "T"]:
    """A sample's random numbers, uniform in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, key, number))).random(length)


def stream_key(seed: int, key: str, number: int) -> int:
    """128 bits that name a sample's random numbers."""
    digest = hashlib.sha256(f"{seed}/{number}/{key}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
