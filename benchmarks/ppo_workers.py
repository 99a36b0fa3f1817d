"""The programs that benchmarks/ppo.py compares: `python ppo_workers.py NAME TASK`. Not started by hand.

Only updates are measured: what lies between the end of the rollouts (responses, old log-probabilities, values,
advantages, all there) and the end of the last optimiser step. Every update learns from the task's responses again.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from rounds import Finished, Gate, give_back, peak_bytes
from task import Task
from workers import about


class PhaseGate(Gate):
    """A gate that measures only what lies between `begin` and `end`; its peak is that of these phases too."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = self._cpu_seconds = 0.0
        self._peak = 0
        self.inside = False

    def begin(self) -> None:
        """The phase starts."""
        give_back()
        reset_peak()
        self.inside = True
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self, loss: float, tokens: int) -> None:
        """It has ended; returns when the parent wants another step."""
        self._seconds += time.perf_counter() - self._wall
        self._cpu_seconds += time.process_time() - self._cpu
        self.inside = False
        self._peak = max(self._peak, phase_peak())
        self._losses.append(loss)
        self._tokens += tokens
        self._left -= 1
        if self._left == 0:
            self._reply(
                {
                    "seconds": self._seconds,
                    "cpu_seconds": self._cpu_seconds,
                    "losses": self._losses,
                    "tokens": self._tokens,
                    "peak_bytes": self._peak,
                }
            )
            self._seconds = self._cpu_seconds = 0.0
            self._peak = 0
            self._wait()


def reset_peak() -> None:
    """Let the system's record of the largest resident set begin anew (Linux; elsewhere the whole process counts)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def phase_peak() -> int:
    """The largest resident set since `reset_peak`."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else peak_bytes()


# ---- TRL -------------------------------------------------------------------------------------------------------


def train_trl(task: Task, gate: PhaseGate) -> None:
    """PPOTrainer's own loop. Generation alone is replaced, by the task's responses; rollouts are not measured.

    The phase begins where its loop first enters `accelerator.accumulate` after a rollout and ends where it logs. In
    between lies all of its optimisation and nothing else but the means of its statistics.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, reward = f"{task.start}/policy", f"{task.start}/reward"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    tokenizer.pad_token_id = task.pad_id
    rows = [p for p in task.prompts for _ in range(task.k)]
    answers = {tuple(p): group for p, group in zip(task.prompts, task.responses, strict=True)}
    tokens: list[int] = []

    @torch.no_grad()
    def given(model: Any, queries: Any, size: int, pad_id: int, config: Any) -> tuple[Any, Any]:
        left = {prompt: list(group) for prompt, group in answers.items()}
        drawn = [left[tuple(t for t in query if t != pad_id)].pop() for query in queries.tolist()]
        width = max(map(len, drawn))
        both = torch.cat([queries, torch.tensor([row + [pad_id] * (width - len(row)) for row in drawn])], 1)
        logits = []
        for part in both.split(8):
            found = ppo_trainer.forward(model, part, pad_id).logits[:, queries.shape[1] - 1 : -1]
            logits.append(found / (config.temperature + 1e-7))
        tokens.append(both.numel())
        return both, torch.cat(logits)

    ppo_trainer.batch_generation = given

    class Seen(PPOTrainer):  # type: ignore[misc]
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            gate.end(logs["loss/policy_avg"], tokens.pop() * self.args.num_ppo_epochs)
            super().log(logs, *args, **kwargs)

    options = task.options
    models = {
        "model": AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32),
        "value_model": AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32),
    }
    with tempfile.TemporaryDirectory() as scratch:
        args = PPOConfig(
            output_dir=scratch,
            use_cpu=True,
            total_episodes=len(rows) * 10_000,
            per_device_train_batch_size=options["micro"],
            gradient_accumulation_steps=len(rows) // options["micro"],
            num_ppo_epochs=options["epochs"],
            num_mini_batches=options["minibatches"],
            response_length=task.new_tokens,
            stop_token_id=task.end_id,
            temperature=1.0,
            learning_rate=options["lr"],
            lr_scheduler_type="constant",
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
            kl_coef=0.05,
            gamma=1.0,
            lam=0.95,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            seed=task.seed,
        )
        trainer = Seen(
            args=args,
            processing_class=tokenizer,
            ref_model=None,
            train_dataset=Dataset.from_list([{"input_ids": p} for p in rows]),
            eval_dataset=Dataset.from_list([{"input_ids": rows[0]}]),
            **models,
        )
        accumulate = trainer.accelerator.accumulate

        @contextlib.contextmanager
        def entered(*modules: Any) -> Iterator[None]:
            if not gate.inside:
                gate.begin()
            with accumulate(*modules):
                yield

        trainer.accelerator.accumulate = entered
        gate.open(
            versions=about(),
            mixed_precision=trainer.accelerator.mixed_precision,
            checkpointing=bool(trainer.model.is_gradient_checkpointing),
        )
        trainer.train()


# ---- Steelyard -------------------------------------------------------------------------------------------------


def train_steelyard(task: Task, gate: PhaseGate, *, critic: str) -> None:
    """`update` of `steelyard train ppo` on rollouts of the task's responses."""
    from steelyard.memory import keep_freed_memory
    from steelyard.ppo_settings import PPOConfig
    from steelyard.rollout import estimate, pay, roll_out
    from steelyard.sampling import Sample
    from steelyard.train.ppo import Learner, update

    keep_freed_memory()  # as the command line does
    options = task.options
    constant = {"lr": options["lr"], "warmup": 0, "decay": False}
    config = PPOConfig.model_validate(
        {
            "policy": f"{task.start}/policy",
            "reward_model": f"{task.start}/reward",
            "prompts": "task",
            "reward": "plain",
            "steps": 10_000,
            "prompts_per_step": len(task.prompts),
            "samples_per_prompt": task.k,
            "epochs": options["epochs"],
            "minibatches": options["minibatches"],
            "sampling": {"max_new_tokens": task.new_tokens},
            "actor": constant,
            "critic": constant,
            "critic_model": critic,
            "kl_coef": 0.05,
            "max_length": task.max_prompt + task.new_tokens,
            "max_tokens": options["max_tokens"],
            "logit_chunk": options["logit_chunk"],
            "precision": task.precision,
            "seed": task.seed,
        }
    )
    learner = Learner(config)
    models = learner.models
    ids = [tuple(p) for p in task.prompts]
    drawn = [[Sample(tuple(r), r[-1] == task.end_id) for r in group] for group in task.responses]
    gate.open(versions=about())
    for step in count(1):
        rollouts = roll_out(models, ids, drawn, config)
        _, rewards_BT, _ = pay(rollouts, None, None, models, learner.scale, config, kl_coef=config.kl_coef)
        advantages_BT, returns_BT = estimate(rollouts, rewards_BT, None, config)
        gate.begin()
        metrics = update(learner, rollouts, advantages_BT, returns_BT, step, config)
        gate.end(metrics["ppo/policy_loss"], sum(map(len, rollouts.trees)) * config.epochs)


PROGRAMS: dict[str, Any] = {
    "trl": train_trl,
    "steelyard": lambda task, gate: train_steelyard(task, gate, critic="separate"),
    "steelyard-shared": lambda task, gate: train_steelyard(task, gate, critic="shared"),
}


def main() -> None:
    """`python ppo_workers.py NAME TASK`."""
    name, path = sys.argv[1], Path(sys.argv[2])
    gate, task = PhaseGate(), Task.read(path)
    import torch

    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    with contextlib.suppress(Finished):
        PROGRAMS[name](task, gate)


if __name__ == "__main__":
    main()
