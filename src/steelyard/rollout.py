"""A PPO step up to its update: sampling, scoring, shaped rewards, advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steelyard.actors import Models
from steelyard.advantages import gae, group_mean, leave_one_out, over_greedy, per_token
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Tree
from steelyard.losses.policy import kl_k1
from steelyard.models.next_token import Nucleus
from steelyard.ppo_settings import PPOConfig
from steelyard.rewards import relative, shape, token_rewards
from steelyard.running import RunningScale, RunningStd
from steelyard.sampling import Sample, SamplingConfig, sample


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What one step sampled and scored; N prompts, K responses, T tokens, zero at padding. No critic: no values.

    All but the nuclei is on the CPU, where the small sums of rewards and advantages are quickest.

    `logprobs_NKT` are those of the distribution that was sampled from, `kept` its nucleus at each token, prompt by
    prompt (None: none was cut out). `kl_NKT` is log p - log p_SFT under sampling's temperature and repetition penalty,
    before the nucleus is cut out; `kl_plain_NK` its sum over tokens for both models as they are.
    """

    trees: list[Tree]
    mask_NKT: Bool[Tensor, "N K T"]
    logprobs_NKT: Float[Tensor, "N K T"]
    values_NKT: Float[Tensor, "N K T"] | None
    kl_NKT: Float[Tensor, "N K T"]
    kl_plain_NK: Float[Tensor, "N K"]
    rewards_NK: Float[Tensor, "N K"]
    ended_NK: Bool[Tensor, "N K"]
    nll_sft: float
    entropy: float
    kept: list[Nucleus] | None = None


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
    device = models.policy.device
    mask = torch.zeros(N, K, T, dtype=torch.bool, device=device)
    logprobs, values, kl = (torch.zeros(N, K, T, device=device) for _ in range(3))
    rewards, kl_plain = (torch.zeros(N, K, device=device) for _ in range(2))
    nll, entropy = torch.zeros(2, dtype=torch.float64, device=device)
    kept: dict[int, Nucleus] = {}
    for group in pack([len(t) for t in trees], config.max_tokens):
        # Three of four models read them; the reward model reads its one token among all.
        batch = collate([trees[i] for i in group], models.encoder.pad_id, device, reads="responses")
        t = batch.mask_BKR.shape[-1]
        now, estimates = models.act(batch)
        full, plain = models.refer(batch)
        mask[group, :, :t] = batch.mask_BKR
        logprobs[group, :, :t] = now.sampled_BKR
        if estimates is not None:
            values[group, :, :t] = estimates * batch.mask_BKR
        # Between the whole distributions: inside a nucleus that has shrunk to one token all policies agree.
        kl[group, :, :t] = kl_k1(now.full_BKR, full)
        kl_plain[group] = kl_k1(now.plain_BKR, plain).sum(-1)
        if now.kept is not None:
            sizes = [sum(map(len, trees[i].responses)) for i in group]
            kept |= dict(zip(group, now.kept.split(sizes), strict=True))
        rewards[group] = models.reward(batch)
        nll -= plain.sum()
        entropy += now.entropy_BKR.sum()
    # Read here alone: on a GPU every number that is read waits for all that was asked of it before.
    mask, logprobs, values, kl, kl_plain, rewards = (x.cpu() for x in (mask, logprobs, values, kl, kl_plain, rewards))
    tokens = int(mask.sum())
    ended = torch.tensor([[s.ended for s in group] for group in drawn])
    held = None if models.critic is None else values
    nuclei = [kept[i] for i in range(N)] if kept else None
    return Rollouts(
        trees, mask, logprobs, held, kl, kl_plain, rewards, ended, nll.item() / tokens, entropy.item() / tokens, nuclei
    )


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
    *,
    kl_coef: float,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "B T"], Float[Tensor, "N"] | None]:
    """(shaped rewards, the same as token rewards with the KL penalty, the greedy responses' sums of theirs); B = N K.

    The running scale learns from the sampled responses alone. With `scale_kl` the size of its factor multiplies
    `kl_coef` too: a negative one (`scaling: signed`) turns the reward around, but must not pay for distance.
    """
    paid_NK = shape_rewards(rollouts, baselines_NK, models, scale, config)
    if config.scale_kl:
        kl_coef *= abs(scale.factor)
    rewards_BT = _with_kl(rollouts, paid_NK, kl_coef)
    if greedy is None:
        return paid_NK, rewards_BT, None
    alone_N1 = shape_rewards(greedy, baselines_NK, models, scale, config, learn=False)
    return paid_NK, rewards_BT, _with_kl(greedy, alone_N1, kl_coef).sum(-1)


def _with_kl(rollouts: Rollouts, paid_NK: Float[Tensor, "N K"], kl_coef: float) -> Float[Tensor, "B T"]:
    kl, mask = rollouts.kl_NKT.flatten(0, 1), rollouts.mask_NKT.flatten(0, 1)
    return token_rewards(paid_NK.flatten(), kl, mask, kl_coef=kl_coef)


def shape_rewards(
    rollouts: Rollouts,
    baselines_NK: Float[Tensor, "N k"] | None,
    models: Models,
    scale: RunningScale | RunningStd,
    config: PPOConfig,
    *,
    learn: bool = True,
) -> Float[Tensor, "N K"]:
    """Raw scores to what PPO is paid (`rewards.shape`), on the normalised scale.

    `learn` takes the rewards into the running scale first.
    """
    normal_NK = models.normal(rollouts.rewards_NK)
    normal, against = normal_NK.flatten(), None
    if baselines_NK is not None:
        against = models.normal(baselines_NK).repeat_interleave(normal_NK.shape[1], 0)
    if learn and isinstance(scale, RunningStd):
        scale.update(relative(normal, against, config.reward))
    elif learn and isinstance(scale, RunningScale) and config.reward == "contrastive":
        scale.update(normal, relative(normal, against, config.reward))
    paid = shape(
        normal, against, rollouts.ended_NK.flatten(), how=config.reward, scale=scale.factor, limit=config.reward_clip,
        missing_eos_penalty=config.missing_eos_penalty,
    )  # fmt: skip
    return paid.view_as(normal_NK)


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
