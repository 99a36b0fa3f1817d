"""Contrastive losses over the features of responses (Secrets of RLHF II, arXiv 2401.06080, section 3.1).

Two views of a batch, made by two dropout masks, give each response two features. The losses want the two to agree
and to differ from those of other responses. All functions are pure and unreduced: one number per feature. They
compute in float32 at least, whatever the inputs (float64 stays float64).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from steelyard.losses.preference import at_least_float32, require_same_shape


def pairs(chosen: Float[Tensor, "B D"], rejected: Float[Tensor, "B D"]) -> Float[Tensor, "N D"]:
    """H = {f(x, y_c), f(x, y_r)}: the chosen features, then the rejected ones; N = 2 B (section 3.1.1).

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return torch.cat([chosen, rejected])


def differences(chosen: Float[Tensor, "B D"], rejected: Float[Tensor, "B D"]) -> Float[Tensor, "N D"]:
    """H = {f(x, y_c) - f(x, y_r), f(x, y_r) - f(x, y_c)}, N = 2 B: each one's mirror is in the batch, a negative.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    d = at_least_float32(chosen) - at_least_float32(rejected)
    return torch.cat([d, -d])


def simcse(h_s: Float[Tensor, "N D"], h_t: Float[Tensor, "N D"], *, temperature: float) -> Float[Tensor, "N"]:
    """How well each feature of view s finds its own counterpart among all those of view t (Eq. 9).

        loss_i = -log( exp(cos(s_i, t_i) / tau) / sum_j exp(cos(s_i, t_j) / tau) )

    The sum runs over the whole batch, j = i included. As printed, only s looks for t, so swapping the views changes
    the numbers. A zero vector has no direction: its cosine with everything is 0, and it gets no gradient.

    Args:
        h_s, h_t: the features of one batch in two views, row i of both belonging together.
        temperature: tau > 0. Unknown in the paper; SimCSE itself (arXiv 2104.08821) uses 0.05.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(h_s=h_s, h_t=h_t)
    similarity_NN = unit(h_s) @ unit(h_t).T / temperature
    return torch.logsumexp(similarity_NN, 1) - similarity_NN.diagonal()


def swav(
    h_t: Float[Tensor, "N D"],
    h_s: Float[Tensor, "N D"],
    prototypes: Float[Tensor, "K D"],
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
) -> Float[Tensor, "N"]:
    """Each view predicts which prototypes the other view was assigned to (Eq. 7 and 8).

        loss = l(t, q_s) + l(s, q_t),    l(t, q_s) = -sum_k q_s^k log softmax_k(t . c_k / tau)

    with the codes q from `sinkhorn`, taken as constants. Features and prototypes enter with unit length, as in SwAV
    (arXiv 2006.09882), to which the paper refers for both: the print has h . c, which would otherwise grow with the
    model's width and saturate. Swapping the views changes nothing.

    Args:
        h_t, h_s: the features of one batch in two views, row i of both belonging together.
        prototypes: C, of any length but 0.
        temperature: tau > 0. Unknown in the paper; SwAV itself uses 0.1.
        epsilon, iterations: of `sinkhorn`; SwAV itself uses 0.05 and 3.

    Raises:
        ValueError: the shapes of h_t and h_s differ, or the prototypes have another width.
    """
    require_same_shape(h_t=h_t, h_s=h_s)
    if h_t.shape[-1] != prototypes.shape[-1]:
        shapes = f"{tuple(h_t.shape)} and {tuple(prototypes.shape)}"
        raise ValueError(f"features and prototypes must be (N, D) and (K, D), got {shapes}")
    c = unit(prototypes)
    t_NK, s_NK = unit(h_t) @ c.T, unit(h_s) @ c.T
    q_t = sinkhorn(t_NK, epsilon=epsilon, iterations=iterations)
    q_s = sinkhorn(s_NK, epsilon=epsilon, iterations=iterations)
    from_t = -(q_s * torch.log_softmax(t_NK / temperature, 1)).sum(1)
    from_s = -(q_t * torch.log_softmax(s_NK / temperature, 1)).sum(1)
    return from_t + from_s


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "N K"], *, epsilon: float, iterations: int) -> Float[Tensor, "N K"]:
    """Soft assignments of N features to K prototypes, all prototypes used alike (SwAV, arXiv 2006.09882, Eq. 3-5).

        q = diag(u) exp(scores / epsilon) diag(v), rows summing to 1, columns to N / K

    by scaling columns and rows in turn, in logarithms so that a small epsilon cannot overflow. Rows come last: they
    sum to 1 exactly, the columns to N / K up to what the iterations leave. No gradient passes.

    Args:
        scores: similarity of each feature to each prototype.
        epsilon: > 0; small makes hard assignments, large makes all alike.
        iterations: scalings of columns and rows, at least 1.
    """
    log_q = at_least_float32(scores) / epsilon
    for _ in range(iterations):
        # The columns' common total N / K is left out: the next line divides it away.
        log_q = log_q - torch.logsumexp(log_q, 0, keepdim=True)
        log_q = log_q - torch.logsumexp(log_q, 1, keepdim=True)
    return log_q.exp()


def unit(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Vectors of length 1, in float32 at least. A zero vector stays zero and passes no gradient."""
    x = at_least_float32(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, math.inf)
