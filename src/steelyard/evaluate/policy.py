"""How good is a policy: gold and proxy reward, distance from the SFT model, and who wins against whom.

Every policy answers the same prompts with the same streams of random numbers. Intervals resample prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from steelyard.config import Config, Device
from steelyard.data.collate import collate, pack
from steelyard.data.dialogues import prompt_text
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_prompts
from steelyard.data.split import prompt_key
from steelyard.evaluate.reward import bootstrap_mean
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision
from steelyard.sampling import Sample, SamplingConfig, sample
from steelyard.scorer import Scorer
from steelyard.types import Prompt


class PolicyEvaluationConfig(Config):
    """Examination of policies on held-out prompts."""

    k: int = Field(2, ge=1, description="responses per prompt")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how responses are drawn")
    tie: float = Field(1e-6, ge=0, description="gold rewards closer than this tie")
    strata: int = Field(3, ge=1, description="groups of prompts by difficulty (proxy reward of other SFT answers)")
    samples: int = Field(8, ge=0, description="prompts whose answers are kept for the report")
    precision: Precision = Field("float32", description="arithmetic of the trunks")
    max_tokens: int = Field(8192, ge=16, description="tokens computed at once (memory, not results)")
    device: Device = "cpu"
    seed: int = Field(1234, ge=0, description="of the sampling; difficulty draws with the next one")


class Answers(NamedTuple):
    """One policy's responses to all prompts; N prompts, K responses."""

    texts: list[list[str]]
    gold_NK: Float[np.ndarray, "N K"] | None
    proxy_NK: Float[np.ndarray, "N K"]
    kl_NK: Float[np.ndarray, "N K"]
    length_NK: Float[np.ndarray, "N K"]
    ended_NK: Float[np.ndarray, "N K"]


def prompts_that_fit(path: str, encoder: Encoder, config: PolicyEvaluationConfig) -> list[Prompt]:
    """The file's different prompts that leave room for a response; a repeated one would only repeat its answers.

    Raises InputError if none does.
    """
    prompts = list({prompt_key(p.prompt): p.prompt for p in load_prompts(path).items}.values())
    return [prompts[i] for i in encoder.with_room(prompts, config.sampling.max_new_tokens, path)]


def answer(
    policy_folder: str,
    reference_folder: str,
    reward_folder: str,
    prompts: Sequence[Prompt],
    encoder: Encoder,
    gold: Scorer | None,
    config: PolicyEvaluationConfig,
) -> Answers:
    """Sample from a policy and score: gold, proxy (the reward model's normalised score), KL to the reference (nats)."""
    policy = PolicyModel.load(policy_folder, precision=config.precision, device=config.device)
    reference = PolicyModel.load(reference_folder, precision=config.precision, device=config.device)
    trees, drawn = draw_answers(policy, prompts, encoder, config)
    texts = [[encoder.decode(s.tokens) for s in group] for group in drawn]
    scored = None
    if gold is not None:
        scored = np.array([[gold(p, t) for t in group] for p, group in zip(prompts, texts, strict=True)])
    return Answers(
        texts,
        scored,
        _proxy(reward_folder, trees, encoder, config),
        divergence(policy, reference, trees, encoder.pad_id, config.max_tokens),
        np.array([[len(s.tokens) for s in group] for group in drawn], dtype=float),
        np.array([[s.ended for s in group] for group in drawn], dtype=float),
    )


def difficulty(
    policy_folder: str,
    reward_folder: str,
    prompts: Sequence[Prompt],
    encoder: Encoder,
    config: PolicyEvaluationConfig,
) -> Float[np.ndarray, "N"]:
    """How well the SFT model does at each prompt: the mean proxy reward of k responses that nothing else reports.

    They are drawn with seed + 1. Were prompts sorted by the very answers that are reported, the poorest stratum would
    hold those that were unlucky, and every other policy would seem to gain most there.
    """
    policy = PolicyModel.load(policy_folder, precision=config.precision, device=config.device)
    again = config.model_copy(update={"seed": config.seed + 1})
    trees, _ = draw_answers(policy, prompts, encoder, again)
    found: Float[np.ndarray, "N"] = _proxy(reward_folder, trees, encoder, config).mean(1)
    return found


def _proxy(
    folder: str, trees: Sequence[Tree], encoder: Encoder, config: PolicyEvaluationConfig
) -> Float[np.ndarray, "N K"]:
    """The reward model's normalised scores."""
    reward = RewardModel.load(folder, precision=config.precision, device=config.device)
    mean, std = reward.normal
    return (reward.score(trees, pad_id=encoder.pad_id, max_tokens=config.max_tokens) - mean) / std


def draw_answers(
    policy: PolicyModel, prompts: Sequence[Prompt], encoder: Encoder, config: PolicyEvaluationConfig
) -> tuple[list[Tree], list[list[Sample]]]:
    """k responses to each prompt, as trees and as samples; the streams follow from the prompt and the seed alone."""
    ids = [encoder.prompt_ids(p) for p in prompts]
    drawn = sample(
        policy,
        ids,
        [prompt_key(p) for p in prompts],
        k=config.k,
        config=config.sampling,
        end_id=encoder.end_id,
        pad_id=encoder.pad_id,
        seed=config.seed,
    )
    trees = [Tree(p, tuple(s.tokens for s in group)) for p, group in zip(ids, drawn, strict=True)]
    return trees, drawn


