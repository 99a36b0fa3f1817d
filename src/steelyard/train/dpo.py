"""Direct preference optimisation, an offline baseline (arXiv 2305.18290): a policy straight from weighed preferences.

No reward model and no sampling: the loss is that of a reward model, on the reward that the policy implies. It reads
each pair's `flip_prob`, `margin` and `weight` as reward-model training does, so every repair runs here, too. Chosen and
rejected share the computation of their prompt; the reference's log-probabilities are computed once, beforehand.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from steelyard import checkpoint
from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config, Device
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid, load_prompts
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.evaluate.policy import divergence
from steelyard.evaluate.reward import reward_metrics, wins
from steelyard.losses.preference import dpo, implicit_reward
from steelyard.models.next_token import Drawing
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision
from steelyard.progress import Progress
from steelyard.run_dir import RunDir
from steelyard.sampling import SamplingConfig, sample
from steelyard.scorer import Scorer, load_scorer
from steelyard.train.optim import OptimConfig, batches, set_rate, take_step, total_steps
from steelyard.train.pairwise import read_pairs, require_weight
from steelyard.types import Preference, Prompt

_SHOWN = 4  # responses of each examination that samples.jsonl keeps


class DPOConfig(Config):
    """Direct preference optimisation."""

    data: str = Field(description="preferences: any file that `audit` or `repair` reads or writes")
    model: str = Field(description="model folder to start from: the SFT model")
    reference: str | None = Field(None, description="model folder to stay near to; none given: `model`")
    beta: float = Field(0.1, gt=0, description="how dearly the distance from the reference is paid")
    # A margin of 1 asks for 1 / beta nats, and ruined policies (recipes/policy-study, fresh seeds).
    use_margin: bool = Field(False, description="read the pairs' margins, as reward-model training does")
    margin_in_flip: bool = Field(
        True, description="with use_margin: whether the margin also enters the flipped term of a soft label"
    )
    validation: dict[str, str] = Field(
        default_factory=dict, description="name -> preference file, examined as it trains"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(32, ge=1, description="pairs a step; the paper uses 64")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=1e-6), description="optimiser; the paper's rate for 2.8B is 1e-6"
    )
    prompts: str | None = Field(
        None, description="prompts that are answered at every examination, to measure the KL; none given: no answers"
    )
    answers: int = Field(64, ge=1, description="how many of the prompts are answered, one response each")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how responses are drawn")
    reward_model: str | None = Field(None, description="reward-model folder whose score of the answers is logged")
    gold: str | None = Field(None, description="`module:function` of a gold scorer; logged, never trained on")
    max_length: int = Field(512, ge=8, description="tokens of prompt and one response together")
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer pairs")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")
    max_tokens: int = Field(4096, ge=16, description="tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunk; weights and loss stay float32")
    device: Device = "cpu"
    seed: int = Field(0, ge=0, description="order of the data, and the answers")
    eval_every: int | None = Field(50, ge=1, description="steps between examinations; none given: never")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")

    @model_validator(mode="after")
    def _refuse_idle_options(self) -> Self:
        if self.prompts is None and (idle := {"answers", "sampling", "reward_model", "gold"} & self.given()):
            raise ValueError(f"{', '.join(sorted(idle))}: no effect without prompts; leave out, or give prompts")
        if self.eval_every is None and (unread := [n for n in ("prompts", "validation") if getattr(self, n)]):
            raise ValueError(f"{', '.join(unread)}: no effect without eval_every; leave out, or give eval_every")
        if not self.use_margin and "margin_in_flip" in self.given():
            raise ValueError("margin_in_flip: no effect without use_margin; leave out, or use the margins")
        return self


@dataclass(frozen=True, slots=True)
class Pairs:
    """Usable pairs, their trees (chosen first), and log pi_ref of both responses."""

    preferences: list[Preference]
    trees: list[Tree]
    reference_N2: Float[Tensor, "N 2"]


def train_dpo(
    config: DPOConfig,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    look: Callable[[int, int, PolicyModel], None] | None = None,
) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the model in `out/model`; returns the result.

    `look(step, steps, policy)` is called after each step and before its checkpoint, so a resumed run may repeat calls;
    it must leave the policy as it is.

    Raises:
        InputError: the data, the models or the settings do not fit, or `out` holds a run that this cannot go on with.
        FloatingPointError: a gradient is not finite; names the step.
    """
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return run.result()
        encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
        examiner = None if config.prompts is None else Examiner.load(config, encoder)
        model = PolicyModel.load(config.model, precision=config.precision, device=config.device)
        data, held_out = _read(config, encoder, model, out, None if quiet else print)
        steps = total_steps(len(data.trees), config.batch_size, config.epochs)
        optimizer = config.optim.build(model.parameters())
        first, window = 0, []
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            unpack_optimizer(optimizer, tensors, state["optimizer"], "optimizer")
            window = [tensors["window"]] if "window" in tensors else []

        order = batches(len(data.trees), config.batch_size, config.seed, first, steps)
        with Progress(steps, "DPO", start=first, quiet=quiet or None) as progress:
            for step, chosen in enumerate(order, first + 1):
                began = time.perf_counter()
                set_rate(optimizer, config.optim.rate(step - 1, steps))
                seen = dpo_step(model, data, chosen, encoder.pad_id, config)
                take_step(optimizer, config.optim, step, of="policy", remedy="Lower optim.lr or beta")
                window.append(seen)
                size = sum(len(data.trees[i]) for i in chosen)
                if step % config.log_every == 0 or step == steps:
                    run.log(step, _summary(torch.cat(window)) | {"dpo/lr": optimizer.param_groups[0]["lr"]})
                    run.time(step, {"tokens_per_second": size / (time.perf_counter() - began)})
                    window = []
                progress.update(step, tokens=size, loss=float(seen[:, 0].mean()))
                if config.eval_every and (step % config.eval_every == 0 or step == steps):
                    if held_out:
                        run.log(step, _examine(model, held_out, encoder.pad_id, config))
                    if examiner is not None:
                        metrics, shown = examiner.look(model)
                        run.log(step, metrics)
                        for row in shown:
                            run.sample(step, row)
                if look is not None:
                    look(step, steps, model)
                if step % config.save_every == 0 and step < steps:
                    optimizer_tensors, optimizer_state = pack_optimizer(optimizer, "optimizer")
                    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors
                    if window:
                        tensors["window"] = torch.cat(window)
                    run.save(step, tensors, {"optimizer": optimizer_state})

        model.save(out / "model", encoder)
        result = {"steps": steps, "pairs": len(data.trees), "tokens": sum(map(len, data.trees))}
        run.finish(result)
        return result


