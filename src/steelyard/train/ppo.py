"""PPO on plain or shaped rewards, with a critic or without (Secrets of RLHF II, section 2.1 and App. B).

One step: sample K responses to each of a batch of prompts, score them, shape the scores by what the SFT model's
stored responses to the same prompt earned, add the per-token KL penalty, estimate advantages, and take clipped
steps on policy and critic. Prompt and responses share one row in every forward pass.

The log-probabilities of the ratio are those of the distribution that was sampled from: temperature is accounted
for; nucleus truncation and repetition penalty change the distribution in ways the update does not follow, so
they are refused here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from steelyard.advantages import whiten
from steelyard.baselines import read_baselines
from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config
from steelyard.data.collate import TreeBatch, collate, pack
from steelyard.data.encode import Encoder
from steelyard.data.load import load_prompts
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.losses.policy import clipped_surrogate, value_loss
from steelyard.models.trunk import Precision
from steelyard.progress import Progress
from steelyard.rewards import Aggregate, RunningScale, RunningStd, ScaleMode, percentile
from steelyard.rollout import Models, Rollouts, collect, estimate, guard, pay, require_finite, rollout_metrics
from steelyard.run_dir import RunDir
from steelyard.sampling import Sample, SamplingConfig
from steelyard.scorer import load_scorer
from steelyard.train.optim import OptimConfig, batches, set_rate
from steelyard.types import Prompt

SCALING = frozenset({"scaling", "scale_warmup", "scale_floor"})
BASELINES = frozenset({"baselines", "k"})
CONTRASTIVE_ONLY = BASELINES | SCALING
"""Settings without effect on plain rewards (but for `scaling = std`)."""
CRITIC_ONLY = frozenset({"critic", "critic_warmup", "gamma", "lam", "value_clip"})
"""Settings without effect where there is no critic."""


class PPOConfig(Config):
    """PPO on plain or shaped rewards."""

    policy: str = Field(description="the SFT model's folder: where the policy starts, and the reference of the KL")
    reward_model: str | tuple[str, ...] = Field(
        description="reward-model folder, or several (an ensemble); the critic starts from the first"
    )
    aggregate: Aggregate = Field("mean", description="how the rewards of several reward models become one")
    uncertainty_weight: float = Field(0.5, ge=0, description="weight of their variance in uncertainty-weighted")
    prompts: str = Field(description="prompts: JSONL, CSV or Parquet, or a preference file")
    reward: Literal["plain", "contrastive", "par", "lsc"] = Field(
        "contrastive", description="what the policy is paid for"
    )
    baselines: str | None = Field(None, description="scored baseline file of `steelyard sample`; not for plain rewards")
    k: int | None = Field(None, ge=1, description="use the first k stored baselines per prompt; none given: all")
    scaling: ScaleMode | Literal["std"] = Field(
        "abs", description="how the contrastive reward returns to the original scale; std: any reward over its std"
    )
    scale_warmup: int = Field(256, ge=1, description="rollouts to see before the reward is rescaled")
    scale_floor: float = Field(0.01, gt=0, description="least divisor of the rescaling, in units of normalised reward")
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
    critic_warmup: int = Field(0, ge=0, description="first steps in which only the critic learns")
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda")
    clip: float = Field(0.2, gt=0, lt=1, description="policy ratio clip")
    value_clip: float = Field(0.2, gt=0, description="value clip, in units of (normalised) reward")
    kl_coef: float = Field(0.05, ge=0, description="weight of the per-token KL penalty; 0 turns it off")
    normalise: bool = Field(True, description="subtract the reward model's mean and divide by its std first")
    reward_clip: float | None = Field(None, gt=0, description="bound on the shaped reward's size")
    missing_eos_penalty: float = Field(0.0, ge=0, description="taken from a response cut off before its end token")
    min_reward_std: float | None = Field(None, gt=0, description="stop if a step's raw reward std falls below this")
    max_kl: float | None = Field(None, gt=0, description="stop if the mean KL per response rises above this (nats)")
    gold: str | None = Field(None, description="`module:function` of a gold scorer, logged and never trained on")
    max_length: int = Field(512, ge=8, description="tokens of prompt and response together")
    max_tokens: int = Field(8192, ge=16, description="padded tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunks; weights stay float32")
    seed: int = Field(0, ge=0, description="order of the prompts and sampling")
    save_every: int = Field(20, ge=1, description="steps between checkpoints")
    sample_every: int = Field(10, ge=1, description="steps between written samples")

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The folders, one or several."""
        return (self.reward_model,) if isinstance(self.reward_model, str) else self.reward_model


