"""The models of a policy study, one job each: SFT, reward models, baselines, policies; and what is kept of them.

A policy's folder holds, beside the stage's own files, `looks/step-XXXXXXXX.npz`: what it answered to the held-out
prompts at that point, by gold and proxy reward and distance. Everything a study says is computed from these.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_preferences
from steelyard.data.split import prompt_key
from steelyard.evaluate.policy import PolicyEvaluationConfig, divergence
from steelyard.evaluate.reward import wins
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.ppo_settings import PPOConfig
from steelyard.rewards import Aggregate, aggregate
from steelyard.run_dir import write_json_atomic
from steelyard.sampling import sample
from steelyard.scorer import load_scorer
from steelyard.stages import GOLD
from steelyard.study.data_models import score
from steelyard.train.dpo import DPOConfig, train_dpo
from steelyard.train.ppo import train_ppo
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.train.sft import SFTConfig, train_sft
from steelyard.types import Prompt

EXAMINED, FAILED = "examined.npz", "failed.json"
COLUMNS = ("gold", "proxy", "kl", "length", "ended")
Look = dict[str, Float[np.ndarray, "N K"]]


@dataclass(frozen=True)
class Exam:
    """The held-out prompts, and how a policy answers them. All policies share the streams of random numbers."""

    prompts: tuple[Prompt, ...]
    config: PolicyEvaluationConfig
    max_length: int
    looks: int

    def steps(self, steps: int) -> set[int]:
        """The steps of a run after which its policy is looked at: equal parts, the last one included."""
        return {max(1, round(steps * (i + 1) / self.looks)) for i in range(self.looks)}


@dataclass(frozen=True)
class RunJob:
    """One policy: its folder, its settings, the SFT model, and the reward models whose score is its proxy."""

    folder: Path
    config: PPOConfig | DPOConfig
    start: str
    rewards: tuple[str, ...]
    exam: Exam

    @property
    def done(self) -> bool:
        """Whether it has finished, or failed for good."""
        return (self.folder / "result.json").exists() or (self.folder / FAILED).exists()


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """An .npz, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def train_start(config: SFTConfig, folder: Path) -> None:
    """The SFT model of one seed."""
    train_sft(config, folder, resume=True, quiet=True)


# ---- answers ---------------------------------------------------------------------------------------------------


class Examiner:
    """Answers the held-out prompts and scores the answers: gold, proxy (normalised), KL to the SFT model."""

    def __init__(self, exam: Exam, start: str, rewards: Sequence[str], how: Aggregate, uncertainty_weight: float):
        precision, device = exam.config.precision, exam.config.device
        self.exam, self.how, self.uncertainty_weight = exam, how, uncertainty_weight
        self.encoder = Encoder.load(start, max_length=exam.max_length)
        self.ids = [self.encoder.prompt_ids(p) for p in exam.prompts]
        self.reference = PolicyModel.load(start, precision=precision, device=device)
        self.rewards = [RewardModel.load(folder, precision=precision, device=device) for folder in rewards]
        self.gold = load_scorer(GOLD)

    def answer(self, policy: PolicyModel, *, k: int, seed: int) -> list[Tree]:
        """k responses to each prompt."""
        config, encoder = self.exam.config, self.encoder
        drawn = sample(
            policy, self.ids, [prompt_key(p) for p in self.exam.prompts], k=k, config=config.sampling,
            end_id=encoder.end_id, pad_id=encoder.pad_id, seed=seed,
        )  # fmt: skip
        return [Tree(p, tuple(s.tokens for s in group)) for p, group in zip(self.ids, drawn, strict=True)]

    def score(self, trees: Sequence[Tree]) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]]:
        """(gold, proxy)."""
        tokens, pad_id = self.exam.config.max_tokens, self.encoder.pad_id
        proxies = []
        for model in self.rewards:
            mean, std = model.normal
            proxies.append((model.score(trees, pad_id=pad_id, max_tokens=tokens) - mean) / std)
        stacked = torch.from_numpy(np.stack(proxies))
        proxy = aggregate(stacked, self.how, uncertainty_weight=self.uncertainty_weight).double().numpy()
        prompts = self.exam.prompts
        gold = [
            [self.gold(p, self.encoder.decode(r)) for r in t.responses] for p, t in zip(prompts, trees, strict=True)
        ]
        return np.array(gold, dtype=np.float64), proxy

    def look(self, policy: PolicyModel) -> Look:
        """One look at a policy; `COLUMNS`, each (prompts, k)."""
        config, end = self.exam.config, self.encoder.end_id
        trees = self.answer(policy, k=config.k, seed=config.seed)
        gold, proxy = self.score(trees)
        kl = divergence(policy, self.reference, trees, self.encoder.pad_id, config.max_tokens)
        length = np.array([[len(r) for r in t.responses] for t in trees], dtype=np.float64)
        ended = np.array([[bool(r) and r[-1] == end for r in t.responses] for t in trees], dtype=np.float64)
        return {"gold": gold, "proxy": proxy, "kl": kl, "length": length, "ended": ended}


