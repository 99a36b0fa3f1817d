"""Losses of one comparison: how well two rewards, or a policy, explain which response was preferred.

All functions are pure and unreduced: one number per pair, so that the caller weighs and averages. They
compute in float32 at least, whatever the inputs (float64 stays float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bradley_terry(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    *,
    margin: Float[Tensor, "B"] | None = None,
    flip_prob: Float[Tensor, "B"] | None = None,
    margin_in_flip: bool = True,
) -> Float[Tensor, "B"]:
    """Negative log-likelihood of each label, with an adaptive margin m and a per-pair chance a that it is wrong.

        d = chosen - rejected
        loss = -(1 - a) log sigmoid(d - m) - a log sigmoid(-(d - m))

    With a = 0, m = 0 this is Eq. 2 of Secrets of RLHF II (arXiv 2401.06080); a is its Eq. 5, m its Eq. 6.

    **The sign of the margin.** m is signed as d is: it belongs to the order (chosen, rejected), so the flipped
    label, whose difference is -d, wants the margin -m, and its term is log sigmoid(-d - (-m)). Both terms then
    agree on one target, d* = m + log((1 - a) / a), and swapping the two responses changes nothing if a becomes
    1 - a and m becomes -m. At a = 1 a pair with m = scale * mu < 0 costs exactly what it costs after its label
    is flipped and its margin becomes scale * |mu|: soft labels pass smoothly into flipped ones. (Asking the
    same m of both labels would instead pull a doubted pair back towards d = 0.)

    Deviations from the print: Eq. 6 puts the margin outside the log-sigmoid, where it has no gradient; whether
    it enters the flipped term is not stated, so `margin_in_flip=False` leaves it out: -a log sigmoid(-d).

    Args:
        chosen, rejected: rewards of the two responses.
        margin: m, in units of reward, of any sign. None means 0.
        flip_prob: a in [0, 1]. None means 0. The range is the caller's promise (`Preference` checks it).
        margin_in_flip: whether m enters the flipped term. Without `margin` or `flip_prob` it changes nothing.

    Returns:
        The loss of each pair. Its gradient with respect to d never exceeds 1 in size and does not vanish on
        badly wrong pairs.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected, margin=margin, flip_prob=flip_prob)
    d = at_least_float32(chosen) - at_least_float32(rejected)
    shifted = d if margin is None else d - at_least_float32(margin)
    if flip_prob is None:
        return -F.logsigmoid(shifted)
    a = at_least_float32(flip_prob)
    flipped = shifted if margin_in_flip else d
    return -(1 - a) * F.logsigmoid(shifted) - a * F.logsigmoid(-flipped)


def dpo(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    reference_chosen: Float[Tensor, "B"],
    reference_rejected: Float[Tensor, "B"],
    *,
    beta: float,
    margin: Float[Tensor, "B"] | None = None,
    flip_prob: Float[Tensor, "B"] | None = None,
    margin_in_flip: bool = True,
) -> Float[Tensor, "B"]:
    """Direct preference optimisation: the Bradley-Terry loss of the reward that a policy implies.

        r(x, y) = beta (log pi(y | x) - log pi_ref(y | x)),   d = r(x, chosen) - r(x, rejected)
        loss = -(1 - a) log sigmoid(d - m) - a log sigmoid(-(d - m))

    With a = 0, m = 0 this is Eq. 7 of arXiv 2305.18290. a > 0 is the conservative form for noisy labels (cDPO,
    E. Mitchell, 2023); m is the offset of arXiv 2402.10571. Both mean what they mean in `bradley_terry`, for d is a
    log-odds here, too: a target of d* asks for a difference of d* / beta in log-ratios (nats).

    Args:
        chosen, rejected: log pi of the two responses, summed over their tokens.
        reference_chosen, reference_rejected: the same under the reference policy, taken as constants.
        beta: > 0; how dearly the distance from the reference is paid. The range is the caller's promise.
        margin, flip_prob, margin_in_flip: as in `bradley_terry`.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(
        chosen=chosen, rejected=rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected
    )
    return bradley_terry(
        implicit_reward(chosen, reference_chosen, beta=beta),
        implicit_reward(rejected, reference_rejected, beta=beta),
        margin=margin,
        flip_prob=flip_prob,
        margin_in_flip=margin_in_flip,
    )


def implicit_reward(
    logprobs: Float[Tensor, "*B"], reference: Float[Tensor, "*B"], *, beta: float
) -> Float[Tensor, "*B"]:
    """beta (log pi - log pi_ref): the reward, up to a term of the prompt alone, whose best policy is pi (ibid., Eq. 5).

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, reference=reference)
    return beta * (at_least_float32(logprobs) - at_least_float32(reference))


def accuracy(chosen: Float[Tensor, "B"], rejected: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """1 where the chosen response has the higher reward, 0 where it has the lower, 0.5 for a tie.

    Half for a tie keeps a constant reward at chance. A NaN reward gives NaN, not a tie.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    d = at_least_float32(chosen) - at_least_float32(rejected)
    # torch.sign(NaN) is 0, which would pass for a tie.
    return torch.where(d.isnan(), d, (torch.sign(d) + 1) / 2)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it already is: half precision has no place in a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_same_shape(**tensors: Tensor | None) -> None:
    """Refuse silent broadcasting: (B,) against (B, 1) would give (B, B).

    Raises:
        ValueError: names every tensor and its shape. Tensors that are None are left out.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        received = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these must have one shape, got {received}; squeeze or expand them first")
