"""Cheap ensemble members: linear reward heads on one cached pass of a frozen trunk.

The trunk reads every distinct response once. Of several layers two features are kept for each: the state at its last
token and the mean over its tokens. A member is a Bradley-Terry model that is linear in them, fitted to the
optimum (a convex problem, so members differ by the pairs they see, not by their seed's luck): in-sample members
see a bootstrap of the prompts, out-of-fold members see the folds they do not score. A pair's `weight` and `flip_prob`
count as in the training of whole models; its `margin` does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression

from steelyard.data.collate import TreeBatch, collate
from steelyard.data.distinct import batches, distinct
from steelyard.data.encode import Tree
from steelyard.data.split import ranks
from steelyard.models.cache import lock
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import run_trunk
from steelyard.progress import Progress
from steelyard.types import Preference

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # candidates for the inverse L2 penalty C


def layer_choice(depth: int, count: int) -> list[int]:
    """`count` layers spread over the upper half of a trunk of `depth` layers, the last one included (1-based)."""
    return sorted({round(x) for x in np.linspace(depth / 2, depth, count)})


@torch.no_grad()
def features(
    model: RewardModel,
    trees: Sequence[Tree],
    layers: Sequence[int],
    path: Path,
    *,
    pad_id: int,
    max_tokens: int,
    quiet: bool = False,
) -> Float[np.ndarray, "N 2 F"]:
    """Features of chosen and rejected, written to `path` as they are computed and read back as a memory map.

    Of several processes that want the same file one computes it, and the others wait: it lies beside their run folders,
    whose locks do not cover it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(f".{path.stem}.lock"), wait=True):
            if not path.exists():
                _compute(model, trees, layers, path, pad_id=pad_id, max_tokens=max_tokens, quiet=quiet)
    return np.load(path, mmap_mode="r")


def _compute(
    model: RewardModel, trees: Sequence[Tree], layers: Sequence[int], path: Path, *, pad_id: int, max_tokens: int,
    quiet: bool,
) -> None:  # fmt: skip
    width = model.head.weight.shape[1]
    # A name of its own, too: on file systems without locks two may still compute at once.
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.tmp")
    shape = (len(trees), 2, 2 * len(layers) * width)
    out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
    depth = model.hf.config.get_text_config().num_hidden_layers
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    for i, tree in enumerate(trees):
        for side, response in enumerate(tree.responses):
            places.setdefault((tree.prompt, response), []).append((i, side))
    groups = batches(distinct(trees, max_tokens), max_tokens)
    with Progress(len(groups), "features", quiet=quiet or None) as progress:
        for step, group in enumerate(groups, 1):
            batch = collate(group, pad_id, model.device)
            output = run_trunk(model.trunk, batch, model.precision, collect=layers)
            states = output.collected | {depth: output.states_TD}  # the last layer's behind the final norm
            pooled_BKF = torch.cat([_pool(states[layer].float(), batch) for layer in layers], -1).cpu().numpy()
            for tree, row_KF in zip(group, pooled_BKF, strict=True):
                for response, own_F in zip(tree.responses, row_KF, strict=True):
                    at = places[tree.prompt, response]
                    out[[i for i, _ in at], [side for _, side in at]] = own_F
            progress.update(step, tokens=batch.tokens)
    out.flush()
    os.replace(temporary, path)


