"""PPO on plain or contrastive rewards (Secrets of RLHF II, section 2.1 and App. B; Contrastive Rewards).

One step: sample K responses to each of a batch of prompts, score them, subtract what the SFT model's stored
responses to the same prompt earned (contrastive), add the per-token KL penalty, estimate advantages with GAE,
and take clipped steps on policy and critic. Prompt and responses share one row in every forward pass.

The log-probabilities of the ratio are those of the distribution that was sampled from: temperature is accounted
for; nucleus truncation and repetition penalty change the distribution in ways the update does not follow, so
they are refused here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from steelyard.advantages import gae, whiten
from steelyard.baselines import read_baselines
from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_prompts
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.losses.policy import clipped_surrogate, kl_k1, value_loss
from steelyard.models.load import Precision
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.progress import Progress
from steelyard.rewards import RunningScale, ScaleMode, clip, contrastive, missing_eos, token_rewards
from steelyard.rollout import Rollouts, rollout_metrics
from steelyard.run_dir import RunDir
from steelyard.sampling import Sample, SamplingConfig, sample
from steelyard.scorer import Scorer, load_scorer
from steelyard.train.optim import OptimConfig, batches, set_rate
from steelyard.types import Prompt

CONTRASTIVE_ONLY = frozenset({"baselines", "k", "scaling", "scale_warmup", "scale_floor"})
"""Settings without effect on plain rewards."""


class PPOConfig(Config):
    """PPO on plain or contrastive rewards."""

    policy: str = Field(description="the SFT model's folder: where the policy starts, and the reference of the KL")
    reward_model: str = Field(description="reward-model folder; the critic starts from it too")
    prompts: str = Field(description="prompts: JSONL, CSV or Parquet, or a preference file")
    reward: Literal["plain", "contrastive"] = Field("contrastive", description="what the policy is paid for")
    baselines: str | None = Field(None, description="scored baseline file of `steelyard sample` (contrastive only)")
    k: int | None = Field(None, ge=1, description="use the first k stored baselines per prompt; none given: all")
    scaling: ScaleMode = Field("abs", description="how the contrastive reward returns to the original scale")
    scale_warmup: int = Field(256, ge=1, description="rollouts to see before the contrastive reward is rescaled")
    scale_floor: float = Field(0.01, gt=0, description="least divisor of the rescaling, in units of normalised reward")
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
    gold: str | None = Field(None, description="`module:function` of a gold scorer, logged and never trained on")
    max_length: int = Field(512, ge=8, description="tokens of prompt and response together")
    max_tokens: int = Field(8192, ge=16, description="padded tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunks; weights stay float32")
    seed: int = Field(0, ge=0, description="order of the prompts and sampling")
    save_every: int = Field(20, ge=1, description="steps between checkpoints")
    sample_every: int = Field(10, ge=1, description="steps between written samples")


class Models:
    """The four models of PPO. The critic is the reward model's twin, read on the normalised reward's scale."""

    def __init__(self, config: PPOConfig) -> None:
        self.encoder = Encoder.load(config.policy, max_length=config.max_length)
        theirs = Encoder.load(config.reward_model, max_length=config.max_length)
        ours = self.encoder.tokenizer
        if (theirs.tokenizer.get_vocab(), theirs.tokenizer.chat_template) != (ours.get_vocab(), ours.chat_template):
            raise InputError(
                f"{config.reward_model}: policy and reward model must share one tokenizer (vocabulary and chat "
                f"template); train the reward model from {config.policy}"
            )
        self.policy = PolicyModel.load(config.policy, precision=config.precision)
        self.reference = PolicyModel.load(config.policy, precision=config.precision).requires_grad_(False)
        self.reward = RewardModel.load(config.reward_model, precision=config.precision).requires_grad_(False)
        self.critic = RewardModel.load(config.reward_model, precision=config.precision)
        for model in (self.policy, self.reference, self.reward, self.critic):
            model.eval()
        self.mean, self.std = self.reward.normal if config.normalise else (0.0, 1.0)
        if not self.std > 0:
            raise InputError(
                f"{config.reward_model}: its rewards have no spread (std {self.std}); nothing to learn from"
            )

    def normal(self, raw: Tensor) -> Tensor:
        """A raw reward or value on the normalised scale."""
        return (raw - self.mean) / self.std


def train_ppo(config: PPOConfig, out: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the policy in `out/model`; returns the result."""
    check(config)
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return run.result()
        models = Models(config)
        gold = load_scorer(config.gold) if config.gold else None
        prompts, ids = _prompts(config, models.encoder, quiet)
        baselines_NK = _baselines(config, prompts)
        mode: ScaleMode = config.scaling if config.reward == "contrastive" else "none"
        scale = RunningScale(mode, floor=config.scale_floor, warmup=config.scale_warmup)
        actor, critic = (
            config.actor.build(models.policy.parameters()),
            config.critic.build(models.critic.parameters()),
        )
        first = 0
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            _restore(models, actor, critic, scale, tensors, state)

        order = batches(len(prompts), config.prompts_per_step, config.seed, first, config.steps)
        with Progress(config.steps, "PPO", start=first, quiet=quiet or None) as progress:
            for step, chosen in enumerate(order, first + 1):
                began = time.perf_counter()
                keys = [f"{step}/{prompt_key(prompts[i])}" for i in chosen]
                drawn = _draw(models, config, [ids[i] for i in chosen], keys)
                rollouts = roll_out(models, config, [ids[i] for i in chosen], drawn)
                sampled = time.perf_counter()

                paid_NK = shape_rewards(
                    rollouts, None if baselines_NK is None else baselines_NK[chosen], models, scale, config
                )
                flat = rollouts.mask_NKT.flatten(0, 1)
                rewards = token_rewards(paid_NK.flatten(), rollouts.kl_NKT.flatten(0, 1), flat, kl_coef=config.kl_coef)
                values = rollouts.values_NKT.flatten(0, 1)
                advantages, returns = gae(rewards, values, flat, gamma=config.gamma, lam=config.lam)
                metrics = rollout_metrics(rollouts, paid_NK, rewards, advantages, returns, scale)
                metrics["ppo/kl_coef"] = config.kl_coef
                shape = rollouts.mask_NKT.shape
                whitened, returns = whiten(advantages, flat).view(shape), returns.view(shape)
                metrics |= update(models, actor, critic, rollouts, whitened, returns, step, config)
                if gold is not None:
                    metrics["ppo/gold"] = _gold(models.encoder, gold, [prompts[i] for i in chosen], drawn)
                _guard(metrics, step)
                run.log(step, metrics)
                tokens = sum(len(t) for t in rollouts.trees)
                seconds = time.perf_counter() - began
                run.time(step, {"seconds": seconds, "sampling": sampled - began, "tokens_per_second": tokens / seconds})
                progress.update(step, tokens=tokens, reward=metrics["ppo/reward_raw"], kl=metrics["ppo/kl"])
                if step % config.sample_every == 0 or step == config.steps:
                    _write_samples(run, step, models.encoder, prompts, chosen, drawn, rollouts)
                if step % config.save_every == 0 and step < config.steps:
                    run.save(step, *_state(models, actor, critic, scale))

        models.policy.save(out / "model", models.encoder)
        result = {"steps": config.steps, "prompts": len(prompts), **metrics}
        run.finish(result)
        return result


