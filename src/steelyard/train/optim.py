"""What the training loops share: the optimiser's settings, its schedule, and the order of the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from pydantic import Field
from torch import nn

from steelyard.config import Config


class OptimConfig(Config):
    """AdamW with warm-up and linear decay to 0."""

    lr: float = Field(1e-5, gt=0, le=1, description="peak learning rate")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps during which the rate rises from 0")
    decay: bool = Field(True, description="let the rate fall linearly to 0 by the last step")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second moment")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """The optimiser over the parameters that are to be trained."""
        return torch.optim.AdamW(
            [p for p in parameters if p.requires_grad],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
            fused=True,  # one pass over the weights instead of a dozen
        )

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step 0, 1, ..., total - 1."""
        rising = max(1, round(self.warmup * total))
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * ((total - step) / max(1, total - rising) if self.decay else 1.0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write the learning rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def require_finite_gradient(norm: float, step: int, *, of: str, remedy: str) -> None:
    """Raise FloatingPointError, naming the step, before an optimiser takes in a gradient that is not finite.

    `of` is whose gradient it is, `remedy` what to change.
    """
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the norm of the {of}'s gradient is {norm}; the weights were left as they are. {remedy}, in "
            "a new run (resuming this one repeats the step)"
        )


def take_step(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, *, of: str, remedy: str) -> None:
    """One step on the gradients at hand, scaled down to `max_grad_norm`; they are gone afterwards.

    Raises FloatingPointError (see `require_finite_gradient`) before anything moves.
    """
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(moved, config.max_grad_norm)
    require_finite_gradient(float(norm), step, of=of, remedy=remedy)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n examples in one epoch: a function of (seed, epoch) alone, so that a resumed run agrees."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(n, generator=generator).tolist()


def total_steps(n: int, batch_size: int, epochs: float) -> int:
    """Steps of `epochs` passes; the last batch of a pass may be smaller."""
    per_epoch = -(-n // batch_size)
    return max(1, round(per_epoch * epochs))


def batches(n: int, batch_size: int, seed: int, first_step: int, steps: int, *, least: int = 1) -> Iterator[list[int]]:
    """Example numbers of each step from `first_step` (0-based) to the last.

    What is left at the end of a pass is a smaller batch; if it has fewer than `least`, it waits for another pass. There
    must be `least` examples.
    """
    per_epoch = n // batch_size + (n % batch_size >= least)
    epoch, order = -1, []
    for step in range(first_step, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = epoch_order(n, seed, epoch)
        at = (step % per_epoch) * batch_size
        yield order[at : at + batch_size]