def dpo_step(
    model: PolicyModel, data: Pairs, chosen: Sequence[int], pad_id: int, config: DPOConfig
) -> Float[Tensor, "B 6"]:
    """Accumulate the gradient of the batch's weighted mean loss, whatever the grouping into micro-batches.

    Returns, per pair: loss, weight, implied reward of chosen and rejected, log pi of chosen and rejected; on the CPU.
    """
    pairs = [data.preferences[i] for i in chosen]
    total = sum(p.weight for p in pairs)
    device = model.device
    seen = torch.zeros(len(pairs), 6, device=device)
    if total == 0:
        return seen.cpu()
    for group in pack([len(data.trees[i]) for i in chosen], config.max_tokens):
        held = [pairs[g] for g in group]
        reference = data.reference_N2[[chosen[g] for g in group]].to(device)
        logprobs = _whole(model, [data.trees[chosen[g]] for g in group], pad_id)
        loss = dpo(
            logprobs[:, 0],
            logprobs[:, 1],
            reference[:, 0],
            reference[:, 1],
            beta=config.beta,
            margin=torch.tensor([p.margin for p in held], device=device) if config.use_margin else None,
            flip_prob=torch.tensor([p.flip_prob for p in held], device=device),
            margin_in_flip=config.margin_in_flip,
        )
        weight = torch.tensor([p.weight for p in held], device=device)
        ((loss * weight).sum() / total).backward()
        rewards = implicit_reward(logprobs.detach(), reference, beta=config.beta)
        seen[group] = torch.cat([torch.stack([loss.detach(), weight], 1), rewards, logprobs.detach()], 1)
    return seen.cpu()