@torch.no_grad()
def roll_out(
    models: Models, config: PPOConfig, ids: Sequence[tuple[int, ...]], drawn: Sequence[Sequence[Sample]]
) -> Rollouts:
    """Score sampled responses with all four models."""
    trees = [Tree(p, tuple(s.tokens for s in group)) for p, group in zip(ids, drawn, strict=True)]
    N, K, T = len(trees), config.samples_per_prompt, max(len(s.tokens) for group in drawn for s in group)
    mask = torch.zeros(N, K, T, dtype=torch.bool)
    logprobs, values, kl = (torch.zeros(N, K, T) for _ in range(3))
    rewards, nll, entropy = torch.zeros(N, K), 0.0, 0.0
    for group in pack([len(t) for t in trees], config.max_tokens):
        batch = collate([trees[i] for i in group], models.encoder.pad_id)
        t = batch.mask_BKT.shape[-1]
        now, then = (m(batch, temperature=config.sampling.temperature) for m in (models.policy, models.reference))
        mask[group, :, :t] = batch.mask_BKT
        logprobs[group, :, :t] = now.sampled_BKT
        values[group, :, :t] = models.normal(models.critic.values(batch)) * batch.mask_BKT
        kl[group, :, :t] = kl_k1(now.sampled_BKT, then.sampled_BKT)
        rewards[group] = models.reward(batch)
        nll -= then.plain_BKT.sum().item()
        entropy += now.entropy_BKT.sum().item()
    tokens = int(mask.sum())
    ended = torch.tensor([[s.ended for s in group] for group in drawn])
    return Rollouts(trees, mask, logprobs, values, kl, rewards, ended, nll / tokens, entropy / tokens)


