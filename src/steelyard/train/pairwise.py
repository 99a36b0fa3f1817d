"""What training on preferences has in common: reading pairs, their losses, and layers that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steelyard.data.collate import pack
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.errors import InputError
from steelyard.group import Group
from steelyard.losses.preference import bradley_terry
from steelyard.models.reward import RewardModel
from steelyard.types import Preference


def read_pairs(
    path: str,
    encoder: Encoder,
    rows: Sequence[int] | None = None,
    *,
    on_invalid: OnInvalid = "error",
    say: Callable[[str], object] | None = None,
) -> tuple[list[Preference], list[Tree]]:
    """Usable pairs and their trees; `say` is told what was found in the file. Raises InputError if none is left."""
    loaded = load_preferences(path, on_invalid=on_invalid)
    pairs = loaded.preferences
    if rows is not None:
        pairs = [pairs[i] for i in rows]
    encoded = encoder.encode(pairs)
    if not encoded.trees:
        why = loaded.left_out(encoded.text()) or "none of its rows was asked for"
        raise InputError(f"{path}: no usable pair is left to train or examine on ({why})")
    if say is not None:
        say("\n".join(filter(None, [loaded.report.text(), encoded.text()])))
    return [pairs[i] for i in encoded.index], encoded.trees


def require_weight(path: str, pairs: Sequence[Preference]) -> None:
    """Raise InputError if all pairs have weight 0."""
    if not any(p.weight for p in pairs):
        raise InputError(
            f"{path}: all {len(pairs)} usable pairs have weight 0, so nothing would be learned; give some a `weight` "
            "above 0"
        )


def pair_losses(rewards: Float[Tensor, "n 2"], pairs: Sequence[Preference], margin_in_flip: bool) -> Float[Tensor, "n"]:
    """Each pair's loss with its own margin and probability of a wrong label, not weighted."""
    return bradley_terry(
        rewards[:, 0],
        rewards[:, 1],
        margin=torch.tensor([p.margin for p in pairs], device=rewards.device),
        flip_prob=torch.tensor([p.flip_prob for p in pairs], device=rewards.device),
        margin_in_flip=margin_in_flip,
    )


def shared_out(trees: Sequence[Tree], max_tokens: int, group: Group) -> list[list[int]]:
    """Micro-batches of at most `max_tokens` tokens, as indices, of the trees that this process computes."""
    # By falling length in turn, so that no process gets all the long ones.
    mine = group.share(sorted(range(len(trees)), key=lambda i: (-len(trees[i]), i)))
    return [[mine[i] for i in micro] for micro in pack([len(trees[i]) for i in mine], max_tokens)]


def freeze_below(model: RewardModel, trainable_layers: int | None) -> None:
    """Leave only the top layers, the final norm and the head trainable. Raises InputError if there are fewer."""
    if trainable_layers is None:
        return
    layers = model.layers
    if trainable_layers > len(layers):
        raise InputError(f"trainable_layers must be at most the model's {len(layers)} layers, got {trainable_layers}")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for layer in layers[len(layers) - trainable_layers :]:
        layer.requires_grad_(True)
    norm = getattr(model.trunk, "norm", None) or getattr(model.trunk, "final_layer_norm", None)
    if norm is not None and trainable_layers > 0:
        norm.requires_grad_(True)