# ---- reward models and baselines -------------------------------------------------------------------------------


def train_and_examine(config: RewardConfig, folder: Path, validation: str, exam: Exam, baseline_k: int) -> None:
    """One reward model; its choices on held-out pairs, and its scores of the SFT model's held-out answers.

    `examined.npz`: accuracy_V (1, 1/2, 0 a pair, by gold); the look at the SFT model (with this reward model's proxy);
    base_gold, base_proxy of an independent second draw from it, `baseline_k` responses a prompt.
    """
    target = folder / EXAMINED
    if target.exists():
        return
    train_reward(config, folder, resume=True, quiet=True)
    ids, scores = score(folder / "model", config, validation)
    examiner = Examiner(exam, config.model, [str(folder / "model")], "mean", 0.0)
    found: dict[str, Any] = dict(examiner.look(examiner.reference))
    again = examiner.answer(examiner.reference, k=baseline_k, seed=exam.config.seed + 1)
    found["base_gold"], found["base_proxy"] = examiner.score(again)
    save_arrays(target, found | {"accuracy_V": wins(scores[:, 0] - scores[:, 1]), "validation_ids": np.array(ids)})


def sample_all(configs: Sequence[BaselineConfig], folder: Path) -> list[str]:
    """Baselines of one seed: the responses once, their scores by every reward model."""
    return [str(sample_baselines(config, folder)) for config in configs]


# ---- policies --------------------------------------------------------------------------------------------------


def train_and_look(job: RunJob) -> None:
    """One policy, looked at along the way. A run that its own guards end leaves `failed.json` in place of a result."""
    config, aim = job.config, job.folder / "looks"
    how: Aggregate = config.aggregate if isinstance(config, PPOConfig) else "mean"
    weight = config.uncertainty_weight if isinstance(config, PPOConfig) else 0.0
    examiner = Examiner(job.exam, job.start, job.rewards, how, weight)

    def look(step: int, steps: int, policy: PolicyModel) -> None:
        path = aim / f"step-{step:08d}.npz"
        if step in job.exam.steps(steps) and not path.exists():
            save_arrays(path, dict(examiner.look(policy)))

    first = aim / "step-00000000.npz"
    if not first.exists():
        save_arrays(first, dict(examiner.look(examiner.reference)))
    try:
        if isinstance(config, PPOConfig):
            train_ppo(config, job.folder, resume=True, quiet=True, look=look)
        else:
            train_dpo(config, job.folder, resume=True, quiet=True, look=look)
    except FloatingPointError as error:
        write_json_atomic(job.folder / FAILED, {"error": str(error)})
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def read_looks(folder: Path) -> tuple[list[int], dict[str, Float[np.ndarray, "J N K"]]]:
    """(steps, columns) of a policy's looks, in order of the steps."""
    paths = sorted((folder / "looks").glob("step-*.npz"))
    looks = [load_arrays(path) for path in paths]
    steps = [int(path.stem.removeprefix("step-")) for path in paths]
    return steps, {name: np.stack([one[name] for one in looks]) for name in COLUMNS}


def read_metrics(folder: Path, prefix: str) -> list[dict[str, float]]:
    """The lines of a stage's metrics that hold anything with this prefix."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith(prefix) for name in row)]


def wrong_share(path: Path) -> float:
    """The share of a file's pairs whose label the gold reward contradicts; a soft label counts by its flip_prob."""
    gold = load_scorer(GOLD)
    shares = []
    for p in load_preferences(path).preferences:
        lower = gold(p.prompt, p.chosen) < gold(p.prompt, p.rejected)
        shares.append(1 - p.flip_prob if lower else p.flip_prob)
    return float(np.mean(shares))
