"""PPO on plain or shaped rewards, with a critic or without (Secrets of RLHF II, section 2.1 and App. B).

One step: sample K responses to each of a batch of prompts, score them, shape the scores by what the SFT model's
stored responses to the same prompt earned, add the per-token KL penalty, estimate advantages, and take clipped
steps on policy and critic. Prompt and responses share one row in every forward pass.

The log-probabilities of the ratio are those of the distribution that was sampled from: temperature, repetition
penalty, and the nucleus as it was at the time of sampling (`models.next_token`).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steelyard.actors import Ensemble, Models
from steelyard.advantages import whiten
from steelyard.baselines import baseline_key, drawn_otherwise, read_baselines, require_same_responses
from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.data.collate import TreeBatch, collate, pack
from steelyard.data.encode import Encoder
from steelyard.data.load import load_prompts
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.losses.policy import clipped_surrogate, kl_k3, value_loss
from steelyard.models.lora import load_trained_state, trained_state
from steelyard.models.next_token import Nucleus
from steelyard.models.policy import PolicyModel
from steelyard.ppo_settings import PPOConfig as PPOConfig
from steelyard.ppo_settings import check as check
from steelyard.progress import Progress
from steelyard.rewards import references
from steelyard.rollout import Rollouts, collect, estimate, pay
from steelyard.run_dir import RunDir
from steelyard.running import KLController, RunningScale, RunningStd, ScaleMode
from steelyard.sampling import Sample
from steelyard.scorer import load_scorer
from steelyard.train.optim import batches, epoch_order, require_finite_gradient, set_rate
from steelyard.types import Prompt
from steelyard.watch import (
    Scene,
    guard,
    naming_the_batch,
    require_finite,
    require_finite_rewards,
    rollout_metrics,
)


class Learner:
    """Everything that the next step depends on and a checkpoint holds: models, optimisers, running scale, KL weight.

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
        self.kl = KLController(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
        learning: dict[str, tuple[str, nn.Module | None]] = {
            "actor": ("policy.", self.models.policy),
            "critic": ("value.", self.models.critic),
        }
        self.settings = {"actor": config.actor, "critic": config.critic}
        self.waits = {"actor": config.critic_warmup, "critic": 0}
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
            tensors |= {prefix + k: v for k, v in trained_state(model).items()} | packed
        return tensors, state | {"scale": self.scale.state_dict(), "kl": self.kl.state_dict()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        for name, (prefix, model, optimizer) in self.parts.items():
            load_trained_state(model, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
            unpack_optimizer(optimizer, tensors, state[name], name)
        self.scale.load_state_dict(state["scale"])
        self.kl.load_state_dict(state["kl"])

    def set_rates(self, step: int, steps: int) -> None:
        """The learning rates of a step (0-based). The actor's schedule begins when the critic has warmed up."""
        for name, (_, _, optimizer) in self.parts.items():
            waits = self.waits[name]
            set_rate(optimizer, self.settings[name].rate(max(step - waits, 0), steps - waits))

    def move(self, step: int) -> float:
        """One optimiser step on the gradients at hand; returns the norm of the policy's.

        Raises FloatingPointError if a gradient is not finite, before anything moves.
        """
        norms = {}
        for name, (_, model, _) in self.parts.items():
            norms[name] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), self.settings[name].max_grad_norm))
            remedy = f"Lower {name}.lr, set reward_clip, or raise kl_coef"
            require_finite_gradient(norms[name], step, of=name, remedy=remedy)
        for _, _, optimizer in self.parts.values():
            optimizer.step()
        self.forget()
        return norms["actor"]

    def forget(self) -> None:
        """Drop the gradients at hand."""
        for _, _, optimizer in self.parts.values():
            optimizer.zero_grad(set_to_none=True)


class Task:
    """What the policy learns on: prompts, their token ids, their baselines (or LSC's references), a gold scorer."""

    def __init__(self, config: PPOConfig, models: Models, quiet: bool) -> None:
        self.gold = load_scorer(config.gold) if config.gold else None
        self.prompts, self.ids, self.names = training_prompts(config, models.encoder, quiet=quiet)
        self.streams = stream_keys(self.prompts)
        self.baselines_NK = _baselines(config, self.prompts, models)

    def stored(self, chosen: Sequence[int]) -> Float[Tensor, "N k"] | None:
        """The baselines of some prompts; None with plain rewards."""
        return None if self.baselines_NK is None else self.baselines_NK[chosen]

    def score(self, encoder: Encoder, chosen: Sequence[int], drawn: Sequence[Sequence[Sample]]) -> dict[str, float]:
        """The mean gold reward of responses; nothing without a gold scorer."""
        if self.gold is None:
            return {}
        pairs = [(self.prompts[i], s) for i, group in zip(chosen, drawn, strict=True) for s in group]
        return {"ppo/gold": float(np.mean([self.gold(p, encoder.decode(s.tokens)) for p, s in pairs]))}


