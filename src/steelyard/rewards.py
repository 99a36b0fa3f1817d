"""From a reward model's scores to the rewards PPO learns from.

Contrastive rewards (arXiv 2403.07708; only summaries of it are to be had) subtract, prompt by prompt, the mean
score of baseline responses that the SFT model gave beforehand. What that does, and what it does not: a
baseline that depends on the prompt alone leaves the *expected* policy gradient as it is. It removes a prompt's
own offset, so batches vary less (from tau^2 + s^2 to s^2 (1 + 1/k) at the start, tau^2 being the variance
between prompts and s^2 within), and normalisation, clipping and the critic see a cleaner signal.

PAR and LSC bend the difference to those baselines instead: they change which policy is best, on purpose. Rewards of
several models are aggregated before any of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

ScaleMode = Literal["none", "abs", "signed"]
Aggregate = Literal["mean", "worst", "uncertainty-weighted"]


def aggregate(
    rewards_MB: Float[Tensor, "M *B"], how: Aggregate, *, uncertainty_weight: float = 0.5
) -> Float[Tensor, "*B"]:
    """One reward from those of M models (arXiv 2310.02743), example by example.

        mean:                  1/M sum_m r_m
        worst:                 min_m r_m
        uncertainty-weighted:  mean_m r_m - uncertainty_weight * var_m r_m   (population variance)

    What it changes: the mean is one more linear reward. The other two pay less where the models disagree, which
    is not linear in any of them and changes which policy is best. The models must be on one scale: normalise first.

    Raises:
        ValueError: no model, an unknown `how`, or a negative weight (it would pay for disagreement).
    """
    if rewards_MB.ndim == 0 or len(rewards_MB) == 0:
        raise ValueError(f"rewards must be (M, ...) with M >= 1 models, got shape {tuple(rewards_MB.shape)}")
    if not 0 <= uncertainty_weight < math.inf:
        raise ValueError(f"uncertainty_weight must be finite and >= 0, got {uncertainty_weight}")
    rewards_MB = rewards_MB.float()
    if how == "mean":
        return rewards_MB.mean(0)
    if how == "worst":
        return rewards_MB.amin(0)
    if how == "uncertainty-weighted":
        variance, mean = torch.var_mean(rewards_MB, dim=0, correction=0)
        return mean - uncertainty_weight * variance
    raise ValueError(f"how must be 'mean', 'worst' or 'uncertainty-weighted', got {how!r}")


def contrastive(rewards_B: Float[Tensor, "B"], baselines_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """r_RL = r(x, y) - 1/K sum_j r(x, y_base_j): the reward over what the SFT model would have earned.

    Args:
        rewards_B: scores of the policy's responses.
        baselines_BK: scores, by the same reward model, of K baseline responses to the same prompts.

    Raises:
        ValueError: the baselines are not (B, K) with K >= 1.
    """
    _require_baselines(rewards_B, baselines_BK)
    return rewards_B.float() - baselines_BK.float().mean(-1)


def par(rewards_B: Float[Tensor, "B"], baselines_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Preference as reward (arXiv 2502.18770): r_RL = 1/K sum_j sigmoid(r(x, y) - r(x, y_base_j)).

    In [0, 1] and rising in r. On the reward model's raw scale it is the mean probability, by Bradley-Terry, that the
    response is preferred to a baseline; on another scale the sigmoid is steeper or flatter.

    What it changes: not linear, so it changes which policy is best. Well above the baselines more reward hardly
    pays, and, unlike LSC, well below them too: the gradient vanishes on both sides.

    Args and errors are those of `contrastive`.
    """
    _require_baselines(rewards_B, baselines_BK)
    return torch.sigmoid(rewards_B.float().unsqueeze(1) - baselines_BK.float()).mean(-1)


