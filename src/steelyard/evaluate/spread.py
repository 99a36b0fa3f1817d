"""How far apart a reward model's scores of several responses to one prompt are, and whether rightly so.

The evidence for MetaRM (Secrets of RLHF II, arXiv 2401.06080, section 3.2, Fig. 16) is a histogram of reward
differences. A model that multiplies all its rewards widens it and has learned nothing, so differences are given in
units that no scaling changes, and beside them the accuracy on pairs whose truth a gold scorer knows, if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float

from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.data.split import prompt_key
from steelyard.evaluate.reward import wins
from steelyard.models.reward import RewardModel
from steelyard.scorer import load_scorer

BINS = 24
WIDEST = 4.0  # end of the histogram in units of the std; what lies beyond is counted in the last bin
ACCURACY = "accuracy"
SPREADS = ("range", "std", "training std")
"""Units of a difference: the range of the model's rewards of these responses, their std, the std in training."""


class Responses(NamedTuple):
    """K responses to each of N prompts, with their true rewards where a gold scorer knows them."""

    trees: list[Tree]
    prompts: list[str]
    gold_NK: Float[np.ndarray, "N K"] | None
    length: float
    ended: float


def read_responses(path: str, gold: str | None) -> Responses:
    """A file of `steelyard sample`; scored by a gold scorer `module:function` if given (prompts of plain text)."""
    table = pq.read_table(path)
    keys, texts = table["key"].to_pylist(), table["response"].to_pylist()
    asked, drawn = table["prompt_tokens"].to_pylist(), table["response_tokens"].to_pylist()
    k = keys.count(keys[0])
    scores = None
    if gold is not None:
        scorer = load_scorer(gold)
        scores = np.array([scorer(key, text) for key, text in zip(keys, texts, strict=True)]).reshape(-1, k)
    starts = range(0, len(keys), k)
    return Responses(
        [Tree(tuple(asked[i]), tuple(tuple(r) for r in drawn[i : i + k])) for i in starts],
        [keys[i] for i in starts],
        scores,
        float(np.mean([len(r) for r in drawn])),
        float(np.mean(table["ended"].to_pylist())),
    )


def examine_spread(
    folder: str, validation: Mapping[str, str], responses: Mapping[str, str], gold: str | None, *,
    max_length: int, on_overlong: OnOverlong, on_invalid: OnInvalid, max_tokens: int, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """One reward model: values of each pair (accuracy) and each prompt (spread), and its rewards; plain values.

    `validation` are preference files, `responses` files of `steelyard sample`; without a gold scorer nobody knows which
    of these are better, and they have no accuracy.
    """
    encoder = Encoder.load(folder, max_length=max_length, on_overlong=on_overlong)
    model = RewardModel.load(folder, device=device)
    accuracy: dict[str, Any] = {}
    pairs = {name: load_preferences(path, on_invalid=on_invalid).preferences for name, path in validation.items()}
    encoded = {name: encoder.encode(found) for name, found in pairs.items()}
    trees = {name: e.trees for name, e in encoded.items()}
    for name, r in model.score_sets(trees, pad_id=encoder.pad_id, max_tokens=max_tokens).items():
        prompts = [prompt_key(pairs[name][i].prompt) for i in encoded[name].index]
        accuracy[name] = {"values": wins(r[:, 0].astype(np.float64) - r[:, 1]).tolist(), "prompts": prompts}
    spread: dict[str, dict[str, Any]] = {unit: {} for unit in SPREADS}
    rewards: dict[str, Any] = {}
    for name, path in responses.items():
        read = read_responses(path, gold)
        scored = model.score(read.trees, pad_id=encoder.pad_id, max_tokens=max_tokens).astype(np.float64)
        if read.gold_NK is not None:
            right, rows = true_choices(scored, read.gold_NK)
            accuracy[name] = {"values": right.tolist(), "prompts": [read.prompts[n] for n in rows]}
        for unit in SPREADS:
            values = in_units(scored, unit, model.normal[1]).mean(1)
            spread[unit][name] = {"values": values.tolist(), "prompts": read.prompts}
        rewards[name] = scored.tolist()
    return {"accuracy": {ACCURACY: accuracy}, "spread": spread, "rewards": rewards, "training_std": model.normal[1]}


def true_choices(
    rewards_NK: Float[np.ndarray, "N K"], gold_NK: Float[np.ndarray, "N K"]
) -> tuple[Float[np.ndarray, "P"], list[int]]:
    """1, 1/2 (a tie) or 0 for each pair of one prompt's responses, and its prompt's row; pairs of equal gold are out.

    Which pairs there are depends on the gold rewards alone, so that models are compared on the same ones.
    """
    i, j = np.triu_indices(gold_NK.shape[1], 1)
    truth_NP = np.sign(gold_NK[:, i] - gold_NK[:, j])
    right_NP = wins((rewards_NK[:, i] - rewards_NK[:, j]) * truth_NP)
    return right_NP[truth_NP != 0], np.nonzero(truth_NP)[0].tolist()


def pair_differences(rewards_NK: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N pairs"]:
    """|r_i - r_j| of the K (K - 1) / 2 pairs of each prompt's responses."""
    i, j = np.triu_indices(rewards_NK.shape[1], 1)
    return np.abs(rewards_NK[:, i] - rewards_NK[:, j])


def in_units(rewards_NK: Float[np.ndarray, "N K"], unit: str, training_std: float) -> Float[np.ndarray, "N pairs"]:
    """`pair_differences` divided by the range of all these rewards (0 to 1, as Fig. 16), by their std, or by the std
    of the model's rewards in training. Neither an offset nor a scale of the rewards changes any of them. Rewards that
    are all equal have differences of 0 in any unit."""
    sizes = {"range": np.ptp(rewards_NK), "std": rewards_NK.std(), "training std": training_std}
    return pair_differences(rewards_NK) / (sizes[unit] if sizes[unit] > 0 else 1.0)


def histograms(examined: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> list[dict[str, Any]]:
    """Shares of differences by size for each arm, all its seeds together: each model in units of its own."""
    rows = []
    for unit in SPREADS:
        edges = np.linspace(0.0, 1.0 if unit == "range" else WIDEST, BINS + 1)
        for arm, runs in examined.items():
            scored = [(np.array(one["rewards"][name]), one["training_std"]) for one in runs]
            values = np.concatenate([in_units(r, unit, std).reshape(-1) for r, std in scored])
            counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
            row = {"set": name, "unit": unit, "arm": arm, "n": len(values), "mean": float(values.mean())}
            rows.append(row | {"edges": edges.tolist(), "shares": (counts / len(values)).tolist()})
    return rows


def stack(
    examined: Mapping[str, Sequence[Mapping[str, Any]]], kind: str, measure: str, name: str
) -> dict[str, Float[np.ndarray, "S N"]]:
    """arm -> the values of its seeds on one set."""
    return {arm: np.array([one[kind][measure][name]["values"] for one in runs]) for arm, runs in examined.items()}
