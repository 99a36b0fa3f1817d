"""What PPO sampled and scored in one step, and the quantities by which a run is watched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from steelyard.data.encode import Tree
from steelyard.losses.policy import masked_mean
from steelyard.rewards import RunningScale


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What one step sampled and scored; N prompts, K responses, T tokens, zero at padding."""

    trees: list[Tree]
    mask_NKT: Bool[Tensor, "N K T"]
    logprobs_NKT: Float[Tensor, "N K T"]
    values_NKT: Float[Tensor, "N K T"]
    kl_NKT: Float[Tensor, "N K T"]
    rewards_NK: Float[Tensor, "N K"]
    ended_NK: Bool[Tensor, "N K"]
    nll_sft: float
    entropy: float


def rollout_metrics(
    rollouts: Rollouts,
    paid_NK: Tensor,
    rewards: Tensor,
    advantages: Tensor,
    returns: Tensor,
    scale: RunningScale,
) -> dict[str, float]:
    """What a PPO step is watched by (Secrets of RLHF II, App. B); token means weigh all tokens alike."""
    mask = rollouts.mask_NKT.flatten(0, 1)
    residual = (returns - rollouts.values_NKT.flatten(0, 1))[mask]
    spread = returns[mask].var(correction=0)
    return {
        "ppo/reward_raw": rollouts.rewards_NK.mean().item(),
        "ppo/reward_std": rollouts.rewards_NK.std(correction=0).item(),
        "ppo/reward_shaped": paid_NK.mean().item(),
        "ppo/return": rewards.sum(-1).mean().item(),
        "ppo/kl": rollouts.kl_NKT.sum(-1).mean().item(),
        "ppo/ppl_sft": math.exp(min(rollouts.nll_sft, 80.0)),
        "ppo/length": mask.sum(-1).float().mean().item(),
        "ppo/ended": rollouts.ended_NK.float().mean().item(),
        "ppo/entropy": rollouts.entropy,
        "ppo/advantage_std": advantages[mask].std(correction=0).item(),
        "ppo/value_mean": masked_mean(rollouts.values_NKT.flatten(0, 1), mask).item(),
        # 1 is a perfect critic; with no spread in the returns there is nothing to explain.
        "ppo/explained_variance": (1 - residual.var(correction=0) / spread).item() if spread > 0 else 0.0,
        "ppo/scale": scale.factor,
    }
