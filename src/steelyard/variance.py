"""How rewards vary between prompts and within a prompt, and what subtracting baselines makes of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Variances(NamedTuple):
    """Of rewards for responses of one policy: between prompts (tau2), within a prompt (s2)."""

    between: float
    within: float

    @property
    def plain(self) -> float:
        """Variance of a reward: tau^2 + s^2."""
        return self.between + self.within

    def contrastive(self, k: int) -> float:
        """Variance of a reward less the mean of k others of the same policy: s^2 (1 + 1/k)."""
        return self.within * (1 + 1 / k)

    def reliability(self, k: int) -> float:
        """Share of the variance of means of k rewards that is the prompts' own: tau^2 / (tau^2 + s^2 / k)."""
        means = self.between + self.within / k
        return self.between / means if means > 0 else 0.0

    def shrunk(self, k: int) -> float:
        """As `contrastive`, but the mean of k is shrunk to the mean of all prompts by `reliability`, the best factor:
        s^2 + tau^2 (s^2 / k) / (tau^2 + s^2 / k). Never above `plain` or `contrastive`."""
        return self.within + self.reliability(k) * self.within / k


def variances(rewards_NK: Float[np.ndarray, "N K"]) -> Variances:
    """Unbiased estimates from K >= 2 independent responses to each of N >= 2 prompts.

    s^2: the mean over prompts of the sample variance. tau^2: the sample variance of the prompts' means less s^2 / K;
    where that is negative, 0.

    Raises:
        ValueError: too few prompts or responses.
    """
    if rewards_NK.ndim != 2 or min(rewards_NK.shape) < 2:
        raise ValueError(f"rewards must be (N, K) with N, K >= 2, got {rewards_NK.shape}")
    within = float(rewards_NK.var(1, ddof=1).mean())
    between = float(rewards_NK.mean(1).var(ddof=1)) - within / rewards_NK.shape[1]
    return Variances(max(between, 0.0), within)


def shrunk_means(rewards_NK: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N"]:
    """Each prompt's mean, shrunk to the mean of all as far as its noise says: m + w (m_x - m), w the `reliability`.

    The best linear guess at a prompt's level from K rewards (empirical Bayes; Robinson 1991, That BLUP is a good
    thing). Raises ValueError as `variances` does.
    """
    weight = variances(rewards_NK).reliability(rewards_NK.shape[1])
    means_N = rewards_NK.mean(1)
    shrunk: np.ndarray = means_N.mean() + weight * (means_N - means_N.mean())
    return shrunk
