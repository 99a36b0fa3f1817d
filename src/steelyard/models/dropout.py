"""Dropout for models that have none, from a generator of its own (Secrets of RLHF II, section 3.1).

Llama-like models are built without dropout, so two forward passes are one and the same. Contrastive learning needs two
that differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from steelyard.errors import InputError

_ATTENTION = ("self_attn", "attention", "attn")
_MLP = ("mlp", "feed_forward", "ffn")


@contextmanager
def dropout(trunk: nn.Module, rate: float, seed: int) -> Iterator[None]:
    """Inside, the output of every layer's attention and MLP is dropped out before it joins the residual stream.

        output * mask / (1 - rate),    each entry of mask 0 with probability rate, else 1

    The masks follow from `seed` and the order of the forward passes alone, and touch no other random state: the same
    pass with the same seed repeats its numbers, which is what lets a run be resumed and a pass be done again. Outside
    nothing is left: no module, no weight, no setting of the model is changed.

    Args:
        trunk: a decoder with a list `layers`.
        rate: share of entries dropped, in [0, 1).
        seed: of the masks, 0 <= seed < 2^64.

    Raises:
        InputError: the model's layers have no attention or MLP of a known name.
    """
    generator = torch.Generator(next(trunk.parameters()).device).manual_seed(seed)

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        mask = x.new_empty(x.shape).bernoulli_(1 - rate, generator=generator)
        dropped = x * mask / (1 - rate)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    hooks = [module.register_forward_hook(drop) for module in branches(trunk)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def branches(trunk: nn.Module) -> list[nn.Module]:
    """Attention and MLP of every layer. Raises InputError if a layer has none of a known name."""
    layers: Any = getattr(trunk, "layers", ())
    found = []
    for layer in layers:
        for names in (_ATTENTION, _MLP):
            module = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
            if module is None:
                raise InputError(
                    f"{type(trunk).__name__}: dropout needs layers with one of {', '.join(names)}, got "
                    f"{', '.join(name for name, _ in layer.named_children())}; contrastive learning works with Llama, "
                    "Qwen and GPT-NeoX style models"
                )
            found.append(module)
    if not found:
        raise InputError(f"{type(trunk).__name__}: dropout needs a model with a list of layers; it has none")
    return found
