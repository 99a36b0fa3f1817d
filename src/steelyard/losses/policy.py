"""Losses and measures of PPO, one number per token: the caller masks and averages.

Every function computes in float32 at least. Values at masked positions must be finite, for a NaN there would
reach the gradient; in the forward pass `masked_mean` never lets them through.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from steelyard.losses.preference import at_least_float32, require_same_shape


def clipped_surrogate(
    logprobs: Float[Tensor, "*T"],
    old_logprobs: Float[Tensor, "*T"],
    advantages: Float[Tensor, "*T"],
    *,
    clip: float,
) -> tuple[Float[Tensor, "*T"], Bool[Tensor, "*T"]]:
    """PPO's clipped policy loss (arXiv 1707.06347, Eq. 7, negated so that lower is better).

        ratio = exp(logprobs - old_logprobs)
        loss = max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip))

    Args:
        logprobs, old_logprobs: of the sampled tokens, now and when sampled, under the same distribution.
        advantages: A, taken as constants.
        clip: how far the ratio may move before it stops paying, > 0.

    Returns:
        The loss, and where it is clipped: the bounded term is the larger one and the gradient is 0.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = torch.exp(at_least_float32(logprobs) - at_least_float32(old_logprobs))
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, bounded), bounded > plain


def value_loss(
    values: Float[Tensor, "*T"],
    old_values: Float[Tensor, "*T"],
    returns: Float[Tensor, "*T"],
    *,
    clip: float,
) -> Float[Tensor, "*T"]:
    """Half the squared error of the value, the worse of moving freely and moving by at most `clip`.

        loss = 1/2 max((V - R)^2, (V_clip - R)^2),   V_clip = V_old + clamp(V - V_old, -clip, clip)

    This is the value clipping of PPO's reference code (no equation in the paper); `clip=math.inf` turns it
    off. `clip` is in units of reward.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (at_least_float32(x) for x in (values, old_values, returns))
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (bounded - returns).square())


def entropy(logits: Float[Tensor, "*T V"]) -> Float[Tensor, "*T"]:
    """Entropy of the next token, in nats: -sum_v p_v log p_v, with 0 log 0 = 0 for logits of -inf."""
    logprobs = torch.log_softmax(at_least_float32(logits), dim=-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


def kl_k1(logprobs: Float[Tensor, "*T"], reference: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
    """The plain estimate of KL(policy || reference) from tokens the policy sampled: log p - log q.

    Unbiased, of either sign. Schulman, "Approximating KL divergence" (2020), k1; the term inside the KL of
    Secrets of RLHF II, Eq. 3.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, reference=reference)
    return at_least_float32(logprobs) - at_least_float32(reference)


def kl_k3(logprobs: Float[Tensor, "*T"], reference: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
    """The steadier estimate of KL(policy || reference): (q/p - 1) - log(q/p).

    Unbiased as a value and never negative; Schulman's k3. Its gradient is not that of the KL: measure with
    it, do not train on it.

    Raises:
        ValueError: the shapes differ.
    """
    log_ratio = -kl_k1(logprobs, reference)
    return torch.expm1(log_ratio) - log_ratio


def masked_mean(x: Shaped[Tensor, "*T"], mask: Bool[Tensor, "*T"]) -> Float[Tensor, ""]:
    """Mean of `x` where `mask` is true: every token of the batch counts the same. NaN if no token is real.

    `x` may be boolean (a share). What stands at masked positions does not matter, NaN included.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x=x, mask=mask)
    return torch.where(mask.bool(), at_least_float32(x), 0.0).sum() / mask.bool().sum()
