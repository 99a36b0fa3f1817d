"""What PPO's rewards carry from step to step: the factor that scales them, and the weight of the KL penalty.

The mathematics of one batch is in `rewards`; here is the state of a run, small enough for a checkpoint's plain values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ScaleMode = Literal["none", "abs", "signed"]


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