def lsc(rewards_B: Float[Tensor, "B"], reference_B: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Log-sigmoid-centred reward (arXiv 2402.00742): r_RL = log sigmoid(r(x, y) - r_ref(x)).

    At most 0 and rising in r: about r - r_ref well below the reference, about 0 well above it. Computed as
    `logsigmoid`, which neither under- nor overflows.

    What it changes: not linear, so it changes which policy is best. Responses above the reference earn hardly more,
    so what can still be gained lies in poor ones.

    Args:
        rewards_B: scores of the policy's responses.
        reference_B: each prompt's reference score, from `percentile`.

    Raises:
        ValueError: the shapes differ.
    """
    if rewards_B.shape != reference_B.shape:
        shapes = f"{tuple(rewards_B.shape)} and {tuple(reference_B.shape)}"
        raise ValueError(f"rewards and references must pair up, got shapes {shapes}")
    return F.logsigmoid(rewards_B.float() - reference_B.float())


def percentile(baselines_BK: Float[Tensor, "B K"], q: float, *, pooled: bool = False) -> Float[Tensor, "B"]:
    """The q-th percentile (0 to 100) of each prompt's baseline scores, or of all prompts' together if `pooled`.

    Between two scores it is interpolated. With few baselines a prompt, a high percentile is about their maximum.

    Raises:
        ValueError: q is out of range, or there is no baseline.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile is between 0 and 100, got {q}")
    if baselines_BK.ndim != 2 or baselines_BK.numel() == 0:
        raise ValueError(f"baselines must be (B, K) with B, K >= 1, got {tuple(baselines_BK.shape)}")
    if pooled:
        return torch.quantile(baselines_BK.float().flatten(), q / 100).expand(len(baselines_BK))
    return torch.quantile(baselines_BK.float(), q / 100, dim=-1)


def _require_baselines(rewards_B: Tensor, baselines_BK: Tensor) -> None:
    if baselines_BK.ndim != 2 or baselines_BK.shape[:1] != rewards_B.shape or baselines_BK.shape[1] == 0:
        raise ValueError(
            f"baselines must be (B, K) with K >= 1 for rewards of shape (B,), "
            f"got {tuple(baselines_BK.shape)} for {tuple(rewards_B.shape)}"
        )


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
        _require_bounds(floor, warmup)
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
        self._sums = _checked_state(state, self._sums)


class RunningStd:
    """The factor 1 / max(std, floor), with the std of every reward seen so far (population form).

    Only divides: the mean stays, so zero reward stays zero. Until `warmup` examples have been seen the factor is 1.

    What it changes: nothing about which response earns more; but the factor multiplies the reward and not the
    KL penalty, so it shifts the balance between the two, and it moves during the run.

    Mean and squared deviations are merged batch by batch in float64 (Chan et al.'s formula): a large mean costs no
    digits, and a restored state continues bit for bit.
    """

    def __init__(self, *, floor: float = 1e-2, warmup: int = 256) -> None:
        """`floor` (> 0, units of reward) bounds the divisor; `warmup` counts examples, not batches.

        Raises:
            ValueError: a bound that does not hold.
        """
        _require_bounds(floor, warmup)
        self.floor = floor
        self.warmup = warmup
        self._moments = {"count": 0.0, "mean": 0.0, "squares": 0.0}

    def update(self, rewards_B: Float[Tensor, "B"]) -> None:
        """Take one batch in.

        Raises:
            ValueError: a reward is not finite (it would spoil the std for good).
        """
        if rewards_B.numel() == 0:
            return
        variance, mean = torch.var_mean(rewards_B.double(), correction=0)
        batch = {"count": float(rewards_B.numel()), "mean": mean.item(), "squares": variance.item() * rewards_B.numel()}
        if not all(map(math.isfinite, batch.values())):
            raise ValueError("rewards must be finite, got NaN or infinity; look at the reward model's scores")
        old, total = self._moments, self._moments["count"] + batch["count"]
        shift = batch["mean"] - old["mean"]
        self._moments = {
            "count": total,
            "mean": old["mean"] + shift * batch["count"] / total,
            "squares": old["squares"] + batch["squares"] + shift**2 * old["count"] * batch["count"] / total,
        }

    @property
    def factor(self) -> float:
        """1 / max(std, floor), from all batches so far."""
        m = self._moments
        return 1.0 if m["count"] < self.warmup else 1 / max(math.sqrt(m["squares"] / m["count"]), self.floor)

    def state_dict(self) -> dict[str, float]:
        """The moments, as plain floats: JSON keeps them bit for bit."""
        return dict(self._moments)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`. Floor and warm-up are configuration and stay as constructed.

        Raises:
            ValueError: a name is missing or unknown, or a value is not finite.
        """
        self._moments = _checked_state(state, self._moments)


def _require_bounds(floor: float, warmup: int) -> None:
    if not 0 < floor < math.inf:
        raise ValueError(f"floor must be finite and > 0, got {floor}")
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1 example, got {warmup}")


def _checked_state(state: Mapping[str, float], like: Mapping[str, float]) -> dict[str, float]:
    if state.keys() != like.keys() or not all(math.isfinite(v) for v in state.values()):
        raise ValueError(f"the state must hold finite {sorted(like)}, got {dict(state)}")
    return {name: float(state[name]) for name in like}


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


class KLController:
    """The weight of the KL penalty: fixed, or steered towards a target KL (Ziegler et al., arXiv 1909.08593, 2.2).

        e = clip((KL - target) / target, -0.2, 0.2)
        coef <- coef (1 + e n / horizon)

    after n responses with a mean KL per response (nats). The paper writes a constant K = 0.1 for n / horizon; counted
    in responses, as in the authors' code, the pace does not depend on the size of a step.
    """

    def __init__(self, coef: float, *, target: float | None = None, horizon: int = 10_000) -> None:
        """No target: fixed.

        Raises:
            ValueError: a target or horizon that is not > 0, or a coefficient that could never move from 0.
        """
        if target is not None and not (target > 0 and horizon > 0 and coef > 0):
            raise ValueError(f"target, horizon and coef must be > 0, got {target}, {horizon} and {coef}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int) -> None:
        """Take in the mean KL of so many responses; the next step's `coef` answers to it."""
        if self.target is not None:
            error = min(max((kl - self.target) / self.target, -0.2), 0.2)
            self.coef *= 1 + error * responses / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient, as a plain float: JSON keeps it bit for bit."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`. Target and horizon are configuration and stay as constructed.

        Raises:
            ValueError: another name, or a value that is not finite.
        """
        self.coef = _checked_state(state, {"coef": 0.0})["coef"]


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