@torch.no_grad()
def response_logprobs(model: PolicyModel, trees: Sequence[Tree], pad_id: int, max_tokens: int) -> Float[Tensor, "N 2"]:
    """log p(y | x) of both responses of every tree, summed over their tokens (the end token included); on the CPU."""
    out = torch.zeros(len(trees), 2, device=model.device)
    for group in pack([len(t) for t in trees], max_tokens):
        out[group] = _whole(model, [trees[i] for i in group], pad_id)
    return out.cpu()


def _whole(model: PolicyModel, trees: Sequence[Tree], pad_id: int) -> Float[Tensor, "B 2"]:
    batch = collate(trees, pad_id, model.device, reads="responses")
    return model.sampled(model.states(batch), batch, Drawing()).sum(-1)


# ---- examination -----------------------------------------------------------------------------------------------


def _summary(seen_W6: Float[Tensor, "W 6"]) -> dict[str, float]:
    """Metrics over the pairs since the last line, each pair counting once (the loss by its weight)."""
    loss, weight, *columns = seen_W6.double().T
    chosen, rejected, logprob_chosen, logprob_rejected = (c.numpy() for c in columns)
    return {
        "dpo/loss": float((loss * weight).sum() / weight.sum()) if weight.sum() > 0 else 0.0,
        "dpo/accuracy": float(wins(chosen - rejected).mean()),
        "dpo/margin": float((chosen - rejected).mean()),
        "dpo/reward_chosen": float(chosen.mean()),
        "dpo/reward_rejected": float(rejected.mean()),
        "dpo/logprob_chosen": float(logprob_chosen.mean()),
        "dpo/logprob_rejected": float(logprob_rejected.mean()),
    }


def _examine(model: PolicyModel, held_out: dict[str, Pairs], pad_id: int, config: DPOConfig) -> dict[str, float]:
    """Accuracy, loss and calibration of the implied reward on the validation sets, labels taken as they are."""
    metrics: dict[str, float] = {}
    for name, data in held_out.items():
        logprobs = response_logprobs(model, data.trees, pad_id, config.max_tokens)
        rewards = implicit_reward(logprobs, data.reference_N2, beta=config.beta).numpy()
        for key, value in reward_metrics(rewards[:, 0], rewards[:, 1]).items():
            metrics[f"validation/{name}/{key}"] = value
    return metrics


