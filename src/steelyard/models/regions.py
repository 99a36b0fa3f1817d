"""The pointwise parts of a Llama-like layer, each one pass over memory when compiled.

Between the matrix products a layer does little arithmetic but, step by step, reads and writes its states many times.
`torch.compile` turns each function here into one loop and so does its gradient. That needs a C++ compiler and takes
some seconds, so it is asked for (`compiled`) where a run is long enough to earn it; the plain functions give the same
numbers up to rounding.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steelyard.errors import InputError


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x + y, its RMS norm in `dtype`): Zhang and Sennrich 2019, arXiv 1910.07467."""
    x = x + y
    return x, norm(x, weight, eps, dtype)


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight, computed in float32."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


def rotate(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama; computed in float32."""
    half = x_THd.shape[-1] // 2
    a, b = x_THd.float().split(half, -1)
    cos, sin = cos_Td[:, None, :half], sin_Td[:, None, :half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_THd.dtype)


def softmax_gradient(
    scores: Tensor, dp: Tensor, lse: Tensor, delta: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(probabilities, gradient of the products q k'), in the dtype of `scores`; zero where not `visible`.

    p = exp(scale s - lse), ds = scale p (dp - delta) with delta = sum_d(gradient * output) (arXiv 2205.14135).
    """
    p = torch.where(visible, torch.exp(scores.float() * scale - lse), 0.0)
    ds = p * (dp.float() - delta) * scale
    return p.to(scores.dtype), ds.to(scores.dtype)


class Regions:
    """The functions above, compiled or not."""

    def __init__(self, wrap: Callable[[Any], Any] = lambda f: f) -> None:
        self.add_norm = wrap(add_norm)
        self.norm = wrap(norm)
        self.swiglu = wrap(swiglu)
        self.rotate = wrap(rotate)
        self.softmax_gradient = wrap(softmax_gradient)


PLAIN = Regions()


@functools.cache
def compiled() -> Regions:
    """Compiled regions, one set a process. Raises InputError where there is no C++ compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError("compile: needs a C++ compiler (g++ or clang++), and none was found; install one, or leave it")
    return Regions(functools.partial(torch.compile, dynamic=True, fullgraph=True))
