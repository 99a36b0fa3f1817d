"""Pure maths: unreduced losses that read tensors and nothing else."""

from __future__ import annotations

from steelyard.losses.contrastive import differences, pairs, simcse, sinkhorn, swav
from steelyard.losses.policy import clipped_surrogate, entropy, kl_k1, kl_k3, masked_mean, value_loss
from steelyard.losses.preference import accuracy, bradley_terry, dpo, implicit_reward

__all__ = [
    "accuracy",
    "bradley_terry",
    "clipped_surrogate",
    "differences",
    "dpo",
    "entropy",
    "implicit_reward",
    "kl_k1",
    "kl_k3",
    "masked_mean",
    "pairs",
    "simcse",
    "sinkhorn",
    "swav",
    "value_loss",
]