def shape_rewards(
    rollouts: Rollouts,
    baselines_NK: Float[Tensor, "N k"] | None,
    models: Models,
    scale: RunningScale,
    config: PPOConfig,
) -> Float[Tensor, "N K"]:
    """Raw scores to what PPO is paid: normalise, contrast, scale, clip, missing end (METHOD: Contrastive Rewards)."""
    normal_NK = models.normal(rollouts.rewards_NK)
    paid = normal_NK
    if baselines_NK is not None:
        K = normal_NK.shape[1]
        baselines = models.normal(baselines_NK).repeat_interleave(K, 0)
        contrast = contrastive(normal_NK.flatten(), baselines)
        scale.update(normal_NK.flatten(), contrast)
        paid = (contrast * scale.factor).view_as(normal_NK)
    if config.reward_clip is not None:
        paid = clip(paid, config.reward_clip)
    return missing_eos(paid, rollouts.ended_NK, penalty=config.missing_eos_penalty)


def update(
    models: Models,
    actor: torch.optim.Optimizer,
    critic: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages_NKT: Float[Tensor, "N K T"],
    returns_NKT: Float[Tensor, "N K T"],
    step: int,
    config: PPOConfig,
) -> dict[str, float]:
    """`epochs` passes of clipped steps over the rollouts; losses are means over the minibatch's tokens."""
    set_rate(actor, config.actor.rate(step - 1, config.steps))
    set_rate(critic, config.critic.rate(step - 1, config.steps))
    N, sums, tokens = len(rollouts.trees), np.zeros(3), 0
    for epoch in range(config.epochs):
        size = -(-N // config.minibatches)
        for rows in batches(N, size, config.seed + step * 7919 + epoch, 0, -(-N // size)):
            total = int(rollouts.mask_NKT[rows].sum())
            for group in pack([len(rollouts.trees[i]) for i in rows], config.max_tokens):
                picked = [rows[i] for i in group]
                batch = collate([rollouts.trees[i] for i in picked], models.encoder.pad_id)
                t, mask = batch.mask_BKT.shape[-1], batch.mask_BKT
                old, value, advantage, target = (
                    x[picked, :, :t] for x in (rollouts.logprobs_NKT, rollouts.values_NKT, advantages_NKT, returns_NKT)
                )
                if step > config.critic_warmup:
                    now = models.policy(batch, temperature=config.sampling.temperature).sampled_BKT
                    policy_loss, clipped = clipped_surrogate(now, old, advantage, clip=config.clip)
                    (policy_loss[mask].sum() / total).backward()
                    sums[:2] += policy_loss[mask].sum().item(), clipped[mask].sum().item()
                values = models.normal(models.critic.values(batch))
                critic_loss = value_loss(values, value, target, clip=config.value_clip)
                (critic_loss[mask].sum() / total).backward()
                sums[2] += critic_loss[mask].sum().item()
            tokens += total
            for optimizer, model, norm in (
                (actor, models.policy, config.actor.max_grad_norm),
                (critic, models.critic, config.critic.max_grad_norm),
            ):
                torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    names = ("ppo/policy_loss", "ppo/clip_fraction", "ppo/value_loss")
    return {name: float(x / tokens) for name, x in zip(names, sums, strict=True)}


def _draw(models: Models, config: PPOConfig, ids: list[tuple[int, ...]], keys: list[str]) -> list[list[Sample]]:
    return sample(
        models.policy,
        ids,
        keys,
        k=config.samples_per_prompt,
        config=config.sampling,
        end_id=models.encoder.end_id,
        pad_id=models.encoder.pad_id,
        seed=config.seed,
    )


def _guard(metrics: dict[str, float], step: int) -> None:
    bad = {k: v for k, v in metrics.items() if not math.isfinite(v)}
    if bad:
        raise FloatingPointError(
            f"step {step}: {bad} is not finite; lower actor.lr, set reward_clip, or raise kl_coef, and resume from the "
            "last checkpoint"
        )


def check(config: PPOConfig) -> None:
    """Raise InputError for settings that would have no effect or no meaning."""
    if config.sampling.top_p != 1.0 or config.sampling.repetition_penalty != 1.0:
        raise InputError(
            "sampling.top_p and sampling.repetition_penalty must be 1 in PPO: the update's log-probabilities would not "
            "be those of the distribution that was sampled from; use sampling.temperature"
        )
    if config.reward == "contrastive" and config.baselines is None:
        raise InputError("baselines: contrastive rewards need a scored baseline file; make one with `steelyard sample`")
    useless = CONTRASTIVE_ONLY & config.given()
    if config.reward == "plain" and useless:
        raise InputError(f"{', '.join(sorted(useless))}: no effect with reward = plain; leave out, or use contrastive")


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
    stored = read_baselines(config.baselines, k=config.k, policy=config.policy, reward_model=config.reward_model)
    missing = sum(prompt_key(p) not in stored for p in prompts)
    if missing:
        raise InputError(f"{config.baselines}: no baselines for {missing} of {len(prompts)} prompts; sample them first")
    return torch.from_numpy(np.stack([stored[prompt_key(p)] for p in prompts]))


def _gold(encoder: Encoder, gold: Scorer, prompts: list[Prompt], drawn: list[list[Sample]]) -> float:
    scores = [gold(p, encoder.decode(s.tokens)) for p, group in zip(prompts, drawn, strict=True) for s in group]
    return float(np.mean(scores))


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


def _state(
    models: Models, actor: torch.optim.Optimizer, critic: torch.optim.Optimizer, scale: RunningScale
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything the next step depends on; sampling and order are functions of (seed, step)."""
    tensors = {f"policy.{k}": v for k, v in models.policy.state_dict().items()}
    tensors |= {f"value.{k}": v for k, v in models.critic.state_dict().items()}
    actor_tensors, actor_state = pack_optimizer(actor, "actor")
    critic_tensors, critic_state = pack_optimizer(critic, "critic")
    state = {"actor": actor_state, "critic": critic_state, "scale": scale.state_dict()}
    return tensors | actor_tensors | critic_tensors, state


def _restore(
    models: Models,
    actor: torch.optim.Optimizer,
    critic: torch.optim.Optimizer,
    scale: RunningScale,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    for name, model in (("policy.", models.policy), ("value.", models.critic)):
        model.load_state_dict({k[len(name) :]: v for k, v in tensors.items() if k.startswith(name)})
    unpack_optimizer(actor, tensors, state["actor"], "actor")
    unpack_optimizer(critic, tensors, state["critic"], "critic")
    scale.load_state_dict(state["scale"])
