"""MetaRM's difference loss, which says how clearly responses to one prompt are told apart, and the step that uses it.

The loss is pure, unreduced and in float32 at least, like those of `losses/preference.py`. The step knows nothing of
reward models: it takes any module and any two losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steelyard.losses.preference import at_least_float32

Normalisation = Literal["paper", "mean"]
Direction = Literal["gradient", "random"]
Losses = Callable[[], Iterable[Tensor]]


def difference_loss(rewards: Float[Tensor, "B K"], *, normalisation: Normalisation = "paper") -> Float[Tensor, "B"]:
    """The degree to which K responses to one prompt get different rewards; MetaRM *maximises* it.

        J = (2 / K^2) sum_{i<j} sigmoid(|r_i - r_j|)

    Eq. 11 of Secrets of RLHF II (arXiv 2401.06080). **The slip of the print:** there are K (K - 1) / 2 pairs, so
    the factor 2 / K^2 is not the mean it looks like: J lies in [1/2, 1) (K - 1) / K. `normalisation="mean"` takes
    2 / (K (K - 1)), whose J lies in [1/2, 1); the gradient then is K / (K - 1) times as long, no more.

    J depends on the differences alone: a constant added to every reward of a prompt changes nothing. A tie has no
    gradient, for |d| has none at 0 (torch's choice is 0): responses that are the same text pull nowhere.

    Args:
        rewards: of K >= 2 responses to each of B prompts.
        normalisation: "paper" or "mean".

    Raises:
        ValueError: `rewards` is not (B, K) with K >= 2, or the normalisation has another name.
    """
    if normalisation not in get_args(Normalisation):
        raise ValueError(f"normalisation must be paper or mean, got {normalisation!r}")
    K = rewards.shape[-1]
    total = torch.sigmoid(differences(rewards)).sum(-1)
    return total * (2 / K**2 if normalisation == "paper" else 2 / (K * (K - 1)))


def differences(rewards: Float[Tensor, "B K"]) -> Float[Tensor, "B pairs"]:
    """|r_i - r_j| of all K (K - 1) / 2 pairs i < j of one prompt's responses.

    Raises:
        ValueError: `rewards` is not (B, K) with K >= 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (B, K) with at least two responses to a prompt, got {tuple(rewards.shape)}")
    r = at_least_float32(rewards)
    i, j = torch.triu_indices(r.shape[1], r.shape[1], offset=1, device=r.device)
    return (r[:, i] - r[:, j]).abs()


def meta_step(
    model: nn.Module,
    meta_batch_fn: Losses,
    train_batch_fn: Losses,
    eta: float,
    *,
    direction: Direction = "gradient",
    seed: int = 0,
    reduce: Callable[[Tensor], None] | None = None,
) -> float:
    """Leave the gradient of L at theta' = theta + eta grad J(theta) in `p.grad`, and theta as it was, bit for bit.

    Algorithm 1 of Secrets of RLHF II, Eq. 12 and 13, first order: the caller's optimiser then steps on theta
    (Eq. 14). Eq. 15 to 17 derive a second-order form, which the algorithm does not compute and neither does this.

    theta' is built in the buffer of grad J, and parameters and buffer trade places until L's gradient is there:
    beyond a plain step one gradient-sized buffer lives, nothing is subtracted again, and the optimiser sees
    neither theta' nor grad J. Autocast is off in both passes.

    Args:
        model: any module; its parameters that require a gradient are theta.
        meta_batch_fn, train_batch_fn: called when the weights are in place; each yields scalar losses, one per
            micro-batch, whose *sum* is J(X_s) (to be maximised) or L(X_t). Their gradients are taken here.
        eta: length of the meta step. At 0 the gradient is that of a plain step, bit for bit.
        direction: "random" replaces grad J by normal draws, scaled to its global norm: a control.
        seed: of the random direction.
        reduce: for several processes: sums a tensor over all of them, in place (`torch.distributed.all_reduce`). Each
            process then yields its share of the two sums, which may be nothing.

    Returns:
        The global norm of grad J.

    Raises:
        ValueError: a parameter is coarser than float32, or eta is negative or not finite.
        FloatingPointError: grad J is not finite. theta is restored after any error.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if coarse := {str(p.dtype) for p in parameters} - {"torch.float32", "torch.float64"}:
        raise ValueError(
            f"parameters must be float32 or float64, got {', '.join(sorted(coarse))}: eta * gradient would be rounded "
            "away; keep the weights in float32"
        )
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be finite and at least 0, got {eta}")
    model.zero_grad(set_to_none=True)
    with contextlib.ExitStack() as stack:
        for device in sorted({p.device.type for p in parameters}):
            stack.enter_context(torch.autocast(device, enabled=False))
        _accumulate(parameters, meta_batch_fn(), reduce)
        size = _norm(parameters)
        if not math.isfinite(size):
            raise FloatingPointError(f"the gradient of the difference loss must be finite, its norm is {size}")
        if direction == "random":
            _randomise(parameters, size, seed)
        with _shifted(parameters, eta):
            _accumulate(parameters, train_batch_fn(), reduce)
    return size


def _accumulate(
    parameters: Sequence[nn.Parameter], losses: Iterable[Tensor], reduce: Callable[[Tensor], None] | None
) -> None:
    for loss in losses:
        loss.backward()
    if reduce is not None:
        reduce_gradients(parameters, reduce)


def reduce_gradients(parameters: Sequence[nn.Parameter], reduce: Callable[[Tensor], None]) -> None:
    """Sum the gradients over several processes; one that had no examples takes part too.

    What none has a gradient for, none gets one for. `reduce` sums a tensor over all of them, in place.
    """
    if not parameters:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    reduce(used)
    for p, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            reduce(p.grad)


@contextlib.contextmanager
def _shifted(parameters: Sequence[nn.Parameter], eta: float) -> Iterator[None]:
    """theta + eta * p.grad in the place of theta, and no gradients; at the end the untouched theta is back."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for p in parameters:
            if eta > 0 and p.grad is not None:
                kept.append((p, p.data))
                p.data = torch.add(p.data, p.grad, alpha=eta, out=p.grad)
            p.grad = None
        yield
    finally:
        for p, theta in kept:
            p.data = theta


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _randomise(parameters: Sequence[nn.Parameter], size: float, seed: int) -> None:
    """Overwrite the gradients by a random direction of global norm `size`."""
    generators: dict[torch.device, torch.Generator] = {}
    for p in parameters:
        if p.grad is not None:
            if p.device not in generators:
                generators[p.device] = torch.Generator(p.device).manual_seed(seed)
            p.grad.normal_(generator=generators[p.device])
    drawn = _norm(parameters)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(size / drawn)
