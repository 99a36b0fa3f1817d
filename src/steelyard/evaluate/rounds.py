"""The examination of one round: how good its policy is, how far it has gone, and whether its reward model still judges.

Every round's policy answers the same held-out prompts with the same streams of random numbers. A round is chosen on
one half of the prompts; what the choice is worth is said on the other half, where choosing has not flattered it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from steelyard.data.collate import collate, pack
from steelyard.data.dialogues import prompt_text
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_prompts
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.evaluate.policy import PolicyEvaluationConfig, draw_answers
from steelyard.evaluate.reward import bootstrap_mean, wins
from steelyard.evaluate.spread import true_choices
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.sampling import Sample
from steelyard.scorer import Scorer
from steelyard.types import Preference, Prompt

FIRST, CURRENT, JUDGE, GOLD = "first", "current", "judge", "gold"
OWN = "the policy's own responses"
Keep = Literal["best", "earliest"]
Pairs = tuple[list[Preference], list[Tree]]
"""Usable pairs and their trees."""


def held_out(path: str, encoder: Encoder, config: PolicyEvaluationConfig) -> list[Prompt]:
    """The file's different prompts that leave room for a response. Raises InputError if they are fewer than 2."""
    prompts = {prompt_key(p.prompt): p.prompt for p in load_prompts(path).items}
    room = encoder.max_length - config.sampling.max_new_tokens
    fits = [p for p in prompts.values() if len(encoder.prompt_ids(p)) <= room]
    if len(fits) < 2:
        raise InputError(
            f"{path}: rounds are chosen on one half of the prompts and measured on the other, so 2 different ones are "
            f"needed; {len(fits)} of {len(prompts)} leave room for {config.sampling.max_new_tokens} new tokens within "
            f"max_length = {encoder.max_length}"
        )
    return fits


def examine_round(
    policy_folder: str,
    sft_folder: str,
    rewards: Mapping[str, str],
    prompts: Sequence[Prompt],
    gold: Scorer | None,
    validation: Mapping[str, Pairs],
    config: PolicyEvaluationConfig,
    *,
    max_length: int,
) -> dict[str, Any]:
    """One policy on held-out prompts, as plain values; `rewards` are reward-model folders by name, `FIRST` among them.

    `validation`: the sets by name, in the tokens that all these models share. `max_length` is the policy's.

    `values`: for each prompt and response the (normalised) rewards, gold, KL to the SFT model in nats (log p(y) -
    log p_SFT(y) at temperature 1), length and whether it ended. `row`: their means, rewards with intervals over
    prompts; `ppl_sft` is the perplexity of all responses under the SFT model. `accuracy`: the first and the current
    reward model on the validation sets and, by gold, on pairs of these very responses.
    """
    encoder = Encoder.load(policy_folder, max_length=max_length)
    trees, drawn, kl_NK, ppl = _answer(policy_folder, sft_folder, encoder, prompts, config)
    texts = [[encoder.decode(s.tokens) for s in group] for group in drawn]
    values: dict[str, Float[np.ndarray, "N K"]] = {}
    if gold is not None:
        values[GOLD] = np.array([[gold(p, t) for t in group] for p, group in zip(prompts, texts, strict=True)])
    accuracy, scored = [], dict[str, tuple[Any, list[dict[str, Any]]]]()
    keys = [prompt_key(p) for p in prompts]
    for name, folder in rewards.items():
        if folder not in scored:
            sets = {} if name == JUDGE else validation
            scored[folder] = _judge(folder, encoder.pad_id, trees, keys, sets, values.get(GOLD), config)
        values[name], rows = scored[folder]
        accuracy += [] if name == JUDGE else [{"model": name, **row} for row in rows]
    values["kl"] = kl_NK
    values["length"] = np.array([[len(s.tokens) for s in group] for group in drawn], dtype=float)
    values["ended"] = np.array([[s.ended for s in group] for group in drawn], dtype=float)
    samples = [
        {"prompt": prompt_text(p), "response": group[0]}
        for p, group in zip(prompts[: config.samples], texts, strict=False)
    ]
    return {
        "row": _row(values, keys, ppl),
        "accuracy": accuracy,
        "prompts": keys,
        "values": {name: v.tolist() for name, v in values.items()},
        "samples": samples,
    }


def _answer(
    policy_folder: str, sft_folder: str, encoder: Encoder, prompts: Sequence[Prompt], config: PolicyEvaluationConfig
) -> tuple[list[Tree], list[list[Sample]], Float[np.ndarray, "N K"], float]:
    """(trees, samples, KL of each response, perplexity of all of them under the SFT model)."""
    policy = PolicyModel.load(policy_folder, precision=config.precision, device=config.device)
    trees, drawn = draw_answers(policy, prompts, encoder, config)
    ours_NK = _loglikelihood(policy, trees, encoder.pad_id, config.max_tokens)
    sft = PolicyModel.load(sft_folder, precision=config.precision, device=config.device)
    theirs_NK = _loglikelihood(sft, trees, encoder.pad_id, config.max_tokens)
    tokens = sum(len(s.tokens) for group in drawn for s in group)
    ppl = math.exp(min(-float(theirs_NK.sum()) / tokens, 80.0))
    return trees, drawn, ours_NK - theirs_NK, ppl