def _pool(states_TD: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """(B, K, 2D): the state at the last token, and the mean over the response's tokens."""
    mask = batch.mask_BKR[..., None].float()
    return torch.cat([states_TD[batch.last_BK], (states_TD[batch.at_BKR] * mask).sum(2) / mask.sum(2)], -1)


class Probes:
    """Bradley-Terry models linear in the features' differences (of `index`ed rows), all on one common scale.

    With `pairs`, one to a row, each counts by its `weight` and `flip_prob`; without, all count alike.
    """

    def __init__(self, features_N2F: Float[np.ndarray, "N 2 F"], pairs: Sequence[Preference] | None = None) -> None:
        self.features = features_N2F
        self.differences = np.asarray(features_N2F[:, 0] - features_N2F[:, 1])
        # No centring: swapping a pair must turn the sign of its difference and nothing else.
        self.scale = np.sqrt((self.differences.astype(np.float64) ** 2).mean(0) + 1e-12).astype(np.float32)
        self.differences /= self.scale
        parts = [(1.0, 0.0)] * len(features_N2F) if pairs is None else [(p.weight, p.flip_prob) for p in pairs]
        weight, flip_prob = np.array(parts).T
        # What the label as observed weighs, and its reverse.
        self.weight_N2 = np.stack([weight * (1 - flip_prob), weight * flip_prob], 1)
        self.alike = bool((self.weight_N2 == (1, 0)).all())

    def fit(self, rows: Sequence[int] | np.ndarray, C: float, seed: int) -> Float[np.ndarray, "F"]:
        """Weights under which the observed labels are most likely, with an L2 penalty |w|^2 / (2 C) on the summed loss.

        A pair of weight 2 counts as two pairs, and one whose label is wrong by chance a as 1 - a of it and a of its
        reverse.
        """
        # The classifier wants two classes: half of the pairs, drawn by the seed, are shown swapped.
        sign = np.where(np.random.default_rng(seed).random(len(rows)) < 0.5, 1.0, -1.0).astype(np.float32)
        sign[:2] = (1.0, -1.0)[: len(rows)]
        shown = self.differences[rows] * sign[:, None]
        weight: Float[np.ndarray, "n"] | None = None
        if len(rows) == 1 or not self.alike:
            own, reverse = self.weight_N2[rows].T
            if not (own.any() or reverse.any()):
                return np.zeros_like(self.scale)
            # A single pair has but one class: its reverse, of whatever weight, is the other.
            both = np.flatnonzero((reverse > 0) | (len(rows) == 1))
            shown, sign = np.concatenate([shown, shown[both]]), np.concatenate([sign, -sign[both]])
            weight = np.concatenate([own, reverse[both]])
        model = LogisticRegression(C=C, fit_intercept=False, tol=1e-3, max_iter=300)
        model.fit(shown, sign, sample_weight=weight)
        return model.coef_[0].astype(np.float32)

    def loss(self, weights: Float[np.ndarray, "F"], rows: Sequence[int] | np.ndarray) -> float:
        """Mean negative log-likelihood of the observed labels, in nats, by the pairs' weights (not all 0)."""
        margin = (self.differences[rows] @ weights).astype(np.float64)
        if self.alike:
            return float(np.logaddexp(0.0, -margin).mean())
        losses = np.stack([np.logaddexp(0.0, -margin), np.logaddexp(0.0, margin)], 1)
        return float(np.average(losses, weights=self.weight_N2[rows]))

    def scores(self, weights: Float[np.ndarray, "F"], rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "N 2"]:
        """Rewards of chosen and rejected."""
        return np.asarray(self.features[rows]) @ (weights / self.scale)

    def choose_penalty(self, held_out_N: Bool[np.ndarray, "N"], seed: int) -> float:
        """The C whose fit on the other pairs gives the held-out *observed* labels the lowest loss; no truth is used."""
        inside, outside = np.flatnonzero(~held_out_N), np.flatnonzero(held_out_N)
        losses = [self.loss(self.fit(inside, C, seed), outside) for C in STRENGTHS]
        return STRENGTHS[int(np.argmin(losses))]


def bootstrap_rows(prompt_keys: Sequence[str], seed: int) -> np.ndarray:
    """Rows of as many prompts as there are, drawn with replacement: pairs of a prompt stay together.

    Of a single prompt pairs are drawn: all draws would be the same otherwise.
    """
    place = ranks(prompt_keys)
    if not place.any():
        place = np.arange(len(place))
    n = int(place.max()) + 1
    drawn = np.bincount(np.random.default_rng(seed).integers(0, n, n), minlength=n)
    return np.repeat(np.arange(len(place)), drawn[place])