class Examiner:
    """Answers the same prompts with the same streams of random numbers, to see where the policy has gone.

    The data's responses cannot tell the KL of the policy from the reference: the policy did not draw them.
    """

    def __init__(
        self,
        config: DPOConfig,
        encoder: Encoder,
        prompts: list[Prompt],
        reference: PolicyModel,
        reward: RewardModel | None,
        gold: Scorer | None,
    ) -> None:
        self.config, self.encoder, self.prompts = config, encoder, prompts
        self.reference, self.reward, self.gold = reference, reward, gold

    @classmethod
    def load(cls, config: DPOConfig, encoder: Encoder) -> Examiner:
        """Raises InputError if no prompt leaves room for a response, or a model does not fit."""
        if config.prompts is None:
            raise ValueError("an examination needs prompts")
        room = config.max_length - config.sampling.max_new_tokens
        distinct = dict.fromkeys(p.prompt for p in load_prompts(config.prompts).items)
        prompts = [p for p in distinct if len(encoder.prompt_ids(p)) <= room][: config.answers]
        if not prompts:
            raise InputError(
                f"{config.prompts}: no prompt leaves room for {config.sampling.max_new_tokens} new tokens within "
                f"max_length = {config.max_length}; raise max_length"
            )
        reward = None
        if config.reward_model is not None:
            encoder.require_same(config.reward_model, what="reward model", of=config.model)
            reward = RewardModel.load(config.reward_model, precision=config.precision, device=config.device)
        gold = load_scorer(config.gold) if config.gold else None
        return cls(config, encoder, prompts, _load_reference(config, encoder), reward, gold)

    def look(self, model: PolicyModel) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of the answers, and some of them. KL: the mean log-ratio of a response at temperature 1, in nats."""
        config, encoder = self.config, self.encoder
        ids = [encoder.prompt_ids(p) for p in self.prompts]
        drawn = sample(
            model, ids, [prompt_key(p) for p in self.prompts], k=1, config=config.sampling,
            end_id=encoder.end_id, pad_id=encoder.pad_id, seed=config.seed,
        )  # fmt: skip
        answers = [group[0] for group in drawn]
        trees = [Tree(p, (a.tokens,)) for p, a in zip(ids, answers, strict=True)]
        texts = [encoder.decode(a.tokens) for a in answers]
        columns = {
            "kl": divergence(model, self.reference, trees, encoder.pad_id, config.max_tokens)[:, 0],
            "length": np.array([len(a.tokens) for a in answers], dtype=float),
            "ended": np.array([a.ended for a in answers], dtype=float),
        }
        if self.reward is not None:
            scores = self.reward.score(trees, pad_id=encoder.pad_id, max_tokens=config.max_tokens)
            columns["reward_raw"] = scores[:, 0].astype(float)
        if self.gold is not None:
            columns["gold"] = np.array([self.gold(p, t) for p, t in zip(self.prompts, texts, strict=True)])
        shown = [
            {"prompt": prompt_key(p).replace("\0", "\n\n"), "response": texts[n]}
            | {name: float(column[n]) for name, column in columns.items()}
            for n, p in enumerate(self.prompts[:_SHOWN])
        ]
        return {f"dpo/{name}": float(column.mean()) for name, column in columns.items()}, shown


# ---- data ------------------------------------------------------------------------------------------------------


def _load_reference(config: DPOConfig, encoder: Encoder) -> PolicyModel:
    folder = config.reference or config.model
    encoder.require_same(folder, what="reference", of=config.model)
    return PolicyModel.load(folder, precision=config.precision, device=config.device)


def _read(
    config: DPOConfig, encoder: Encoder, start: PolicyModel, out: Path, say: Callable[[str], object] | None
) -> tuple[Pairs, dict[str, Pairs]]:
    """Training pairs and validation sets with the reference's log-probabilities, kept in `out` for a resumed run.

    `start` is the model before its first step: the reference unless another one is given.
    """
    reference = start if config.reference is None else _load_reference(config, encoder)
    sets = {"": config.data} | (config.validation if config.eval_every else {})
    read = {name: read_pairs(path, encoder, on_invalid=config.on_invalid, say=say) for name, path in sets.items()}
    require_weight(config.data, read[""][0])
    unread = 0 if config.use_margin else sum(p.margin != 0 for p in read[""][0])
    if unread and say is not None:
        say(f"{config.data}: the margins of {unread} pairs are left out (use_margin reads them)")
    distinct = list(dict.fromkeys(tree for _, trees in read.values() for tree in trees))
    stored = _reference_logprobs(config, encoder, reference, distinct, out / "reference")
    place = {tree: i for i, tree in enumerate(distinct)}
    found = {name: Pairs(p, trees, stored[[place[t] for t in trees]]) for name, (p, trees) in read.items()}
    return found.pop(""), found


def _reference_logprobs(
    config: DPOConfig, encoder: Encoder, reference: PolicyModel, trees: list[Tree], folder: Path
) -> Float[Tensor, "N 2"]:
    digest = hashlib.sha256(repr([(t.prompt, t.responses) for t in trees]).encode()).hexdigest()
    if folder.exists():
        try:
            tensors, state = checkpoint.load(folder)
            if state["trees"] == digest:
                return tensors["logprobs"]
        except checkpoint.CheckpointError:
            pass  # It can be computed again.
    logprobs = response_logprobs(reference, trees, encoder.pad_id, config.max_tokens)
    checkpoint.save(folder, {"logprobs": logprobs}, {"trees": digest})
    return logprobs
