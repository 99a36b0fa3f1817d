"""Llama-like models as a reader: a prompt's keys and values are kept once, whatever the number of its samples.

A sample's token attends to its prompt and to its own response so far. The two parts lie in two caches and are computed
apart, each with the log of its sum of exponentials; the parts are then joined exactly (as in arXiv 2205.14135, section
3.1, for blocks of keys). All memory is taken at the start: a layer's caches are (p, G, P, d) for the prompts and
(R, G, T, d) for the responses. A row that ends is replaced by the last row: rows stay dense, and one is moved, not all.

The layer is the one of `models.trunk`, with the weights rounded once a call where products are bfloat16. Its logits are
rounded to bfloat16 then, as those of `generate` in bfloat16 are; in float32 they are those of `PolicyModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steelyard.models.pointwise import rms_norm, rotate, swiglu
from steelyard.models.policy import PolicyModel
from steelyard.models.trunk import attention_window, in_parts

# Prompt tokens read at once.
_AT_ONCE = 4096
Weights = tuple[Tensor, Tensor | None]
Norm = tuple[Tensor, float, torch.dtype]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def refusal(policy: PolicyModel, longest: int) -> str | None:
    """Why this policy's texts of up to `longest` tokens cannot be read here; None where they can."""
    trunk = policy.hf.base_model
    if not in_parts(trunk):
        return f"{type(trunk).__name__} is not a stack of Llama, Mistral or Qwen style layers"
    window = attention_window(trunk)
    if window is not None and longest > window:
        return f"texts of up to {longest} tokens are longer than the model's sliding window of {window}"
    parts: list[nn.Module] = [trunk, trunk.norm, policy.hf.get_output_embeddings()]
    for layer in trunk.layers:
        parts += [layer, layer.self_attn, layer.mlp, *_linears(layer)]
        if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return f"its activation is {type(layer.mlp.act_fn).__name__}, not SiLU"
    if any(m._forward_hooks or m._forward_pre_hooks for m in parts):
        return "it has hooks"
    odd = {type(m).__name__ for layer in trunk.layers for m in _linears(layer) if not _is_linear(m)}
    return f"its layers hold {', '.join(sorted(odd))}" if odd else None


