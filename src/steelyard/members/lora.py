"""`lora` members: low-rank adapters and a head over one frozen trunk (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.members.config import LoraConfig, StrengthConfig
from steelyard.models import lora as adapters
from steelyard.models.reward import RewardModel
from steelyard.train.optim import batches, set_rate, take_step, total_steps
from steelyard.train.pairwise import read_pairs, require_weight
from steelyard.train.reward import RewardConfig, reward_step


def require_peft() -> None:
    """Raise InputError if the package peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError(
            "backend = lora needs the package peft, which is not installed: pip install 'steelyard[lora]', or use the "
            "backend head or layers"
        ) from None


def adapt(model: RewardModel, config: LoraConfig, seed: int) -> None:
    """Freeze the trunk and put adapters into it, in place; they begin as no change at all (B = 0, A from the seed).

    Raises InputError if the model has no projection of a name in `targets`, or peft is not installed.
    """
    require_peft()
    settings = adapters.LoraConfig(rank=config.rank, alpha=config.alpha, targets=config.targets or ())
    adapters.add_adapters(model.trunk, settings, seed=seed)


def lora_member(
    config: StrengthConfig, m: int, train: list[int] | None, judged: list[Tree], pad_id: int, out: Path
) -> Float[np.ndarray, "n 2"]:
    """Train member m on the pairs `train` (None: all), and score. One that was interrupted begins anew."""
    seed = config.seed + m
    encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
    model = RewardModel.from_language_model(
        config.model, pad_id=pad_id, seed=seed, precision=config.precision, device=config.device
    )
    adapt(model, config.lora, seed)
    pairs, trees = read_pairs(config.data, encoder, train, on_invalid=config.on_invalid)
    require_weight(config.data, pairs)
    settings = RewardConfig(data=config.data, model=config.model, max_tokens=config.max_tokens)
    member = config.member
    optim = member.optim.model_copy(update={"lr": config.lora.lr})
    optimizer = optim.build(model.parameters())
    steps = total_steps(len(trees), member.batch_size, member.epochs)
    for step, chosen in enumerate(batches(len(trees), member.batch_size, seed, 0, steps)):
        set_rate(optimizer, optim.rate(step, steps))
        reward_step(model, [pairs[i] for i in chosen], [trees[i] for i in chosen], encoder, settings)
        take_step(optimizer, optim, step + 1, of="member", remedy="Lower lora.lr")
    return model.score(judged, pad_id=pad_id, max_tokens=config.max_tokens)
