"""`full` and `layers` members: reward models trained as `train reward` does, with a head and an order of their own.

`layers` members train the top layers. Everything below is frozen and alike in all members, so its outputs are
computed once for the data set and read by every member, of both scorings.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from steelyard.data.encode import Tree
from steelyard.members.config import StrengthConfig
from steelyard.models.reward import RewardModel
from steelyard.train.reward import RewardConfig, open_cache, train_reward


def reward_config(config: StrengthConfig, m: int, *, cache: Path) -> RewardConfig:
    """The settings of member m; `cache` is where frozen layers' outputs are kept unless the settings say."""
    kept: dict[str, Any] = {}
    if config.backend == "layers":
        kept = {
            "activation_cache": config.activation_cache or str(cache),
            "activation_precision": config.activation_precision,
        }
    return RewardConfig(
        data=config.data,
        model=config.model,
        epochs=config.member.epochs,
        batch_size=config.member.batch_size,
        optim=config.member.optim,
        trainable_layers=config.trainable_layers,
        max_length=config.max_length,
        on_overlong=config.on_overlong,
        on_invalid=config.on_invalid,
        max_tokens=config.max_tokens,
        precision=config.precision,
        device=config.device,
        seed=config.seed + m,
        **kept,
    )


def trained_member(
    config: StrengthConfig, m: int, train: list[int] | None, judged: list[Tree], pad_id: int, out: Path
) -> Float[np.ndarray, "n 2"]:
    """Train member m on the pairs `train` (None: all) in the folder `out`, and score; goes on where one stopped."""
    settings = reward_config(config, m, cache=out.parents[2] / "activations")
    train_reward(settings, out, resume=out.exists(), quiet=True, rows=train, normal=config.keep_members)
    model = RewardModel.load(out / "model", precision=config.precision, device=config.device)
    scorer = open_cache(settings, model, judged) or model
    scores = scorer.score(judged, pad_id=pad_id, max_tokens=config.max_tokens)
    if not config.keep_members:
        shutil.rmtree(out)
    return scores