def train_ppo(
    config: PPOConfig,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    look: Callable[[int, int, PolicyModel], None] | None = None,
) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the policy in `out/model`; returns the result.

    `look(step, steps, policy)` is called after each step and before its checkpoint, so a resumed run may repeat calls;
    it must leave the policy as it is.

    Raises:
        InputError: prompts, baselines, models or settings do not fit, or `out` holds a run that this cannot go on with.
        FloatingPointError: something is not finite, or past a bound that `config` sets; names step and prompts.
    """
    check(config)
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return run.result()
        learner = Learner(config)
        models = learner.models
        task, first = Task(config, models, quiet), 0
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            learner.restore(tensors, state)

        # Fewer than half of a step's prompts would be little to whiten over and to take a whole step on.
        least = -(-config.prompts_per_step // 2)
        order = batches(len(task.prompts), config.prompts_per_step, config.seed, first, config.steps, least=least)
        with Progress(config.steps, "PPO", start=first, quiet=quiet or None) as progress:
            for step, chosen in enumerate(order, first + 1):
                began = time.perf_counter()
                names, prompts = [task.names[i] for i in chosen], [task.prompts[i] for i in chosen]
                scene = Scene(step, names, prompts)
                with naming_the_batch(scene, run.path, models.encoder):
                    sampled, rollouts = take_step(learner, task, chosen, scene, config)
                drawn, metrics = scene.drawn, scene.metrics
                run.log(step, metrics)
                tokens = sum(len(t) for t in rollouts.trees)
                seconds = time.perf_counter() - began
                run.time(step, {"seconds": seconds, "sampling": sampled - began, "tokens_per_second": tokens / seconds})
                progress.update(step, tokens=tokens, reward=metrics["ppo/reward_raw"], kl=metrics["ppo/kl"])
                if step % config.sample_every == 0 or step == config.steps:
                    _write_samples(run, step, models.encoder, task.prompts, chosen, drawn, rollouts)
                if look is not None:
                    look(step, config.steps, models.policy)
                if step % config.save_every == 0 and step < config.steps:
                    run.save(step, *learner.state())

        models.policy.save(out / "model", models.encoder)
        result = {"steps": config.steps, "prompts": len(task.prompts), **metrics}
        run.finish(result)
        return result


def take_step(
    learner: Learner, task: Task, chosen: Sequence[int], scene: Scene, config: PPOConfig
) -> tuple[float, Rollouts]:
    """One step of PPO, recorded in `scene`; returns the time at which its responses were there and scored, and them."""
    step, models, scale = scene.step, learner.models, learner.scale
    keys = [f"{step}{task.streams[i]}" for i in chosen]
    scene.drawn, rollouts, greedy = collect(models, [task.ids[i] for i in chosen], keys, config)
    scene.rollouts, scene.greedy = rollouts, greedy
    require_finite_rewards(rollouts, step)
    if greedy is not None:
        require_finite_rewards(greedy, step, "greedy responses")
    sampled, kl_coef = time.perf_counter(), learner.kl.coef

    baselines_NK = task.stored(chosen)
    paid_NK, rewards_BT, greedy_N = pay(rollouts, greedy, baselines_NK, models, scale, config, kl_coef=kl_coef)
    scene.paid_NK = paid_NK
    advantages_BT, returns_BT = estimate(rollouts, rewards_BT, greedy_N, config)
    metrics = scene.metrics
    metrics |= rollout_metrics(rollouts, paid_NK, rewards_BT, advantages_BT, returns_BT, scale)
    metrics |= {"ppo/kl_coef": kl_coef}
    if scale.factor:
        # What a nat costs in units of the reward before it was scaled: arms compare at equal prices.
        metrics |= {"ppo/kl_price": kl_coef if config.scale_kl else kl_coef / abs(scale.factor)}
    guard(metrics, step, config)
    metrics |= update(learner, rollouts, advantages_BT, returns_BT, step, config)
    metrics |= task.score(models.encoder, chosen, scene.drawn)
    require_finite(metrics, step)
    if step > config.critic_warmup:
        learner.kl.update(metrics["ppo/kl"], rollouts.rewards_NK.numel())
    return sampled, rollouts


def update(
    learner: Learner,
    rollouts: Rollouts,
    advantages_BT: Float[Tensor, "B T"],
    returns_BT: Float[Tensor, "B T"] | None,
    step: int,
    config: PPOConfig,
) -> dict[str, float]:
    """`epochs` passes of clipped steps over the rollouts; losses are means over the minibatch's tokens.

    Ends early, before the optimiser step, at a minibatch on which the policy is further than `stop_epochs_at_kl` from
    the one that sampled.
    """
    learner.set_rates(step - 1, config.steps)
    device = learner.models.policy.device
    per_token_NKT = [x.to(device) for x in _per_token(rollouts, advantages_BT, returns_BT)]
    sums, tokens, norm, moved, updates = np.zeros(3), 0, 0.0, 0.0, 0
    for rows in _minibatches(len(rollouts.trees), step, config):
        total = int(rollouts.mask_NKT[rows].sum())
        gathered = torch.zeros(4, dtype=torch.float64, device=device)
        for group in pack([len(rollouts.trees[i]) for i in rows], config.max_tokens):
            picked = [rows[i] for i in group]
            trees = [rollouts.trees[i] for i in picked]
            batch = collate(trees, learner.models.encoder.pad_id, device, reads="responses")
            t = batch.mask_BKR.shape[-1]
            kept = Nucleus.join([rollouts.kept[i] for i in picked]) if rollouts.kept else None
            gathered += backward(
                learner.models, batch, [x[picked, :, :t] for x in per_token_NKT], kept, total, step, config
            )
        part = gathered.cpu().numpy()
        moved = float(part[3] / total)
        if updates and config.stop_epochs_at_kl is not None and moved > config.stop_epochs_at_kl:
            learner.forget()
            break
        sums, tokens, updates = sums + part[:3], tokens + total, updates + 1
        norm = learner.move(step)
    names = ["ppo/policy_loss", "ppo/clip_fraction", "ppo/value_loss"][: 3 if returns_BT is not None else 2]
    means = {name: float(x / tokens) for name, x in zip(names, sums, strict=False)}
    return means | {"ppo/updates": float(updates), "ppo/kl_update": moved, "ppo/grad_norm": norm}


def _per_token(
    rollouts: Rollouts, advantages_BT: Float[Tensor, "B T"], returns_BT: Float[Tensor, "B T"] | None
) -> list[Float[Tensor, "N K T"]]:
    """Log-probabilities when sampled, advantages, and with a critic values when sampled and returns."""
    shape = rollouts.mask_NKT.shape
    if rollouts.values_NKT is None or returns_BT is None:
        # Advantages without a critic are differences of rewards and are used as they are.
        return [rollouts.logprobs_NKT, advantages_BT.view(shape)]
    white = whiten(advantages_BT, rollouts.mask_NKT.flatten(0, 1)).view(shape)
    return [rollouts.logprobs_NKT, white, rollouts.values_NKT, returns_BT.view(shape)]


def _minibatches(n: int, step: int, config: PPOConfig) -> Iterator[list[int]]:
    """Rows of each optimiser step of all epochs, in an order of their own; parts differ by one row at most."""
    cuts = [n * i // config.minibatches for i in range(config.minibatches + 1)]
    for epoch in range(config.epochs):
        order = epoch_order(n, config.seed + step * 7919 + epoch, 0)
        yield from (order[a:b] for a, b in pairwise(cuts) if b > a)


def backward(
    models: Models,
    batch: TreeBatch,
    per_token_BKR: Sequence[Tensor],
    kept: Nucleus | None,
    total: int,
    step: int,
    config: PPOConfig,
) -> Float[Tensor, "4"]:
    """Add the gradients of a few prompts; returns the sums over tokens of policy loss, clipping, value loss, and of the
    KL from the policy that sampled to this one (k3), in float64 and where the models are: nothing is read here.

    `per_token_BKR`: log-probabilities when sampled, advantages, and with a critic values when sampled and returns.
    `kept`: the nucleus when sampled.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=batch.real_r.device)
    old, advantage, *critic = per_token_BKR
    learns, states, loss = step > config.critic_warmup, None, torch.zeros((), device=sums.device)

    def over_tokens(x: Tensor) -> Tensor:
        return x.flatten()[batch.real_r].sum()

    if learns or models.shared:
        with torch.set_grad_enabled(learns):
            states = models.policy.states(batch)
    if learns and states is not None:
        now = models.logprobs(states, batch, kept)
        policy_loss, clipped = clipped_surrogate(now, old, advantage, clip=config.clip)
        loss = over_tokens(policy_loss) / total
        moved = kl_k3(old, now.detach())
        for place, x in ((0, policy_loss), (1, clipped), (3, moved)):
            sums[place] = over_tokens(x.detach())
    if learns and not models.shared:
        # Before the critic's pass, so that only one of the two graphs is in memory.
        loss.backward()
    if critic and (values := models.values(batch, states)) is not None:
        critic_loss = value_loss(values, *critic, clip=config.value_clip)
        value = over_tokens(critic_loss) / total
        (loss + config.value_coef * value if models.shared else value).backward()
        sums[2] = over_tokens(critic_loss.detach())
    return sums


