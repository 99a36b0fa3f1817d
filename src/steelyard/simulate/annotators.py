"""Simulated annotators: they know the gold reward and still err, in three ways and at stated rates.

Works for any preferences and any gold scorer. Each rate is the expected share of *all* pairs whose label that
noise flips, so the rates add up to the share of wrong labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.simulate.world import flattery, length
from steelyard.types import Preference, Prompt

Scorer = Callable[[Prompt, str], float]
Noise = Literal["", "uniform", "bradley_terry", "systematic"]
Bias = Literal["length", "flattery"]

ATTRIBUTES: dict[Bias, Callable[[str], int]] = {"length": length, "flattery": flattery}
"""What a biased annotator likes: the number of words, or of words of the flattery lexicon.

The lexicon (`world.FLATTERY`) is exact in the small world. In other text it is a rough count of praise.
"""


ROUNDING = 1e-12


class AnnotatorConfig(Config):
    """Rates of label noise, each as the expected share of all pairs; and what biased annotators like."""

    uniform: float = Field(default=0.08, ge=0, le=1, description="share of labels flipped whatever the pair")
    bradley_terry: float = Field(default=0.10, ge=0, le=1, description="share flipped since the pair is close")
    systematic: float = Field(default=0.07, ge=0, le=1, description="share flipped by annotators who follow the bias")
    bias: Bias = Field(default="length", description="what the biased annotators like: length or flattery")


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true of one annotated pair: is its label wrong, which noise flipped it, and the gold rewards.

    `gold_chosen` belongs to the response that the *label* calls chosen; `wrong` means that it is the lower one.
    """

    id: str
    wrong: bool
    noise: Noise
    gold_chosen: float
    gold_rejected: float


def annotate(
    preferences: Sequence[Preference], scorer: Scorer, config: AnnotatorConfig, seed: int
) -> tuple[list[Preference], list[Truth]]:
    """Label the pairs anew: by gold, then flipped by at most one noise each. Same order and ids.

    The labels that came in are not used, except that a pair with equal gold keeps its label: it has no wrong
    one and is never flipped. The flip probabilities are, one noise after the other on what is left:

    systematic:    a constant, on pairs whose gold-worse response has more of the biased attribute
    bradley_terry: sigmoid(-beta |gap|), the error of a Bradley-Terry annotator, with beta solved for the rate
    uniform:       a constant

    Deterministic in `seed`. All fields of a pair but chosen and rejected stay as they are.

    Raises InputError if a rate is out of reach (the message says how large it can be) or gold is not finite.
    """
    if not preferences:
        return [], []
    better, gold_N2 = _order(preferences, scorer)
    probabilities_3N = flip_probabilities(better, gold_N2[:, 0] - gold_N2[:, 1], config)
    draws_N = np.random.default_rng(np.random.SeedSequence([seed, 0x5EE1])).random(len(better))
    kinds_N = (draws_N[None, :] >= np.cumsum(probabilities_3N, axis=0)).sum(axis=0)
    names: tuple[Noise, ...] = ("systematic", "bradley_terry", "uniform", "")
    labelled: list[Preference] = []
    truths: list[Truth] = []
    for pair, (high, low), kind in zip(better, gold_N2.tolist(), kinds_N.tolist(), strict=True):
        wrong = kind < 3
        labelled.append(replace(pair, chosen=pair.rejected, rejected=pair.chosen) if wrong else pair)
        truths.append(Truth(pair.id, wrong, names[kind], low if wrong else high, high if wrong else low))
    return labelled, truths


def flip_probabilities(
    better: Sequence[Preference], gap_N: NDArray[np.float64], config: AnnotatorConfig
) -> NDArray[np.float64]:
    """(3, N) probabilities that systematic, Bradley-Terry and uniform noise flips each pair; columns sum to <= 1.

    `better` are pairs whose chosen response is the better one by `gap_N` >= 0. Each row's mean is its rate.
    Raises InputError if a rate is out of reach.
    """
    attribute = ATTRIBUTES[config.bias]
    untied_N = (gap_N > 0).astype(np.float64)
    tempted_N = np.array([attribute(pair.rejected) > attribute(pair.chosen) for pair in better]) * untied_N
    systematic_N = tempted_N * _constant(config.systematic, tempted_N, f"systematic (bias {config.bias!r})")
    left_N = untied_N - systematic_N
    bradley_terry_N = left_N * _ambiguity(config.bradley_terry, left_N, gap_N)
    left_N = left_N - bradley_terry_N
    uniform_N = left_N * _constant(config.uniform, left_N, "uniform")
    return np.stack([systematic_N, bradley_terry_N, uniform_N])


def _order(preferences: Sequence[Preference], scorer: Scorer) -> tuple[list[Preference], NDArray[np.float64]]:
    """The pairs with the better response as chosen, and the gold of (better, worse), shape (N, 2)."""
    better: list[Preference] = []
    gold: list[tuple[float, float]] = []
    for pair in preferences:
        chosen, rejected = float(scorer(pair.prompt, pair.chosen)), float(scorer(pair.prompt, pair.rejected))
        if not (np.isfinite(chosen) and np.isfinite(rejected)):
            where = pair.source or pair.id
            raise InputError(f"{where}: the gold scorer must return finite numbers, got {chosen} and {rejected}")
        if rejected > chosen:
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        better.append(pair)
        gold.append((max(chosen, rejected), min(chosen, rejected)))
    return better, np.array(gold, dtype=np.float64)


def _constant(rate: float, left_N: NDArray[np.float64], name: str) -> float:
    """The p with mean(p * left) = rate."""
    most = float(left_N.mean())
    if rate > most + ROUNDING:
        raise _out_of_reach(name, rate, most)
    return min(rate / most, 1.0) if rate else 0.0


def _ambiguity(rate: float, left_N: NDArray[np.float64], gap_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """sigmoid(-beta * gap), with the beta >= 0 at which mean(left * sigmoid) = rate, by bisection."""
    if not rate:
        return np.zeros_like(gap_N)
    most = float(left_N.mean()) / 2  # beta = 0: every label is a coin toss
    if rate > most + ROUNDING:
        raise _out_of_reach("bradley_terry", rate, most)

    def chance(beta: float) -> NDArray[np.float64]:
        odds_N = np.exp(-np.minimum(beta * gap_N, 700.0))
        return odds_N / (1 + odds_N)

    low, high = 0.0, 1.0
    while (left_N * chance(high)).mean() > rate:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (left_N * chance(middle)).mean() > rate else (low, middle)
    return chance(high)


def _out_of_reach(name: str, rate: float, most: float) -> InputError:
    return InputError(
        f"{name}: the rate must be at most {most:.4f} on these pairs, got {rate}. "
        "Pairs of equal gold cannot be wrong, Bradley-Terry noise flips at most half of the pairs, systematic noise "
        "only those in which the worse response has more of what is liked, and no pair is flipped twice. "
        "Lower the rate."
    )
