"""Rounds of sampling, reward model, PPO and examination: what each round starts from, what is kept, when it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from conftest import Folders
from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.data.collate import collate
from steelyard.data.encode import Encoder, Tree
from steelyard.models.policy import PolicyModel
from steelyard.sampling import SamplingConfig
from steelyard.train.optim import OptimConfig
from steelyard.train.ppo import PPOConfig, train_ppo

SAMPLING = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def moved(language_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy with the SFT model's tokenizer and other weights."""
    model = tiny.build_model(tiny.build_config("llama"), seed=7)
    return tiny.save_folder(model, tiny.build_tokenizer(), tmp_path_factory.mktemp("moved"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [{}, {"rank": 2}])
def test_ppo_goes_on_from_a_moved_policy_and_measures_its_way_from_another(
    lora: dict[str, int], moved: str, language_model: Folders, reward_model: Folders, planted: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """KL and perplexity of the first step's samples, from the two models read apart, one response at a time."""
    sft = language_model("llama")
    config = PPOConfig.model_validate(
        {
            "policy": moved, "reference": sft, "reward_model": reward_model("llama"), "prompts": planted["prompts"],
            "reward": "plain", "steps": 1, "prompts_per_step": 3, "samples_per_prompt": 1, "max_length": 64,
            "sampling": SAMPLING, "actor": {"lr": 1e-3}, "sample_every": 1, "lora": lora,
        }
    )  # fmt: skip
    train_ppo(config, tmp_path, quiet=True)
    (found,) = metrics(tmp_path)
    encoder = Encoder.load(sft, max_length=64)
    sums = []
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        words = row["response"].split()
        response = tuple(encoder.tokenizer.convert_tokens_to_ids(words))
        tree = Tree(encoder.prompt_ids(row["prompt"]), (response + (() if len(words) == 5 else (encoder.end_id,)),))
        batch = collate([tree], encoder.pad_id)
        with torch.no_grad():
            ours, theirs = (float(PolicyModel.load(f)(batch).plain_BKR.sum()) for f in (moved, sft))
        sums.append((ours - theirs, theirs, len(tree.responses[0])))
    gap, theirs, tokens = np.array(sums).T
    assert len(sums) == 3
    assert found["ppo/kl_plain"] == pytest.approx(gap.mean(), rel=1e-4)
    assert found["ppo/kl_plain"] > 1
    assert found["ppo/ppl_sft"] == pytest.approx(np.exp(-theirs.sum() / tokens.sum()), rel=1e-4)


@pytest.mark.parametrize("drawn_from", ["reference", "policy"])
def test_baselines_come_from_the_reference_or_from_the_policy_as_it_starts(
    drawn_from: str, moved: str, language_model: Folders, reward_model: Folders, planted: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    folders = {"reference": language_model("llama"), "policy": moved}
    shared: dict[str, Any] = {
        "reward_model": reward_model("llama"), "prompts": planted["prompts"], "max_length": 64,
        "sampling": SamplingConfig.model_validate(SAMPLING),
    }  # fmt: skip
    stored = sample_baselines(BaselineConfig(policy=folders[drawn_from], k=2, **shared), tmp_path / "baselines")
    config = PPOConfig(
        **folders, **shared, baselines=str(stored), steps=1, prompts_per_step=3, samples_per_prompt=2,
        actor=OptimConfig(lr=1e-3),
    )  # fmt: skip
    assert train_ppo(config, tmp_path / "ppo", quiet=True)["steps"] == 1