class SharedReader:
    """Implements `loop.Reader`. H heads share G key-value heads; R rows; T the room for a response."""

    def __init__(self, policy: PolicyModel) -> None:
        """Raises ValueError where `refusal` gives a reason."""
        if reason := refusal(policy, 0):
            raise ValueError(f"cannot share prompts: {reason}")
        self.dtype = torch.bfloat16 if policy.precision == "bfloat16" else torch.float32
        self.trunk: Any = policy.hf.base_model
        self.layers = [_Layer.of(layer, self.dtype) for layer in self.trunk.layers]
        self.norm = _norm(self.trunk.norm, self.dtype)
        self.head = _weights(policy.hf.get_output_embeddings(), self.dtype)
        self.device = self.head[0].device
        # Some models rotate their layers in several ways: no one table is made beforehand for those.
        self.static = isinstance(self.trunk.rotary_emb.rope_type, str)

    def start(self, prompts: Sequence[tuple[int, ...]], *, k: int, room: int) -> Float[Tensor, "R V"]:
        """See `loop.Reader`."""
        n, width, rows = len(prompts), max(map(len, prompts)), len(prompts) * k
        self.k = k
        self.whole = True  # row i stands in slot i: nobody has left, or prompts and rows move together (k = 1)
        self.prefix = self.suffix = []  # a group's caches are freed before the next group's are taken
        self.lengths_p = torch.tensor([len(p) for p in prompts], device=self.device)
        # Zeros: what lies behind a shorter prompt is hidden, but must be finite.
        self.prefix = [tuple(self._cache(n, width, x, zero=True) for _ in range(2)) for x in self.layers]
        self.suffix = [tuple(self._cache(rows, room, x) for _ in range(2)) for x in self.layers]
        self.written = 0
        self.slot_R = torch.arange(rows, device=self.device)
        self.position_R = self.lengths_p.repeat_interleave(k)
        self.tables = self._rotary(torch.arange(width + room, device=self.device)) if self.static else None
        last = [self._read_prompts(prompts[a:b], a) for a, b in _chunks([len(p) for p in prompts])]
        self._hide_padding()
        return self._logits(torch.cat(last)).repeat_interleave(k, 0)

    def leave(self, keep_R: Bool[Tensor, "R"]) -> Int[Tensor, "r"]:
        """See `loop.Reader`."""
        self.whole = self.k == 1
        order = _fill_holes(keep_R, [x[:, :, : self.written] for pair in self.suffix for x in pair])
        self.slot_R, self.position_R = self.slot_R[order], self.position_R[order]
        prompt_R = self.slot_R // self.k
        used_p = torch.zeros_like(self.lengths_p, dtype=torch.bool)
        used_p[prompt_R] = True
        if not used_p.all():
            old = _fill_holes(used_p, [x for pair in self.prefix for x in pair])
            new = torch.empty_like(self.lengths_p)
            new[old] = torch.arange(len(old), device=self.device)
            self.slot_R = new[prompt_R] * self.k + self.slot_R % self.k
            self.lengths_p = self.lengths_p[old]
            self._hide_padding()
        return order

    def read(self, token_R: Int[Tensor, "R"]) -> Float[Tensor, "R V"]:
        """See `loop.Reader`."""
        rows, t = len(token_R), self.written

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, new in zip(self.suffix[number], (k, v), strict=True):
                cache[:rows, :, t] = new
            keys, values = (x[:rows, :, : t + 1] for x in self.suffix[number])
            G, scale = keys.shape[1], self.layers[number].scale
            own, own_lse = _attention(q.view(rows, G, -1, q.shape[-1]), keys, values, None, scale)
            shared, shared_lse = self._over_prompts(number, q)
            # softmax over both = the two outputs, weighted by their shares of the sum of exponentials.
            share = torch.sigmoid(shared_lse - own_lse.reshape(rows, -1))[..., None]
            return torch.lerp(own.reshape(q.shape).float(), shared.float(), share).to(q.dtype)

        x = self._run(self.trunk.embed_tokens(token_R), self.position_R, attend)
        self.written += 1
        self.position_R = self.position_R + 1
        return self._logits(x)

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]], first: int) -> Float[Tensor, "p D"]:
        """Fill the cache of prompts from number `first` on; the last layer at each one's last token."""
        n, width = len(prompts), max(map(len, prompts))
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        position = torch.cat([torch.arange(len(p), device=self.device) for p in prompts])
        # Only real tokens go through the layers; attention alone sees them padded.
        place = torch.repeat_interleave(torch.arange(n, device=self.device) * width, lengths) + position

        def padded(x: Tensor) -> Tensor:  # (T, H, d) -> (p, H, P, d)
            grid = x.new_zeros(n * width, *x.shape[1:])
            grid[place] = x
            return grid.view(n, width, *x.shape[1:]).transpose(1, 2)

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q_, k_, v_ = padded(q), padded(k), padded(v)
            for cache, new in zip(self.prefix[number], (k_, v_), strict=True):
                cache[first : first + n, :, :width] = new
            scale = self.layers[number].scale
            # Padding stands on the right, where no earlier token looks.
            o = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale, enable_gqa=True)
            return o.transpose(1, 2).reshape(n * width, *q.shape[1:])[place]

        ids = torch.tensor([token for p in prompts for token in p], device=self.device)
        return self._run(self.trunk.embed_tokens(ids), position, attend)[lengths.cumsum(0) - 1]

    def _over_prompts(self, number: int, q_RHd: Tensor) -> tuple[Float[Tensor, "R H d"], Float[Tensor, "R H"]]:
        """Attention of every row over its prompt: the k samples of a prompt, and heads of a group, side by side."""
        p, k, (_, H, d) = len(self.lengths_p), self.k, q_RHd.shape
        keys, values = (x[:p, :, : self.hidden.shape[-1]] for x in self.prefix[number])
        G = keys.shape[1]
        q = q_RHd
        # As many rows as slots are no proof of that order: prompts may be gone, and the rest whole but moved about.
        if not self.whole:
            q = torch.zeros(p * k, H, d, dtype=q.dtype, device=q.device).index_copy_(0, self.slot_R, q)
        q = q.view(p, k, G, H // G, d).transpose(1, 2).reshape(p, G, -1, d)
        o, lse = _attention(q, keys, values, self.hidden, self.layers[number].scale)
        o = o.view(p, G, k, -1, d).transpose(1, 2).reshape(p * k, H, d)
        lse = lse.view(p, G, k, -1).transpose(1, 2).reshape(p * k, H)
        return (o, lse) if self.whole else (o[self.slot_R], lse[self.slot_R])

    def _run(self, x_ND: Tensor, position_N: Tensor, attend: Attend) -> Float[Tensor, "N D"]:
        """The layers; `attend` is given a layer's number, queries (N, H, d), keys and values (N, G, d)."""
        x = x_ND.float()
        cos, sin = self._rotary(position_N) if self.tables is None else (t[position_N] for t in self.tables)
        for number, layer in enumerate(self.layers):
            h = rms_norm(x, *layer.norm)
            q, k, v = (F.linear(h, *w).view(len(x), -1, layer.head_dim) for w in (layer.q, layer.k, layer.v))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            q, k = (rotate(z, cos, sin).to(v.dtype) for z in (q, k))
            o = attend(number, q, k, v).reshape(len(x), -1)
            x = x + F.linear(o, *layer.o)
            h = rms_norm(x, *layer.mlp_norm)
            x = x + F.linear(swiglu(F.linear(h, *layer.gate), F.linear(h, *layer.up)), *layer.down)
        return x

    def _rotary(self, position_N: Int[Tensor, "N"]) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]]:
        """Cosines and sines of these positions."""
        as_float32 = torch.empty(0, device=self.device)
        cos, sin = self.trunk.rotary_emb(as_float32, position_N[None])
        return cos[0], sin[0]

    def _logits(self, x_RD: Tensor) -> Float[Tensor, "R V"]:
        return F.linear(rms_norm(x_RD, *self.norm), *self.head).float()

    def _hide_padding(self) -> None:
        """(p, 1, 1, P): minus infinity behind a prompt's end; P is the longest prompt still there."""
        place = torch.arange(int(self.lengths_p.max()), device=self.device)
        hidden = torch.zeros(len(self.lengths_p), len(place), dtype=self.dtype, device=self.device)
        self.hidden = hidden.masked_fill_(place >= self.lengths_p[:, None], -torch.inf)[:, None, None]

    def _cache(self, n: int, length: int, layer: _Layer, *, zero: bool = False) -> Tensor:
        make = torch.zeros if zero else torch.empty
        return make(n, layer.groups, length, layer.head_dim, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a Llama-like layer computes with, in the dtype of its products."""

    norm: Norm
    q: Weights
    k: Weights
    v: Weights
    o: Weights
    mlp_norm: Norm
    gate: Weights
    up: Weights
    down: Weights
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    head_dim: int
    scale: float

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return len(self.k[0]) // self.head_dim

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> _Layer:
        attention = layer.self_attn
        q, k, v, o, gate, up, down = (_weights(m, dtype) for m in _linears(layer))
        return cls(
            norm=_norm(layer.input_layernorm, dtype),
            q=q,
            k=k,
            v=v,
            o=o,
            mlp_norm=_norm(layer.post_attention_layernorm, dtype),
            gate=gate,
            up=up,
            down=down,
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
            head_dim=attention.head_dim,
            scale=attention.scaling,
        )


def _linears(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    found = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*found, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_linear(module: Any) -> bool:
    """A plain linear layer, or one with LoRA adapters (which are added to the weight)."""
    return type(module) is nn.Linear or (hasattr(module, "lora_A") and type(module.base_layer) is nn.Linear)


def _weights(module: Any, dtype: torch.dtype) -> Weights:
    """Weight and bias; in float32 the model's own tensors, no copies."""
    base = getattr(module, "base_layer", module)
    weight, bias = base.weight.detach(), base.bias
    if base is not module and not module.disable_adapters:
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter).detach()
    return weight.to(dtype), None if bias is None else bias.detach().to(dtype)