def stream_keys(prompts: Sequence[Prompt]) -> list[str]:
    """What names each prompt's random numbers: its text and, for a repeated prompt, which copy in the file it is.

    So copies draw different samples, and nothing else in the file or in a batch matters.
    """
    counts: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        key = prompt_key(prompt)
        # A first copy has the name it would have alone. What stands before the slash holds no text of a prompt.
        keys.append(f".{counts[key]}/{key}" if counts[key] else f"/{key}")
        counts[key] += 1
    return keys


def training_prompts(
    config: PPOConfig, encoder: Encoder, *, quiet: bool
) -> tuple[list[Prompt], list[tuple[int, ...]], list[str]]:
    """(prompts that leave room for a response, their tokens, their ids in the file).

    Raises InputError if they are fewer than one step needs.
    """
    room = config.max_length - config.sampling.max_new_tokens
    rows = load_prompts(config.prompts).items[: config.limit]
    prompts = [p.prompt for p in rows]
    ids = [encoder.prompt_ids(p) for p in prompts]
    fits = [i for i, x in enumerate(ids) if len(x) <= room]
    if len(fits) < config.prompts_per_step:
        raise InputError(
            f"{config.prompts}: {len(fits)} of {len(prompts)} prompts leave room for "
            f"{config.sampling.max_new_tokens} new tokens within max_length = {config.max_length}; prompts_per_step "
            f"= {config.prompts_per_step} needs more: lower it, or add prompts"
            + (f"; limit = {config.limit} lets only the first prompts in" if len(rows) == config.limit else "")
        )
    if not quiet:
        rest = "; the others leave no room within max_length" if len(fits) < len(prompts) else ""
        print(f"{len(fits)} of {len(prompts)} prompts used{rest}")
    return [prompts[i] for i in fits], [ids[i] for i in fits], [rows[i].id for i in fits]


