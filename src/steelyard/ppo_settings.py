"""The settings of PPO, and which of them do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from steelyard.baselines import BaselineConfig
from steelyard.config import Config, Device, Paths
from steelyard.errors import InputError
from steelyard.models.lora import LoraConfig
from steelyard.models.trunk import Precision
from steelyard.rewards import Aggregate, Baseline, Transform
from steelyard.running import ScaleMode
from steelyard.sampling import SamplingConfig
from steelyard.train.optim import OptimConfig

SCALING = frozenset({"scaling", "scale_warmup", "scale_floor", "scale_kl"})
BASELINES = frozenset({"baselines", "k"})
CONTRASTIVE_ONLY = BASELINES | SCALING
"""Settings without effect on plain rewards (but for `scaling = std`)."""
CRITIC_ONLY = frozenset({"critic", "critic_model", "critic_warmup", "value_coef", "gamma", "lam", "value_clip"})
"""Settings without effect where there is no critic."""


class PPOConfig(Config):
    """PPO on plain or shaped rewards."""

    policy: str = Field(description="where the policy starts: the SFT model's folder")
    reference: str | None = Field(
        None, description="reference of the KL where the policy starts elsewhere: the SFT model; none given: `policy`"
    )
    reward_model: Paths = Field(
        description="reward-model folder, or several (an ensemble); the critic starts from the first"
    )
    aggregate: Aggregate = Field("mean", description="how the rewards of several reward models become one")
    uncertainty_weight: float = Field(0.5, ge=0, description="weight of their variance in uncertainty-weighted")
    prompts: str = Field(description="prompts: JSONL, CSV or Parquet, or a preference file")
    reward: Transform = Field("contrastive", description="what the policy is paid for")
    baselines: Paths | None = Field(
        None,
        description="scored baseline file of `steelyard sample`, with several reward models one scored by each, in "
        "their order; not for plain rewards",
    )
    k: int | None = Field(None, ge=1, description="use the first k stored baselines per prompt; none given: all")
    baseline: Baseline = Field(
        "mean",
        description="contrastive: subtract each prompt's mean, or that mean shrunk to all prompts' by its reliability",
    )
    scaling: ScaleMode | Literal["std"] = Field(
        "abs", description="how the contrastive reward returns to the original scale; std: any reward over its std"
    )
    scale_warmup: int = Field(256, ge=1, description="rollouts to see before the reward is rescaled")
    scale_floor: float = Field(0.01, gt=0, description="least divisor of the rescaling, in units of normalised reward")
    scale_kl: bool = Field(
        False, description="scale the KL penalty like the reward: with one kl_coef, all scalings weigh KL alike"
    )
    lsc_percentile: float = Field(85.0, ge=0, le=100, description="percentile of the baselines that lsc refers to")
    lsc_reference: Literal["prompt", "all"] = Field("prompt", description="baselines of the prompt, or of all prompts")
    advantage: Literal["gae", "rloo", "group", "remax"] = Field(
        "gae", description="how rewards become advantages; all but gae do without a critic"
    )
    group_std: bool = Field(True, description="divide a group's advantages by its std (advantage = group)")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    steps: int = Field(100, ge=1, description="rollout-and-update steps")
    prompts_per_step: int = Field(32, ge=1, description="prompts sampled per step")
    samples_per_prompt: int = Field(4, ge=1, description="responses sampled per prompt")
    minibatches: int = Field(1, ge=1, description="optimiser steps per pass over the rollouts")
    epochs: int = Field(1, ge=1, description="passes over the rollouts of a step")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how rollouts are drawn")
    actor: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=5e-7, decay=False), description="the paper's rate for 7B is 5e-7"
    )
    critic: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=1.5e-6, decay=False), description="the paper's rate for 7B is 1.5e-6"
    )
    critic_model: Literal["separate", "shared"] = Field(
        "separate", description="the critic: a copy of the reward model, or a new head on the policy's own layers"
    )
    value_coef: float = Field(0.1, gt=0, description="weight of the value loss in layers that the critic shares")
    critic_warmup: int = Field(
        0, ge=0, description="first steps in which only the critic learns (of a shared one the head)"
    )
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda")
    clip: float = Field(0.2, gt=0, lt=1, description="policy ratio clip")
    value_clip: float = Field(0.2, gt=0, description="value clip, in units of (normalised) reward")
    kl_coef: float = Field(0.05, ge=0, description="weight of the per-token KL penalty; 0 turns it off")
    kl_target: float | None = Field(
        None, gt=0, description="steer kl_coef towards this KL per response (nats); none given: it is fixed"
    )
    kl_horizon: int = Field(10_000, ge=1, description="responses over which kl_coef moves by about the relative error")
    stop_epochs_at_kl: float | None = Field(
        None,
        gt=0,
        description="end a step's updates once the policy is this far (nats per token) from where it sampled",
    )
    normalise: bool = Field(True, description="subtract the reward model's mean and divide by its std first")
    reward_clip: float | None = Field(None, gt=0, description="bound on the shaped reward's size")
    missing_eos_penalty: float = Field(0.0, ge=0, description="taken from a response cut off before its end token")
    min_reward_std: float | None = Field(
        None,
        gt=0,
        description="stop if the raw rewards' std within a prompt (mean of a step) falls below this",
    )
    max_kl: float | None = Field(None, gt=0, description="stop if the mean KL per response rises above this (nats)")
    gold: str | None = Field(None, description="`module:function` of a gold scorer, logged and never trained on")
    lora: LoraConfig = Field(
        default_factory=LoraConfig, description="train adapters; the reference is the policy without them"
    )
    max_length: int = Field(512, ge=8, description="tokens of prompt and response together")
    max_tokens: int = Field(8192, ge=16, description="tokens computed at once (memory, not results)")
    logit_chunk: int | None = Field(
        None, ge=1, description="positions whose logits are in memory at once; none given: all of max_tokens"
    )
    precision: Precision = Field("float32", description="arithmetic of the trunks; weights stay float32")
    device: Device = "cpu"
    seed: int = Field(0, ge=0, description="order of the prompts and sampling")
    save_every: int = Field(20, ge=1, description="steps between checkpoints")
    sample_every: int = Field(10, ge=1, description="steps between written samples")

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The folders, one or several."""
        return (self.reward_model,) if isinstance(self.reward_model, str) else self.reward_model

    @property
    def baseline_files(self) -> tuple[str, ...]:
        """The files, one for each reward model; none with plain rewards."""
        if self.baselines is None:
            return ()
        return (self.baselines,) if isinstance(self.baselines, str) else self.baselines