@torch.no_grad()
def _loglikelihood(model: PolicyModel, trees: Sequence[Tree], pad_id: int, max_tokens: int) -> Float[np.ndarray, "N K"]:
    """log p(y|x) of each response at temperature 1."""
    out = np.zeros((len(trees), len(trees[0].responses)))
    for group in pack([len(t) for t in trees], max_tokens):
        batch = collate([trees[i] for i in group], pad_id, model.device, reads="responses")
        out[group] = model(batch).plain_BKR.sum(-1).cpu().numpy()
    return out


def _judge(
    folder: str,
    pad_id: int,
    trees: Sequence[Tree],
    keys: Sequence[str],
    validation: Mapping[str, Pairs],
    gold_NK: Float[np.ndarray, "N K"] | None,
    config: PolicyEvaluationConfig,
) -> tuple[Float[np.ndarray, "N K"], list[dict[str, Any]]]:
    """(one reward model's normalised rewards of the responses, its accuracy on each set)."""
    model = RewardModel.load(folder, precision=config.precision, device=config.device)
    mean, std = model.normal
    how: dict[str, int] = {"pad_id": pad_id, "max_tokens": config.max_tokens}
    raw_NK = model.score(list(trees), **how).astype(np.float64)
    sets: dict[str, tuple[Float[np.ndarray, "n"], list[str]]] = {}
    for name, (pairs, encoded) in validation.items():
        rewards = model.score(encoded, **how).astype(np.float64)
        sets[name] = wins(rewards[:, 0] - rewards[:, 1]), [prompt_key(p.prompt) for p in pairs]
    if gold_NK is not None and gold_NK.shape[1] > 1:
        right, rows = true_choices(raw_NK, gold_NK)
        sets[OWN] = right, [keys[n] for n in rows]
    found = []
    for name, (points, clusters) in sets.items():
        if len(points):
            value, low, high = bootstrap_mean(points, clusters=clusters)
            found.append({"set": name, "n": len(points), "accuracy": value, "low": low, "high": high})
    return (raw_NK - mean) / std, found


def _row(values: Mapping[str, Float[np.ndarray, "N K"]], keys: Sequence[str], ppl: float) -> dict[str, float]:
    row: dict[str, float] = {}
    for name, v in values.items():
        if name in (GOLD, FIRST, CURRENT, JUDGE):
            clusters = [key for key in keys for _ in range(v.shape[1])]
            row[name], row[f"{name}_low"], row[f"{name}_high"] = bootstrap_mean(v.reshape(-1), clusters=clusters)
        else:
            row[name] = float(v.mean())
    return row | {"ppl_sft": ppl}


def scores(examined: Mapping[str, Any], by: str, kl_price: float) -> Float[np.ndarray, "N"]:
    """What each prompt's responses are worth: mean reward by the criterion, less `kl_price` a nat of KL."""
    values = {name: np.array(examined["values"][name]) for name in (by, "kl")}
    worth: Float[np.ndarray, "N"] = (values[by] - kl_price * values["kl"]).mean(1)
    return worth


def choose(examined: Sequence[Mapping[str, Any]], by: str, kl_price: float, keep: Keep = "best") -> dict[str, Any]:
    """The round to keep so far; round 0 is the SFT model, so that nothing is kept that is worse than not training.

    `keep`: the best round, or the earliest one that is not told apart from the best (the 95 % interval of their paired
    difference over the choosing prompts holds 0): the one-standard-error rule's idea (Breiman et al. 1984), since each
    round goes further from the SFT model and that far a stand-in for the truth is worth less.
    `score`: its worth on every other prompt, on which it was chosen, beginning with the first. `rest`: its worth on
    the other prompts, with an interval over them; `gain`: there, minus that of round 0.
    """
    worth_RN = np.stack([scores(one, by, kl_price) for one in examined])
    choosing_RN = worth_RN[:, ::2]
    chosen_R = choosing_RN.mean(1)
    kept = int(chosen_R.argmax())
    if keep == "earliest":
        ahead = [bootstrap_mean(choosing_RN[kept] - choosing_RN[r])[1] for r in range(kept)]
        kept = next((r for r, low in enumerate(ahead) if low <= 0), kept)
    rest, first = worth_RN[kept, 1::2], worth_RN[0, 1::2]
    return {
        "round": kept,
        "scores": chosen_R.tolist(),
        "score": float(chosen_R[kept]),
        "rest": dict(zip(("value", "low", "high"), bootstrap_mean(rest), strict=True)),
        "gain": dict(zip(("value", "low", "high"), bootstrap_mean(rest - first), strict=True)),
    }
