"""The distribution that tokens are drawn from, as a differentiable function of the logits.

With logits l, the set S of tokens said so far (prompt and response), temperature T and repetition penalty c:

    z_v = (l_v / c if l_v > 0 else l_v c, for v in S; else l_v) / T
    full:     p(v) = softmax(z)_v
    nucleus:  N = the most probable tokens up to a mass of top_p
    sampled:  mu(v) = p(v) / sum_{u in N} p(u) for v in N, 0 elsewhere

The penalty is that of CTRL (arXiv 1909.05858, section 4.1) with its sign mended as in transformers, the nucleus that of
arXiv 1904.09751, Eq. 3. S is known from the text, so full follows the weights exactly. N is decided by the weights:
when they move, a token that was drawn may fall outside the new N, and its ratio would be 0. An update therefore takes
N as it was when the tokens were drawn (`Nucleus`). mu then is a softmax over a fixed set: every ratio is positive and
finite, and, as N is piecewise constant in the weights, the gradient of log mu at the weights that sampled is exactly
that of the distribution that was sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from steelyard.data.collate import TreeBatch

# So many of the largest probabilities are looked at for a nucleus before all are.
_LARGEST = 64
_LOW_BITS = 20  # of a float32, which leaves the exponent and three bits of its fraction


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn: fields as in `sampling.SamplingConfig`."""

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Nucleus:
    """The tokens that could be drawn at each of n positions: `counts_n` of `tokens_L` belong to each, in order."""

    tokens_L: Int[Tensor, "L"]
    counts_n: Int[Tensor, "n"]

    @classmethod
    def join(cls, parts: Sequence[Nucleus]) -> Nucleus:
        """The positions of all parts, one part after another."""
        return cls(torch.cat([p.tokens_L for p in parts]), torch.cat([p.counts_n for p in parts]))

    def split(self, sizes: Sequence[int]) -> list[Nucleus]:
        """Parts of so many positions each."""
        if len(sizes) == 1:
            return [self]
        counts = self.counts_n.split(list(sizes))
        # Read at once: on a GPU every number that is read waits for all that was asked of it before.
        tokens = self.tokens_L.split(torch.stack([c.sum() for c in counts]).tolist())
        return [Nucleus(*pair) for pair in zip(tokens, counts, strict=True)]

    def of(self, values_nV: Shaped[Tensor, "n V"]) -> tuple[Shaped[Tensor, "L"], Int[Tensor, "L"], Int[Tensor, "L"]]:
        """(the values at the nuclei's tokens, row and column of each)."""
        rows = torch.arange(len(self.counts_n), device=self.counts_n.device)
        rows_L = torch.repeat_interleave(rows, self.counts_n, output_size=len(self.tokens_L))
        columns_L = self.tokens_L.long()
        return values_nV[rows_L, columns_L], rows_L, columns_L

    def reduce(self, values_L: Float[Tensor, "L"], how: Literal["sum", "max"]) -> Float[Tensor, "n"]:
        """The sum or the largest over each nucleus."""
        # `unsafe` leaves out a check of the counts, for which a GPU would wait.
        return torch.segment_reduce(values_L, how, lengths=self.counts_n, unsafe=True)


class Seen:
    """Which tokens stand before each response token of a batch, in its prompt or in its own response."""

    def __init__(self, batch: TreeBatch, vocabulary: int) -> None:
        B, K, R = batch.mask_BKR.shape
        device = batch.ids_T.device
        # The place in its response from which on a token has been said: 0 if the prompt says it, R if never.
        first = torch.full((B, K, vocabulary), R, device=device)
        said = torch.arange(1, R + 1, device=device).expand(B, K, R)
        said = torch.where(batch.mask_BKR, said, R)
        first.scatter_reduce_(2, batch.response_BKR, said, "amin")
        in_prompt = torch.full((B * vocabulary,), R, device=device)
        in_prompt.scatter_reduce_(0, batch.tree_T * vocabulary + batch.ids_T, batch.branch_T.clamp(max=1) * R, "amin")
        self.first_GV = torch.minimum(first, in_prompt.view(B, 1, vocabulary)).flatten(0, 1)
        self.response_n, self.place_n = batch.real_r // R, batch.real_r % R

    def __getitem__(self, part: slice) -> Bool[Tensor, "n V"]:
        """For some of the response tokens, in the order of `real_r`."""
        return self.first_GV[self.response_n[part]] <= self.place_n[part, None]


