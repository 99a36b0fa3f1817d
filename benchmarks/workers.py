"""The programs that the benchmarks compare: `python workers.py NAME PLAN`. Started by the benchmarks, not by hand.

Each trains on the plan's steps, calling the gate after every optimiser step. All begin from the same folder (an
AutoModelForSequenceClassification with a seeded head, float32) and see the same token ids.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from plan import Pair, Plan, micro_batches
from rounds import Finished, Gate


def about() -> dict[str, Any]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "trl", "steelyard"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ---- TRL -------------------------------------------------------------------------------------------------------


def train_trl(plan: Plan, gate: Gate, *, checkpointing: bool) -> None:
    """TRL's RewardTrainer in its own loop. Only what must be equal in all programs is set; the rest is its default.

    bf16 is accelerate's autocast around the model's forward: float32 weights, bfloat16 products.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer  # type: ignore[import-not-found]

    wanted = plan.settings
    losses: list[float] = []
    tokens: list[int] = []

    class Seen(RewardTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens.append(inputs["input_ids"].numel())
            found = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    class Ask(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gate.open(versions=about(), parameters=sum(p.numel() for p in trainer.model.parameters()))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss, computed = sum(losses) / len(losses), sum(tokens)
            losses.clear()
            tokens.clear()
            gate.step(loss, computed)

    rows = [dict(zip(("chosen_ids", "rejected_ids"), pair.sequences, strict=True)) for pair in plan.pairs]
    with tempfile.TemporaryDirectory() as scratch:
        args = RewardConfig(
            output_dir=scratch,
            use_cpu=wanted.device == "cpu",
            bf16=wanted.precision == "bfloat16",
            max_length=wanted.max_length,
            per_device_train_batch_size=wanted.micro,
            gradient_accumulation_steps=wanted.batch // wanted.micro,
            max_steps=len(plan.pairs) // wanted.batch,
            train_sampling_strategy="sequential",  # the plan's order is random already, and the same for all
            learning_rate=wanted.lr,
            lr_scheduler_type="constant",
            adam_beta1=wanted.betas[0],
            adam_beta2=wanted.betas[1],
            weight_decay=wanted.weight_decay,
            max_grad_norm=wanted.max_grad_norm,
            save_strategy="no",
            report_to="none",
            seed=wanted.seed,
            **({} if checkpointing else {"gradient_checkpointing": False}),
        )
        trainer = Seen(model=wanted.start, args=args, train_dataset=Dataset.from_list(rows), callbacks=[Ask()])
        trainer.train()


# ---- a plain loop ----------------------------------------------------------------------------------------------


def train_bucketed(plan: Plan, gate: Gate) -> None:
    """What one would write by hand: transformers' classifier, sdpa, pairs of similar length padded together."""
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForSequenceClassification

    wanted = plan.settings
    model = AutoModelForSequenceClassification.from_pretrained(
        wanted.start, attn_implementation="sdpa", dtype=torch.float32
    ).to(wanted.device)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=wanted.lr, betas=wanted.betas, weight_decay=wanted.weight_decay, fused=True
    )
    pad_id = model.config.get_text_config().pad_token_id
    gate.open(versions=about(), parameters=sum(p.numel() for p in parameters))
    for step in plan.bucketed_steps():
        total, computed = 0.0, 0
        for group in micro_batches(step, wanted.bucket):
            ids, mask = (x.to(wanted.device) for x in _padded(group, pad_id))
            with torch.autocast(wanted.device, torch.bfloat16, enabled=wanted.precision == "bfloat16"):
                rewards = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
            chosen, rejected = rewards.float().chunk(2)
            loss = -logsigmoid(chosen - rejected).sum() / len(step)
            loss.backward()
            total += float(loss.detach())
            computed += ids.numel()
        torch.nn.utils.clip_grad_norm_(parameters, wanted.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.step(total, computed)


def _padded(pairs: Sequence[Pair], pad_id: int) -> tuple[Any, Any]:
    """All chosen sequences, then all rejected ones, padded on the right; and the mask of what is real."""
    import torch

    both = [pair.sequences for pair in pairs]
    rows = [s[0] for s in both] + [s[1] for s in both]
    ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


# ---- Steelyard -------------------------------------------------------------------------------------------------


def train_steelyard(plan: Plan, gate: Gate, *, meta: bool = False) -> None:
    """The loop of `steelyard train reward`, or with `meta` that of `steelyard train metarm`, without its run folder.

    With `meta` the step's own trees are the meta batch too (two responses each), so that both passes compute the same
    tokens.
    """
    from torch.nn.utils import clip_grad_norm_

    from steelyard.data.encode import Encoder, Tree
    from steelyard.memory import keep_freed_memory
    from steelyard.models.reward import RewardModel
    from steelyard.train.metarm import MetaRMConfig, metarm_step
    from steelyard.train.optim import OptimConfig, set_rate
    from steelyard.train.reward import RewardConfig, reward_step
    from steelyard.types import Preference

    keep_freed_memory()  # as the command line does
    wanted = plan.settings
    optim = OptimConfig(
        lr=wanted.lr,
        warmup=0,
        decay=False,
        weight_decay=wanted.weight_decay,
        beta1=wanted.betas[0],
        beta2=wanted.betas[1],
        max_grad_norm=wanted.max_grad_norm,
    )
    common: dict[str, Any] = {
        "data": "plan",
        "model": wanted.start,
        "batch_size": wanted.batch,
        "optim": optim,
        "max_tokens": wanted.max_tokens,
        "max_length": wanted.max_length,
        "precision": wanted.precision,
        "device": wanted.device,
    }
    config = RewardConfig(**common)
    meta_config = MetaRMConfig(**common, meta="plan", k=2, meta_batch_size=wanted.batch) if meta else None
    encoder = Encoder.load(wanted.start, max_length=wanted.max_length)
    model = RewardModel.from_language_model(
        wanted.start, pad_id=encoder.pad_id, seed=wanted.seed, precision=config.precision, device=wanted.device
    )
    model.eval()
    optimizer = optim.build(model.parameters())
    computed: list[int] = []
    model.register_forward_pre_hook(lambda module, args: computed.append(args[0].tokens))
    gate.open(versions=about(), parameters=sum(p.numel() for p in model.parameters()))
    steps = plan.steps()
    for number, step in enumerate(steps):
        pairs = [Preference("", "", "", "") for _ in step]
        trees = [Tree(tuple(p.prompt), (tuple(p.chosen), tuple(p.rejected))) for p in step]
        set_rate(optimizer, optim.rate(number, len(steps)))
        if meta_config is not None:
            seen, _, _ = metarm_step(model, pairs, trees, trees, encoder, meta_config, number)
        else:
            seen = reward_step(model, pairs, trees, encoder, config)
        clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.step(float(seen[:, 0].mean()), sum(computed))
        computed.clear()


PROGRAMS: dict[str, Any] = {
    "trl": lambda plan, gate: train_trl(plan, gate, checkpointing=True),
    "trl-nockpt": lambda plan, gate: train_trl(plan, gate, checkpointing=False),
    "hf-bucketed": train_bucketed,
    "steelyard": train_steelyard,
    "metarm": lambda plan, gate: train_steelyard(plan, gate, meta=True),
}


def main() -> None:
    """`python workers.py NAME PLAN`."""
    name, path = sys.argv[1], Path(sys.argv[2])
    plan = Plan.read(path)
    gate = Gate(plan.settings.device)
    import torch

    torch.set_num_threads(plan.settings.threads)
    torch.manual_seed(plan.settings.seed)
    with contextlib.suppress(Finished):
        PROGRAMS[name](plan, gate)


if __name__ == "__main__":
    main()