def _norm(norm: Any, dtype: torch.dtype) -> Norm:
    return norm.weight.detach(), norm.variance_epsilon, dtype


def _attention(
    q: Float[Tensor, "n G Q d"],
    k: Float[Tensor, "n G S d"],
    v: Float[Tensor, "n G S d"],
    hidden: Float[Tensor, "n 1 1 S"] | None,
    scale: float,
) -> tuple[Float[Tensor, "n G Q d"], Float[Tensor, "n G Q"]]:
    """softmax(scale q k' + hidden) v, and the log of the sum of exponentials (float32)."""
    if q.device.type == "cpu":
        mask = None if hidden is None else hidden.expand(-1, 1, q.shape[2], -1)
        out: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
        return out
    scores = (q @ k.transpose(2, 3)).float() * scale
    if hidden is not None:
        scores = scores + hidden
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse[..., None]).to(v.dtype) @ v, lse


def _fill_holes(keep_n: Bool[Tensor, "n"], caches: Sequence[Tensor]) -> Int[Tensor, "m"]:
    """Move what must stay into the first m places, as little of it as possible; which old place each new one is."""
    m = int(keep_n.sum())
    order = torch.arange(m, device=keep_n.device)
    holes, movers = (~keep_n[:m]).nonzero()[:, 0], keep_n[m:].nonzero()[:, 0] + m
    order[holes] = movers
    if len(holes):
        for cache in caches:
            cache[holes] = cache[movers]
    return order


def _chunks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive prompts of at most `_AT_ONCE` tokens together, padding included; (first, behind the last)."""
    chunks: list[tuple[int, int]] = []
    first = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or max(lengths[first : i + 1]) * (i + 1 - first) > _AT_ONCE:
            chunks.append((first, i))
            first = i
    return chunks
