"""Contrastive learning beside the reward-model loss (Secrets of RLHF II, section 3.1): settings and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from steelyard.config import Config
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Encoder, Tree
from steelyard.losses.contrastive import differences, simcse, swav, unit
from steelyard.losses.contrastive import pairs as both_features
from steelyard.models.dropout import dropout
from steelyard.models.reward import RewardModel
from steelyard.train.pairwise import pair_losses
from steelyard.types import Preference

if TYPE_CHECKING:
    from steelyard.train.reward import RewardConfig


class ContrastiveConfig(Config):
    """Contrastive learning beside the reward-model loss, on two views of every pair made by dropout."""

    method: Literal["simcse", "swav"] | None = Field(None, description="contrastive loss; none given: plain training")
    features: Literal["pairs", "differences"] = Field(
        "pairs", description="contrast the responses' features, or the differences of chosen and rejected"
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="weight of the contrastive term; 0 is the control: same dropout, same doubled forward. None given: "
        "the paper's, 1 for simcse, 0.1 for swav on pairs, 0.5 for swav on differences",
    )
    temperature: float | None = Field(
        None, gt=0, description="tau; the paper does not say; none given: 0.05 for simcse, 0.1 for swav"
    )
    dropout: float = Field(0.05, gt=0, lt=1, description="share of each layer's outputs dropped, in training alone")
    prototypes: int | None = Field(
        None, ge=2, description="clusters (swav only); none given: the paper's, 50 on pairs, 20 on differences"
    )
    epsilon: float = Field(0.05, gt=0, description="softness of the cluster assignments (swav only)")
    iterations: int = Field(3, ge=1, description="Sinkhorn-Knopp iterations (swav only)")

    @model_validator(mode="after")
    def _refuse_idle_options(self) -> ContrastiveConfig:
        swav_only = {"prototypes", "epsilon", "iterations"}
        idle = {None: set(type(self).model_fields) - {"method"}, "simcse": swav_only, "swav": set()}[self.method]
        if given := idle & self.given():
            needs = "a method (simcse or swav)" if self.method is None else "method = swav"
            raise ValueError(f"{', '.join(sorted(given))}: no effect without {needs}; leave out, or choose it")
        return self

    def numbers(self) -> dict[str, float]:
        """beta, temperature and (swav) prototypes as they are used: given, or the paper's."""
        paper = {("swav", "pairs"): (0.1, 50), ("swav", "differences"): (0.5, 20)}
        beta, prototypes = paper.get((str(self.method), self.features), (1.0, 0))
        temperature = 0.1 if self.method == "swav" else 0.05
        used: dict[str, float] = {
            "beta": beta if self.beta is None else self.beta,
            "temperature": temperature if self.temperature is None else self.temperature,
        }
        if self.method == "swav":
            used["prototypes"] = prototypes if self.prototypes is None else self.prototypes
        return used


def contrastive_step(
    model: RewardModel,
    pairs: Sequence[Preference],
    trees: Sequence[Tree],
    encoder: Encoder,
    config: RewardConfig,
    *,
    step: int,
    prototypes: nn.Parameter | None,
) -> Float[Tensor, "B 5"]:
    """Accumulate the gradient of L_rm + beta L_cl over two dropout views of the batch (Secrets of RLHF II, 3.1).

    L_rm is the weighted mean of the pairs' losses over both views, L_cl that of the contrastive losses. Negatives span
    the batch, whatever the grouping into micro-batches: where both views do not fit into `max_tokens` at once, all
    features are computed first without a graph, then L_cl's gradient at each feature is carried through a second pass
    with the same masks (GradCache, arXiv 2101.06983). That is exact; the grouping changes only which masks are drawn.

    Returns, per pair: loss, weight, r(chosen), r(rejected), contrastive loss; means over the views, and over the
    pair's two features; on the CPU.
    """
    weights = torch.tensor([p.weight for p in pairs], device=model.device)
    total = weights.sum()
    seen = torch.zeros(len(pairs), 5, device=model.device)
    if total == 0:
        return seen.cpu()
    seen[:, 1] = weights
    groups = pack([len(t) for t in trees], config.max_tokens)

    def view(micro: int, v: int) -> Float[Tensor, "n 2 D"]:
        batch = collate([trees[i] for i in groups[micro]], encoder.pad_id, model.device)
        with dropout(model.trunk, config.contrastive.dropout, stream(config.seed, step, micro, v)):
            return model.features(batch)

    jobs = [(micro, v) for micro in range(len(groups)) for v in (0, 1)]
    at_once = 2 * len(trees) * max(map(len, trees)) <= config.max_tokens
    with torch.set_grad_enabled(at_once):
        first = [view(*job) for job in jobs]
    cached = first[0].new_zeros(2, len(pairs), *first[0].shape[1:])
    for (micro, v), features in zip(jobs, first, strict=True):
        cached[v, groups[micro]] = features.detach()
    contrast = contrastive_losses(cached.requires_grad_(), weights, prototypes, config.contrastive)
    beta = config.contrastive.numbers()["beta"]
    (beta * (contrast * weights).sum() / total).backward()
    assert cached.grad is not None
    seen[:, 4] = contrast.detach()
    for (micro, v), kept in zip(jobs, first, strict=True):
        group = groups[micro]
        features = kept if at_once else view(micro, v)
        rewards = model.head(features).squeeze(-1)
        loss = pair_losses(rewards, [pairs[i] for i in group], config.margin_in_flip)
        objective = (loss * weights[group]).sum() / (2 * total)
        (objective + (features * cached.grad[v, group]).sum()).backward()
        seen[group, 0] += loss.detach() / 2
        seen[group, 2:4] += rewards.detach() / 2
    return seen.cpu()


def contrastive_losses(
    features_VBKD: Float[Tensor, "2 B 2 D"],
    weights_B: Float[Tensor, "B"],
    prototypes: Tensor | None,
    config: ContrastiveConfig,
) -> Float[Tensor, "B"]:
    """Each pair's contrastive loss, the mean of its two features'; pairs without weight take no part and get 0."""
    used = weights_B > 0
    build = both_features if config.features == "pairs" else differences
    s, t = (build(view[used, 0], view[used, 1]) for view in features_VBKD)
    temperature = config.numbers()["temperature"]
    if prototypes is None:
        losses = simcse(s, t, temperature=temperature)
    else:
        epsilon, iterations = config.epsilon, config.iterations
        losses = swav(t, s, prototypes, temperature=temperature, epsilon=epsilon, iterations=iterations)
    per_pair = losses.view(2, -1).mean(0)
    return per_pair.new_zeros(len(used)).masked_scatter(used, per_pair)


def new_prototypes(config: RewardConfig, width: int, device: torch.device | str = "cpu") -> nn.Parameter | None:
    """SwAV's K prototypes, random directions from the seed; None for other methods. They are not part of the model."""
    if config.contrastive.method != "swav":
        return None
    generator = torch.Generator().manual_seed(stream(config.seed))
    K = int(config.contrastive.numbers()["prototypes"])
    return nn.Parameter(unit(torch.randn(K, width, generator=generator)).to(device))


def stream(seed: int, *numbers: int) -> int:
    """A seed of its own for each tuple of numbers: with nothing else to remember, a resumed run draws the same."""
    return int(np.random.SeedSequence((seed, len(numbers), *numbers)).generate_state(1, np.uint64)[0])
