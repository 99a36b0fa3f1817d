"""Reward-model training on weighed preferences (Secrets of RLHF II, sections 2.1 and 2.4, and 3.1 as an option).

The loss reads each pair's `flip_prob`, `margin` and `weight`; which repair wrote them it does not know. With
contrastive learning every pair is computed under two dropout masks, and a term on the two views' features is added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.errors import InputError
from steelyard.evaluate.reward import reward_metrics, wins
from steelyard.losses.contrastive import differences, simcse, swav, unit
from steelyard.losses.contrastive import pairs as both_features
from steelyard.losses.preference import bradley_terry
from steelyard.models.cache import TrunkCache, lower_layers
from steelyard.models.dropout import dropout
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision
from steelyard.progress import Progress
from steelyard.run_dir import RunDir
from steelyard.train.optim import OptimConfig, batches, set_rate, total_steps
from steelyard.types import Preference

NORMAL_PAIRS = 512  # training pairs over which the reward's mean and std are measured at the end


class ContrastiveConfig(Config):
    """Contrastive learning beside the reward-model loss, on two views of every pair made by dropout."""

    method: Literal["simcse", "swav"] | None = Field(None, description="contrastive loss; none given: plain training")
    features: Literal["pairs", "differences"] = Field(
        "pairs", description="contrast the responses' features, or the differences of chosen and rejected"
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="weight of the contrastive term; 0 is the control: same dropout, same doubled forward. None given: "
        "the paper's, 1 for simcse, 0.1 for swav on pairs, 0.5 for swav on differences",
    )
    temperature: float | None = Field(
        None, gt=0, description="tau; the paper does not say; none given: 0.05 for simcse, 0.1 for swav"
    )
    dropout: float = Field(0.05, gt=0, lt=1, description="share of each layer's outputs dropped, in training alone")
    prototypes: int | None = Field(
        None, ge=2, description="clusters (swav only); none given: the paper's, 50 on pairs, 20 on differences"
    )
    epsilon: float = Field(0.05, gt=0, description="softness of the cluster assignments (swav only)")
    iterations: int = Field(3, ge=1, description="Sinkhorn-Knopp iterations (swav only)")

    @model_validator(mode="after")
    def _refuse_idle_options(self) -> ContrastiveConfig:
        swav_only = {"prototypes", "epsilon", "iterations"}
        idle = {None: set(type(self).model_fields) - {"method"}, "simcse": swav_only, "swav": set()}[self.method]
        if given := idle & self.given():
            needs = "a method (simcse or swav)" if self.method is None else "method = swav"
            raise ValueError(f"{', '.join(sorted(given))}: no effect without {needs}; leave out, or choose it")
        return self

    def numbers(self) -> dict[str, float]:
        """beta, temperature and (swav) prototypes as they are used: given, or the paper's."""
        paper = {("swav", "pairs"): (0.1, 50), ("swav", "differences"): (0.5, 20)}
        beta, prototypes = paper.get((str(self.method), self.features), (1.0, 0))
        temperature = 0.1 if self.method == "swav" else 0.05
        used: dict[str, float] = {
            "beta": beta if self.beta is None else self.beta,
            "temperature": temperature if self.temperature is None else self.temperature,
        }
        if self.method == "swav":
            used["prototypes"] = prototypes if self.prototypes is None else self.prototypes
        return used


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
    activation_precision: Precision = Field(
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
        model.eval()  # dropout that the model brings would follow no seed; `models.dropout` does
        freeze_below(model, config.trainable_layers)
        prototypes = new_prototypes(config, model.head.in_features)
        trained = [*model.parameters(), *([] if prototypes is None else [prototypes])]
        say = None if quiet else print
        pairs, trees = read_pairs(config.data, encoder, rows, on_invalid=config.on_invalid, say=say)
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
                    seen = reward_step(model, *batch, encoder, config, cache)
                else:
                    seen = contrastive_step(model, *batch, encoder, config, step=step, prototypes=prototypes)
                nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
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
                    run.log(step, _examine(scorer, held_out, encoder, config.max_tokens))
                if step % config.save_every == 0 and step < steps:
                    optimizer_tensors, optimizer_state = pack_optimizer(optimizer, "optimizer")
                    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors
                    if window:
                        tensors["window"] = torch.cat(window)
                    if prototypes is not None:
                        tensors["prototypes"] = prototypes.detach()
                    run.save(step, tensors, {"optimizer": optimizer_state})

        sample = trees[:: -(-len(trees) // NORMAL_PAIRS)]
        rewards = scorer.score(sample, pad_id=encoder.pad_id, max_tokens=config.max_tokens)
        model.set_normal(float(rewards.mean()), float(rewards.std()))
        model.save(out / "model", encoder)
        result: dict[str, Any] = {
            "steps": steps,
            "pairs": len(trees),
            "tokens": sum(map(len, trees)),
            "reward_mean": model.normal[0],
            "reward_std": model.normal[1],
        }
        if config.contrastive.method is not None:
            result["contrastive"] = config.contrastive.numbers()
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
    cache: TrunkCache | None = None,
) -> Float[Tensor, "B 4"]:
    """Accumulate the gradient of the batch's weighted mean loss, whatever the grouping into micro-batches.

    With a `cache` the outputs of the frozen layers are read from it.

    Returns, per pair: loss, weight, r(chosen), r(rejected).
    """
    total = sum(p.weight for p in pairs)
    seen = torch.zeros(len(pairs), 4)
    if total == 0:
        return seen
    for group in pack([len(t) for t in trees], config.max_tokens):
        micro = [trees[i] for i in group]
        if cache is None:
            rewards = model(collate(micro, encoder.pad_id))
        else:
            rewards = cache.rewards(micro, pad_id=encoder.pad_id)
        loss = _losses(rewards, [pairs[i] for i in group], config)
        weight = torch.tensor([pairs[i].weight for i in group])
        ((loss * weight).sum() / total).backward()
        seen[group] = torch.stack([loss.detach(), weight, *rewards.detach().T], 1)
    return seen


def contrastive_step(
    model: RewardModel,
    pairs: Sequence[Preference],
    trees: Sequence[Tree],
    encoder: Encoder,
    config: RewardConfig,
    *,
    step: int,
    prototypes: nn.Parameter | None,
) -> Float[Tensor, "B 5"]:
    """Accumulate the gradient of L_rm + beta L_cl over two dropout views of the batch (Secrets of RLHF II, 3.1).

    L_rm is the weighted mean of the pairs' losses over both views, L_cl that of the contrastive losses. Negatives span
    the batch, whatever the grouping into micro-batches: where both views do not fit into `max_tokens` at once, all
    features are computed first without a graph, then L_cl's gradient at each feature is carried through a second pass
    with the same masks (GradCache, arXiv 2101.06983). That is exact; the grouping changes only which masks are drawn.

    Returns, per pair: loss, weight, r(chosen), r(rejected), contrastive loss; means over the views, and over the
    pair's two features.
    """
    weights = torch.tensor([p.weight for p in pairs])
    total = weights.sum()
    seen = torch.zeros(len(pairs), 5)
    if total == 0:
        return seen
    seen[:, 1] = weights
    groups = pack([len(t) for t in trees], config.max_tokens)

    def view(micro: int, v: int) -> Float[Tensor, "n 2 D"]:
        batch = collate([trees[i] for i in groups[micro]], encoder.pad_id)
        with dropout(model.trunk, config.contrastive.dropout, stream(config.seed, step, micro, v)):
            return model.features(batch)

    jobs = [(micro, v) for micro in range(len(groups)) for v in (0, 1)]
    at_once = 2 * len(trees) * max(map(len, trees)) <= config.max_tokens
    with torch.set_grad_enabled(at_once):
        first = [view(*job) for job in jobs]
    cached = first[0].new_zeros(2, len(pairs), *first[0].shape[1:])
    for (micro, v), features in zip(jobs, first, strict=True):
        cached[v, groups[micro]] = features.detach()
    contrast = contrastive_losses(cached.requires_grad_(), weights, prototypes, config.contrastive)
    beta = config.contrastive.numbers()["beta"]
    (beta * (contrast * weights).sum() / total).backward()
    assert cached.grad is not None
    seen[:, 4] = contrast.detach()
    for (micro, v), kept in zip(jobs, first, strict=True):
        group = groups[micro]
        features = kept if at_once else view(micro, v)
        rewards = model.head(features).squeeze(-1)
        loss = _losses(rewards, [pairs[i] for i in group], config)
        objective = (loss * weights[group]).sum() / (2 * total)
        (objective + (features * cached.grad[v, group]).sum()).backward()
        seen[group, 0] += loss.detach() / 2
        seen[group, 2:4] += rewards.detach() / 2
    return seen


def contrastive_losses(
    features_VBKD: Float[Tensor, "2 B 2 D"],
    weights_B: Float[Tensor, "B"],
    prototypes: Tensor | None,
    config: ContrastiveConfig,
) -> Float[Tensor, "B"]:
    """Each pair's contrastive loss, the mean of its two features'; pairs without weight take no part and get 0."""
    used = weights_B > 0
    build = both_features if config.features == "pairs" else differences
    s, t = (build(view[used, 0], view[used, 1]) for view in features_VBKD)
    temperature = config.numbers()["temperature"]
    if prototypes is None:
        losses = simcse(s, t, temperature=temperature)
    else:
        epsilon, iterations = config.epsilon, config.iterations
        losses = swav(t, s, prototypes, temperature=temperature, epsilon=epsilon, iterations=iterations)
    per_pair = losses.view(2, -1).mean(0)
    return per_pair.new_zeros(len(used)).masked_scatter(used, per_pair)


def new_prototypes(config: RewardConfig, width: int) -> nn.Parameter | None:
    """SwAV's K prototypes, random directions from the seed; None for other methods. They are not part of the model."""
    if config.contrastive.method != "swav":
        return None
    generator = torch.Generator().manual_seed(stream(config.seed))
    K = int(config.contrastive.numbers()["prototypes"])
    return nn.Parameter(unit(torch.randn(K, width, generator=generator)))


def stream(seed: int, *numbers: int) -> int:
    """A seed of its own for each tuple of numbers: with nothing else to remember, a resumed run draws the same."""
    return int(np.random.SeedSequence((seed, len(numbers), *numbers)).generate_state(1, np.uint64)[0])


def _losses(rewards: Float[Tensor, "n 2"], pairs: Sequence[Preference], config: RewardConfig) -> Float[Tensor, "n"]:
    return bradley_terry(
        rewards[:, 0],
        rewards[:, 1],
        margin=torch.tensor([p.margin for p in pairs]),
        flip_prob=torch.tensor([p.flip_prob for p in pairs]),
        margin_in_flip=config.margin_in_flip,
    )


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


def open_cache(
    config: RewardConfig, model: RewardModel, trees: Sequence[Tree], *, quiet: bool = True
) -> TrunkCache | None:
    """The frozen layers' outputs for these trees, computed where they are not there yet; None without activation_cache.

    `model` may be one that was trained from `config.model`: the layers below are the same.
    """
    if config.activation_cache is None or config.trainable_layers is None:
        return None
    layers: Any = model.trunk.layers
    cut = len(layers) - config.trainable_layers
    source = lower_layers(model, cut)
    cache = TrunkCache(config.activation_cache, model, source=source, cut=cut, states=config.activation_precision)
    missing = list(cache.missing(trees).values())
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
