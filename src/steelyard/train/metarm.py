"""MetaRM: reward-model training that keeps responses of a shifted policy apart (Secrets of RLHF II, section 3.2).

Each step looks at the preference loss from where the reward model would stand after a small ascent of the difference
loss on the policy's own responses, and moves the model itself by what it sees there (Algorithm 1, first order).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config, Device
from steelyard.data.collate import collate
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid
from steelyard.errors import InputError
from steelyard.evaluate.reward import reward_metrics, wins
from steelyard.group import ALONE, Group, GroupRun
from steelyard.losses.meta import Direction, Normalisation, difference_loss, differences, meta_step
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision
from steelyard.progress import Progress
from steelyard.train.optim import OptimConfig, batches, set_rate, take_step, total_steps
from steelyard.train.pairwise import pair_losses, read_pairs, require_weight, shared_out
from steelyard.types import Preference

NORMAL_PAIRS = 512  # training pairs over which the reward's mean and std are measured at the end
BINS = 20  # of the histogram of differences
_META_ORDER = 1 << 20  # added to the seed: the meta set has an order of its own


class MetaRMConfig(Config):
    """MetaRM: reward-model training on preferences, seen from where a shifted policy's responses differ more."""

    data: str = Field(description="preferences: any file that `audit` or `repair` reads or writes")
    model: str = Field(description="model folder to start from: a reward model to continue, or the SFT model")
    meta: str = Field(description="Parquet file of `steelyard sample`: responses of the shifted policy, scored or not")
    meta_validation: str | None = Field(
        None, description="such a file with other prompts, for the histogram before and after; none given: `meta`"
    )
    validation: dict[str, str] = Field(
        default_factory=dict, description="name -> preference file, examined as it trains"
    )
    eta: float = Field(5e-6, ge=0, le=1, description="length of the meta step; 0 is plain training, the control")
    direction: Direction = Field(
        "gradient", description="of the meta step; random is a control: any direction, of the gradient's norm"
    )
    k: int = Field(5, ge=2, description="use the first k responses to each prompt of the meta file")
    normalisation: Normalisation = Field("paper", description="factor of the difference loss: 2/k^2, or a true mean")
    epochs: float = Field(1.0, gt=0, description="passes over the preferences")
    batch_size: int = Field(16, ge=1, description="pairs a step")
    meta_batch_size: int = Field(16, ge=1, description="prompts of the meta file a step")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=5e-6), description="optimiser; the paper's rate for 7B is 5e-6"
    )
    margin_in_flip: bool = Field(True, description="whether the margin also enters the flipped term of a soft label")
    max_length: int = Field(512, ge=8, description="tokens of prompt and one response together")
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer pairs and meta prompts")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")
    max_tokens: int = Field(2048, ge=16, description="tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="float32 only: bfloat16 would round the meta step away")
    device: Device = "cpu"
    seed: int = Field(0, ge=0, description="new head, order of both data sets, random direction")
    eval_every: int | None = Field(
        50, ge=1, description="steps between examinations on the validation sets; none given: never"
    )
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")

    @field_validator("precision")
    @classmethod
    def _resolves_the_step(cls, precision: Precision) -> Precision:
        if precision != "float32":
            raise ValueError(
                f"must be float32, got {precision}: eta * gradient is far below its resolution, so that the loss would "
                "not be seen from the shifted weights but from their rounding"
            )
        return precision

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.eta == 0 and self.direction == "random":
            raise ValueError("direction: random has no effect with eta 0; give an eta above 0, or leave it out")
        return self


def train_metarm(
    config: MetaRMConfig, out: Path, *, resume: bool = False, quiet: bool = False, group: Group = ALONE
) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the model in `out/model`; returns the result (in a group, the first
    process's).

    Raises:
        InputError: the data, the meta file, the model or the settings do not fit, or `out` holds a run that this cannot
            go on with.
        FloatingPointError: a gradient is not finite; names the step.
    """
    quiet = quiet or not group.first
    with GroupRun(group, out, config, resume=resume) as run:
        if run.finished:
            return run.result()
        encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
        say: Callable[[str], object] = (lambda text: None) if quiet else print
        pairs, trees = read_pairs(config.data, encoder, on_invalid=config.on_invalid, say=say)
        require_weight(config.data, pairs)
        held_out = {
            n: read_pairs(p, encoder, on_invalid=config.on_invalid, say=say)[1] for n, p in config.validation.items()
        }
        meta = read_meta(config.meta, encoder, config.k, say)
        shown = read_meta(config.meta_validation, encoder, config.k, say) if config.meta_validation else meta
        model = RewardModel.from_language_model(
            config.model, pad_id=encoder.pad_id, seed=config.seed, precision=config.precision, device=config.device
        )
        steps = total_steps(len(trees), config.batch_size, config.epochs)
        optimizer = config.optim.build(model.parameters())
        first, window = 0, _Window()
        before: dict[str, Any] = {}
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            unpack_optimizer(optimizer, tensors, state["optimizer"], "optimizer")
            before = state["before"]
            window = _Window.unpack(tensors)
        elif group.first:
            before = spread_of(model.score(shown, pad_id=encoder.pad_id, max_tokens=config.max_tokens))

        order = batches(len(trees), config.batch_size, config.seed, first, steps)
        meta_order = batches(len(meta), config.meta_batch_size, config.seed + _META_ORDER, first, steps)
        with Progress(steps, "MetaRM", start=first, quiet=quiet or None) as progress:
            for step, (chosen, shifted) in enumerate(zip(order, meta_order, strict=True), first + 1):
                began = time.perf_counter()
                set_rate(optimizer, config.optim.rate(step - 1, steps))
                seen, rewards, norm = metarm_step(
                    model,
                    [pairs[i] for i in chosen],
                    [trees[i] for i in chosen],
                    [meta[i] for i in shifted],
                    encoder,
                    config,
                    step,
                    group,
                )
                take_step(optimizer, config.optim, step, of="reward model", remedy="Lower optim.lr or eta")
                window.add(seen, rewards, norm)
                size = sum(len(trees[i]) for i in chosen) + sum(len(meta[i]) for i in shifted)
                if step % config.log_every == 0 or step == steps:
                    summary = window.summary(config.normalisation)
                    run.log(step, summary | {"train/lr": optimizer.param_groups[0]["lr"]})
                    run.time(step, {"tokens_per_second": size / (time.perf_counter() - began)})
                    window = _Window()
                progress.update(step, tokens=size, loss=_mean_loss(seen))
                if group.first and held_out and config.eval_every and (step % config.eval_every == 0 or step == steps):
                    run.log(step, _examine(model, held_out, encoder, config.max_tokens))
                if step % config.save_every == 0 and step < steps:
                    optimizer_tensors, optimizer_state = pack_optimizer(optimizer, "optimizer")
                    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
                    run.save(
                        step,
                        tensors | optimizer_tensors | window.pack(),
                        {"optimizer": optimizer_state, "before": before},
                    )

        if not group.first:
            return run.result()
        after = spread_of(model.score(shown, pad_id=encoder.pad_id, max_tokens=config.max_tokens))
        sample = trees[:: -(-len(trees) // NORMAL_PAIRS)]
        normal = model.score(sample, pad_id=encoder.pad_id, max_tokens=config.max_tokens)
        model.set_normal(float(normal.mean()), float(normal.std()))
        model.hf.config.steelyard_max_length = config.max_length
        model.save(out / "model", encoder)
        result = {
            "steps": steps,
            "pairs": len(trees),
            "tokens": sum(map(len, trees)),
            "reward_mean": model.normal[0],
            "reward_std": model.normal[1],
            "meta_prompts": len(meta),
            "differences": {
                "set": "meta_validation" if config.meta_validation else "meta",
                "prompts": len(shown),
                "k": config.k,
                "edges": [b / BINS for b in range(BINS + 1)],
                "before": before,
                "after": after,
            },
        }
        run.finish(result)
        return run.result()


def metarm_step(
    model: RewardModel,
    pairs: Sequence[Preference],
    trees: Sequence[Tree],
    meta: Sequence[Tree],
    encoder: Encoder,
    config: MetaRMConfig,
    step: int,
    group: Group = ALONE,
) -> tuple[Float[Tensor, "B 4"], Float[Tensor, "M K"], float]:
    """The gradient of Algorithm 1 for these pairs and these prompts, whatever the grouping into micro-batches and the
    number of processes.

    Returns, per pair, loss, weight, r(chosen), r(rejected) at theta'; the meta rewards at theta; the norm of grad J.
    Tensors are on the CPU.
    """
    seen = torch.zeros(len(pairs), 4, device=model.device)
    rewards = torch.zeros(len(meta), config.k, device=model.device)
    norm = meta_step(
        model,
        lambda: difference_losses(model, meta, encoder, config, rewards, group),
        lambda: preference_losses(model, pairs, trees, encoder, config, seen, group),
        config.eta,
        direction=config.direction,
        seed=(config.seed * 1_000_003 + step) % (1 << 63),
        reduce=group.sum_ if group.size > 1 else None,
    )
    for shared in (seen, rewards):
        group.sum_(shared)
    return seen.cpu(), rewards.cpu(), norm


def difference_losses(
    model: RewardModel, trees: Sequence[Tree], encoder: Encoder, config: MetaRMConfig, rewards_BK: Tensor, group: Group
) -> Iterator[Tensor]:
    """J of the prompts, their mean, in shares of one micro-batch each; writes the rewards into `rewards_BK`.

    In a group, what this process computes of it.
    """
    for micro in shared_out(trees, config.max_tokens, group):
        rewards = model(collate([trees[i] for i in micro], encoder.pad_id, model.device))
        rewards_BK[micro] = rewards.detach()
        yield difference_loss(rewards, normalisation=config.normalisation).sum() / len(trees)


def preference_losses(
    model: RewardModel,
    pairs: Sequence[Preference],
    trees: Sequence[Tree],
    encoder: Encoder,
    config: MetaRMConfig,
    seen_B4: Tensor,
    group: Group,
) -> Iterator[Tensor]:
    """L of the pairs, their weighted mean, in shares of one micro-batch each.

    Writes loss, weight, r(chosen), r(rejected) of each pair into `seen_B4`. Pairs that weigh nothing yield nothing.
    In a group, what this process computes of it.
    """
    total = sum(p.weight for p in pairs)
    if total == 0:
        return
    for micro in shared_out(trees, config.max_tokens, group):
        rewards = model(collate([trees[i] for i in micro], encoder.pad_id, model.device))
        loss = pair_losses(rewards, [pairs[i] for i in micro], config.margin_in_flip)
        weight = torch.tensor([pairs[i].weight for i in micro], device=model.device)
        seen_B4[micro] = torch.stack([loss.detach(), weight, *rewards.detach().T], 1)
        yield (loss * weight).sum() / total


# ---- data ------------------------------------------------------------------------------------------------------


def read_meta(path: str, encoder: Encoder, k: int, say: Callable[[str], object] = print) -> list[Tree]:
    """The first k responses to each prompt of a file of `steelyard sample`, as the tokens that were drawn.

    Over-long rows follow the encoder's rule; the prompt loses its oldest tokens. Raises InputError if the file is no
    such file, holds fewer than k responses to a prompt, was drawn with another tokenizer, or nothing fits.
    """
    table, stored = _open_meta(path)
    if k > stored:
        raise InputError(f"{path}: holds {stored} responses per prompt, {k} are wanted; sample again with k = {k}")
    keys = table["key"].to_pylist()
    prompts, responses = table["prompt_tokens"].to_pylist(), table["response_tokens"].to_pylist()
    texts = zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True)
    for row, (prompt, response) in enumerate(texts):
        if encoder.tokenizer.decode(prompts[row]) != prompt or encoder.decode(responses[row]) != response:
            raise InputError(
                f"{path}: row {row + 1} was drawn with another tokenizer than the reward model's; sample from a "
                "policy that has the same one"
            )
    trees, cut, left_out = [], 0, 0
    for i in range(0, len(keys), stored):
        group = slice(i, i + stored)
        whole = len(keys[group]) == stored and len(set(keys[group])) == 1
        if not (whole and all(prompts[group]) and all(responses[group])):
            raise InputError(f"{path}: row {i + 1} must begin {stored} responses to one prompt; make the file anew")
        prompt, drawn = tuple(prompts[i]), tuple(tuple(r) for r in responses[i : i + k])
        room = encoder.max_length - max(map(len, drawn))
        if len(prompt) > room and encoder.on_overlong == "error":
            raise InputError(
                f"{path}: row {i + 1}: prompt and response have {len(prompt) + encoder.max_length - room} tokens, more "
                f"than max_length = {encoder.max_length}; raise max_length, or use --on-overlong drop|truncate-prompt"
            )
        if room < 1 or (len(prompt) > room and encoder.on_overlong == "drop"):
            left_out += 1
            continue
        cut += len(prompt) > room
        trees.append(Tree(prompt[-room:], drawn))
    if not trees:
        raise InputError(f"{path}: no prompt has {k} responses within max_length = {encoder.max_length}; raise it")
    say(
        f"{path}: {len(trees)} prompts, the first {k} of {stored} responses to each"
        + (f"; {left_out} prompts left out: longer than max_length" if left_out else "")
        + (f"; {cut} lost the start of a prompt longer than max_length" if cut else "")
    )
    return trees


def _open_meta(path: str) -> tuple[pa.Table, int]:
    """The table of a file of `steelyard sample`, and its responses per prompt."""
    if not Path(path).is_file():
        kind = "a folder, not a file: name one of its *.parquet" if Path(path).exists() else "no such meta file"
        raise InputError(f"{path}: {kind}; make one with `steelyard sample --policy SHIFTED_POLICY`")
    try:
        table = pq.read_table(path).select(["key", "prompt", "response", "prompt_tokens", "response_tokens"])
        stored = json.loads((table.schema.metadata or {})[b"steelyard"])["k"]
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{path}: must be a file of `steelyard sample` (Parquet): {error}") from None
    return table, int(stored)


# ---- numbers ---------------------------------------------------------------------------------------------------


class _Window:
    """What was seen since the last line of metrics: pairs, meta rewards, norms of the meta gradient."""

    def __init__(self) -> None:
        self.pairs: list[Tensor] = []
        self.rewards: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, pairs_B4: Tensor, rewards_BK: Tensor, norm: float) -> None:
        self.pairs.append(pairs_B4)
        self.rewards.append(rewards_BK)
        self.norms.append(torch.tensor([norm], dtype=torch.float64))

    def pack(self) -> dict[str, Tensor]:
        return {f"window.{n}": torch.cat(v) for n, v in vars(self).items() if v}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        window = cls()
        for name, values in vars(window).items():
            values += [tensors[f"window.{name}"]] if f"window.{name}" in tensors else []
        return window

    def summary(self, normalisation: Normalisation) -> dict[str, float]:
        """Metrics, each pair and each prompt counting once (the loss by its weight)."""
        pairs, meta = torch.cat(self.pairs), torch.cat(self.rewards).double()
        margins = (pairs[:, 2].double() - pairs[:, 3].double()).numpy()
        found = {
            "train/loss": _mean_loss(pairs),
            "train/accuracy": float(wins(margins).mean()),
            "train/margin": float(margins.mean()),
            "meta/difference_loss": float(difference_loss(meta, normalisation=normalisation).mean()),
            "meta/difference_mean": float(differences(meta).mean()),
            "meta/gradient_norm": float(torch.cat(self.norms).mean()),
        }
        # Rewards that are all the same have no spread in units of their std: the metric is left out.
        spread = _spread(meta)
        return found if spread is None else found | {"meta/spread": spread}


def _spread(rewards_NK: Tensor) -> float | None:
    """Mean |r_i - r_j| within prompts in units of the std of all rewards: scaling the rewards changes nothing."""
    std = float(rewards_NK.std(correction=0))
    return float(differences(rewards_NK).mean()) / std if std > 0 else None


def spread_of(rewards: Float[np.ndarray, "N K"]) -> dict[str, Any]:
    """How far apart the rewards of one prompt's responses are, with the data of Fig. 16.

    `counts` is the histogram of |r_i - r_j| over BINS equal bins of 0 to 1, after the rewards were mapped to 0 to 1
    by their own smallest and largest value. The source does not say how it normalises; done so for each model by
    itself, neither an offset nor a scale of the rewards can change the picture.
    """
    r = torch.from_numpy(rewards).double()
    low, high = float(r.min()), float(r.max())
    scaled = differences(r) / (high - low if high > low else 1.0)
    counts, _ = np.histogram(scaled.numpy(), bins=BINS, range=(0.0, 1.0))
    return {
        "counts": counts.tolist(),
        "mean": float(scaled.mean()),
        "difference_mean": float(differences(r).mean()),
        "spread": _spread(r),
        "reward_mean": float(r.mean()),
        "reward_std": float(r.std(correction=0)),
        "reward_low": low,
        "reward_high": high,
    }


def _mean_loss(seen: Float[Tensor, "B 4"]) -> float:
    weight = seen[:, 1].sum()
    return float((seen[:, 0] * seen[:, 1]).sum() / weight) if weight > 0 else 0.0


def _examine(
    model: RewardModel, held_out: dict[str, list[Tree]], encoder: Encoder, max_tokens: int
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, rewards in model.score_sets(held_out, pad_id=encoder.pad_id, max_tokens=max_tokens).items():
        for key, value in reward_metrics(rewards[:, 0], rewards[:, 1]).items():
            metrics[f"validation/{name}/{key}"] = value
    return metrics