@torch.no_grad()
def divergence(
    policy: PolicyModel, reference: PolicyModel, trees: Sequence[Tree], pad_id: int, max_tokens: int
) -> Float[np.ndarray, "N K"]:
    """log p(y|x) - log p_ref(y|x) of each response at temperature 1: its mean over y ~ policy is the KL."""
    out = np.zeros((len(trees), len(trees[0].responses)))
    for group in pack([len(t) for t in trees], max_tokens):
        batch = collate([trees[i] for i in group], pad_id, policy.device, reads="responses")
        out[group] = (policy(batch).plain_BKR - reference(batch).plain_BKR).sum(-1).cpu().numpy()
    return out


def compare(
    answers: Mapping[str, Answers],
    prompts: Sequence[Prompt],
    config: PolicyEvaluationConfig,
    difficulty_N: Float[np.ndarray, "N"],
) -> dict[str, Any]:
    """The report's tables: one row per policy, win / tie / lose of every pair by gold, strata, samples.

    `difficulty_N` says how well the SFT model does at a prompt, from answers that are not among these (`difficulty`).
    """
    keys = [prompt_key(p) for p in prompts]
    return {
        "arms": [_row(name, a, keys) for name, a in answers.items()],
        "wins": [
            _win(a, b, answers[a].gold_NK, answers[b].gold_NK, config.tie, keys)
            for b, a in combinations(answers, 2)
            if answers[a].gold_NK is not None
        ],
        "difficulty": _strata(answers, keys, difficulty_N, config.strata),
        "samples": [
            {
                "prompt": prompt_text(p),
                "responses": {
                    name: {
                        "text": a.texts[n][0],
                        "gold": None if a.gold_NK is None else float(a.gold_NK[n, 0]),
                        "proxy": float(a.proxy_NK[n, 0]),
                    }
                    for name, a in answers.items()
                },
            }
            for n, p in enumerate(prompts[: config.samples])
        ],
    }


def _row(name: str, a: Answers, keys: Sequence[str]) -> dict[str, Any]:
    return {
        "arm": name,
        **_interval("gold", a.gold_NK, keys),
        **_interval("proxy", a.proxy_NK, keys),
        "kl": float(a.kl_NK.mean()),
        "length": float(a.length_NK.mean()),
        "ended": float(a.ended_NK.mean()),
    }


def _interval(name: str, values_NK: Float[np.ndarray, "N K"] | None, keys: Sequence[str]) -> dict[str, float | None]:
    """A mean over responses with its interval over prompts; Nones where there are no values."""
    names = (name, f"{name}_low", f"{name}_high")
    if values_NK is None:
        return dict.fromkeys(names)
    clusters = [key for key in keys for _ in range(values_NK.shape[1])]
    return dict(zip(names, bootstrap_mean(values_NK.reshape(-1), clusters=clusters), strict=True))


def _win(a: str, b: str, gold_a: Any, gold_b: Any, tie: float, keys: Sequence[str]) -> dict[str, Any]:
    difference = gold_a - gold_b
    points = np.where(np.abs(difference) <= tie, 0.5, (difference > 0).astype(float))
    return win_row(a, b, "gold", points.reshape(-1), [key for key in keys for _ in range(points.shape[1])])


def win_row(a: str, b: str, judge: str, points_n: Float[np.ndarray, "n"], keys: Sequence[str]) -> dict[str, Any]:
    """A row of the table of wins from points (1: a wins, 1/2: tie, 0: b wins, NaN: no verdict, left out).

    Shares of win, tie and lose; `score` counts a tie half, its interval resamples prompts (`keys`).
    """
    known = ~np.isnan(points_n)
    points = points_n[known]
    row: dict[str, Any] = {"a": a, "b": b, "judge": judge}
    if not len(points):
        return row | {"win": 0.0, "tie": 0.0, "lose": 0.0, "score": None, "low": None, "high": None, "n": 0}
    score, low, high = bootstrap_mean(points, clusters=[key for key, k in zip(keys, known, strict=True) if k])
    return row | {
        "win": float((points == 1).mean()),
        "tie": float((points == 0.5).mean()),
        "lose": float((points == 0).mean()),
        "score": score,
        "low": low,
        "high": high,
        "n": points.size,
    }


def _strata(
    answers: Mapping[str, Answers], keys: Sequence[str], difficulty_N: Float[np.ndarray, "N"], strata: int
) -> list[dict[str, Any]]:
    rows = []
    for s, members in enumerate(np.array_split(np.argsort(difficulty_N, kind="stable"), strata)):
        if not len(members):
            continue
        low, high = float(difficulty_N[members].min()), float(difficulty_N[members].max())
        held = [keys[n] for n in members]
        for name, a in answers.items():
            row = {"arm": name, "stratum": f"{s + 1} of {strata}", "low": low, "high": high, "n": len(members)}
            row |= _interval("gold", None if a.gold_NK is None else a.gold_NK[members], held)
            rows.append(row | _interval("proxy", a.proxy_NK[members], held))
    return rows
