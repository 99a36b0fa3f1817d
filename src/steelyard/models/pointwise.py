"""The pointwise parts of a Llama-like layer, with gradients written out.

Between its matrix products a layer does little arithmetic but reads and writes its states many times. Written out, a
gradient needs fewer passes over memory than one assembled operation by operation, and keeps less for the way back.
Without gradients the same arithmetic runs directly: a small model's sampling would spend its time in autograd's calls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x_TD: Float[Tensor, "T D"], weight_D: Float[Tensor, "D"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "T D"]:
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32, given in `dtype` (arXiv 1910.07467)."""
    if not torch.is_grad_enabled():
        return _normed(x_TD, weight_D, eps)[0].to(dtype)
    y: Tensor = _RMSNorm.apply(x_TD, weight_D, eps, dtype)
    return y


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps)
    return (x * inverse).mul_(weight), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        g = gradients[0].float()
        dx = dw = None
        gx = g * x
        if ctx.needs_input_grad[1]:
            dw = (inverse.t() @ gx)[0]
        if ctx.needs_input_grad[0]:
            # d/dx of x r w with r = (mean(x^2) + eps)^(-1/2): r (g w) - x r^3 sum(g w x) / D
            shrink = (gx @ weight)[:, None] * inverse**3 / x.shape[-1]
            dx = (g * weight).mul_(inverse).addcmul_(x, shrink, value=-1)
        return dx, dw, None, None


def swiglu(gate: Float[Tensor, "T F"], up: Float[Tensor, "T F"]) -> Float[Tensor, "T F"]:
    """silu(gate) * up (arXiv 2002.05202)."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g,) = gradients
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


def rotate(
    x_THd: Float[Tensor, "T H d"], cos_Td: Float[Tensor, "T d"], sin_Td: Float[Tensor, "T d"]
) -> Float[Tensor, "T H d"]:
    """Rotary positions, halves paired as in Llama (arXiv 2104.09864); computed in float32."""
    cos, sin = cos_Td[:, None], sin_Td[:, None]
    if not torch.is_grad_enabled():
        return _turn(x_THd, cos, sin)
    y: Tensor = _Rotate.apply(x_THd, cos, sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, -sin), None, None  # a rotation's transpose turns back


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    y = wide * cos
    half = x.shape[-1] // 2
    y[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return y.to(x.dtype)