def check(config: PPOConfig) -> None:
    """Raise InputError for settings that would have no effect or no meaning."""
    folders, reward, advantage = config.reward_models, config.reward, config.advantage
    if not folders or len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError(f"reward_model: must name one or several different folders, got {list(folders)}")
    if len(folders) > 1 and not config.normalise:
        raise InputError(
            "normalise: must be on with several reward models: their raw rewards have offsets and scales of their own, "
            "so neither the worst nor the mean of them would mean anything"
        )
    if advantage != "gae" and reward == "contrastive" and config.reward_clip is None:
        raise InputError(
            f"advantage = {advantage} with reward = contrastive: the baseline cancels, for it is taken from every "
            "response to a prompt alike and these advantages are differences between them; use reward = plain, par or "
            "lsc, or advantage = gae, or bound the difference (reward_clip)"
        )
    if advantage in ("rloo", "group") and config.samples_per_prompt < 2:
        raise InputError(
            f"samples_per_prompt: advantage = {advantage} compares the responses to one prompt and needs at least 2, "
            f"got {config.samples_per_prompt}; sample more, or use remax or gae"
        )
    if reward != "plain" and config.baselines is None:
        raise InputError(f"baselines: {reward} rewards need a scored baseline file; make one with `steelyard sample`")
    if reward != "plain" and len(config.baseline_files) != len(folders):
        raise InputError(
            "baselines: must name one scored file for each reward model, in their order, got "
            f"{len(config.baseline_files)} for {len(folders)}; `steelyard sample` with each reward model makes them "
            "and samples once"
        )
    if config.sampling.min_new_tokens:
        raise InputError(
            f"sampling.min_new_tokens: must be 0 in PPO, got {config.sampling.min_new_tokens}: the update's "
            "log-probabilities would not be those of the distribution that was sampled from; use missing_eos_penalty"
        )
    if config.critic_warmup >= config.steps:
        raise InputError(
            f"critic_warmup: must be below steps = {config.steps}, got {config.critic_warmup}: the policy would never "
            "learn; lower it, or raise steps"
        )
    if config.prompts_per_step % config.minibatches:
        raise InputError(
            f"minibatches: must divide prompts_per_step = {config.prompts_per_step}, got {config.minibatches}: the "
            "last optimiser step would rest on fewer prompts, or there would be fewer steps than asked for"
        )
    if config.kl_target is not None and config.kl_coef == 0:
        raise InputError("kl_coef: must be above 0 where kl_target steers it, for it is multiplied; got 0")
    responses = config.prompts_per_step * config.samples_per_prompt
    if config.kl_target is not None and 5 * config.kl_horizon <= responses:
        raise InputError(
            f"kl_horizon: must be above a fifth of a step's {responses} responses, got {config.kl_horizon}: one step "
            "could bring kl_coef to 0"
        )
    if config.baseline == "shrunk" and config.k == 1:
        raise InputError("k: one baseline a prompt does not tell how noisy it is; baseline = shrunk needs k >= 2")
    for names, reason in _without_effect(config):
        if useless := names & config.given():
            raise InputError(f"{', '.join(sorted(useless))}: no effect {reason}")