def shaped(logits_nV: Float[Tensor, "n V"], seen_nV: Bool[Tensor, "n V"] | None, how: Drawing) -> Float[Tensor, "n V"]:
    """z: the logits under repetition penalty and temperature."""
    z = logits_nV
    if seen_nV is not None:
        c = how.repetition_penalty
        z = torch.where(seen_nV, torch.where(z > 0, z / c, z * c), z)
    return z if how.temperature == 1.0 else z / how.temperature


@torch.no_grad()
def nucleus(z_nV: Float[Tensor, "n V"], top_p: float, drawn_n: Int[Tensor, "n"]) -> Nucleus:
    """The most probable tokens up to a mass of `top_p`, the one that crosses it included, and the token drawn.

    The token drawn belongs there already but for rounding: it came from logits that were computed in another order.
    """
    kept = cut_nucleus((z_nV - z_nV.amax(-1, keepdim=True)).exp_(), top_p) > 0
    kept.scatter_(-1, drawn_n[:, None], True)
    return Nucleus(kept.nonzero()[:, 1].int(), kept.sum(-1))


def cut_nucleus(weights_RV: Float[Tensor, "R V"], top_p: float) -> Float[Tensor, "R V"]:
    """The weights, 0 outside the nucleus: the largest that are needed to reach a share of `top_p`.

    A token stays if those before it have not reached top_p; the most probable one always stays; among equal weights
    the lower id comes first.
    """
    R, V = weights_RV.shape
    bound_R1 = top_p * weights_RV.sum(-1, keepdim=True)
    least_R1 = weights_RV.new_zeros(R, 1)
    rest = torch.arange(R, device=weights_RV.device)
    ways = [_least_of_largest] if V > _LARGEST else []
    # Bins are of float32's bits. On a GPU sums into them come in no fixed order, and sorting is cheap.
    if ways and weights_RV.device.type == "cpu" and weights_RV.dtype == torch.float32:
        ways.append(_least_by_bins)
    for way in ways:
        if len(rest):
            value, found = way(weights_RV[rest], bound_R1[rest])
            least_R1[rest[found]] = value[found]
            rest = rest[~found]
    cut = weights_RV * (weights_RV >= least_R1)  # on a CPU filling in zeros takes several times as long
    if len(rest):
        ordered, index = weights_RV[rest].sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= bound_R1[rest], 0.0)
        cut[rest] = torch.zeros_like(ordered).scatter_(-1, index, ordered)
    return cut


