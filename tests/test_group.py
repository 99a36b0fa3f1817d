"""Several processes train what one trains: started by torchrun, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Folders
from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.errors import InputError
from steelyard.group import ALONE, Group, joined, started
from steelyard.models.reward import RewardModel
from steelyard.sampling.settings import SamplingConfig
from steelyard.train.metarm import MetaRMConfig, train_metarm
from steelyard.train.reward import RewardConfig, train_reward

SHORT: dict[str, Any] = {"max_length": 64, "max_tokens": 96, "batch_size": 5, "optim": {"lr": 1e-3}, "log_every": 1}


def two_processes(verb: str, settings: dict[str, Any], out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node 2 steelyard VERB`, on this machine."""
    given = settings | {f"optim.{k}": v for k, v in settings["optim"].items()}
    given |= {"validation": " ".join(next(iter(settings["validation"].items())))} if "validation" in settings else {}
    del given["optim"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "steelyard.cli", *verb.split(), "--out", str(out), *options]
    for name, value in given.items():
        command += [f"--{name.replace('_', '-')}", *str(value).split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def numbers(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in RewardModel.load(folder / "model").parameters()])


def same(one: Path, two: Path) -> None:
    left, right = numbers(one), numbers(two)
    assert len(left) == len(right) > 2
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    a, b = weights(one), weights(two)
    assert float((a - b).norm() / a.norm()) < 1e-5


class TestTwoProcesses:
    def test_metarm(
        self, language_model: Folders, reward_model: Folders, planted: dict[str, str], tmp_path: Path
    ) -> None:
        sampled = BaselineConfig(
            policy=language_model("llama"), prompts=planted["prompts"], max_length=64, k=3,
            sampling=SamplingConfig(max_new_tokens=5),
        )  # fmt: skip
        settings = SHORT | {
            "data": planted["held-out"], "model": reward_model("llama"), "eta": 1e-2, "k": 3, "epochs": 0.5,
            "meta": str(sample_baselines(sampled, tmp_path)), "meta_batch_size": 3, "save_every": 2, "eval_every": 2,
            "validation": {"v": planted["held-out"]},
        }  # fmt: skip
        train_metarm(MetaRMConfig(**settings), tmp_path / "one", quiet=True)
        made = two_processes("train metarm", settings, tmp_path / "two")
        assert made.returncode == 0, made.stderr
        same(tmp_path / "one", tmp_path / "two")
        assert made.stdout.count("model: ") == 1  # the first process speaks for both

        # Killed between two checkpoints, its steps done by one process in the place of two.
        (tmp_path / "two" / "result.json").unlink()
        train_metarm(MetaRMConfig(**settings), tmp_path / "two", quiet=True, resume=True)
        same(tmp_path / "one", tmp_path / "two")

        refused = two_processes("train metarm", settings, tmp_path / "two")
        assert "already holds a run" in refused.stderr
        assert refused.stderr.count("steelyard train metarm: ") == 1

    def test_reward(self, language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
        settings = SHORT | {"data": planted["held-out"], "model": language_model("llama"), "epochs": 0.5}
        train_reward(RewardConfig(**settings), tmp_path / "one", quiet=True)
        made = two_processes("train reward", settings, tmp_path / "two")
        assert made.returncode == 0, made.stderr
        same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("changes", [{"contrastive": {"method": "simcse"}}, {"activation_cache": "states"}])
def test_what_processes_cannot_share_is_refused(
    changes: dict[str, Any], language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    trainable = {"trainable_layers": 1} if "activation_cache" in changes else {}
    config = RewardConfig(data=planted["held-out"], model=language_model("llama"), **trainable, **changes)
    with pytest.raises(InputError, match="torchrun"):
        train_reward(config, tmp_path / "out", quiet=True, group=Group(0, 2))


def test_other_stages_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from steelyard.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert started() == 2
    assert main(["train", "sft", "--data", "d", "--model", "m", "--out", os.devnull]) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_one_gpu_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="names one GPU for 2 processes"), joined("cuda:1"):
        pass


def test_alone_nothing_is_shared() -> None:
    x = torch.ones(2)
    ALONE.sum_(x)
    assert x.tolist() == [1, 1]
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert [Group(r, 2).share([1, 2, 3]) for r in (0, 1)] == [[1, 3], [2]]
