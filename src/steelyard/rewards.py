"""From a reward model's scores to the rewards PPO learns from.

Contrastive rewards (arXiv 2403.07708; only summaries of it are to be had) subtract, prompt by prompt, the mean
score of baseline responses that the SFT model gave beforehand. What that does, and what it does not: a
baseline that depends on the prompt alone leaves the *expected* policy gradient as it is. It removes a prompt's
own offset, so batches vary less (from tau^2 + s^2 to s^2 (1 + 1/k) at the start, tau^2 being the variance
between prompts and s^2 within), and normalisation, clipping and the critic see a cleaner signal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ScaleMode = Literal["none", "abs", "signed"]


def contrastive(rewards_B: Float[Tensor, "B"], baselines_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """r_RL = r(x, y) - 1/K sum_j r(x, y_base_j): the reward over what the SFT model would have earned.

    Args:
        rewards_B: scores of the policy's responses.
        baselines_BK: scores, by the same reward model, of K baseline responses to the same prompts.

    Raises:
        ValueError: the baselines are not (B, K) with K >= 1.
    """
    if baselines_BK.ndim != 2 or baselines_BK.shape[:1] != rewards_B.shape or baselines_BK.shape[1] == 0:
        raise ValueError(
            f"baselines must be (B, K) with K >= 1 for rewards of shape (B,), "
            f"got {tuple(baselines_BK.shape)} for {tuple(rewards_B.shape)}"
        )
    return rewards_B.float() - baselines_BK.float().mean(-1)


class RunningScale:
    """The factor that brings contrastive rewards back to the scale of the original ones.

    The paper rescales "by the ratio of their running means"; its direction and form are unknown in print. Chosen
    here: contrastive rewards are *multiplied* by

        abs:     lambda = mean |r| / max(mean |c|, floor)
        signed:  lambda = mean r / mean c, the literal ratio, with |mean c| held at `floor` or more
        none:    lambda = 1

    with the means over every example seen so far. At step 0 the policy is the SFT model, so mean c is about 0: the
    signed ratio explodes, and with it the reward; a negative one even turns the reward around. Hence `abs` is
    the default, and until `warmup` examples have been seen lambda is 1 in every mode.

    The state is sums of float64: how examples are split into batches does not matter (up to rounding), and a
    restored scale continues bit for bit. With several processes, feed each of them the gathered rewards.
    """

    def __init__(self, mode: ScaleMode = "abs", *, floor: float = 1e-2, warmup: int = 256) -> None:
        """`floor` (> 0, units of reward) bounds the divisor; `warmup` counts examples, not batches.

        Raises:
            ValueError: an unknown mode, or a bound that does not hold.
        """
        if mode not in ("none", "abs", "signed"):
            raise ValueError(f"mode must be 'none', 'abs' or 'signed', got {mode!r}")
        if not 0 < floor < math.inf:
            raise ValueError(f"floor must be finite and > 0, got {floor}")
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1 example, got {warmup}")
        self.mode = mode
        self.floor = floor
        self.warmup = warmup
        # Sums for both modes: a state saved under one of them is right under the other.
        self._sums = {"count": 0.0, "reward": 0.0, "contrastive": 0.0, "abs_reward": 0.0, "abs_contrastive": 0.0}

    def update(self, rewards_B: Float[Tensor, "B"], contrastive_B: Float[Tensor, "B"]) -> None:
        """Take one batch into the running means: the original rewards and, example by example, the contrastive.

        Raises:
            ValueError: the shapes differ, or a reward is not finite (it would spoil the means for good).
        """
        if rewards_B.shape != contrastive_B.shape:
            shapes = f"{tuple(rewards_B.shape)} and {tuple(contrastive_B.shape)}"
            raise ValueError(f"original and contrastive rewards must pair up, got shapes {shapes}")
        r, c = rewards_B.double(), contrastive_B.double()
        sums = torch.stack([r.sum(), c.sum(), r.abs().sum(), c.abs().sum()]).tolist()
        if not all(map(math.isfinite, sums)):
            raise ValueError("rewards must be finite, got NaN or infinity; look at the reward model's scores")
        for name, value in zip(self._sums, [r.numel(), *sums], strict=True):
            self._sums[name] += value

    @property
    def factor(self) -> float:
        """lambda, from all batches so far."""
        s = self._sums
        if self.mode == "none" or s["count"] < self.warmup:
            return 1.0
        n = s["count"]
        if self.mode == "abs":
            return (s["abs_reward"] / n) / max(s["abs_contrastive"] / n, self.floor)
        mean = s["contrastive"] / n
        return (s["reward"] / n) / math.copysign(max(abs(mean), self.floor), mean)

    def state_dict(self) -> dict[str, float]:
        """The running sums, as plain floats: JSON keeps them bit for bit."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`. Mode, floor and warm-up are configuration and stay as constructed.

        Raises:
            ValueError: a name is missing or unknown, or a value is not finite.
        """
        if state.keys() != self._sums.keys() or not all(math.isfinite(v) for v in state.values()):
            raise ValueError(f"the state must hold finite {sorted(self._sums)}, got {dict(state)}")
        self._sums = {name: float(state[name]) for name in self._sums}


def clip(rewards: Float[Tensor, "*B"], limit: float) -> Float[Tensor, "*B"]:
    """Bound each reward to [-limit, limit], in units of reward (Secrets of RLHF II, App. B uses 0.8).

    NaN stays NaN; `limit=math.inf` changes nothing.

    Raises:
        ValueError: limit is not > 0.
    """
    if not limit > 0:
        raise ValueError(f"the reward limit must be > 0, got {limit}")
    return rewards.clamp(-limit, limit)


def missing_eos(rewards: Float[Tensor, "*B"], ended: Bool[Tensor, "*B"], *, penalty: float) -> Float[Tensor, "*B"]:
    """Take `penalty` (>= 0, units of reward) from every response cut off before its EOS.

    Raises:
        ValueError: the shapes differ, or the penalty is negative (it would pay for never ending).
    """
    if rewards.shape != ended.shape:
        raise ValueError(f"rewards and ended must have one shape, got {tuple(rewards.shape)} and {tuple(ended.shape)}")
    if not penalty >= 0:
        raise ValueError(f"penalty must be >= 0, got {penalty}; it is subtracted")
    return torch.where(ended.bool(), rewards, rewards - penalty)


def token_rewards(
    rewards_B: Float[Tensor, "B"],
    kl_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
) -> Float[Tensor, "B T"]:
    """Per-token rewards: the KL penalty on every token, the score on the last real one.

        r_t = -kl_coef KL_t + [t is the last real token] r(x, y)

    Summed over tokens this is Eq. 3 of Secrets of RLHF II. Padding gets 0, whatever `kl_BT` holds there.

    Args:
        rewards_B: the score of each whole response.
        kl_BT: per-token estimate of KL(policy || SFT), as `losses.kl_k1` gives it.
        mask_BT: true at real tokens.

    Raises:
        ValueError: the shapes do not fit, or a response has no real token (its score would be lost).
    """
    if kl_BT.shape != mask_BT.shape or kl_BT.shape[:1] != rewards_B.shape:
        shapes = f"{tuple(rewards_B.shape)}, {tuple(kl_BT.shape)} and {tuple(mask_BT.shape)}"
        raise ValueError(f"rewards, kl and mask must be (B,), (B, T) and (B, T), got {shapes}")
    mask_BT = mask_BT.bool()
    if not bool(mask_BT.any(-1).all()):
        empty = (~mask_BT.any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"every response needs a real token to carry its score, got none in rows {empty}")
    shaped_BT = torch.where(mask_BT, -kl_coef * kl_BT.float(), 0.0)
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = torch.where(mask_BT, positions_T, -1).amax(-1, keepdim=True)
    return shaped_BT.scatter_add(1, last_B1, rewards_B.float().unsqueeze(1))