def _baselines(config: PPOConfig, prompts: Sequence[Prompt], models: Models) -> Float[Tensor, "N k"] | None:
    """What each prompt's rewards are set against, on the scale of `models.reward`; None with plain rewards."""
    files = config.baseline_files
    if config.reward == "plain":
        return None
    # Responses of the reference, or of the policy as it starts: where it has moved before, both can be meant.
    policies = [p for p in (config.reference, config.policy) if p is not None]
    keys = [baseline_key(p, models.encoder) for p in prompts]
    scores: list[Tensor] = []
    for path, model in zip(files, config.reward_models, strict=True):
        # The policy's weights are digested once: all files must hold the first one's responses.
        stored = read_baselines(path, k=config.k, policy=None if scores else policies, reward_model=model)
        if missing := sum(key not in stored for key in keys):
            raise InputError(f"{path}: no baselines for {missing} of {len(prompts)} prompts; sample them first")
        scores.append(torch.from_numpy(np.stack([stored[key] for key in keys])))
    require_same_responses(files)
    if differs := drawn_otherwise(files[0], config.sampling, config.precision):
        # Allowed: baselines may be drawn as people will draw. But then the contrast at the start is not 0 on average.
        print(f"warning: {files[0]}: not drawn as PPO samples: {differs}", file=sys.stderr, flush=True)
    baselines_NK = models.reward.combine(scores) if isinstance(models.reward, Ensemble) else scores[0]
    if config.baseline == "shrunk" and min(baselines_NK.shape) < 2:
        raise InputError(
            f"{files[0]}: {len(baselines_NK)} prompts with {baselines_NK.shape[1]} baselines each; "
            "baseline = shrunk needs 2 of both: sample more, or use mean"
        )
    pooled = config.lsc_reference == "all"
    return references(
        baselines_NK, config.reward, baseline=config.baseline, lsc_percentile=config.lsc_percentile, pooled=pooled
    )


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
