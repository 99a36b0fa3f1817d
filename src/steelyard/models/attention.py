"""Attention inside trees: exact, without padding between trees, and with a backward pass of its own.

Every block of a batch holds segments (a prompt, or a response that also sees its prompt) of one padded shape. On a CPU
torch's fused kernel computes the forward pass; its backward is slow there, so the probabilities are computed again
from the saved log-sum-exp and the five products done as batched matrix products. On a GPU the same rule of who sees
whom goes to FlexAttention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from steelyard.data.collate import AttentionBlocks, TreeBatch

Made = TypeVar("Made")


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
    """Rows of all blocks are fetched at once, one block's behind another's: few operations, each of some size."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float) -> Tensor:
        _, H, d = query.shape
        G = key.shape[1]
        q, k, v = _fetch(query, blocks, "queries_nQ"), _fetch(key, blocks, "keys_nS"), _fetch(value, blocks, "keys_nS")
        rows = zip(_each(q, blocks, "queries_nQ", H), *(_each(x, blocks, "keys_nS", G) for x in (k, v)), strict=True)
        out, lse = [], []
        for (q, k, v), bias in zip(rows, _biases(blocks, query.dtype), strict=True):
            o, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=bias, scale=scale
            )
            out.append(o.transpose(1, 2).reshape(-1, H, d))
            lse.append(log_sum.flatten())
        y = torch.cat(out).index_select(0, _back(blocks, 1))
        ctx.save_for_backward(query, key, value, y, torch.cat(lse))
        ctx.blocks, ctx.scale = blocks, scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        query, key, value, out, lse = ctx.saved_tensors
        blocks, (_, H, d), G, dtype = ctx.blocks, query.shape, key.shape[1], query.dtype
        q, grad = _fetch(query, blocks, "queries_nQ"), _fetch(g, blocks, "queries_nQ")
        k, v = _fetch(key, blocks, "keys_nS"), _fetch(value, blocks, "keys_nS")
        # p = exp(scale q k' - lse), ds = p (g v' - delta), delta = sum(g o) (arXiv 2205.14135). The differences are
        # taken inside the products, before they are rounded; what lse itself loses to rounding, a factor of each row of
        # p, goes into the row's gradient. Padded queries have none, so nothing flows from them.
        rounded = lse.to(dtype)
        kept = _real(blocks, H) * torch.exp(rounded.float() - lse)
        grad = grad.mul_(kept[:, None])
        delta = _fetch((g.float() * out.float()).sum(-1, keepdim=True), blocks, "queries_nQ").mul_(kept[:, None])
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        # Heads of a group are stacked along the queries, so that keys are used as they are.
        of_queries = (q, grad, -rounded[:, None], -delta.to(dtype), dq)
        of_keys = (k, v, dk, dv)
        for block, (q_, g_, lse_, delta_, dq_), (k_, v_, dk_, dv_), seen in zip(
            blocks,
            zip(*(_each(x, blocks, "queries_nQ", H, G) for x in of_queries), strict=True),
            zip(*(_each(x, blocks, "keys_nS", G, G) for x in of_keys), strict=True),
            _seen(blocks, dtype),
            strict=True,
        ):
            # What a query does not see may be infinite here; multiplying is much quicker than filling in zeros, and
            # than the exponential of very small numbers.
            p = torch.baddbmm(lse_, q_, k_.mT, alpha=ctx.scale).exp_().clamp_max_(torch.finfo(dtype).max)
            p.view(len(seen), H, seen.shape[2], -1)[..., block.open :].mul_(seen)
            ds = torch.baddbmm(delta_, g_, v_.mT).mul_(p)
            torch.bmm(ds, k_, out=dq_)
            torch.bmm(ds.mT, q_, out=dk_)
            torch.bmm(p.mT, g_, out=dv_)
        dq = dq.index_select(0, _back(blocks, H)).mul_(ctx.scale)
        dk, dv = (
            torch.zeros(len(key) * G, d).index_add_(0, _numbers(blocks, "keys_nS", G), x.float()) for x in (dk, dv)
        )
        return dq.view(query.shape), *(x.view(key.shape).to(dtype) for x in (dk.mul_(ctx.scale), dv)), None, None


def _fetch(x_THd: Tensor, blocks: AttentionBlocks, of: Literal["queries_nQ", "keys_nS"]) -> Tensor:
    """(m, d): what stands at the places of all blocks, in each block heads before places."""
    _, H, d = x_THd.shape
    return x_THd.reshape(-1, d).index_select(0, _numbers(blocks, of, H))


def _each(
    x_md: Tensor, blocks: AttentionBlocks, of: Literal["queries_nQ", "keys_nS"], heads: int, groups: int | None = None
) -> list[Tensor]:
    """The rows of each block: (n, H, L, d), or with `groups` (n G, H / G L, d)."""
    shapes = [getattr(block, of).shape for block in blocks]
    parts = x_md.split([n * heads * L for n, L in shapes])
    if groups is not None:
        return [part.view(n * groups, -1, x_md.shape[-1]) for part, (n, _) in zip(parts, shapes, strict=True)]
    return [part.view(n, heads, L, -1) for part, (n, L) in zip(parts, shapes, strict=True)]


def _once(blocks: AttentionBlocks, name: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """What `make` gives, made for the first layer and kept for all others."""
    if name not in blocks.kept:
        blocks.kept[name] = make()
    found: Made = blocks.kept[name]
    return found


def _numbers(blocks: AttentionBlocks, of: Literal["queries_nQ", "keys_nS"], heads: int) -> Tensor:
    """Rows of a (T heads, d) view at the places of all blocks, in each block heads before places: (m)."""

    def number() -> Tensor:
        each = torch.arange(heads)[:, None]
        return torch.cat([(getattr(block, of)[:, None] * heads + each).flatten() for block in blocks])

    return _once(blocks, (of, heads), number)


def _back(blocks: AttentionBlocks, heads: int) -> Tensor:
    """Where each row of a (T heads, d) view stands as a real query: the way back from `_numbers`."""

    def number() -> Tensor:
        real = _real(blocks, heads).nonzero().squeeze(-1)
        return torch.empty_like(real).index_copy_(0, _numbers(blocks, "queries_nQ", heads)[real], real)

    return _once(blocks, ("back", heads), number)


def _real(blocks: AttentionBlocks, heads: int) -> Tensor:
    """(m): 1 for the rows of real queries, 0 for padding."""

    def find() -> Tensor:
        return torch.cat([block.real_nQ[:, None].expand(-1, heads, -1).flatten() for block in blocks]).float()

    return _once(blocks, ("real", heads), find)


def _biases(blocks: AttentionBlocks, dtype: torch.dtype) -> list[Tensor]:
    """(n, 1, Q, S) of each block: 0 where a query sees a key, elsewhere the least number."""
    least = torch.finfo(dtype).max
    return _once(blocks, ("bias", dtype), lambda: [b.attend_nQS.to(dtype).sub_(1).mul_(least)[:, None] for b in blocks])


def _seen(blocks: AttentionBlocks, dtype: torch.dtype) -> list[Tensor]:
    """(n, 1, Q, S - open) of each block: 1 where a query sees a key, else 0, of the keys that not all see."""
    return _once(blocks, ("seen", dtype), lambda: [b.attend_nQS[:, None, :, b.open :].to(dtype) for b in blocks])


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
