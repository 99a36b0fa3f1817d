"""A PPO step up to its update: models, sampling, scoring, shaped rewards, advantages, and what a run is watched by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steelyard.advantages import gae, group_mean, leave_one_out, over_greedy, per_token
from steelyard.data.collate import TreeBatch, collate, pack
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.losses.policy import kl_k1, masked_mean
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.rewards import (
    Aggregate,
    RunningScale,
    RunningStd,
    aggregate,
    clip,
    contrastive,
    lsc,
    missing_eos,
    par,
    token_rewards,
)
from steelyard.sampling import Sample, SamplingConfig, sample

if TYPE_CHECKING:
    from steelyard.train.ppo import PPOConfig


class Ensemble(nn.Module):
    """Several reward models as one: each by its own mean and std (`normals`), then aggregated."""

    def __init__(
        self,
        members: Sequence[RewardModel],
        normals: Sequence[tuple[float, float]],
        how: Aggregate,
        uncertainty_weight: float,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.normals = tuple(normals)
        self.how: Aggregate = how
        self.uncertainty_weight = uncertainty_weight

    def forward(self, batch: TreeBatch) -> Float[Tensor, "B K"]:
        """Aggregated rewards, float32."""
        scores = [(m(batch) - mean) / std for m, (mean, std) in zip(self.members, self.normals, strict=True)]
        return aggregate(torch.stack(scores), self.how, uncertainty_weight=self.uncertainty_weight)


class Models:
    """Policy, SFT reference, reward model and, where there is one, the critic.

    The critic is the twin of the (first) reward model, read on the normalised reward's scale. Several reward models
    act as one whose scores are normalised already.

    Raises InputError if the folders do not fit together, or a reward model's scores have no spread.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.encoder = Encoder.load(config.policy, max_length=config.max_length)
        folders, precision = config.reward_models, config.precision
        for folder in folders:
            _require_tokenizer(self.encoder, folder, config)
        self.policy = PolicyModel.load(config.policy, precision=precision)
        self.reference = PolicyModel.load(config.policy, precision=precision).requires_grad_(False)
        members = [RewardModel.load(f, precision=precision).requires_grad_(False) for f in folders]
        self.critic = RewardModel.load(folders[0], precision=precision) if config.advantage == "gae" else None
        normals = [m.normal if config.normalise else (0.0, 1.0) for m in members]
        for folder, (_, std) in zip(folders, normals, strict=True):
            if not std > 0:
                raise InputError(f"{folder}: its rewards have no spread (std {std}); nothing to learn from")
        self.reward: nn.Module = members[0]
        self.mean, self.std = self.value_mean, self.value_std = normals[0]
        if len(members) > 1:
            self.reward = Ensemble(members, normals, config.aggregate, config.uncertainty_weight)
            self.mean, self.std = 0.0, 1.0
        for model in (self.policy, self.reference, self.reward, self.critic):
            if model is not None:
                model.eval()

    def normal(self, raw: Tensor) -> Tensor:
        """A raw reward on the normalised scale."""
        return (raw - self.mean) / self.std

    def values(self, batch: TreeBatch) -> Float[Tensor, "B K T"] | None:
        """The critic's values on the normalised scale; None without a critic."""
        return None if self.critic is None else (self.critic.values(batch) - self.value_mean) / self.value_std


