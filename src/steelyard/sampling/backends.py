"""Which sampler draws: one Protocol, three implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from steelyard.errors import InputError
from steelyard.models.policy import PolicyModel
from steelyard.models.trunk import require_positions
from steelyard.sampling.cached import CacheReader
from steelyard.sampling.loop import Reader, sample_in_groups
from steelyard.sampling.settings import Sample, SamplingConfig
from steelyard.sampling.shared import SharedReader, refusal
from steelyard.sampling.vllm_engine import VllmSampler


class Sampler(Protocol):
    """Draws responses of one policy."""

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        keys: Sequence[str],
        *,
        k: int,
        config: SamplingConfig,
        end_id: int,
        seed: int,
    ) -> list[list[Sample]]:
        """k responses for each prompt (token ids), in the prompts' order; `keys` name the prompts' streams."""
        ...


class ReaderSampler:
    """Draws in this process, with the model as a reader."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        keys: Sequence[str],
        *,
        k: int,
        config: SamplingConfig,
        end_id: int,
        seed: int,
    ) -> list[list[Sample]]:
        """See `Sampler`."""
        return sample_in_groups(self.reader, prompts, keys, k=k, config=config, end_id=end_id, seed=seed)


# An engine takes minutes to start and holds a copy of the weights: one for each policy, for as long as that lives.
_engines: WeakKeyDictionary[PolicyModel, VllmSampler] = WeakKeyDictionary()


def sampler_for(policy: PolicyModel, config: SamplingConfig, *, longest: int, pad_id: int) -> Sampler:
    """The sampler that `config.sampler` asks for, with the policy's weights as they are now.

    `longest`: tokens of the longest prompt with its response.

    Raises InputError if the model cannot be read by the sampler that was asked for, or vLLM is missing.
    """
    if config.sampler == "vllm":
        if policy not in _engines:
            _engines[policy] = VllmSampler(policy, gpu_memory=config.gpu_memory)
        return _engines[policy]
    require_positions(policy.hf.base_model, lambda: longest)
    reason = None if config.sampler == "transformers" else refusal(policy, longest)
    if config.sampler == "shared" and reason is not None:
        raise InputError(f"sampler = shared: {reason}; use auto or transformers")
    if config.sampler == "transformers" or reason is not None:
        return ReaderSampler(CacheReader(policy, pad_id=pad_id))
    return ReaderSampler(SharedReader(policy))


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
    """k responses for each prompt (token ids), in the prompts' order. `keys` name the prompts for their streams.

    Raises InputError as `sampler_for` does.
    """
    if len(keys) != len(prompts):
        raise ValueError(f"one key per prompt is needed, got {len(keys)} keys for {len(prompts)} prompts")
    if not prompts:
        return []
    training = policy.training
    policy.eval()
    try:
        longest = max(map(len, prompts)) + config.max_new_tokens
        sampler = sampler_for(policy, config, longest=longest, pad_id=pad_id)
        return sampler.sample(prompts, keys, k=k, config=config, end_id=end_id, seed=seed)
    finally:
        policy.train(training)
