"""Reward-model training on weighed preferences (Secrets of RLHF II, sections 2.1 and 2.4, and 3.1 as an option).

The loss reads each pair's `flip_prob`, `margin` and `weight`; which repair wrote them it does not know. With
contrastive learning every pair is computed under two dropout masks, and a term on the two views' features is added.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config, Device
from steelyard.data.collate import collate
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid
from steelyard.errors import InputError
from steelyard.evaluate.reward import reward_metrics, wins
from steelyard.group import ALONE, Group, GroupRun
from steelyard.losses.meta import reduce_gradients
from steelyard.models.cache import TrunkCache, lower_layers
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision, Stored
from steelyard.progress import Progress
from steelyard.train.contrastive import ContrastiveConfig, contrastive_step, new_prototypes
from steelyard.train.optim import OptimConfig, batches, set_rate, take_step, total_steps
from steelyard.train.pairwise import freeze_below, pair_losses, read_pairs, require_weight, shared_out
from steelyard.types import Preference

NORMAL_PAIRS = 512  # training pairs over which the reward's mean and std are measured at the end


class RewardConfig(Config):
    """Reward-model training."""

    data: str = Field(description="preferences: any file that `audit` or `repair` reads or writes")
    model: str = Field(description="model folder to start from: the SFT model, or a reward model to continue")
    validation: dict[str, str] = Field(
        default_factory=dict, description="name -> preference file, examined as it trains"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(32, ge=1, description="pairs a step")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=5e-6), description="optimiser; the paper's rate for 7B is 5e-6"
    )
    trainable_layers: int | None = Field(
        None, ge=0, description="train only this many top layers (and the head); none given: all"
    )
    activation_cache: str | None = Field(
        None,
        description="folder for the frozen layers' outputs: computed once, read by every run on the same pairs, "
        "repaired or not; needs trainable_layers",
    )
    activation_precision: Stored = Field(
        "float32", description="how those outputs are stored; bfloat16 takes half the disk and rounds them"
    )
    margin_in_flip: bool = Field(True, description="whether the margin also enters the flipped term of a soft label")
    contrastive: ContrastiveConfig = Field(
        default_factory=ContrastiveConfig, description="SimCSE or SwAV beside the loss; no method given: neither"
    )
    max_length: int = Field(512, ge=8, description="tokens of prompt and one response together")
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer pairs")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")
    max_tokens: int = Field(2048, ge=16, description="tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunk; weights, head and loss stay float32")
    device: Device = "cpu"
    seed: int = Field(0, ge=0, description="new head, order of the data, dropout masks, prototypes")
    eval_every: int | None = Field(
        50, ge=1, description="steps between examinations on the validation sets; none given: never"
    )
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")

    @model_validator(mode="after")
    def _refuse_frozen_features(self) -> RewardConfig:
        if self.trainable_layers == 0 and self.contrastive.method and self.contrastive.numbers()["beta"] > 0:
            raise ValueError(
                "contrastive.method: no effect with trainable_layers = 0, for the features then never change; train at "
                "least one layer, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _refuse_idle_cache(self) -> RewardConfig:
        if self.activation_cache is None:
            if "activation_precision" in self.given():
                raise ValueError("activation_precision: no effect without activation_cache; leave it out")
        elif self.trainable_layers is None:
            raise ValueError(
                "activation_cache: needs trainable_layers, for it keeps the outputs of the layers that are frozen; set "
                "trainable_layers, or leave it out"
            )
        elif self.contrastive.method is not None:
            raise ValueError(
                "activation_cache: no use with contrastive.method, whose dropout acts in the frozen layers too; leave "
                "it out"
            )
        return self


def train_reward(
    config: RewardConfig,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    rows: Sequence[int] | None = None,
    normal: bool = True,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the model in `out/model`; returns the result (in a group, the first
    process's).

    `rows` restricts the training data to these rows of the file's usable pairs (an ensemble's folds). Without `normal`
    the reward's mean and std are not measured, for who only compares raw rewards: that scores up to 512 pairs again.

    Raises:
        InputError: the data, the model or the settings do not fit, or `out` holds a run that this cannot go on with.
        FloatingPointError: a gradient is not finite; names the step.
    """
    require_shares(config, group)
    quiet = quiet or not group.first
    with GroupRun(group, out, config, resume=resume) as run:
        if run.finished:
            return run.result()
        encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
        model = RewardModel.from_language_model(
            config.model, pad_id=encoder.pad_id, seed=config.seed, precision=config.precision, device=config.device
        )
        freeze_below(model, config.trainable_layers)
        prototypes = new_prototypes(config, model.head.in_features, model.device)
        trained = [*model.parameters(), *([] if prototypes is None else [prototypes])]
        say = None if quiet else print
        pairs, trees = read_pairs(config.data, encoder, rows, on_invalid=config.on_invalid, say=say)
        require_weight(config.data, pairs)
        held_out = {
            name: read_pairs(path, encoder, on_invalid=config.on_invalid, say=say)[1]
            for name, path in config.validation.items()
        }
        cache = open_cache(config, model, [*trees, *(t for found in held_out.values() for t in found)], quiet=quiet)
        scorer = model if cache is None else cache
        steps = total_steps(len(trees), config.batch_size, config.epochs)
        optimizer = config.optim.build(trained)
        first, window = 0, []
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            if prototypes is not None:
                prototypes.data.copy_(tensors["prototypes"])
            unpack_optimizer(optimizer, tensors, state["optimizer"], "optimizer")
            window = [tensors["window"]] if "window" in tensors else []

        with Progress(steps, "reward model", start=first, quiet=quiet or None) as progress:
            for step, chosen in enumerate(batches(len(trees), config.batch_size, config.seed, first, steps), first + 1):
                began = time.perf_counter()
                set_rate(optimizer, config.optim.rate(step - 1, steps))
                batch = [pairs[i] for i in chosen], [trees[i] for i in chosen]
                if config.contrastive.method is None:
                    seen = reward_step(model, *batch, encoder, config, cache, group)
                else:
                    seen = contrastive_step(model, *batch, encoder, config, step=step, prototypes=prototypes)
                take_step(optimizer, config.optim, step, of="reward model", remedy="Lower optim.lr")
                window.append(seen)
                size = sum(len(trees[i]) for i in chosen)
                if step % config.log_every == 0 or step == steps:
                    run.log(step, _summary(window) | {"train/lr": optimizer.param_groups[0]["lr"]})
                    run.time(step, {"tokens_per_second": size / (time.perf_counter() - began)})
                    window = []
                progress.update(step, tokens=size, loss=_mean_loss(seen))
                if group.first and held_out and config.eval_every and (step % config.eval_every == 0 or step == steps):
                    run.log(step, _examine(scorer, held_out, encoder, config.max_tokens))
                if step % config.save_every == 0 and step < steps:
                    optimizer_tensors, optimizer_state = pack_optimizer(optimizer, "optimizer")
                    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors
                    if window:
                        tensors["window"] = torch.cat(window)
                    if prototypes is not None:
                        tensors["prototypes"] = prototypes.detach()
                    run.save(step, tensors, {"optimizer": optimizer_state})

        if not group.first:
            return run.result()
        if normal:
            sample = trees[:: -(-len(trees) // NORMAL_PAIRS)]
            rewards = scorer.score(sample, pad_id=encoder.pad_id, max_tokens=config.max_tokens)
            model.set_normal(float(rewards.mean()), float(rewards.std()))
        model.hf.config.steelyard_max_length = config.max_length
        model.save(out / "model", encoder)
        result: dict[str, Any] = {
            "steps": steps,
            "pairs": len(trees),
            "tokens": sum(map(len, trees)),
        }
        if normal:
            result |= {"reward_mean": model.normal[0], "reward_std": model.normal[1]}
        if config.contrastive.method is not None:
            result["contrastive"] = config.contrastive.numbers()
        run.finish(result)
        return run.result()


def reward_step(
    model: RewardModel,
    pairs: Sequence[Preference],
    trees: Sequence[Tree],
    encoder: Encoder,
    config: RewardConfig,
    cache: TrunkCache | None = None,
    group: Group = ALONE,
) -> Float[Tensor, "B 4"]:
    """Accumulate the gradient of the batch's weighted mean loss, whatever the grouping into micro-batches and
    the number of processes.

    With a `cache` the outputs of the frozen layers are read from it.

    Returns, per pair: loss, weight, r(chosen), r(rejected); on the CPU.
    """
    total = sum(p.weight for p in pairs)
    seen = torch.zeros(len(pairs), 4, device=model.device)
    if total == 0:
        return seen.cpu()
    for micro in shared_out(trees, config.max_tokens, group):
        inside = [trees[i] for i in micro]
        if cache is None:
            rewards = model(collate(inside, encoder.pad_id, model.device))
        else:
            rewards = cache.rewards(inside, pad_id=encoder.pad_id)
        loss = pair_losses(rewards, [pairs[i] for i in micro], config.margin_in_flip)
        weight = torch.tensor([pairs[i].weight for i in micro], device=model.device)
        ((loss * weight).sum() / total).backward()
        seen[micro] = torch.stack([loss.detach(), weight, *rewards.detach().T], 1)
    if group.size > 1:
        reduce_gradients([p for p in model.parameters() if p.requires_grad], group.sum_)
    group.sum_(seen)
    return seen.cpu()


def require_shares(config: RewardConfig, group: Group) -> None:
    """Raise InputError if several processes cannot share the batches of this training."""
    if group.size > 1 and config.contrastive.method is not None:
        raise InputError(
            f"contrastive.method = {config.contrastive.method} cannot be trained by {group.size} processes: each pair "
            "is contrasted with all others of its batch; start it without torchrun"
        )
    if group.size > 1 and config.activation_cache is not None:
        raise InputError(
            f"activation_cache is kept by one process, but torchrun started {group.size}: leave it out, or start "
            "without torchrun"
        )


def open_cache(
    config: RewardConfig, model: RewardModel, trees: Sequence[Tree], *, quiet: bool = True
) -> TrunkCache | None:
    """The frozen layers' outputs for these trees, computed where they are not there yet; None without activation_cache.

    `model` may be one that was trained from `config.model`: the layers below are the same.
    """
    if config.activation_cache is None or config.trainable_layers is None:
        return None
    cut = len(model.layers) - config.trainable_layers
    source = lower_layers(model, cut)
    cache = TrunkCache(config.activation_cache, model, source=source, cut=cut, states=config.activation_precision)
    missing = cache.missing(trees, config.max_tokens)
    done = 0
    with Progress(sum(map(len, missing)), "frozen layers", quiet=quiet or not missing or None) as progress:

        def update(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress.update(done, tokens=tokens)

        cache.prepare(trees, max_tokens=config.max_tokens, say=None if quiet else print, on_tokens=update)
    return cache


def _mean_loss(seen: Float[Tensor, "B C"], column: int = 0) -> float:
    weight = seen[:, 1].sum()
    return float((seen[:, column] * seen[:, 1]).sum() / weight) if weight > 0 else 0.0


def _summary(window: list[Tensor]) -> dict[str, float]:
    """Metrics over the pairs since the last line, each pair counting once (the loss by its weight)."""
    seen = torch.cat(window)
    rewards = seen[:, 2:4].double().numpy()
    return ({"train/contrastive_loss": _mean_loss(seen, 4)} if seen.shape[1] > 4 else {}) | {
        "train/loss": _mean_loss(seen),
        "train/accuracy": float(wins(rewards[:, 0] - rewards[:, 1]).mean()),
        "train/margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "train/reward_mean": float(rewards.mean()),
        "train/reward_std": float(rewards.std()),
    }


def _examine(
    model: RewardModel | TrunkCache, held_out: dict[str, list[Tree]], encoder: Encoder, max_tokens: int
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, rewards in model.score_sets(held_out, pad_id=encoder.pad_id, max_tokens=max_tokens).items():
        for key, value in reward_metrics(rewards[:, 0], rewards[:, 1]).items():
            metrics[f"validation/{name}/{key}"] = value
    return metrics
