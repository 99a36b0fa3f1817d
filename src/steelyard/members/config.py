"""What kind of members vote, on what, and how they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool
from pydantic import Field

from steelyard.config import Config, Device
from steelyard.data.encode import OnOverlong
from steelyard.data.load import OnInvalid
from steelyard.errors import InputError
from steelyard.models.trunk import Precision, Stored
from steelyard.strength import ActionRule, out_of_fold_plan
from steelyard.train.optim import OptimConfig

Scoring = Literal["in-sample", "out-of-fold"]
Backend = Literal["full", "lora", "layers", "head"]

TOP_LAYERS = 2  # trained by `layers` members unless told otherwise


class MemberConfig(Config):
    """How full, lora and layers members are trained."""

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(32, ge=1, description="pairs a step")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=5e-6), description="optimiser; lora members have lora.lr for its rate"
    )
    trainable_layers: int | None = Field(
        None, ge=0, description=f"train only this many top layers; none given: all, with layers members {TOP_LAYERS}"
    )


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on one frozen trunk."""

    rank: int = Field(16, ge=1, description="r of the adapters")
    alpha: float = Field(32.0, gt=0, description="adapters are scaled by alpha / rank")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of the projections that get one; none given: every linear projection"
    )
    lr: float = Field(2e-4, gt=0, le=1, description="peak rate; adapters want far larger ones than whole models")


class StrengthConfig(Config):
    """Preference strength by the vote of M reward models."""

    data: str = Field(description="preferences to weigh")
    model: str = Field(description="model folder that the members start from: the SFT model")
    backend: Backend = Field(
        "head",
        description="kind of member: the whole model, LoRA adapters, the top layers (the rest computed once), or "
        "linear heads",
    )
    scoring: Scoring = Field("out-of-fold", description="whether members judge pairs that they trained on")
    members: int = Field(10, ge=1, description="M, the number of reward models; the paper uses 10")
    folds: int = Field(
        2, ge=2, description="out-of-fold: parts by prompt, dividing the members: each pair gets members / folds votes"
    )
    member: MemberConfig = Field(default_factory=MemberConfig, description="training of full, lora and layers members")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="lora: the adapters")
    layers: int = Field(3, ge=1, description="head: this many layers of the upper half give features")
    penalty: float | None = Field(
        None, gt=0, description="head: inverse L2 penalty; none given: chosen by held-out loss"
    )
    activation_cache: str | None = Field(
        None, description="layers: folder for the frozen layers' outputs; none given: `activations` beside the run"
    )
    activation_precision: Stored = Field("float32", description="layers: how those outputs are stored")
    temperature: float | None = Field(
        None, gt=0, description="of p_flip; none given: fitted to held-out margins (out-of-fold) or 1 (in-sample)"
    )
    rule: ActionRule = Field(default_factory=ActionRule, description="when to suggest what")
    keep_members: bool = Field(False, description="keep the models of full and layers members on disk")
    max_length: int = Field(512, ge=8, description="tokens of prompt and one response together")
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer pairs")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")
    max_tokens: int = Field(4096, ge=16, description="tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunk")
    device: Device = "cpu"
    workers: int | None = Field(
        None, ge=1, description="members trained side by side; none given: one per CPU, on a GPU one"
    )
    seed: int = Field(0, ge=0, description="member m uses seed + m")

    @property
    def trainable_layers(self) -> int | None:
        """Top layers that a member trains; None: all."""
        given = self.member.trainable_layers
        return TOP_LAYERS if given is None and self.backend == "layers" else given


_HEAD, _LORA = {"layers", "penalty"}, {"lora"}
_CACHE, _TRAINED = {"activation_cache", "activation_precision"}, {"member", "workers", "keep_members"}
IDLE: dict[Backend, set[str]] = {
    "full": _HEAD | _LORA | _CACHE,
    "lora": _HEAD | _CACHE | {"keep_members"},
    "layers": _HEAD | _LORA,
    "head": _LORA | _CACHE | _TRAINED,
}


def check(config: StrengthConfig) -> None:
    """Raise InputError for settings that would have no effect."""
    idle = IDLE[config.backend] | ({"folds"} if config.scoring == "in-sample" else set())
    given = sorted(idle & config.given())
    if config.backend == "lora":
        if config.member.trainable_layers is not None:
            given.append("member.trainable_layers")
        if config.member.optim.lr != MemberConfig().optim.lr:
            given.append("member.optim.lr (set lora.lr)")
    if given:
        raise InputError(
            f"{', '.join(given)}: no effect with backend = {config.backend}, scoring = {config.scoring}; leave it out"
        )
    if config.backend == "layers" and config.trainable_layers == 0:
        raise InputError("member.trainable_layers: must be at least 1 with backend = layers; for none, use head")


def held_out_plan(config: StrengthConfig, keys: Sequence[str]) -> Bool[np.ndarray, "M N"] | None:
    """Which member scores which pair; None in-sample, where every member scores every pair."""
    if config.scoring == "in-sample":
        return None
    prompts = len(set(keys))
    if prompts < config.folds:
        raise InputError(
            f"{config.data}: out-of-fold scoring needs at least as many distinct prompts as folds, got {prompts} and "
            f"{config.folds}; {'lower --folds, ' if prompts > 1 else ''}use --scoring in-sample, or add data"
        )
    return out_of_fold_plan(keys, members=config.members, folds=config.folds, seed=config.seed)
