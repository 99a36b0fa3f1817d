"""Prompts to tokens, a policy to start folders: `python prepare_task.py MODEL DATA TASK PROMPTS [rollouts]`.

A process of its own, so that the benchmark's parent never imports torch (see rounds.py). TASK holds the settings
already. With `rollouts` a reward model is made from the policy (seeded head) and the responses are sampled.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from task import Task

from steelyard.data.encode import Encoder
from steelyard.data.load import load_prompts
from steelyard.errors import InputError
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.sampling import SamplingConfig, sample


def prepare(model: str, data: str, path: Path, count: int, *, rollouts: bool) -> None:
    """Raises InputError if the data hold fewer prompts of at most `max_prompt` tokens."""
    task = Task.read(path)
    torch.set_num_threads(task.threads)
    encoder = Encoder.load(model, max_length=task.max_prompt + task.new_tokens)
    order = np.random.default_rng(task.seed)
    rows = load_prompts(data, on_invalid="skip").items
    prompts: list[tuple[int, ...]] = []
    for i in order.permutation(len(rows)):
        ids = encoder.prompt_ids(rows[i].prompt)
        if 0 < len(ids) <= task.max_prompt and ids not in prompts and encoder.pad_id not in ids:
            prompts.append(ids)
        if len(prompts) == count:
            break
    else:
        raise InputError(f"{data}: has {len(prompts)} prompts of at most {task.max_prompt} tokens, {count} are needed")
    policy = PolicyModel.load(model)
    policy.save(Path(task.start) / "policy", encoder)
    done = replace(task, prompts=[list(p) for p in prompts], end_id=encoder.end_id, pad_id=encoder.pad_id)
    if rollouts:
        RewardModel.from_language_model(model, pad_id=encoder.pad_id, seed=task.seed).save(
            Path(task.start) / "reward", encoder
        )
        config = SamplingConfig(max_new_tokens=task.new_tokens, min_new_tokens=task.new_tokens if task.fixed else 0)
        keys = [str(i) for i in range(count)]
        ids = (encoder.end_id, encoder.pad_id)
        drawn = sample(policy, prompts, keys, k=task.k, config=config, end_id=ids[0], pad_id=ids[1], seed=task.seed)
        done = replace(done, responses=[[list(s.tokens) for s in group] for group in drawn])
    done.write(path)


if __name__ == "__main__":
    try:
        prepare(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), rollouts="rollouts" in sys.argv[5:])
    except InputError as error:
        sys.exit(str(error))
