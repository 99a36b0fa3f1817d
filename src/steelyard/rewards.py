"""From a reward model's scores to the rewards PPO learns from.

Contrastive rewards (arXiv 2403.07708; only summaries of it are to be had) subtract, prompt by prompt, the mean
score of baseline responses that the SFT model gave beforehand. What that does, and what it does not: a
baseline that depends on the prompt alone leaves the *expected* policy gradient as it is. It removes a prompt's
own offset, so batches vary less (from tau^2 + s^2 to s^2 (1 + 1/k) at the start, tau^2 being the variance
between prompts and s^2 within), and normalisation, clipping and the critic see a cleaner signal.

Where prompts hardly differ the baselines' own noise is more than what they take away. Shrunk to the mean of all
prompts by their reliability (`baseline = "shrunk"`, this project's) they add none, but for errors of estimation, and
still depend on the prompt alone.

PAR and LSC bend the difference to those baselines instead: they change which policy is best, on purpose. Rewards of
several models are aggregated before any of this.

`references` (once, over all prompts) and `shape` (batch by batch) are the whole of it for another trainer.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from steelyard.variance import shrunk_means

Aggregate = Literal["mean", "worst", "uncertainty-weighted"]
Transform = Literal["plain", "contrastive", "par", "lsc"]
Baseline = Literal["mean", "shrunk"]


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


def references(
    baselines_NK: Float[Tensor, "N K"],
    how: Transform,
    *,
    baseline: Baseline = "mean",
    lsc_percentile: float = 85.0,
    pooled: bool = False,
) -> Float[Tensor, "N k"]:
    """What each prompt's rewards are set against: its baselines or, for lsc, a percentile of them (k = 1).

    Args:
        baselines_NK: scores of K baseline responses to all N prompts.
        baseline: for contrastive: shrunk gives each prompt's `variance.shrunk_means` (k = 1), which needs N, K >= 2.
        pooled: lsc's percentile is that of all prompts' baselines together.

    Raises:
        ValueError: as `percentile` and `shrunk_means` do; an unknown `how` or `baseline`; or one that `how` does not
            read.
    """
    _require_one_of(Transform, "how", how)
    _require_one_of(Baseline, "baseline", baseline)
    if baseline != "mean" and how != "contrastive":
        raise ValueError(f"baseline = {baseline} goes with contrastive rewards, got {how!r}")
    if how == "lsc":
        return percentile(baselines_NK, lsc_percentile, pooled=pooled)[:, None]
    if baseline == "mean":
        return baselines_NK
    shrunk_N = torch.from_numpy(shrunk_means(baselines_NK.double().cpu().numpy()))
    return shrunk_N[:, None].to(baselines_NK.device, torch.float32)


def relative(
    rewards_B: Float[Tensor, "B"], references_Bk: Float[Tensor, "B k"] | None, how: Transform
) -> Float[Tensor, "B"]:
    """Rewards set against each prompt's `references`: `contrastive`, `par` or `lsc`; plain rewards as they are.

    Raises:
        ValueError: an unknown `how`; references are missing or do not fit, or stand beside plain rewards, which would
            not read them.
    """
    _require_one_of(Transform, "how", how)
    if (references_Bk is None) != (how == "plain"):
        raise ValueError(f"references go with contrastive, par and lsc, got {how!r} and {references_Bk is not None}")
    if references_Bk is None:
        return rewards_B.float()
    if how == "lsc":
        _require_baselines(rewards_B, references_Bk)
        if references_Bk.shape[1] != 1:
            raise ValueError(
                f"lsc: a prompt has one reference, a percentile of its baselines; got {references_Bk.shape[1]}: pass "
                "references(baselines, 'lsc')"
            )
        return lsc(rewards_B, references_Bk[:, 0])
    return par(rewards_B, references_Bk) if how == "par" else contrastive(rewards_B, references_Bk)


def _require_one_of(names: object, field: str, value: str) -> None:
    if value not in get_args(names):
        raise ValueError(f"{field} must be one of {', '.join(get_args(names))}, got {value!r}")


def shape(
    rewards_B: Float[Tensor, "B"],
    references_Bk: Float[Tensor, "B k"] | None,
    ended_B: Bool[Tensor, "B"],
    *,
    how: Transform,
    scale: float = 1.0,
    limit: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> Float[Tensor, "B"]:
    """What a policy is paid for a response: the steps below, in this order, response by response.

        relative (plain, contrastive, par, lsc), times `scale`, clip to +-`limit`, less the missing-EOS penalty

    No response's pay depends on its company, so batches may be split anywhere. A running `scale` is the caller's
    (`running.RunningScale`, fed with what `relative` gives).

    Args:
        rewards_B, references_Bk: scores of one reward model, on one scale (normalised alike, or both raw).
        ended_B: false where a response was cut off.
        limit: none given: not clipped.

    Raises:
        ValueError: as `relative`, `clip` and `missing_eos` do.
    """
    paid = relative(rewards_B, references_Bk, how) * scale
    return missing_eos(paid if limit is None else clip(paid, limit), ended_B, penalty=missing_eos_penalty)


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
