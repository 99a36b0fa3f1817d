"""From logits to tokens: repetition penalty, temperature, nucleus, and a draw by inverse CDF in two levels.

`models.next_token` defines the distribution; here it is drawn from, many rows a step, so the passes over the
vocabulary are what counts. In the place of a cumulative sum over the whole vocabulary stand sums of blocks, a
cumulative sum of those, and one inside the block that is hit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from steelyard.models.next_token import cut_nucleus
from steelyard.sampling.settings import SamplingConfig

_BLOCK = 128


def draw(
    logits_RV: Float[Tensor, "R V"],
    uniform_R: Float[Tensor, "R"],
    config: SamplingConfig,
    said_RS: Int[Tensor, "R S"] | None = None,
) -> Int[Tensor, "R"]:
    """One token a row: the first whose cumulative probability, in the order of ids, exceeds the uniform number.

    `said_RS` are the tokens that the repetition penalty falls on; a token may stand there more than once. A token of
    probability 0 is never drawn, whatever the uniform number in [0, 1). -1 where the logits have no finite sum.
    """
    logits = logits_RV
    if config.repetition_penalty != 1.0 and said_RS is not None:
        said = logits.gather(-1, said_RS)
        c = config.repetition_penalty
        logits = logits.scatter(-1, said_RS, torch.where(said > 0, said / c, said * c))
    # Probabilities up to a factor: the factor cancels, so no pass is spent on dividing by it.
    weights = logits - logits.amax(-1, keepdim=True)
    if config.temperature != 1.0:
        weights.div_(config.temperature)
    weights.exp_()
    if config.top_p < 1.0:
        weights = cut_nucleus(weights, config.top_p)
    return invert(weights, uniform_R)


def invert(weights_RV: Float[Tensor, "R V"], uniform_R: Float[Tensor, "R"]) -> Int[Tensor, "R"]:
    """For each row the first v with sum(weights[:v + 1]) > uniform sum(weights); -1 where the sum is not finite.

    Exact up to the float32 rounding of a block's sum; everything above it is float64.
    """
    R, V = weights_RV.shape
    blocks_RBb = (
        F.pad(weights_RV, (0, -V % _BLOCK)).view(R, -1, _BLOCK) if V % _BLOCK else weights_RV.view(R, -1, _BLOCK)
    )
    upto_RB = blocks_RBb.sum(-1).double().cumsum(-1)
    target_R1 = uniform_R.double()[:, None] * upto_RB[:, -1:]
    # `right`: a block without weight has no share of the line, and is never hit.
    block_R1 = torch.searchsorted(upto_RB, target_R1, right=True).clamp(max=upto_RB.shape[-1] - 1)
    before_R1 = torch.where(block_R1 > 0, upto_RB.gather(-1, (block_R1 - 1).clamp(min=0)), 0.0)
    inside_Rb = blocks_RBb[torch.arange(R, device=block_R1.device), block_R1[:, 0]].double().cumsum(-1)
    # The block's own sum, in float64, may be a rounding below the one that chose it.
    last_R1 = inside_Rb[:, -1:]
    rest_R1 = torch.minimum(target_R1 - before_R1, torch.nextafter(last_R1, torch.zeros_like(last_R1)))
    found_R = (block_R1 * _BLOCK + torch.searchsorted(inside_Rb, rest_R1, right=True))[:, 0]
    return torch.where(upto_RB[:, -1].isfinite(), found_R, -1)
