"""What a policy study computes from looks and scores: pure functions of arrays.

Over-optimisation is read off reward against sqrt(KL) (Gao et al., arXiv 2210.10760). What contrastive rewards
(arXiv 2403.07708) can and cannot do is predicted from two variances and from flip rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Array = np.ndarray


def reached(kl_J: Float[Array, "J"]) -> float:
    """The greatest distance (nats) of a run's looks; the reference itself is at 0."""
    return float(max(np.max(kl_J), 0.0))


def at_kl(values_JX: Float[Array, "J X"], kl_J: Float[Array, "J"], kl: float) -> Float[Array, "X"] | None:
    """The values of a run where it first is `kl` nats away, linear in sqrt(KL) between two looks; None if it never is.

    The weights are the run's, not each response's: the distance of a policy is a mean, so a mean over responses of what
    this returns is the interpolated mean. The first look is the reference, at distance 0 whatever its estimate.

    Raises:
        ValueError: shapes do not fit, or `kl` is negative.
    """
    if values_JX.shape[:1] != kl_J.shape or kl_J.size == 0:
        raise ValueError(f"one distance a look is needed, got {kl_J.shape} for values {values_JX.shape}")
    if kl < 0:
        raise ValueError(f"kl must be at least 0, got {kl}")
    root_J = np.sqrt(np.maximum(kl_J, 0.0))
    root_J[0] = 0.0
    target = float(np.sqrt(kl))
    # sqrt and square do not cancel to the last digit, and a run's own greatest distance must be found in it.
    beyond = np.flatnonzero(root_J >= target * (1 - 1e-12))
    if not len(beyond):
        return None
    j = int(beyond[0])
    if j == 0:
        return values_JX[0]
    weight = min((target - root_J[j - 1]) / (root_J[j] - root_J[j - 1]), 1.0)
    return (1 - weight) * values_JX[j - 1] + weight * values_JX[j]


def contrasted(current_NK: Float[Array, "N K"], baselines_Nk: Float[Array, "N k"], k: int) -> Float[Array, "N K"]:
    """Rewards less the mean of each prompt's first k baselines."""
    return current_NK - baselines_Nk[:, :k].mean(1, keepdims=True)


def correlation(first_NK: Float[Array, "N K"], second_NK: Float[Array, "N k"]) -> float:
    """Pearson's correlation, over all pairs of a response of the one and a response of the other to the same prompt.

    0 where one of them has no spread.
    """
    a_NK, b_NK = first_NK - first_NK.mean(), second_NK - second_NK.mean()
    # The mean over all K k pairs of one prompt is the product of its two means.
    together = float((a_NK.mean(1) * b_NK.mean(1)).mean())
    spread = float(a_NK.std() * b_NK.std())
    return together / spread if spread > 0 else 0.0


def errors(proxy_NK: Float[Array, "N K"], gold_NK: Float[Array, "N K"], line: tuple[float, float]) -> Array:
    """What the truth does not explain of a reward: proxy - (a + b gold)."""
    return proxy_NK - (line[0] + line[1] * gold_NK)


def line(proxy_NK: Float[Array, "N K"], gold_NK: Float[Array, "N K"]) -> tuple[float, float]:
    """(a, b) of the least-squares line proxy = a + b gold; b = 0 where gold has no spread."""
    spread = float(gold_NK.var())
    b = float(((proxy_NK - proxy_NK.mean()) * (gold_NK - gold_NK.mean())).mean()) / spread if spread > 0 else 0.0
    return float(proxy_NK.mean()) - b * float(gold_NK.mean()), b


def correlation_interval(
    firsts: Sequence[Array], seconds: Sequence[Array], *, draws: int = 300, seed: int = 0
) -> dict[str, object]:
    """Mean over seeds of `correlation`, each seed's, and a 95 % interval: prompts and seeds are both drawn anew.

    The seeds' deviations are stretched by sqrt(S / (S - 1)), as in `evaluate.seeds.mean_over_seeds`; with one seed the
    interval is over prompts alone.
    """
    values_S = np.array([correlation(a, b) for a, b in zip(firsts, seconds, strict=True)])
    rng, n, S = np.random.default_rng(seed), len(firsts[0]), len(firsts)
    stretch_S = (np.sqrt(S / max(S - 1, 1)) - 1) * (values_S - values_S.mean())
    means = []
    for _ in range(draws):
        rows = rng.integers(n, size=n)
        picked = rng.integers(S, size=S)
        means.append(np.mean([correlation(firsts[s][rows], seconds[s][rows]) + stretch_S[s] for s in picked]))
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values_S.mean()), "low": float(low), "high": float(high), "seeds": values_S.tolist()}


# ---- the flip-rate identity ------------------------------------------------------------------------------------


def expected_reward(truth: float, c0: float, c1: float) -> float:
    """E[r] of a binary reward that flips the truth: c0 + (1 - c0 - c1) P(r* = 1).

    `truth` = P(r* = 1), c0 = P(r = 1 | r* = 0), c1 = P(r = 0 | r* = 1).

    Raises:
        ValueError: one of them is no probability.
    """
    if not all(0 <= p <= 1 for p in (truth, c0, c1)):
        raise ValueError(f"must be probabilities, got truth {truth}, c0 {c0}, c1 {c1}")
    return c0 + (1 - c0 - c1) * truth


def expected_contrast(policy: float, baseline: float, c0: float, c1: float) -> float:
    """E[r_y - r_base] = (1 - c0 - c1) (P(r*_y = 1) - P(r*_base = 1)): the bias c0 cancels."""
    return expected_reward(policy, c0, c1) - expected_reward(baseline, c0, c1)


def simulate_contrast(
    policy: float, baseline: float, c0: float, c1: float, *, k: int, draws: int, seed: int
) -> tuple[float, float]:
    """(mean, its standard error) of r_y - mean of k r_base over simulated binary rewards with flips.

    Each draw: one truth of the policy's response, k of baselines, and each is flipped by itself, given its truth.
    """
    rng = np.random.default_rng(seed)

    def noisy(chance: float, shape: tuple[int, ...]) -> Array:
        true = rng.random(shape) < chance
        flipped = rng.random(shape) < np.where(true, c1, c0)
        return (true ^ flipped).astype(np.float64)

    contrast = noisy(policy, (draws,)) - noisy(baseline, (draws, k)).mean(1)
    return float(contrast.mean()), float(contrast.std(ddof=1) / np.sqrt(draws))


def flip_table(*, k: int = 3, draws: int = 200_000, seed: int = 0) -> list[dict[str, float]]:
    """The identity at a few flip rates: predicted and simulated, for the reward and for the contrast."""
    rows = []
    for number, (c0, c1) in enumerate([(0.0, 0.0), (0.2, 0.2), (0.4, 0.4), (0.4, 0.0), (0.0, 0.4), (0.6, 0.1)]):
        policy, baseline = 0.7, 0.4
        mean, error = simulate_contrast(policy, baseline, c0, c1, k=k, draws=draws, seed=seed + number)
        rows.append(
            {"c0": c0, "c1": c1, "policy": policy, "baseline": baseline, "k": k, "draws": draws,
             "plain": expected_reward(policy, c0, c1), "predicted": expected_contrast(policy, baseline, c0, c1),
             "simulated": mean, "error": error}
        )  # fmt: skip
    return rows
