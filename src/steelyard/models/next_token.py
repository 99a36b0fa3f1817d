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
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steelyard.data.collate import TreeBatch


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

    def allowed(self, vocabulary: int) -> Bool[Tensor, "n V"]:
        """True where a token could be drawn."""
        n, device = len(self.counts_n), self.tokens_L.device
        rows = torch.repeat_interleave(torch.arange(n, device=device), self.counts_n, output_size=len(self.tokens_L))
        mask = torch.zeros(n, vocabulary, dtype=torch.bool, device=device)
        mask[rows, self.tokens_L.long()] = True
        return mask


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
    ordered, index = torch.softmax(z_nV, -1).sort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(ordered, dtype=torch.bool)
    kept.scatter_(-1, index, ordered.cumsum(-1) - ordered < top_p)
    kept.scatter_(-1, drawn_n[:, None], True)
    return Nucleus(kept.nonzero()[:, 1].int(), kept.sum(-1))


def log_probability(z_nV: Float[Tensor, "n V"], tokens_n: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """log softmax(z) at one token a row. The backward pass makes one array of the size of z, not three."""
    out: Tensor = _LogProbability.apply(z_nV, tokens_n)
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


@torch.no_grad()
def entropies(z_nV: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
    """Entropy of softmax(z) in nats; a logit of -inf counts as probability 0."""
    logp = torch.log_softmax(z_nV, -1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