def _require_tokenizer(ours: Encoder, folder: str, config: PPOConfig) -> None:
    theirs, mine = Encoder.load(folder, max_length=config.max_length).tokenizer, ours.tokenizer
    if (theirs.get_vocab(), theirs.chat_template) != (mine.get_vocab(), mine.chat_template):
        raise InputError(
            f"{folder}: policy and reward model must share one tokenizer (vocabulary and chat template); train the "
            f"reward model from {config.policy}"
        )


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What one step sampled and scored; N prompts, K responses, T tokens, zero at padding. No critic: no values."""

    trees: list[Tree]
    mask_NKT: Bool[Tensor, "N K T"]
    logprobs_NKT: Float[Tensor, "N K T"]
    values_NKT: Float[Tensor, "N K T"] | None
    kl_NKT: Float[Tensor, "N K T"]
    rewards_NK: Float[Tensor, "N K"]
    ended_NK: Bool[Tensor, "N K"]
    nll_sft: float
    entropy: float


def draw(
    models: Models, ids: Sequence[tuple[int, ...]], keys: Sequence[str], config: SamplingConfig, *, k: int, seed: int
) -> list[list[Sample]]:
    """k responses of the policy to each prompt."""
    end_id, pad_id = models.encoder.end_id, models.encoder.pad_id
    return sample(models.policy, ids, keys, k=k, config=config, end_id=end_id, pad_id=pad_id, seed=seed)


def draw_greedy(models: Models, ids: Sequence[tuple[int, ...]], config: SamplingConfig) -> list[list[Sample]]:
    """The one response to each prompt that takes the most probable token every time."""
    # The smallest set of tokens with this probability is the most probable token alone: nothing is left to chance.
    greedy = config.model_copy(update={"top_p": 1e-9})
    return draw(models, ids, [str(i) for i in range(len(ids))], greedy, k=1, seed=0)


@torch.no_grad()
def roll_out(
    models: Models,
    ids: Sequence[tuple[int, ...]],
    drawn: Sequence[Sequence[Sample]],
    config: PPOConfig,
) -> Rollouts:
    """Score sampled responses with all models; as many responses to every prompt."""
    trees = [Tree(p, tuple(s.tokens for s in group)) for p, group in zip(ids, drawn, strict=True)]
    N, K, T = len(trees), len(drawn[0]), max(len(s.tokens) for group in drawn for s in group)
    mask = torch.zeros(N, K, T, dtype=torch.bool)
    logprobs, values, kl = (torch.zeros(N, K, T) for _ in range(3))
    rewards, nll, entropy = torch.zeros(N, K), 0.0, 0.0
    for group in pack([len(t) for t in trees], config.max_tokens):
        batch = collate([trees[i] for i in group], models.encoder.pad_id)
        t = batch.mask_BKR.shape[-1]
        now, then = (m(batch, temperature=config.sampling.temperature) for m in (models.policy, models.reference))
        mask[group, :, :t] = batch.mask_BKR
        logprobs[group, :, :t] = now.sampled_BKR
        if (estimates := models.values(batch)) is not None:
            values[group, :, :t] = estimates * batch.mask_BKR
        kl[group, :, :t] = kl_k1(now.sampled_BKR, then.sampled_BKR)
        rewards[group] = models.reward(batch)
        nll -= then.plain_BKR.sum().item()
        entropy += now.entropy_BKR.sum().item()
    tokens = int(mask.sum())
    ended = torch.tensor([[s.ended for s in group] for group in drawn])
    held = None if models.critic is None else values
    return Rollouts(trees, mask, logprobs, held, kl, rewards, ended, nll / tokens, entropy / tokens)


def collect(
    models: Models, ids: Sequence[tuple[int, ...]], keys: Sequence[str], config: PPOConfig
) -> tuple[list[list[Sample]], Rollouts, Rollouts | None]:
    """(responses, the same scored, and greedy responses scored where ReMax needs them)."""
    drawn = draw(models, ids, keys, config.sampling, k=config.samples_per_prompt, seed=config.seed)
    greedy = None
    if config.advantage == "remax":
        greedy = roll_out(models, ids, draw_greedy(models, ids, config.sampling), config)
    return drawn, roll_out(models, ids, drawn, config), greedy


def pay(
    rollouts: Rollouts,
    greedy: Rollouts | None,
    baselines_NK: Float[Tensor, "N k"] | None,
    models: Models,
    scale: RunningScale | RunningStd,
    config: PPOConfig,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "B T"], Float[Tensor, "N"] | None]:
    """(shaped rewards, the same as token rewards with the KL penalty, the greedy responses' sums of theirs); B = N K.

    The running scale learns from the sampled responses alone.
    """
    paid_NK = shape_rewards(rollouts, baselines_NK, models, scale, config)
    rewards_BT = _with_kl(rollouts, paid_NK, config)
    if greedy is None:
        return paid_NK, rewards_BT, None
    alone_N1 = shape_rewards(greedy, baselines_NK, models, scale, config, learn=False)
    return paid_NK, rewards_BT, _with_kl(greedy, alone_N1, config).sum(-1)


def _with_kl(rollouts: Rollouts, paid_NK: Float[Tensor, "N K"], config: PPOConfig) -> Float[Tensor, "B T"]:
    kl, mask = rollouts.kl_NKT.flatten(0, 1), rollouts.mask_NKT.flatten(0, 1)
    return token_rewards(paid_NK.flatten(), kl, mask, kl_coef=config.kl_coef)


def shape_rewards(
    rollouts: Rollouts,
    baselines_NK: Float[Tensor, "N k"] | None,
    models: Models,
    scale: RunningScale | RunningStd,
    config: PPOConfig,
    *,
    learn: bool = True,
) -> Float[Tensor, "N K"]:
    """Raw scores to what PPO is paid: normalise, set against the baselines, scale, clip, missing end.

    `learn` takes the rewards into the running scale first.
    """
    normal_NK = models.normal(rollouts.rewards_NK)
    shaped = normal = normal_NK.flatten()
    if baselines_NK is not None:
        baselines = models.normal(baselines_NK).repeat_interleave(normal_NK.shape[1], 0)
        if config.reward == "lsc":
            shaped = lsc(normal, baselines[:, 0])
        else:
            shaped = par(normal, baselines) if config.reward == "par" else contrastive(normal, baselines)
    if learn and isinstance(scale, RunningStd):
        scale.update(shaped)
    elif learn and isinstance(scale, RunningScale) and config.reward == "contrastive":
        scale.update(normal, shaped)
    paid = (shaped * scale.factor).view_as(normal_NK)
    if config.reward_clip is not None:
        paid = clip(paid, config.reward_clip)
    return missing_eos(paid, rollouts.ended_NK, penalty=config.missing_eos_penalty)


def estimate(
    rollouts: Rollouts, rewards_BT: Float[Tensor, "B T"], greedy_N: Float[Tensor, "N"] | None, config: PPOConfig
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
    """(advantages, and with a critic the returns it learns). Without one, a response's tokens share its advantage."""
    mask = rollouts.mask_NKT.flatten(0, 1)
    if rollouts.values_NKT is not None:
        return gae(rewards_BT, rollouts.values_NKT.flatten(0, 1), mask, gamma=config.gamma, lam=config.lam)
    # Eq. 3 of Secrets of RLHF II, response by response: the score less the KL penalty of all its tokens.
    totals_NK = rewards_BT.sum(-1).view_as(rollouts.rewards_NK)
    if greedy_N is not None:
        advantages_NK = over_greedy(totals_NK, greedy_N)
    elif config.advantage == "rloo":
        advantages_NK = leave_one_out(totals_NK)
    else:
        advantages_NK = group_mean(totals_NK, normalise=config.group_std)
    return per_token(advantages_NK.flatten(), mask), None


def rollout_metrics(
    rollouts: Rollouts,
    paid_NK: Float[Tensor, "N K"],
    rewards_BT: Float[Tensor, "B T"],
    advantages_BT: Float[Tensor, "B T"],
    returns_BT: Float[Tensor, "B T"] | None,
    scale: RunningScale | RunningStd,
) -> dict[str, float]:
    """What a PPO step is watched by (Secrets of RLHF II, App. B); token means weigh all tokens alike."""
    mask = rollouts.mask_NKT.flatten(0, 1)
    metrics = {
        "ppo/reward_raw": rollouts.rewards_NK.mean().item(),
        "ppo/reward_std": rollouts.rewards_NK.std(correction=0).item(),
        "ppo/reward_shaped": paid_NK.mean().item(),
        "ppo/return": rewards_BT.sum(-1).mean().item(),
        "ppo/kl": rollouts.kl_NKT.sum(-1).mean().item(),
        "ppo/ppl_sft": math.exp(min(rollouts.nll_sft, 80.0)),
        "ppo/length": mask.sum(-1).float().mean().item(),
        "ppo/ended": rollouts.ended_NK.float().mean().item(),
        "ppo/entropy": rollouts.entropy,
        "ppo/advantage_std": advantages_BT[mask].std(correction=0).item(),
    }
    if rollouts.values_NKT is not None and returns_BT is not None:
        values = rollouts.values_NKT.flatten(0, 1)
        residual, spread = (returns_BT - values)[mask], returns_BT[mask].var(correction=0)
        metrics["ppo/value_mean"] = masked_mean(values, mask).item()
        # 1 is a perfect critic; with no spread in the returns there is nothing to explain.
        explained = (1 - residual.var(correction=0) / spread).item() if spread > 0 else 0.0
        metrics["ppo/explained_variance"] = explained
    return metrics | {"ppo/scale": scale.factor}


def require_finite(metrics: dict[str, float], step: int) -> None:
    """Raise FloatingPointError, naming step and metric, if one is not a finite number."""
    bad = {k: v for k, v in metrics.items() if not math.isfinite(v)}
    if bad:
        raise FloatingPointError(
            f"step {step}: {bad} is not finite; lower actor.lr, set reward_clip, or raise kl_coef, in a new run "
            "(resuming this one repeats the step)"
        )


def guard(metrics: dict[str, float], step: int, config: PPOConfig) -> None:
    """Raise FloatingPointError, naming the step, for a metric out of the bounds that `config` sets.

    Those are: finite always; `min_reward_std` and `max_kl` where given.
    """
    require_finite(metrics, step)
    std, kl = metrics["ppo/reward_std"], metrics["ppo/kl"]
    if config.min_reward_std is not None and std < config.min_reward_std:
        raise FloatingPointError(
            f"step {step}: the rewards' std {std:.4g} fell below min_reward_std = {config.min_reward_std:g}: responses "
            "hardly differ in reward any more; look at the samples, then raise kl_coef or the temperature, or lower "
            "actor.lr"
        )
    if config.max_kl is not None and kl > config.max_kl:
        raise FloatingPointError(
            f"step {step}: the KL of {kl:.4g} nats per response rose above max_kl = {config.max_kl:g}: the policy has "
            "left the SFT model; raise kl_coef or lower actor.lr"
        )
