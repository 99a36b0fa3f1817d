"""Reward-model training on weighed preferences (Secrets of RLHF II, sections 2.1 and 2.4).

The loss reads each pair's `flip_prob`, `margin` and `weight`; which repair wrote them it does not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.errors import InputError
from steelyard.evaluate.reward import reward_metrics, wins
from steelyard.losses.preference import bradley_terry
from steelyard.models.load import Precision
from steelyard.models.reward import RewardModel
from steelyard.progress import Progress
from steelyard.run_dir import RunDir
from steelyard.train.optim import OptimConfig, batches, set_rate, total_steps
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
    margin_in_flip: bool = Field(True, description="whether the margin also enters the flipped term of a soft label")
    max_length: int = Field(512, ge=8, description="tokens of prompt and one response together")
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer pairs")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")
    max_tokens: int = Field(4096, ge=16, description="padded tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunk; weights, head and loss stay float32")
    seed: int = Field(0, ge=0, description="new head and order of the data")
    eval_every: int | None = Field(
        50, ge=1, description="steps between examinations on the validation sets; none given: never"
    )
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")


def train_reward(
    config: RewardConfig,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the model in `out/model`; returns the result.

    `rows` restricts the training data to these rows of the file's usable pairs (an ensemble's folds).
    """
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return run.result()
        encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
        model = RewardModel.from_language_model(
            config.model, pad_id=encoder.pad_id, seed=config.seed, precision=config.precision
        )
        freeze_below(model, config.trainable_layers)
        say = None if quiet else print
        pairs, trees = read_pairs(config.data, encoder, rows, on_invalid=config.on_invalid, say=say)
        held_out = {
            name: read_pairs(path, encoder, on_invalid=config.on_invalid, say=say)[1]
            for name, path in config.validation.items()
        }
        steps = total_steps(len(trees), config.batch_size, config.epochs)
        optimizer = config.optim.build(model.parameters())
        first, window = 0, []
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            unpack_optimizer(optimizer, tensors, state["optimizer"], "optimizer")
            window = [tensors["window"]] if "window" in tensors else []

        with Progress(steps, "reward model", start=first, quiet=quiet or None) as progress:
            for step, chosen in enumerate(batches(len(trees), config.batch_size, config.seed, first, steps), first + 1):
                began = time.perf_counter()
                set_rate(optimizer, config.optim.rate(step - 1, steps))
                seen = reward_step(model, [pairs[i] for i in chosen], [trees[i] for i in chosen], encoder, config)
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                window.append(seen)
                size = sum(len(trees[i]) for i in chosen)
                if step % config.log_every == 0 or step == steps:
                    run.log(step, _summary(window) | {"train/lr": optimizer.param_groups[0]["lr"]})
                    run.time(step, {"tokens_per_second": size / (time.perf_counter() - began)})
                    window = []
                progress.update(step, tokens=size, loss=_mean_loss(seen))
                if held_out and config.eval_every and (step % config.eval_every == 0 or step == steps):
                    run.log(step, _examine(model, held_out, encoder, config.max_tokens))
                if step % config.save_every == 0 and step < steps:
                    optimizer_tensors, optimizer_state = pack_optimizer(optimizer, "optimizer")
                    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors
                    if window:
                        tensors["window"] = torch.cat(window)
                    run.save(step, tensors, {"optimizer": optimizer_state})

        sample = trees[:: -(-len(trees) // NORMAL_PAIRS)]
        rewards = model.score(sample, pad_id=encoder.pad_id, max_tokens=config.max_tokens)
        model.set_normal(float(rewards.mean()), float(rewards.std()))
        model.save(out / "model", encoder)
        result = {
            "steps": steps,
            "pairs": len(trees),
            "tokens": sum(map(len, trees)),
            "reward_mean": model.normal[0],
            "reward_std": model.normal[1],
        }
        run.finish(result)
        return result


def read_pairs(
    path: str,
    encoder: Encoder,
    rows: Sequence[int] | None = None,
    *,
    on_invalid: OnInvalid = "error",
    say: Callable[[str], None] | None = None,
) -> tuple[list[Preference], list[Tree]]:
    """Usable pairs and their trees; `say` is told what was found in the file. Raises InputError if none is left."""
    loaded = load_preferences(path, on_invalid=on_invalid)
    pairs = loaded.preferences
    if rows is not None:
        pairs = [pairs[i] for i in rows]
    encoded = encoder.encode(pairs)
    if not encoded.trees:
        raise InputError(f"{path}: no usable pair is left to train or examine on ({encoded.text() or 'empty file'})")
    if say is not None:
        say("\n".join(filter(None, [loaded.report.text(), encoded.text()])))
    return [pairs[i] for i in encoded.index], encoded.trees


def reward_step(
    model: RewardModel,
    pairs: Sequence[Preference],
    trees: Sequence[Tree],
    encoder: Encoder,
    config: RewardConfig,
) -> Float[Tensor, "B 4"]:
    """Accumulate the gradient of the batch's weighted mean loss, whatever the grouping into micro-batches.

    Returns, per pair: loss, weight, r(chosen), r(rejected).
    """
    total = sum(p.weight for p in pairs)
    seen = torch.zeros(len(pairs), 4)
    if total == 0:
        return seen
    for group in pack([len(t) for t in trees], config.max_tokens):
        rewards = model(collate([trees[i] for i in group], encoder.pad_id))
        loss = bradley_terry(
            rewards[:, 0],
            rewards[:, 1],
            margin=torch.tensor([pairs[i].margin for i in group]),
            flip_prob=torch.tensor([pairs[i].flip_prob for i in group]),
            margin_in_flip=config.margin_in_flip,
        )
        weight = torch.tensor([pairs[i].weight for i in group])
        ((loss * weight).sum() / total).backward()
        seen[group] = torch.stack([loss.detach(), weight, *rewards.detach().T], 1)
    return seen


def freeze_below(model: RewardModel, trainable_layers: int | None) -> None:
    """Leave only the top layers, the final norm and the head trainable. Raises InputError if there are fewer."""
    if trainable_layers is None:
        return
    layers: Any = model.trunk.layers
    if trainable_layers > len(layers):
        raise InputError(f"trainable_layers must be at most the model's {len(layers)} layers, got {trainable_layers}")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for layer in layers[len(layers) - trainable_layers :]:
        layer.requires_grad_(True)
    norm = getattr(model.trunk, "norm", None) or getattr(model.trunk, "final_layer_norm", None)
    if norm is not None and trainable_layers > 0:
        norm.requires_grad_(True)


def _mean_loss(seen: Float[Tensor, "B 4"]) -> float:
    weight = seen[:, 1].sum()
    return float((seen[:, 0] * seen[:, 1]).sum() / weight) if weight > 0 else 0.0


def _summary(window: list[Tensor]) -> dict[str, float]:
    """Metrics over the pairs since the last line, each pair counting once (the loss by its weight)."""
    seen = torch.cat(window)
    rewards = seen[:, 2:].double().numpy()
    return {
        "train/loss": _mean_loss(seen),
        "train/accuracy": float(wins(rewards[:, 0] - rewards[:, 1]).mean()),
        "train/margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "train/reward_mean": float(rewards.mean()),
        "train/reward_std": float(rewards.std()),
    }


def _examine(
    model: RewardModel, held_out: dict[str, list[Tree]], encoder: Encoder, max_tokens: int
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, rewards in model.score_sets(held_out, pad_id=encoder.pad_id, max_tokens=max_tokens).items():
        for key, value in reward_metrics(rewards[:, 0], rewards[:, 1]).items():
            metrics[f"validation/{name}/{key}"] = value
    return metrics
