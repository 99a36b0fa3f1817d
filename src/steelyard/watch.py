"""What a PPO run is watched by: its metrics, the guards that stop it, and the batch that they name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from steelyard.data.encode import Encoder
from steelyard.losses.policy import masked_mean
from steelyard.ppo_settings import PPOConfig
from steelyard.rollout import Rollouts
from steelyard.run_dir import write_json_atomic
from steelyard.running import RunningScale, RunningStd
from steelyard.sampling import Sample
from steelyard.types import Prompt


@dataclass
class Scene:
    """A step as far as it has come; ids and prompts are those of its batch."""

    step: int
    ids: Sequence[str]
    prompts: Sequence[Prompt]
    drawn: Sequence[Sequence[Sample]] = ()
    rollouts: Rollouts | None = None
    greedy: Rollouts | None = None
    paid_NK: Float[Tensor, "N K"] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


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
        "ppo/reward_std_within": rollouts.rewards_NK.std(-1, correction=0).mean().item(),
        "ppo/reward_shaped": paid_NK.mean().item(),
        "ppo/return": rewards_BT.sum(-1).mean().item(),
        "ppo/kl": rollouts.kl_NKT.sum(-1).mean().item(),
        "ppo/kl_plain": rollouts.kl_plain_NK.mean().item(),
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


class RewardCollapse(FloatingPointError):
    """The responses hardly differ in reward any more."""


def require_finite(metrics: dict[str, float], step: int) -> None:
    """Raise FloatingPointError, naming step and metric, if one is not a finite number."""
    bad = {k: v for k, v in metrics.items() if not math.isfinite(v)}
    if bad:
        raise FloatingPointError(
            f"step {step}: {bad} is not finite; lower actor.lr, set reward_clip, or raise kl_coef, in a new run "
            "(resuming this one repeats the step)"
        )


def require_finite_rewards(rollouts: Rollouts, step: int, of: str = "responses") -> None:
    """Raise FloatingPointError if a reward model gave no number: no setting of PPO mends that."""
    if bad := int((~rollouts.rewards_NK.isfinite()).sum()):
        raise FloatingPointError(
            f"step {step}: the rewards of {bad} of {rollouts.rewards_NK.numel()} {of} are not finite: the reward model "
            "is at fault, not the policy; take a sound one, or precision = float32"
        )


def guard(metrics: dict[str, float], step: int, config: PPOConfig) -> None:
    """Raise FloatingPointError, naming the step, for a metric out of the bounds that `config` sets.

    Those are: finite always; `min_reward_std` (RewardCollapse) and `max_kl` where given.
    """
    require_finite(metrics, step)
    # Prompts differ in reward even where a policy has but one answer to each.
    several = config.samples_per_prompt > 1
    std, kl = metrics["ppo/reward_std_within" if several else "ppo/reward_std"], metrics["ppo/kl"]
    if config.min_reward_std is not None and std < config.min_reward_std:
        whose = "of a prompt's responses" if several else "of the responses"
        raise RewardCollapse(
            f"step {step}: the rewards' std {whose}, {std:.4g}, fell below min_reward_std = {config.min_reward_std:g}: "
            "they hardly differ in reward any more; look at the samples, then raise kl_coef or the temperature, or "
            "lower actor.lr"
        )
    if config.max_kl is not None and kl > config.max_kl:
        raise FloatingPointError(
            f"step {step}: the KL of {kl:.4g} nats per response rose above max_kl = {config.max_kl:g}: the policy has "
            "left the SFT model; raise kl_coef or lower actor.lr"
        )


@contextmanager
def naming_the_batch(scene: Scene, folder: Path, encoder: Encoder) -> Iterator[None]:
    """A FloatingPointError from inside leaves the step's batch in `folder` and names its worst prompts."""
    try:
        yield
    except FloatingPointError as error:
        path = folder / f"offending-step-{scene.step:08d}.json"
        prompts = _describe(scene, encoder)
        badness = _sameness if isinstance(error, RewardCollapse) else _badness
        worst = sorted(range(len(prompts)), key=lambda n: badness(prompts[n]), reverse=True)[:3]
        record = {
            "step": scene.step,
            "error": str(error),
            "worst": [scene.ids[n] for n in worst],
            "metrics": {name: _written(value) for name, value in scene.metrics.items()},
            "prompts": prompts,
        }
        write_json_atomic(path, record)
        names = ", ".join(scene.ids[n] for n in worst)
        raise FloatingPointError(f"{error}. The worst of its {len(scene.ids)} prompts: {names}; all: {path}") from error


def _describe(scene: Scene, encoder: Encoder) -> list[dict[str, Any]]:
    """The batch in plain values: every response with its tokens and, as far as they are known, its numbers."""
    numbers: dict[str, Tensor] = {}
    if scene.rollouts is not None:
        numbers = {"reward": scene.rollouts.rewards_NK, "kl": scene.rollouts.kl_NKT.sum(-1)}
        if scene.rollouts.values_NKT is not None:
            numbers["values"] = scene.rollouts.values_NKT.sum(-1)
    if scene.paid_NK is not None:
        numbers["paid"] = scene.paid_NK
    described: list[dict[str, Any]] = []
    for n, (id_, prompt) in enumerate(zip(scene.ids, scene.prompts, strict=True)):
        text = prompt if isinstance(prompt, str) else [{"role": t.role, "content": t.content} for t in prompt]
        responses = [
            {"text": encoder.decode(s.tokens), "tokens": list(s.tokens), "ended": s.ended}
            | {name: _written(x[n, k].item()) for name, x in numbers.items()}
            for k, s in enumerate(scene.drawn[n] if scene.drawn else ())
        ]
        described.append({"id": id_, "prompt": text, "responses": responses})
        if scene.greedy is not None:
            described[-1]["greedy_reward"] = _written(scene.greedy.rewards_NK[n, 0].item())
    return described


def _badness(prompt: dict[str, Any]) -> tuple[int, float]:
    """Not finite comes first, then the KL."""
    values = [r.get(name, 0.0) for r in prompt["responses"] for name in ("reward", "kl", "values", "paid")]
    values.append(prompt.get("greedy_reward", 0.0))
    kl = [r["kl"] for r in prompt["responses"] if isinstance(r.get("kl"), float)]
    return sum(isinstance(v, str) for v in values), sum(kl)


def _sameness(prompt: dict[str, Any]) -> float:
    """The smaller the spread of a prompt's rewards, the worse."""
    rewards = [r["reward"] for r in prompt["responses"]]
    return min(rewards) - max(rewards)


def _written(value: float) -> float | str:
    """JSON has no NaN: a number that is not finite is written as text."""
    return value if math.isfinite(value) else str(value)
