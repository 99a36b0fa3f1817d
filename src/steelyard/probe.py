"""Cheap ensemble members: linear reward heads on one cached pass of a frozen trunk.

The trunk reads every distinct response once. Of several layers two features are kept for each: the state at its last
token and the mean over its tokens. A member is a Bradley-Terry model that is linear in them, fitted to the
optimum (a convex problem, so members differ by the pairs they see, not by their seed's luck): in-sample members
see a bootstrap of the prompts, out-of-fold members see the folds they do not score.
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
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import run_trunk
from steelyard.progress import Progress

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
    """Features of chosen and rejected, written to `path` as they are computed and read back as a memory map."""
    if path.exists():
        return np.load(path, mmap_mode="r")
    width = model.head.weight.shape[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
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
    return np.load(path, mmap_mode="r")


def _pool(states_TD: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """(B, K, 2D): the state at the last token, and the mean over the response's tokens."""
    mask = batch.mask_BKR[..., None].float()
    return torch.cat([states_TD[batch.last_BK], (states_TD[batch.at_BKR] * mask).sum(2) / mask.sum(2)], -1)


class Probes:
    """Bradley-Terry models linear in the features' differences (of `index`ed rows), all on one common scale."""

    def __init__(self, features_N2F: Float[np.ndarray, "N 2 F"]) -> None:
        self.features = features_N2F
        self.differences = np.asarray(features_N2F[:, 0] - features_N2F[:, 1])
        # No centring: swapping a pair must turn the sign of its difference and nothing else.
        self.scale = np.sqrt((self.differences.astype(np.float64) ** 2).mean(0) + 1e-12).astype(np.float32)
        self.differences /= self.scale

    def fit(self, rows: Sequence[int] | np.ndarray, C: float, seed: int) -> Float[np.ndarray, "F"]:
        """Weights under which the observed labels are most likely, with an L2 penalty 1 / C per pair."""
        # The classifier wants two classes: half of the pairs, drawn by the seed, are shown swapped.
        sign = np.where(np.random.default_rng(seed).random(len(rows)) < 0.5, 1.0, -1.0).astype(np.float32)
        sign[:2] = (1.0, -1.0)
        model = LogisticRegression(C=C, fit_intercept=False, tol=1e-3, max_iter=300)
        model.fit(self.differences[rows] * sign[:, None], sign)
        return model.coef_[0].astype(np.float32)

    def loss(self, weights: Float[np.ndarray, "F"], rows: Sequence[int] | np.ndarray) -> float:
        """Mean negative log-likelihood of the observed labels, in nats."""
        return float(np.logaddexp(0.0, -(self.differences[rows] @ weights).astype(np.float64)).mean())

    def scores(self, weights: Float[np.ndarray, "F"], rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "N 2"]:
        """Rewards of chosen and rejected."""
        return np.asarray(self.features[rows]) @ (weights / self.scale)

    def choose_penalty(self, held_out_N: Bool[np.ndarray, "N"], seed: int) -> float:
        """The C whose fit on the other pairs gives the held-out *observed* labels the lowest loss; no truth is used."""
        inside, outside = np.flatnonzero(~held_out_N), np.flatnonzero(held_out_N)
        losses = [self.loss(self.fit(inside, C, seed), outside) for C in STRENGTHS]
        return STRENGTHS[int(np.argmin(losses))]


def bootstrap_rows(prompt_keys: Sequence[str], seed: int) -> np.ndarray:
    """Rows of as many prompts as there are, drawn with replacement: pairs of a prompt stay together."""
    place = np.unique(np.asarray(prompt_keys), return_inverse=True)[1]
    n = int(place.max()) + 1
    drawn = np.bincount(np.random.default_rng(seed).integers(0, n, n), minlength=n)
    return np.repeat(np.arange(len(place)), drawn[place])
