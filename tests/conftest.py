"""Shared fixtures: tiny checkpoints and data files, built once per session; one thread, so that runs repeat."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Folders = Callable[[str], str]
Life = Callable[..., int]


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Sums split among threads round differently; bits are compared under one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def life() -> Iterator[Life]:
    """life(function, *arguments): run a test module's function in a process of its own; returns its exit status."""
    server = Path(__file__).with_name("lives.py")
    process = subprocess.Popen([sys.executable, server], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    wish, answer = process.stdin, process.stdout

    def live(function: Callable[..., None], *arguments: Any) -> int:
        pickle.dump((function.__module__, function.__name__, arguments), wish)
        wish.flush()
        status: int = pickle.load(answer)
        return status

    yield live
    wish.close()
    assert process.wait(10) == 0
    answer.close()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose figures are empty, for tests that write several and look at none: drawing takes seconds a page."""
    from markupsafe import Markup

    monkeypatch.setattr("steelyard.report.plots._svg", lambda name, figure: Markup('<svg class="plot"></svg>'))


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Folders:
    """family -> folder of a tiny causal language model with its tokenizer."""
    import tiny

    made: dict[str, str] = {}

    def folder(family: str = "llama") -> str:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            made[family] = tiny.save_folder(tiny.build_model(tiny.build_config(family)), tiny.build_tokenizer(), path)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Folders:
    """family -> folder of a tiny reward model with random weights, its mean and std set."""
    import tiny

    made: dict[str, str] = {}

    def folder(family: str = "llama") -> str:
        if family not in made:
            config = tiny.build_config(family)
            config.steelyard_reward = [0.3, 1.7]
            model = tiny.build_model(config, seed=1, head=True)
            made[family] = tiny.save_folder(model, tiny.build_tokenizer(), tmp_path_factory.mktemp(f"{family}-reward"))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data files with a planted rule ("good" beats "bad"): name -> path."""
    import numpy as np

    import tiny

    root = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(5)
    prompts = [{"prompt": " ".join(tiny.sentence(rng, 3, 7))} for _ in range(12)]
    demonstrations = [
        {"prompt": " ".join(tiny.sentence(rng, 2, 5)), "response": "good w1 w2 good" if i % 2 else "w3 good w1"}
        for i in range(48)
    ]
    return {
        "clean": tiny.write_jsonl(root / "clean.jsonl", tiny.planted_pairs(96)[0]),
        "noisy": tiny.write_jsonl(root / "noisy.jsonl", tiny.planted_pairs(240, flips=0.2, seed=1)[0]),
        "held-out": tiny.write_jsonl(root / "held-out.jsonl", tiny.planted_pairs(64, seed=2)[0]),
        "prompts": tiny.write_jsonl(root / "prompts.jsonl", prompts),
        "demonstrations": tiny.write_jsonl(root / "demonstrations.jsonl", demonstrations),
    }


@pytest.fixture(scope="session")
def planted_reward(tmp_path_factory: pytest.TempPathFactory, language_model: Folders, planted: dict[str, str]) -> Path:
    """Stage folder of a reward model trained on the planted rule."""
    from steelyard.train.optim import OptimConfig
    from steelyard.train.reward import RewardConfig, train_reward

    out = tmp_path_factory.mktemp("planted-reward") / "rm"
    config = RewardConfig(
        data=planted["clean"],
        model=language_model("llama"),
        validation={"held-out": planted["held-out"]},
        epochs=4,
        batch_size=16,
        optim=OptimConfig(lr=3e-3),
        max_length=64,
        log_every=4,
        eval_every=12,
    )
    train_reward(config, out, quiet=True)
    return out