class Learner:
    """Everything that the next step depends on and a checkpoint holds: models, optimisers, running scale.

    Sampling and order are functions of (seed, step) and need no state.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.models = Models(config)
        self.scale: RunningScale | RunningStd
        if config.scaling == "std":
            self.scale = RunningStd(floor=config.scale_floor, warmup=config.scale_warmup)
        else:
            mode: ScaleMode = config.scaling if config.reward == "contrastive" else "none"
            self.scale = RunningScale(mode, floor=config.scale_floor, warmup=config.scale_warmup)
        learning: dict[str, tuple[str, nn.Module | None]] = {
            "actor": ("policy.", self.models.policy),
            "critic": ("value.", self.models.critic),
        }
        self.settings = {"actor": config.actor, "critic": config.critic}
        # name in the checkpoint -> (its prefix of the model's tensors there, model, optimiser)
        self.parts = {
            name: (prefix, model, self.settings[name].build(model.parameters()))
            for name, (prefix, model) in learning.items()
            if model is not None
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values)."""
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for name, (prefix, model, optimizer) in self.parts.items():
            packed, state[name] = pack_optimizer(optimizer, name)
            tensors |= {prefix + k: v for k, v in model.state_dict().items()} | packed
        return tensors, state | {"scale": self.scale.state_dict()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        for name, (prefix, model, optimizer) in self.parts.items():
            model.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
            unpack_optimizer(optimizer, tensors, state[name], name)
        self.scale.load_state_dict(state["scale"])

    def set_rates(self, step: int, steps: int) -> None:
        """The learning rates of a step (0-based)."""
        for name, (_, _, optimizer) in self.parts.items():
            set_rate(optimizer, self.settings[name].rate(step, steps))

    def move(self) -> None:
        """One optimiser step on the gradients at hand."""
        for name, (_, model, optimizer) in self.parts.items():
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.settings[name].max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Task:
    """What the policy learns on: prompts, their token ids, their baselines (or LSC's references), a gold scorer."""

    def __init__(self, config: PPOConfig, encoder: Encoder, quiet: bool) -> None:
        self.gold = load_scorer(config.gold) if config.gold else None
        self.prompts, self.ids = _prompts(config, encoder, quiet)
        self.baselines_NK = _baselines(config, self.prompts)

    def stored(self, chosen: Sequence[int]) -> Float[Tensor, "N k"] | None:
        """The baselines of some prompts; None with plain rewards."""
        return None if self.baselines_NK is None else self.baselines_NK[chosen]

    def score(self, encoder: Encoder, chosen: Sequence[int], drawn: Sequence[Sequence[Sample]]) -> dict[str, float]:
        """The mean gold reward of responses; nothing without a gold scorer."""
        if self.gold is None:
            return {}
        pairs = [(self.prompts[i], s) for i, group in zip(chosen, drawn, strict=True) for s in group]
        return {"ppo/gold": float(np.mean([self.gold(p, encoder.decode(s.tokens)) for p, s in pairs]))}


def train_ppo(config: PPOConfig, out: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the policy in `out/model`; returns the result."""
    check(config)
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return run.result()
        learner = Learner(config)
        models, scale = learner.models, learner.scale
        task, first = Task(config, models.encoder, quiet), 0
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            learner.restore(tensors, state)

        order = batches(len(task.prompts), config.prompts_per_step, config.seed, first, config.steps)
        with Progress(config.steps, "PPO", start=first, quiet=quiet or None) as progress:
            for step, chosen in enumerate(order, first + 1):
                began = time.perf_counter()
                keys = [f"{step}/{prompt_key(task.prompts[i])}" for i in chosen]
                drawn, rollouts, greedy = collect(models, [task.ids[i] for i in chosen], keys, config)
                require_finite({"ppo/reward_raw": rollouts.rewards_NK.mean().item()}, step)
                sampled = time.perf_counter()

                paid_NK, rewards_BT, greedy_N = pay(rollouts, greedy, task.stored(chosen), models, scale, config)
                advantages_BT, returns_BT = estimate(rollouts, rewards_BT, greedy_N, config)
                metrics = rollout_metrics(rollouts, paid_NK, rewards_BT, advantages_BT, returns_BT, scale)
                metrics["ppo/kl_coef"] = config.kl_coef
                metrics |= update(learner, rollouts, advantages_BT, returns_BT, step, config)
                metrics |= task.score(models.encoder, chosen, drawn)
                guard(metrics, step, config)

                run.log(step, metrics)
                tokens = sum(len(t) for t in rollouts.trees)
                seconds = time.perf_counter() - began
                run.time(step, {"seconds": seconds, "sampling": sampled - began, "tokens_per_second": tokens / seconds})
                progress.update(step, tokens=tokens, reward=metrics["ppo/reward_raw"], kl=metrics["ppo/kl"])
                if step % config.sample_every == 0 or step == config.steps:
                    _write_samples(run, step, models.encoder, task.prompts, chosen, drawn, rollouts)
                if step % config.save_every == 0 and step < config.steps:
                    run.save(step, *learner.state())

        models.policy.save(out / "model", models.encoder)
        result = {"steps": config.steps, "prompts": len(task.prompts), **metrics}
        run.finish(result)
        return result


def update(
    learner: Learner,
    rollouts: Rollouts,
    advantages_BT: Float[Tensor, "B T"],
    returns_BT: Float[Tensor, "B T"] | None,
    step: int,
    config: PPOConfig,
) -> dict[str, float]:
    """`epochs` passes of clipped steps over the rollouts; losses are means over the minibatch's tokens."""
    learner.set_rates(step - 1, config.steps)
    shape, names = rollouts.mask_NKT.shape, ["ppo/policy_loss", "ppo/clip_fraction"]
    per_token_NKT = [rollouts.logprobs_NKT, advantages_BT.view(shape)]
    if rollouts.values_NKT is not None and returns_BT is not None:
        # Advantages without a critic are differences of rewards and are used as they are.
        per_token_NKT[1] = whiten(advantages_BT, rollouts.mask_NKT.flatten(0, 1)).view(shape)
        per_token_NKT += [rollouts.values_NKT, returns_BT.view(shape)]
        names.append("ppo/value_loss")
    N, sums, tokens = len(rollouts.trees), np.zeros(3), 0
    for epoch in range(config.epochs):
        size = -(-N // config.minibatches)
        for rows in batches(N, size, config.seed + step * 7919 + epoch, 0, -(-N // size)):
            total = int(rollouts.mask_NKT[rows].sum())
            for group in pack([len(rollouts.trees[i]) for i in rows], config.max_tokens):
                picked = [rows[i] for i in group]
                batch = collate([rollouts.trees[i] for i in picked], learner.models.encoder.pad_id)
                t = batch.mask_BKR.shape[-1]
                sums += backward(learner.models, batch, [x[picked, :, :t] for x in per_token_NKT], total, step, config)
            tokens += total
            learner.move()
    return {name: float(x / tokens) for name, x in zip(names, sums, strict=False)}


def backward(
    models: Models, batch: TreeBatch, per_token_BKR: Sequence[Tensor], total: int, step: int, config: PPOConfig
) -> Float[np.ndarray, "3"]:
    """Add the gradients of a few prompts; returns the sums over tokens of policy loss, clipping and value loss.

    `per_token_BKR`: log-probabilities when sampled, advantages, and with a critic values when sampled and returns.
    """
    mask, sums = batch.mask_BKR, np.zeros(3)
    old, advantage, *critic = per_token_BKR
    if step > config.critic_warmup:
        now = models.policy(batch, temperature=config.sampling.temperature).sampled_BKR
        policy_loss, clipped = clipped_surrogate(now, old, advantage, clip=config.clip)
        (policy_loss[mask].sum() / total).backward()
        sums[:2] = policy_loss[mask].sum().item(), clipped[mask].sum().item()
    if critic and (values := models.values(batch)) is not None:
        critic_loss = value_loss(values, *critic, clip=config.value_clip)
        (critic_loss[mask].sum() / total).backward()
        sums[2] = critic_loss[mask].sum().item()
    return sums


def check(config: PPOConfig) -> None:
    """Raise InputError for settings that would have no effect or no meaning."""
    if config.sampling.top_p != 1.0 or config.sampling.repetition_penalty != 1.0:
        raise InputError(
            "sampling.top_p and sampling.repetition_penalty must be 1 in PPO: the update's log-probabilities would not "
            "be those of the distribution that was sampled from; use sampling.temperature"
        )
    folders, reward, advantage = config.reward_models, config.reward, config.advantage
    if not folders or len(set(folders)) < len(folders):
        raise InputError(f"reward_model: must name one or several different folders, got {list(folders)}")
    if len(folders) > 1 and reward != "plain":
        raise InputError(
            f"reward_model: several reward models need reward = plain, got {reward}: a baseline file holds the scores "
            "of one reward model; name one folder, or use plain"
        )
    if advantage != "gae" and reward == "contrastive":
        raise InputError(
            f"advantage = {advantage} with reward = contrastive: the baseline cancels, for it is taken from every "
            "response to a prompt alike and these advantages are differences between them; use reward = plain, par or "
            "lsc, or advantage = gae"
        )
    if advantage in ("rloo", "group") and config.samples_per_prompt < 2:
        raise InputError(
            f"samples_per_prompt: advantage = {advantage} compares the responses to one prompt and needs at least 2, "
            f"got {config.samples_per_prompt}; sample more, or use remax or gae"
        )
    if reward != "plain" and config.baselines is None:
        raise InputError(f"baselines: {reward} rewards need a scored baseline file; make one with `steelyard sample`")
    for names, reason in _without_effect(config):
        if useless := names & config.given():
            raise InputError(f"{', '.join(sorted(useless))}: no effect {reason}")


def _without_effect(config: PPOConfig) -> Iterator[tuple[frozenset[str] | set[str], str]]:
    """Settings that the others make idle, and why."""
    reward, advantage, std = config.reward, config.advantage, config.scaling == "std"
    if reward == "plain":
        yield CONTRASTIVE_ONLY - (SCALING if std else set()), "with reward = plain; leave out, or use contrastive"
    elif reward != "contrastive" and not std:
        yield SCALING, f"with reward = {reward}; leave out, or use scaling = std"
    if reward != "lsc":
        yield {"lsc_percentile", "lsc_reference"}, f"with reward = {reward}; leave out, or use lsc"
    if len(config.reward_models) == 1:
        yield {"aggregate", "uncertainty_weight"}, "with one reward model; leave out, or name several"
    elif config.aggregate != "uncertainty-weighted":
        yield {"uncertainty_weight"}, f"with aggregate = {config.aggregate}; leave out, or use uncertainty-weighted"
    if advantage != "gae":
        yield CRITIC_ONLY, f"with advantage = {advantage}, which has no critic; leave out, or use gae"
    if advantage != "group":
        yield {"group_std"}, f"with advantage = {advantage}; leave out, or use group"


def _prompts(config: PPOConfig, encoder: Encoder, quiet: bool) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    room = config.max_length - config.sampling.max_new_tokens
    prompts = [p.prompt for p in load_prompts(config.prompts).items[: config.limit]]
    ids = [encoder.prompt_ids(p) for p in prompts]
    fits = [i for i, x in enumerate(ids) if len(x) <= room]
    if len(fits) < config.prompts_per_step:
        raise InputError(
            f"{config.prompts}: {len(fits)} of {len(prompts)} prompts leave room for "
            f"{config.sampling.max_new_tokens} new tokens within max_length = {config.max_length}; prompts_per_step "
            f"= {config.prompts_per_step} needs more"
        )
    if not quiet:
        print(f"{len(fits)} of {len(prompts)} prompts used; the others leave no room within max_length")
    return [prompts[i] for i in fits], [ids[i] for i in fits]


def _baselines(config: PPOConfig, prompts: Sequence[Prompt]) -> Float[Tensor, "N k"] | None:
    if config.reward == "plain" or config.baselines is None:
        return None
    (model,) = config.reward_models
    stored = read_baselines(config.baselines, k=config.k, policy=config.policy, reward_model=model)
    missing = sum(prompt_key(p) not in stored for p in prompts)
    if missing:
        raise InputError(f"{config.baselines}: no baselines for {missing} of {len(prompts)} prompts; sample them first")
    baselines_NK = torch.from_numpy(np.stack([stored[prompt_key(p)] for p in prompts]))
    if config.reward == "lsc":
        return percentile(baselines_NK, config.lsc_percentile, pooled=config.lsc_reference == "all")[:, None]
    return baselines_NK


def _write_samples(
    run: RunDir,
    step: int,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    chosen: Sequence[int],
    drawn: Sequence[Sequence[Sample]],
    rollouts: Rollouts,
) -> None:
    for n in range(min(4, len(chosen))):
        prompt = prompts[chosen[n]]
        text = prompt if isinstance(prompt, str) else "\n".join(f"{t.role}: {t.content}" for t in prompt)
        reward = rollouts.rewards_NK[n, 0].item()
        run.sample(step, {"prompt": text, "response": encoder.decode(drawn[n][0].tokens), "reward": reward})
