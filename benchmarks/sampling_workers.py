"""The programs that benchmarks/sampling.py compares: `python sampling_workers.py NAME TASK`. Not started by hand.

A step draws k responses to every prompt of the task, beginning with the prompts' tokens and ending with the
responses' tokens as lists.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from rounds import Finished, Gate
from task import Task
from workers import about

Draw = Callable[[int], list[list[int]]]


def generate(task: Task, *, at_once: int) -> Draw:
    """transformers' `generate` as it comes: weights of the wanted precision, sdpa, its cache, its sampling."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        f"{task.start}/policy", attn_implementation="sdpa", dtype=getattr(torch, task.precision)
    )
    model.eval()
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "num_return_sequences": task.k,
        "max_new_tokens": task.new_tokens,
        "min_new_tokens": task.new_tokens if task.fixed else None,
        "eos_token_id": task.end_id,
        "pad_token_id": task.pad_id,
    }

    def draw(step: int) -> list[list[int]]:
        torch.manual_seed(task.seed + step)
        prompts = sorted(task.prompts, key=len, reverse=True) if at_once < len(task.prompts) else task.prompts
        found = []
        for first in range(0, len(prompts), at_once):
            group = prompts[first : first + at_once]
            width = max(map(len, group))
            ids = torch.tensor([[task.pad_id] * (width - len(p)) + p for p in group])
            there = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group])
            found += model.generate(ids, attention_mask=there, **settings)[:, width:].tolist()
        return [_to_end(row, task.end_id) for row in found]

    return draw


def _to_end(row: list[int], end_id: int) -> list[int]:
    """Without the padding behind the end token."""
    return row[: row.index(end_id) + 1] if end_id in row else row


def steelyard(task: Task, *, sampler: str) -> Draw:
    """`steelyard.sampling.sample`, all prompts side by side, weights and caches made anew in every step."""
    from steelyard.memory import keep_freed_memory
    from steelyard.models.policy import PolicyModel
    from steelyard.sampling import SamplingConfig, sample

    keep_freed_memory()  # as the command line does
    precision: Any = task.precision
    policy = PolicyModel.load(f"{task.start}/policy", precision=precision)
    config = SamplingConfig.model_validate(
        {
            "max_new_tokens": task.new_tokens,
            "min_new_tokens": task.new_tokens if task.fixed else 0,
            "rows": len(task.prompts) * task.k,
            "sampler": sampler,
        }
    )
    prompts, keys = [tuple(p) for p in task.prompts], [str(i) for i in range(len(task.prompts))]

    def draw(step: int) -> list[list[int]]:
        drawn = sample(
            policy,
            prompts,
            keys,
            k=task.k,
            config=config,
            end_id=task.end_id,
            pad_id=task.pad_id,
            seed=task.seed + step,
        )
        return [list(s.tokens) for group in drawn for s in group]

    return draw


PROGRAMS: dict[str, Callable[[Task], Draw]] = {
    "generate": lambda task: generate(task, at_once=len(task.prompts)),
    "generate-sorted": lambda task: generate(task, at_once=task.options["at_once"]),
    "steelyard-transformers": lambda task: steelyard(task, sampler="transformers"),
    "steelyard": lambda task: steelyard(task, sampler="shared"),
}


def main() -> None:
    """`python sampling_workers.py NAME TASK`."""
    name, path = sys.argv[1], Path(sys.argv[2])
    gate, task = Gate(), Task.read(path)
    import torch

    torch.set_num_threads(task.threads)
    try:
        draw = PROGRAMS[name](task)
        gate.open(versions=about())
        for step in count():
            drawn = draw(step)
            if task.fixed and {len(row) for row in drawn} != {task.new_tokens}:
                raise RuntimeError(f"responses of {task.new_tokens} tokens were asked for, got others")
            gate.step(0.0, sum(map(len, drawn)))
    except Finished:
        pass


if __name__ == "__main__":
    main()
