"""k responses per prompt from a policy: each prompt is read once, its k samples share the reading.

Every sample owns its stream of random numbers, a function of (seed, key of the prompt, number of the sample), so
it does not matter which prompts are sampled together, in which order, or how many at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from steelyard.config import Config
from steelyard.models.policy import PolicyModel
from steelyard.models.trunk import autocast


class SamplingConfig(Config):
    """How responses are drawn."""

    temperature: float = Field(1.0, gt=0, le=5, description="divides the logits; 1 is the model as it is")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the smallest set of tokens with this probability")
    repetition_penalty: float = Field(
        1.0, ge=1, le=5, description="divides (multiplies) positive (negative) logits of tokens already there"
    )
    max_new_tokens: int = Field(64, ge=1, description="a response is cut off after this many tokens")
    rows: int = Field(64, ge=1, description="samples drawn side by side (memory, not results, depends on it)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One response: its tokens (end token included if it came) and whether the end token came."""

    tokens: tuple[int, ...]
    ended: bool


@torch.no_grad()
def sample(
    policy: PolicyModel,
    prompts: Sequence[tuple[int, ...]],
    keys: Sequence[str],
    *,
    k: int,
    config: SamplingConfig,
    end_id: int,
    pad_id: int,
    seed: int,
) -> list[list[Sample]]:
    """k responses for each prompt (token ids), in the prompts' order. `keys` name the prompts for their streams."""
    if len(keys) != len(prompts):
        raise ValueError(f"one key per prompt is needed, got {len(keys)} keys for {len(prompts)} prompts")
    training = policy.training
    policy.eval()
    results: list[list[Sample]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    step = max(1, config.rows // k)
    for start in range(0, len(order), step):
        group = order[start : start + step]
        streams = np.stack([_stream(seed, keys[i], j, config.max_new_tokens) for i in group for j in range(k)])
        drawn = _sample_group(policy, [prompts[i] for i in group], k, streams, config, end_id, pad_id)
        for n, i in enumerate(group):
            results[i] = drawn[n * k : (n + 1) * k]
    policy.train(training)
    return results


def _sample_group(
    policy: PolicyModel,
    prompts: Sequence[tuple[int, ...]],
    k: int,
    streams_RT: Float[np.ndarray, "R T"],
    config: SamplingConfig,
    end_id: int,
    pad_id: int,
) -> list[Sample]:
    """Draw k responses for each of a few prompts; finished samples leave the batch."""
    device = policy.hf.get_output_embeddings().weight.device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    there = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # Padding stands on the left, so a row's last token is real.
    said = torch.where(there.bool(), ids, ids[:, -1:])
    # The prompt is read once per prompt; its cache rows are then repeated for the k samples.
    output = _read(policy, ids, there, (there.cumsum(-1) - 1).clamp(min=0), None)
    cache, logits = output.past_key_values, output.logits[:, -1].float().repeat_interleave(k, 0)
    cache.batch_repeat_interleave(k)
    there = there.repeat_interleave(k, 0)
    seen = torch.zeros(len(there), logits.shape[-1], dtype=torch.bool, device=device)
    if config.repetition_penalty != 1.0:
        seen.scatter_(1, said.repeat_interleave(k, 0), True)
    position = there.sum(-1)
    streams = torch.from_numpy(streams_RT).to(device)
    rows = torch.arange(len(there), device=device)
    tokens: list[list[int]] = [[] for _ in rows]
    for t in range(config.max_new_tokens):
        token = draw(logits, streams[rows, t], config, seen)
        for row, value in zip(rows.tolist(), token.tolist(), strict=True):
            tokens[row].append(value)
        going = token != end_id
        if t + 1 == config.max_new_tokens or not going.any():
            break
        if not going.all():
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, there, position, seen = (x[keep] for x in (rows, token, there, position, seen))
        seen.scatter_(1, token[:, None], True)
        there = torch.cat([there, there.new_ones(len(there), 1)], 1)
        output = _read(policy, token[:, None], there, position[:, None], cache)
        logits, position = output.logits[:, -1].float(), position + 1
    return [Sample(tuple(row), row[-1] == end_id) for row in tokens]


def _read(policy: PolicyModel, ids: Tensor, there: Tensor, positions: Tensor, cache: Any) -> Any:
    with autocast(policy.precision, ids.device):
        return policy.hf(
            input_ids=ids,
            attention_mask=there,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


def draw(
    logits_RV: Float[Tensor, "R V"],
    uniform_R: Float[Tensor, "R"],
    config: SamplingConfig,
    seen_RV: Tensor | None = None,
) -> Int[Tensor, "R"]:
    """One token a row by inverse CDF: the first token whose cumulative probability exceeds the uniform number."""
    logits = logits_RV
    if config.repetition_penalty != 1.0 and seen_RV is not None:
        penalised = torch.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = torch.where(seen_RV, penalised, logits)
    probabilities = torch.softmax(logits / config.temperature, -1)
    if config.top_p < 1.0:
        sorted_, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays if the tokens before it have not reached top_p; the most probable one always stays.
        sorted_ = sorted_.masked_fill(sorted_.cumsum(-1) - sorted_ >= config.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, sorted_)
    # In float64 the last cumulative sum is off by 1e-15, not 1e-6: no token is drawn that has probability 0.
    cumulative = probabilities.double().cumsum(-1)
    target = uniform_R.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _stream(seed: int, key: str, number: int, length: int) -> Float[np.ndarray, "T"]:
    digest = hashlib.sha256(f"{seed}/{number}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(length)