def check_baselines(config: PPOConfig, stored: BaselineConfig, where: str, there: str) -> None:
    """Raise InputError where baselines sampled as `stored` says would be too few for `config`, or for too few prompts.

    `where` and `there` are the names of the two sections, for the message.
    """
    least = max(config.k or 1, 2 if config.baseline == "shrunk" else 1)
    if stored.k < least:
        why = "" if least == config.k else " (baseline = shrunk)"
        raise InputError(f"{there}.k: must be at least the {least} baselines that {where} reads{why}, got {stored.k}")
    if stored.limit is not None and config.limit is not None and config.limit > stored.limit:
        raise InputError(f"{there}.limit: must be at least {where}.limit = {config.limit}, got {stored.limit}")
    room = [c.max_length - c.sampling.max_new_tokens for c in (config, stored)]
    if room[0] > room[1]:
        raise InputError(
            f"{there}: prompts of up to {room[1]} tokens get baselines (max_length less sampling.max_new_tokens), but "
            f"{where} takes prompts of up to {room[0]}; make the two alike"
        )


def idle(reward: str, advantage: str) -> set[str]:
    """Settings without effect on this reward and these advantages, the scaling's apart."""
    names = set[str]()
    if reward == "plain":
        names |= BASELINES
    if reward != "contrastive":
        names |= {"baseline"}
    if reward != "lsc":
        names |= {"lsc_percentile", "lsc_reference"}
    if advantage != "gae":
        names |= CRITIC_ONLY
    if advantage != "group":
        names |= {"group_std"}
    return names


def _without_effect(config: PPOConfig) -> Iterator[tuple[frozenset[str] | set[str], str]]:
    """Settings that the others make idle, and why."""
    reward, advantage, std = config.reward, config.advantage, config.scaling == "std"
    if reward == "plain":
        yield CONTRASTIVE_ONLY - (SCALING if std else set()), "with reward = plain; leave out, or use contrastive"
    elif reward != "contrastive" and not std:
        yield SCALING, f"with reward = {reward}; leave out, or use scaling = std"
    if reward != "contrastive":
        yield {"baseline"}, f"with reward = {reward}; leave out, or use contrastive"
    if reward == "par" and not std and (config.reward_clip or 0) >= 1:
        yield {"reward_clip"}, "with reward = par, which lies between 0 and 1; leave out, or lower it"
    if reward == "lsc" and config.k == 1 and config.lsc_reference == "prompt":
        yield {"lsc_percentile"}, "with k = 1: of one baseline all percentiles are the same; leave out, or raise k"
    as_it_is = config.reward_clip is None and not config.missing_eos_penalty and (config.scale_kl or not config.kl_coef)
    if std and advantage == "group" and config.group_std and as_it_is:
        yield SCALING, "with advantage = group and group_std, which divides the scale out again; leave out"
    if reward != "lsc":
        yield {"lsc_percentile", "lsc_reference"}, f"with reward = {reward}; leave out, or use lsc"
    if len(config.reward_models) == 1:
        yield {"aggregate", "uncertainty_weight"}, "with one reward model; leave out, or name several"
    elif config.aggregate != "uncertainty-weighted":
        yield {"uncertainty_weight"}, f"with aggregate = {config.aggregate}; leave out, or use uncertainty-weighted"
    if reward == "contrastive" and config.scaling == "none":
        yield SCALING - {"scaling"}, "with scaling = none; leave out, or scale"
    if config.kl_coef == 0:
        yield {"scale_kl"}, "with kl_coef = 0, which turns the penalty off; leave out"
    if config.kl_target is None:
        yield {"kl_horizon"}, "without kl_target; leave out, or give one"
    if advantage == "gae" and config.critic_model == "separate":
        yield {"value_coef"}, "with critic_model = separate; leave out, or use shared"
    if advantage != "gae":
        yield CRITIC_ONLY, f"with advantage = {advantage}, which has no critic; leave out, or use gae"
    if config.epochs * config.minibatches == 1:
        idle = {"stop_epochs_at_kl", "clip", "value_clip"}  # the policy is still the one that sampled
        yield idle, "with one optimiser step per rollout; leave out, or raise epochs or minibatches"
    if advantage != "group":
        yield {"group_std"}, f"with advantage = {advantage}; leave out, or use group"
