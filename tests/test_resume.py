"""Killed without warning, at any moment, and continued: every stage ends with the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Folders, Life
from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.data.load import load_preferences
from steelyard.iterate import run_rounds
from steelyard.measure import MemberConfig, StrengthConfig, measure
from steelyard.models.lora import LoraConfig
from steelyard.rounds_settings import RoundsConfig
from steelyard.run_dir import RunDir
from steelyard.sampling import SamplingConfig
from steelyard.train.dpo import DPOConfig, train_dpo
from steelyard.train.optim import OptimConfig
from steelyard.train.ppo import PPOConfig, train_ppo
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.train.sft import ScratchConfig, SFTConfig, train_sft

TRAIN: dict[str, Callable[..., Any]] = {
    "sft": train_sft,
    "reward": train_reward,
    "dpo": train_dpo,
    "ppo": train_ppo,
    "ppo, rloo": train_ppo,
    "ppo, remax, running std": train_ppo,
    "ppo, adapters, shared critic": train_ppo,
    "ppo, nucleus, shared critic": train_ppo,
}


SIMILAR = {"ppo, rloo", "ppo, remax, running std"}
"""What they keep between steps is also in others here; killed in the slow checks alone."""


@contextmanager
def at_event(hook: Callable[[int], None]) -> Iterator[None]:
    """Call `hook(n)` before the n-th thing that changes state: a step, a line, a synchronised or renamed file."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            hook(count)
            count += 1
            return original(*args, **kwargs)

        return wrapper

    places: list[tuple[Any, str]] = [(os, "fsync"), (os, "replace"), (torch.optim.AdamW, "step"), (RunDir, "_append")]
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, before, strict=True):
        setattr(owner, name, counted(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, before, strict=True):
            setattr(owner, name, original)


def train_until(stage: str, config: Any, out: Path, event: int) -> None:
    """A job: train, and be killed at the event (once it comes)."""

    def hook(n: int) -> None:
        if n == event:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_event(hook):
        TRAIN[stage](config, out, resume=True, quiet=True)


def outcome(out: Path) -> dict[str, bytes]:
    files = [*(out / "model").iterdir(), *(out / n for n in ("metrics.jsonl", "result.json", "samples.jsonl"))]
    return {path.name: path.read_bytes() for path in files if path.exists()}


@pytest.fixture(scope="module")
def configs(
    language_model: Folders, reward_model: Folders, planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    sampling = SamplingConfig(max_new_tokens=5)
    stored = sample_baselines(
        BaselineConfig(
            policy=language_model("llama"), reward_model=reward_model("llama"), prompts=planted["prompts"],
            max_length=64, sampling=sampling, k=2,
        ),
        tmp_path_factory.mktemp("baselines"),
    )  # fmt: skip
    ppo: dict[str, Any] = {
        "policy": language_model("llama"), "reward_model": reward_model("llama"), "prompts": planted["prompts"],
        "steps": 7, "prompts_per_step": 8, "samples_per_prompt": 8, "max_length": 64, "sampling": sampling,
        "actor": OptimConfig(lr=1e-3), "save_every": 2, "sample_every": 3, "gold": "tiny:count_good",
    }  # fmt: skip
    return {
        # Word vectors shared by input and output are one tensor in memory and two names in the state.
        "sft": SFTConfig(
            data=planted["demonstrations"], validation=planted["demonstrations"], tokenizer=language_model("llama"),
            scratch=ScratchConfig(layers=1, width=16, heads=2, context=32), batch_size=8, epochs=2, max_length=32,
            optim=OptimConfig(lr=1e-2, weight_decay=0.1), save_every=3, log_every=4,
        ),
        "reward": RewardConfig(
            data=planted["held-out"], model=language_model("llama"), validation={"own": planted["held-out"]},
            batch_size=8, epochs=1.5, max_length=64, optim=OptimConfig(lr=3e-3), save_every=3, log_every=4,
            eval_every=4,
        ),
        "dpo": DPOConfig(
            data=planted["held-out"], model=language_model("llama"), validation={"own": planted["held-out"]},
            batch_size=8, epochs=1.5, max_length=64, optim=OptimConfig(lr=3e-3), save_every=3, log_every=4,
            eval_every=4, prompts=planted["prompts"], answers=6, sampling=sampling, gold="tiny:count_good",
        ),
        "ppo": PPOConfig(
            **ppo, baselines=str(stored), minibatches=2, epochs=2, critic_warmup=1, critic=OptimConfig(lr=1e-3)
        ),
        "ppo, rloo": PPOConfig(**ppo, baselines=str(stored), reward="par", advantage="rloo", epochs=2),
        "ppo, remax, running std": PPOConfig(
            **ppo, reward="plain", advantage="remax", scaling="std", scale_warmup=100, minibatches=2
        ),
        "ppo, adapters, shared critic": PPOConfig(
            **ppo, reward="plain", lora=LoraConfig(rank=2), critic_model="shared", critic_warmup=2, kl_target=0.1,
            kl_horizon=100, scaling="std", scale_warmup=100, scale_kl=True,
        ),
        "ppo, nucleus, shared critic": PPOConfig(
            **ppo | {"sampling": SamplingConfig(max_new_tokens=5, top_p=0.8, repetition_penalty=1.2)},
            reward="plain", critic_model="shared", kl_target=5.0, kl_horizon=100, epochs=3, minibatches=2,
            stop_epochs_at_kl=1e-3, logit_chunk=16,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("stage", [pytest.param(s, marks=pytest.mark.slow if s in SIMILAR else ()) for s in TRAIN])
def test_killed_again_and_again_a_run_ends_with_the_same_bytes(
    stage: str, configs: dict[str, Any], life: Life, tmp_path: Path
) -> None:
    events: list[int] = []
    with at_event(events.append):
        TRAIN[stage](configs[stage], tmp_path / "whole", quiet=True)
    expected = outcome(tmp_path / "whole")
    assert {"model.safetensors", "metrics.jsonl", "result.json"} <= expected.keys()

    # One life ends before the first checkpoint, one late, and two soon after they were restored.
    rng, out = np.random.default_rng(len(stage)), tmp_path / "killed"
    total = len(events)
    points = [int(total * rng.uniform(low, high)) for low, high in ((0, 0.15), (0.55, 0.75), (0.02, 0.1), (0.1, 0.25))]
    for point in points:
        assert life(train_until, stage, configs[stage], out, point) == -signal.SIGKILL
        assert not (out / "result.json").exists()
    assert list((out / "checkpoints").glob("step-*"))
    TRAIN[stage](configs[stage], out, resume=True, quiet=True)
    found = outcome(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    steps = [
        line
        for line in found["metrics.jsonl"].splitlines()
        if any(k in line for k in (b"train/", b"ppo/", b"dpo/loss"))
    ]
    assert len(steps) == (7 if stage.startswith("ppo") else 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(TRAIN))
def test_killed_once_at_every_third_event(stage: str, configs: dict[str, Any], life: Life, tmp_path: Path) -> None:
    events: list[int] = []
    with at_event(events.append):
        TRAIN[stage](configs[stage], tmp_path / "whole", quiet=True)
    expected = outcome(tmp_path / "whole")
    for point in range(0, len(events), 3):
        out = tmp_path / str(point)
        assert life(train_until, stage, configs[stage], out, point) == -signal.SIGKILL
        TRAIN[stage](configs[stage], out, resume=True, quiet=True)
        assert outcome(out) == expected, point


def measure_until(config: StrengthConfig, out: Path, event: int) -> None:
    """A job: measure, and be killed at the event."""

    def hook(n: int) -> None:
        if n == event:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_event(hook):
        measure(config, load_preferences(config.data).preferences, out, resume=True, quiet=True)


@pytest.mark.parametrize("backend", ["full", "head"])
def test_a_measurement_continues_too(
    backend: str, language_model: Folders, planted: dict[str, str], life: Life, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"backend": backend, "members": 2, "folds": 2, "max_length": 64}
    if backend == "full":
        settings |= {"workers": 1, "member": MemberConfig(batch_size=16, optim=OptimConfig(lr=3e-3))}
    config = StrengthConfig.model_validate({"data": planted["held-out"], "model": language_model("llama")} | settings)
    preferences = load_preferences(planted["held-out"]).preferences
    events: list[int] = []
    with at_event(events.append):
        expected = measure(config, preferences, tmp_path / "whole", quiet=True)
    for share in (0.3, 0.5):
        point = int(share * len(events))
        assert life(measure_until, config, tmp_path / "killed", point) == -signal.SIGKILL
    assert measure(config, preferences, tmp_path / "killed", resume=True, quiet=True) == expected
    whole, killed = ((tmp_path / folder / "strength.parquet").read_bytes() for folder in ("whole", "killed"))
    assert whole == killed
    a, b = (np.load(tmp_path / folder / "margins.npz")["scores"] for folder in ("whole", "killed"))
    np.testing.assert_array_equal(a, b)


def iterate_until(config: RoundsConfig, out: Path, event: int) -> None:
    """A job: go through the rounds, and be killed at the event."""

    def hook(n: int) -> None:
        if n == event:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_event(hook):
        run_rounds(config, out, resume=True, quiet=True)


@pytest.fixture(scope="module")
def rounds(language_model: Folders, reward_model: Folders, planted: dict[str, str]) -> RoundsConfig:
    """Two rounds: MetaRM and contrastive PPO on baselines of the policy as it is, with a critic."""
    sampling, optim = {"max_new_tokens": 5}, {"lr": 3e-3}
    return RoundsConfig.model_validate(
        {
            "sft": language_model("llama"), "reward_model": reward_model("llama"), "data": planted["held-out"],
            "prompts": planted["prompts"], "eval_prompts": planted["prompts"], "rounds": 2, "patience": None,
            "rm": {"max_length": 64, "optim": optim, "save_every": 2, "log_every": 1, "eval_every": None},
            "meta": {"eta": 0.1, "meta_batch_size": 4}, "meta_sample": {"k": 3}, "baselines": "current",
            "baseline_sample": {"k": 2}, "validation": {"own": planted["held-out"]}, "gold": "tiny:count_good",
            "ppo": {
                "steps": 5, "prompts_per_step": 6, "samples_per_prompt": 3, "max_length": 64, "sampling": sampling,
                "actor": optim, "critic": optim, "save_every": 2, "sample_every": 3, "scale_warmup": 20,
                "minibatches": 2,
            },
            "evaluate": {"k": 2, "sampling": sampling},
        }
    )  # fmt: skip


def left(out: Path) -> dict[str, bytes]:
    """Everything that the rounds leave and that is not about this machine: times, locks, and paths of settings."""
    files = (p for p in out.rglob("*") if p.is_file() and not p.is_relative_to(out / "best" / "model"))
    idle = {"config.json", "inputs.json", "timings.jsonl", ".lock"}
    found = {
        str(p.relative_to(out)): p.read_bytes() for p in files if p.name not in idle and "checkpoints" not in p.parts
    }
    return found | {"best": str((out / "best" / "model").readlink()).encode()}


def rounds_killed_at(points: int, config: RoundsConfig, life: Life, path: Path) -> None:
    """Killed once at each of so many seeded moments, one in every equal part of the run, and continued each time."""
    events: list[int] = []
    with at_event(events.append):
        run_rounds(config, path / "whole", quiet=True)
    expected = left(path / "whole")
    parts = [
        f"round-{n:02d}/{s}" for n in (1, 2) for s in ("rm/model/model.safetensors", "ppo/model/model.safetensors")
    ]
    assert {*parts, "rounds.json", "result.json", "round-02/ppo/metrics.jsonl", "best/best.json"} <= expected.keys()
    shares = (np.arange(points) + np.random.default_rng(points).random(points)) / points
    for point in (int(share * len(events)) for share in shares):
        out = path / f"killed at {point}"
        assert life(iterate_until, config, out, point) == -signal.SIGKILL
        assert not (out / "result.json").exists()
        run_rounds(config, out, resume=True, quiet=True)
        found = left(out)
        assert found.keys() == expected.keys(), point
        assert [name for name in expected if found[name] != expected[name]] == [], point


def test_killed_rounds_end_with_the_same_bytes(rounds: RoundsConfig, life: Life, tmp_path: Path) -> None:
    rounds_killed_at(2, rounds, life, tmp_path)


@pytest.mark.slow
def test_killed_rounds_end_with_the_same_bytes_wherever_they_are_killed(
    rounds: RoundsConfig, life: Life, tmp_path: Path
) -> None:
    rounds_killed_at(20, rounds, life, tmp_path)
