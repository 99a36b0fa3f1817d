"""Commands that train a model, or sample from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from steelyard.baselines import BaselineConfig, outlook, sample_baselines
from steelyard.cli import VERBS
from steelyard.commands.common import OUT, RESUME, Args
from steelyard.config import Config
from steelyard.group import joined, require_one_process
from steelyard.settings import parse
from steelyard.train.dpo import DPOConfig, train_dpo
from steelyard.train.metarm import MetaRMConfig, train_metarm
from steelyard.train.ppo import PPOConfig, train_ppo
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.train.sft import SFTConfig, train_sft

SHARED = ("train reward", "train metarm")  # several processes can share their batches


def train(config_type: type[Config], function: Callable[..., dict[str, Any]], verb: str) -> Callable[[Args], None]:
    """The command of a training stage."""

    def command(args: Args) -> None:
        config, extra = parse(config_type, args, verb=verb, about=VERBS[verb], out=OUT, resume=RESUME)
        if verb in SHARED:
            with joined(getattr(config, "device", "cpu")) as group:
                result = function(config, extra.out, resume=extra.resume, group=group)
            if not group.first:
                return
        else:
            require_one_process()
            result = function(config, extra.out, resume=extra.resume)
        print(json.dumps(result, indent=2))
        print(f"model: {extra.out / 'model'}")

    return command


def sample_command(args: Args) -> None:
    """Offline baselines."""
    config, extra = parse(BaselineConfig, args, verb="sample", about=VERBS["sample"], out=OUT)
    path = sample_baselines(config, extra.out)
    if config.reward_model is not None:
        print(outlook(path))
    print(f"baselines: {path}")


COMMANDS: dict[str, Callable[[Args], None]] = {
    "train sft": train(SFTConfig, train_sft, "train sft"),
    "train reward": train(RewardConfig, train_reward, "train reward"),
    "train ppo": train(PPOConfig, train_ppo, "train ppo"),
    "train dpo": train(DPOConfig, train_dpo, "train dpo"),
    "train metarm": train(MetaRMConfig, train_metarm, "train metarm"),
    "sample": sample_command,
}
