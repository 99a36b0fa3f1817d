"""Supervised fine-tuning: the mean negative log-likelihood of demonstrated responses (Secrets of RLHF II, 2.1).

Prompt tokens are read, not learned. With `model: scratch` a small Llama is trained from fresh weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from steelyard.checkpoint import pack_optimizer, unpack_optimizer
from steelyard.config import Config, Device
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Encoder, OnOverlong, OverlongError, Tree
from steelyard.data.load import load_demonstrations
from steelyard.errors import InputError
from steelyard.models.policy import PolicyModel
from steelyard.models.trunk import Precision
from steelyard.progress import Progress
from steelyard.run_dir import RunDir
from steelyard.train.optim import OptimConfig, batches, set_rate, take_step, total_steps


class ScratchConfig(Config):
    """Architecture of a model trained from fresh weights."""

    layers: int = Field(4, ge=1, description="decoder layers")
    width: int = Field(160, ge=8, description="hidden size")
    heads: int = Field(5, ge=1, description="attention heads; must divide the width")
    context: int = Field(512, ge=16, description="longest sequence in tokens")


class SFTConfig(Config):
    """Supervised fine-tuning."""

    data: str = Field(description="demonstrations: JSONL, CSV or Parquet with prompt and response, or messages")
    model: str = Field("scratch", description="model folder to start from, or `scratch` for a small new Llama")
    tokenizer: str | None = Field(None, description="tokenizer folder; needed for (and only with) `scratch`")
    validation: str | None = Field(None, description="demonstrations whose loss is reported at the end")
    scratch: ScratchConfig = Field(default_factory=ScratchConfig, description="the new model's shape")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(32, ge=1, description="demonstrations a step")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=2e-5), description="optimiser; the paper's rate for 7B is 2e-5"
    )
    max_length: int = Field(512, ge=8, description="tokens of prompt and response together")
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer ones")
    max_tokens: int = Field(4096, ge=16, description="tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunk; weights stay float32")
    device: Device = "cpu"
    seed: int = Field(0, ge=0, description="fresh weights and order of the data")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")


def train_sft(config: SFTConfig, out: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train, leaving a stage folder in `out` with the model in `out/model`; returns the result.

    Raises:
        InputError: the data, the model or the settings do not fit, or `out` holds a run that this cannot go on with.
        FloatingPointError: a gradient is not finite; names the step.
    """
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return run.result()
        model, encoder = _start(config)
        trees = _trees(config.data, encoder, quiet)
        steps = total_steps(len(trees), config.batch_size, config.epochs)
        optimizer = config.optim.build(model.parameters())
        first, loss_sum, token_sum = 0, 0.0, 0
        if (saved := run.restore()) is not None:
            first, tensors, state = saved
            model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            unpack_optimizer(optimizer, tensors, state["optimizer"], "optimizer")
            loss_sum, token_sum = state["loss_sum"], state["token_sum"]

        with Progress(steps, "SFT", start=first, quiet=quiet or None) as progress:
            for step, chosen in enumerate(batches(len(trees), config.batch_size, config.seed, first, steps), first + 1):
                began = time.perf_counter()
                set_rate(optimizer, config.optim.rate(step - 1, steps))
                loss, tokens = sft_step(model, [trees[i] for i in chosen], encoder.pad_id, config.max_tokens)
                take_step(optimizer, config.optim, step, of="model", remedy="Lower optim.lr")
                loss_sum, token_sum = loss_sum + loss * tokens, token_sum + tokens
                size = sum(len(trees[i]) for i in chosen)
                if step % config.log_every == 0 or step == steps:
                    run.log(step, {"train/loss": loss_sum / token_sum, "train/lr": optimizer.param_groups[0]["lr"]})
                    run.time(step, {"tokens_per_second": size / (time.perf_counter() - began)})
                    loss_sum, token_sum = 0.0, 0
                progress.update(step, tokens=size, loss=loss)
                if step % config.save_every == 0 and step < steps:
                    optimizer_tensors, optimizer_state = pack_optimizer(optimizer, "optimizer")
                    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors
                    state = {"optimizer": optimizer_state, "loss_sum": loss_sum, "token_sum": token_sum}
                    run.save(step, tensors, state)

        result: dict[str, Any] = {"steps": steps, "examples": len(trees)}
        if config.validation:
            held_out = _trees(config.validation, encoder, quiet)
            result["validation_loss"] = sft_loss(model, held_out, encoder.pad_id, config.max_tokens)
            run.log(steps, {"validation/loss": result["validation_loss"]})
        model.save(out / "model", encoder)
        run.finish(result)
        return result


def sft_step(model: PolicyModel, trees: Sequence[Tree], pad_id: int, max_tokens: int) -> tuple[float, int]:
    """Accumulate the gradient of the mean loss over all response tokens; returns (loss in nats, tokens)."""
    total = sum(len(t.responses[0]) for t in trees)
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    for group in pack([len(t) for t in trees], max_tokens):
        batch = collate([trees[i] for i in group], pad_id, model.device, reads="responses")
        loss = -model(batch).sampled_BKR.sum() / total
        loss.backward()
        loss_sum += loss.detach()
    return loss_sum.item(), total


@torch.no_grad()
def sft_loss(model: PolicyModel, trees: Sequence[Tree], pad_id: int, max_tokens: int) -> float:
    """Mean negative log-likelihood per response token, in nats."""
    loss = 0.0
    for group in pack([len(t) for t in trees], max_tokens):
        batch = collate([trees[i] for i in group], pad_id, model.device, reads="responses")
        loss -= model(batch).sampled_BKR.sum().item()
    return loss / sum(len(t.responses[0]) for t in trees)


def _start(config: SFTConfig) -> tuple[PolicyModel, Encoder]:
    scratch = config.model == "scratch"
    if scratch != (config.tokenizer is not None):
        raise InputError(
            "`tokenizer` is needed with `model: scratch`, and only then (a model folder brings its own); got "
            f"model = {config.model!r}, tokenizer = {config.tokenizer!r}"
        )
    if not scratch and "scratch" in config.given():
        raise InputError("`scratch` describes a new model and has no effect on a model folder: leave it out")
    folder = config.tokenizer or config.model
    encoder = Encoder.load(folder, max_length=config.max_length, on_overlong=config.on_overlong)
    if not scratch:
        return PolicyModel.load(config.model, precision=config.precision, device=config.device), encoder
    shape = config.scratch
    if shape.width % shape.heads:
        raise InputError(f"scratch.heads must divide scratch.width, got {shape.heads} and {shape.width}")
    model = PolicyModel.scratch(
        encoder,
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        context=shape.context,
        seed=config.seed,
        device=config.device,
    )
    model.precision = config.precision
    return model, encoder


def _trees(path: str, encoder: Encoder, quiet: bool) -> list[Tree]:
    loaded = load_demonstrations(path)
    trees = []
    for d in loaded.items:
        try:
            trees.append(encoder.tree(d.prompt, [d.response]))
        except OverlongError as error:
            if encoder.on_overlong == "error":
                raise InputError(f"{d.source}: {error}; raise max_length or change on_overlong") from None
    if not trees:
        raise InputError(f"{path}: no demonstration fits into max_length = {encoder.max_length} tokens")
    if not quiet:
        print(loaded.report.text())
        if len(trees) < len(loaded.items):
            print(f"{len(loaded.items) - len(trees)} demonstrations left out: longer than max_length")
    return trees