def _least_of_largest(
    weights_nV: Float[Tensor, "n V"], bound_n1: Float[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n 1"], Bool[Tensor, "n"]]:
    """(the smallest weight of the nucleus, whether it is that and no other equals it), looking at the largest only."""
    top = weights_nV.topk(_LARGEST).values
    last = ((top.cumsum(-1) - top < bound_n1).sum(-1, keepdim=True) - 1).clamp(min=0)  # 0: not finite
    value = top.gather(-1, last)
    # Weights below the last one must have come into sight; else equal ones may be missing, or all may stay.
    return value, (value > top[:, -1:])[:, 0] & (last + 1 == (top >= value).sum(-1, keepdim=True))[:, 0]


def _least_by_bins(
    weights_nV: Float[Tensor, "n V"], bound_n1: Float[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n 1"], Bool[Tensor, "n"]]:
    """The same for a nucleus of any size: only the weights between two steps of an eighth of a power of 2 are sorted.

    The upper bits of a positive float order as it does. The weight of each of their values is summed, from the top;
    the nucleus ends inside the bin that reaches the bound.
    """
    n, bins = len(weights_nV), 1 << (31 - _LOW_BITS)
    bin_nV = (weights_nV.contiguous().view(torch.int32) >> _LOW_BITS) & (bins - 1)  # a NaN may have a sign
    falling_nB = weights_nV.new_zeros(n, bins).scatter_add_(1, bin_nV.long(), weights_nV).flip(-1)
    upto_nB = falling_nB.cumsum(-1)
    at_n1 = torch.searchsorted(upto_nB, bound_n1).clamp(max=bins - 1)
    row_L, column_L = (bin_nV == bins - 1 - at_n1).nonzero(as_tuple=True)
    counts_n = torch.bincount(row_L, minlength=n)
    inside_nM = weights_nV.new_zeros(n, max(int(counts_n.max()), 1))
    inside_nM[row_L, torch.arange(len(row_L)) - (counts_n.cumsum(0) - counts_n)[row_L]] = weights_nV[row_L, column_L]
    inside_nM = inside_nM.sort(dim=-1, descending=True).values
    before_n1 = (upto_nB - falling_nB).gather(-1, at_n1)
    last = (before_n1 + inside_nM.cumsum(-1) - inside_nM < bound_n1).sum(-1, keepdim=True)
    # Where rounding leaves a whole bin below the bound that it reached, the padding, other rows' doing, must not count.
    last = (torch.minimum(last, counts_n[:, None]) - 1).clamp(min=0)
    value = inside_nM.gather(-1, last)
    return value, (value > 0)[:, 0] & (last + 1 == (inside_nM >= value).sum(-1, keepdim=True))[:, 0]


def log_probability(
    z_nV: Float[Tensor, "n V"], tokens_n: Int[Tensor, "n"], kept: Nucleus | None = None
) -> Float[Tensor, "n"]:
    """log softmax(z) at one token a row, over all tokens or over a nucleus that holds it.

    The backward pass makes one array of the size of z, not three; no other is made for a nucleus.
    """
    out: Tensor = _LogProbability.apply(z_nV, tokens_n) if kept is None else _Within.apply(z_nV, tokens_n, kept)
    return out


class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, tokens: Tensor) -> Tensor:
        lse = torch.logsumexp(z, -1)
        ctx.save_for_backward(z, tokens, lse)
        return z.gather(-1, tokens[:, None])[:, 0] - lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        z, tokens, lse = ctx.saved_tensors
        dz = (z - lse[:, None]).exp_().mul_(-g[:, None])
        dz[torch.arange(len(dz), device=dz.device), tokens] += g
        return dz, None


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, tokens: Tensor, kept: Nucleus) -> Tensor:
        logp, lse, rows, columns = _softmax_within(z, kept)
        ctx.save_for_backward(logp, rows, columns, tokens)
        ctx.shape = z.shape
        return z.gather(-1, tokens[:, None])[:, 0] - lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = gradients
        logp, rows, columns, tokens = ctx.saved_tensors
        dz = g.new_zeros(ctx.shape)
        dz[rows, columns] = logp.exp() * -g[rows]  # a token stands once in a nucleus
        dz[torch.arange(len(dz), device=dz.device), tokens] += g
        return dz, None, None


def _softmax_within(z_nV: Tensor, kept: Nucleus) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities of the nuclei's tokens, (n,) logs of the sums of exponentials, rows, columns)."""
    z, rows, columns = kept.of(z_nV)
    top = kept.reduce(z, "max")
    lse = kept.reduce((z - top[rows]).exp_(), "sum").log_() + top
    return z - lse[rows], lse, rows, columns


@torch.no_grad()
def entropies(z_nV: Float[Tensor, "n V"], kept: Nucleus | None = None) -> Float[Tensor, "n"]:
    """Entropy in nats of softmax(z), over all tokens or over a nucleus."""
    if kept is not None:
        logp_L = _softmax_within(z_nV, kept)[0]
        return -kept.reduce(logp_L.exp() * logp_L, "sum")
    return torch.special.entr(torch.softmax(z_nV, -1)).sum(-1)
