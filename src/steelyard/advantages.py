"""From rewards to advantages: how much better each token or response did than expected.

Results are constants: no gradient flows through them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Added to a variance before it divides: equal rewards give 0, not rounding noise blown up to size 1."""


@torch.no_grad()
def gae(
    rewards_BT: Float[Tensor, "B T"],
    values_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimation (arXiv 1506.02438, Eq. 16), and the returns the value learns.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    Responses are right-padded and end at their last real token; after it both V and A are 0.

    Args:
        rewards_BT, values_BT: per token; what stands at padding does not matter.
        mask_BT: true at real tokens.
        gamma, lam: discount and trace decay, in [0, 1].

    Returns:
        (advantages, returns), both 0 at padding.

    Raises:
        ValueError: the shapes differ, or a real token follows padding.
    """
    if not rewards_BT.shape == values_BT.shape == mask_BT.shape:
        shapes = f"{tuple(rewards_BT.shape)}, {tuple(values_BT.shape)} and {tuple(mask_BT.shape)}"
        raise ValueError(f"rewards, values and mask must have one shape (B, T), got {shapes}")
    mask_BT = mask_BT.bool()
    if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
        raise ValueError("responses must be right-padded, got a real token after padding; re-align them")
    rewards_BT = torch.where(mask_BT, rewards_BT.float(), 0.0)
    values_BT = torch.where(mask_BT, values_BT.float(), 0.0)

    advantages_BT = torch.zeros_like(rewards_BT)
    next_value = next_advantage = torch.zeros_like(rewards_BT[:, 0])
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        delta = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        # At padding every term is 0, so the recursion starts afresh at each response's own end.
        next_advantage = advantages_BT[:, t] = delta + gamma * lam * next_advantage
        next_value = values_BT[:, t]
    return advantages_BT, advantages_BT + values_BT


@torch.no_grad()
def whiten(x: Float[Tensor, "*T"], mask: Bool[Tensor, "*T"]) -> Float[Tensor, "*T"]:
    """Zero mean and unit variance over the real tokens: (x - mean) / sqrt(var + 1e-8), 0 at padding.

    The mean is **not** added back (some libraries do, and shift every advantage). The variance is the
    population's. Adding a constant to `x`, or multiplying it by a positive one, changes nothing.

    Raises:
        ValueError: the shapes differ, or no token is real.
    """
    if x.shape != mask.shape:
        raise ValueError(f"x and mask must have one shape, got {tuple(x.shape)} and {tuple(mask.shape)}")
    mask = mask.bool()
    real = x.float()[mask]
    if real.numel() == 0:
        raise ValueError("whitening needs at least one real token, got a mask that is false everywhere")
    variance, mean = torch.var_mean(real, correction=0)
    return torch.where(mask, (x.float() - mean) * torch.rsqrt(variance + VARIANCE_FLOOR), 0.0)


@torch.no_grad()
def leave_one_out(rewards_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """RLOO (arXiv 2402.14740): each reward minus the mean of the other K - 1 to the same prompt.

        A_k = r_k - 1/(K-1) sum_{j != k} r_j = K/(K-1) (r_k - mean r)

    Raises:
        ValueError: not (B, K), or fewer than two responses a prompt.
    """
    _require_groups(rewards_BK)
    k, rewards_BK = rewards_BK.shape[1], rewards_BK.float()
    return (rewards_BK - rewards_BK.mean(-1, keepdim=True)) * (k / (k - 1))


@torch.no_grad()
def group_mean(rewards_BK: Float[Tensor, "B K"], *, normalise: bool) -> Float[Tensor, "B K"]:
    """GRPO (arXiv 2402.03300, section 4.1.2): each reward minus its prompt's mean, over its std if `normalise`.

        A_k = (r_k - mean r) / sqrt(var r + 1e-8)

    The std is the population's (the paper does not say); a prompt whose rewards are all equal gives 0.

    Raises:
        ValueError: not (B, K), or fewer than two responses a prompt (every advantage would be 0).
    """
    _require_groups(rewards_BK)
    variance, mean = torch.var_mean(rewards_BK.float(), dim=-1, correction=0, keepdim=True)
    centred = rewards_BK.float() - mean
    return centred * torch.rsqrt(variance + VARIANCE_FLOOR) if normalise else centred


def _require_groups(rewards_BK: Tensor) -> None:
    # A flat batch would pass for one prompt's responses, and be centred on the mean of all prompts.
    if rewards_BK.ndim != 2 or rewards_BK.shape[1] < 2:
        raise ValueError(
            f"rewards must be (B, K) with at least 2 responses to each prompt, got {tuple(rewards_BK.shape)}; sample "
            "more, or give each prompt's rewards a row (view(-1, K))"
        )


@torch.no_grad()
def over_greedy(rewards_BK: Float[Tensor, "B K"], greedy_B: Float[Tensor, "B"]) -> Float[Tensor, "B K"]:
    """ReMax (arXiv 2310.10505): each reward minus that of the greedy response to the same prompt.

        A_k = r_k - r(x, y_greedy)

    The greedy response depends on the prompt and the policy alone, not on what was sampled: the expected gradient is
    that of the plain rewards.

    Raises:
        ValueError: not one greedy reward a prompt.
    """
    if rewards_BK.shape[:-1] != greedy_B.shape:
        shapes = f"{tuple(rewards_BK.shape)} and {tuple(greedy_B.shape)}"
        raise ValueError(f"rewards and greedy rewards must be (B, K) and (B,), got {shapes}")
    return rewards_BK.float() - greedy_B.float().unsqueeze(-1)


@torch.no_grad()
def per_token(advantages_B: Float[Tensor, "B"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Every real token of a response carries the response's advantage; 0 at padding.

    Raises:
        ValueError: the shapes do not fit.
    """
    if mask_BT.shape[:1] != advantages_B.shape:
        shapes = f"{tuple(advantages_B.shape)} and {tuple(mask_BT.shape)}"
        raise ValueError(f"advantages and mask must be (B,) and (B, T), got {shapes}")
    return torch.where(mask_BT.bool(), advantages_B.float().unsqueeze(1), 0.0)
