"""Attention inside trees: exact, without padding between trees, and with a backward pass of its own.

Every block of a batch holds segments (a prompt, or a response that also sees its prompt) of similar size. On a CPU
torch's fused kernel computes the forward pass; its backward is slow there, so the probabilities are computed again
from the saved log-sum-exp and the five products done as batched matrix products. On a GPU the same rule of who sees
whom goes to FlexAttention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from steelyard.data.collate import AttentionBlock, TreeBatch


def tree_attention(
    query_THd: Float[Tensor, "Q H d"],
    key_TGd: Float[Tensor, "T G d"],
    value_TGd: Float[Tensor, "T G d"],
    batch: TreeBatch,
    scale: float,
    *,
    read: bool = False,
) -> Float[Tensor, "Q H d"]:
    """softmax(scale q k') v, each token over its prompt and its own response up to itself.

    All T tokens are queries; with `read` those at `batch.read_n` alone. H heads share G key-value heads (H a multiple
    of G). The result has the query's dtype.
    """
    if query_THd.device.type == "cuda":
        return _flex(query_THd, key_TGd, value_TGd, batch, scale, read=read)
    blocks = batch.read_blocks if read else batch.blocks
    out: Tensor = _TreeAttention.apply(query_THd, key_TGd, value_TGd, blocks, scale)
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[AttentionBlock, ...],
        scale: float,
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = []
        for block in blocks:
            q, k, v = _at(query, block, "queries_nQ"), _at(key, block, "keys_nS"), _at(value, block, "keys_nS")
            o, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=_bias(block, q.dtype), scale=scale
            )
            _put(out, block, o.transpose(1, 2).reshape(-1, *out.shape[1:]))
            lse.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        query, key, value, out, *lse = ctx.saved_tensors
        # Contiguous, whatever the query's layout: rows of heads are added to.
        dq = query.new_zeros(query.shape)
        dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (key, value))
        delta_TH = (g.float() * out.float()).sum(-1)
        for block, log_sum in zip(ctx.blocks, lse, strict=True):
            _block_backward(g, query, key, value, delta_TH, log_sum, block, ctx.scale, (dq, dk, dv))
        return dq, dk.to(key.dtype), dv.to(value.dtype), None, None


def _block_backward(
    g: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta_TH: Tensor,
    lse_nHQ: Tensor,
    block: AttentionBlock,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add one block's gradients. Heads of a group are stacked along the queries, so that keys are used as they are."""
    n, Q = block.queries_nQ.shape
    S = block.keys_nS.shape[1]
    H, d = query.shape[1:]
    G = key.shape[1]

    def column(x_nHQ: Tensor) -> Tensor:
        return x_nHQ.reshape(n * G, -1, 1)

    q, grad = (_at(x, block, "queries_nQ").view(n * G, -1, d) for x in (query, g))
    k, v = (_at(x, block, "keys_nS").view(n * G, S, d) for x in (key, value))
    # p = exp(scale q k' - lse), ds = p (g v' - delta), delta = sum(g o) (arXiv 2205.14135). The differences are taken
    # inside the products, before they are rounded; what lse itself loses to rounding, a factor of each row of p, goes
    # into the row's gradient. Padded queries have none, so nothing flows from them.
    lse, delta = column(lse_nHQ), column(_at(delta_TH[..., None], block, "queries_nQ"))
    rounded = lse.to(query.dtype)
    exact = rounded.dtype == lse.dtype
    if not exact or block.written_m[1] is not None:
        lost = column(block.real_nQ[:, None].expand(n, H, Q)).to(lse.dtype)
        lost = lost if exact else lost * torch.exp(rounded.float() - lse)
        delta, grad = delta * lost, (grad * lost).to(query.dtype)
    delta = delta.to(query.dtype)
    # What a query does not see may be infinite here; multiplying is much quicker than filling in zeros, and than the
    # exponential of very small numbers.
    p = torch.baddbmm(-rounded, q, k.transpose(1, 2), alpha=scale).exp_().clamp_max_(torch.finfo(query.dtype).max)
    p.view(n, H, Q, S)[..., block.open :].mul_(_seen(block, p.dtype)[:, None])
    ds = torch.baddbmm(-delta, grad, v.transpose(1, 2)).mul_(p)
    dq, dk, dv = into
    dq.view(-1, d).index_add_(0, _rows(block, "queries_nQ", H), torch.bmm(ds, k).mul_(scale).view(-1, d))
    of_keys = _rows(block, "keys_nS", G)
    q.mul_(scale)  # a copy of its own, for dk
    for target, left, right in ((dk, ds, q), (dv, p, grad)):
        target.view(-1, d).index_add_(0, of_keys, torch.bmm(left.transpose(1, 2), right).view(-1, d).float())


def _once(block: AttentionBlock, name: str, of: object, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, made for the first layer and kept for all others."""
    if (name, of) not in block.kept:
        block.kept[name, of] = make()
    found: Tensor = block.kept[name, of]
    return found


def _rows(block: AttentionBlock, of: Literal["queries_nQ", "keys_nS"], heads: int) -> Tensor:
    """Numbers of the rows of a (T heads, d) view at these places of the block, heads before places: (n heads L)."""

    def number() -> Tensor:
        return (getattr(block, of)[:, None] * heads + torch.arange(heads)[:, None]).flatten()

    return _once(block, of, heads, number)


def _at(x_THd: Tensor, block: AttentionBlock, of: Literal["queries_nQ", "keys_nS"]) -> Tensor:
    """(n, H, L, d): what stands at these places of the block, heads first."""
    (n, L), (_, H, d) = getattr(block, of).shape, x_THd.shape
    return x_THd.reshape(-1, d).index_select(0, _rows(block, of, H)).view(n, H, L, d)


def _put(out_THd: Tensor, block: AttentionBlock, x_mHd: Tensor) -> None:
    """Write the real queries' rows to their places."""
    places, numbers = block.written_m
    out_THd.index_copy_(0, places, x_mHd if numbers is None else x_mHd.index_select(0, numbers))


def _bias(block: AttentionBlock, dtype: torch.dtype) -> Tensor:
    """(n, 1, Q, S): 0 where a query sees a key, elsewhere the least number."""
    return _once(block, "bias", dtype, lambda: block.attend_nQS.to(dtype).sub_(1).mul_(torch.finfo(dtype).max)[:, None])


def _seen(block: AttentionBlock, dtype: torch.dtype) -> Tensor:
    """(n, Q, S - open): 1 where a query sees a key, 0 elsewhere, of the keys that not every query sees."""
    return _once(block, "seen", dtype, lambda: block.attend_nQS[..., block.open :].to(dtype))


def _flex(
    query: Tensor, key: Tensor, value: Tensor, batch: TreeBatch, scale: float, *, read: bool = False, run: Any = None
) -> Tensor:
    """The same through FlexAttention, compiled unless `run` says otherwise."""
    d = query.shape[-1]
    # A matrix unit's tile is 16 wide: narrower heads get columns of zeros, which change no product.
    q, k, v = (F.pad(x, (0, max(0, 16 - d))).transpose(0, 1)[None] for x in (query, key, value))
    out: Tensor = (run or _compiled_flex())(q, k, v, block_mask=_block_mask(batch, read), scale=scale, enable_gqa=True)
    return out[0, ..., :d].transpose(0, 1)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


_latest: dict[bool, tuple[TreeBatch, Any]] = {}  # by `read`: a batch and its mask, which all layers of a pass share


def _block_mask(batch: TreeBatch, read: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if read not in _latest or _latest[read][0] is not batch:
        tree, branch, T = batch.tree_T, batch.branch_T, batch.tokens
        place = batch.read_n

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q = place[q] if read else q
            return (k <= q) & (tree[q] == tree[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))

        queries = len(place) if read else T
        _latest[read] = batch, create_block_mask(sees, None, None, queries, T, device=str(tree.device))
    return _latest[read][1]
