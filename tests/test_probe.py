"""Linear members: the features they see, the optimum they find, and that bootstraps keep prompts whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from conftest import Folders
from steelyard import probe
from steelyard.data.encode import Encoder
from steelyard.models.reward import RewardModel
from steelyard.probe import STRENGTHS, Probes, bootstrap_rows, features, layer_choice
from steelyard.types import Preference


def test_layers_are_spread_over_the_upper_half() -> None:
    assert layer_choice(12, 3) == [6, 9, 12]
    assert layer_choice(2, 1) in ([1], [2])
    assert layer_choice(2, 5) == [1, 2]
    assert layer_choice(24, 2) == [12, 24]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_features_are_those_of_separate_sequences(family: str, reward_model: Folders, tmp_path: Path) -> None:
    model = RewardModel.load(reward_model(family))
    encoder = Encoder.load(reward_model(family))
    texts = [("w1 w2", "good w3", "bad"), ("w4", "w5", "w6 w7 w8 w9")]
    trees = [encoder.tree(p, [a, b]) for p, a, b in texts]
    path = tmp_path / "deep" / "features.npy"
    found = features(model, trees, [1, 2], path, pad_id=encoder.pad_id, max_tokens=16, quiet=True)
    assert found.shape == (2, 2, 2 * 2 * 32)
    for n, tree in enumerate(trees):
        for k, response in enumerate(tree.responses):
            with torch.no_grad():
                ids = torch.tensor([tree.prompt + response])
                output = model.trunk(input_ids=ids, output_hidden_states=True, use_cache=False)
            parts = []
            for hidden in (output.hidden_states[1][0], output.last_hidden_state[0]):
                parts += [hidden[-1], hidden[len(tree.prompt) :].mean(0)]
            np.testing.assert_allclose(found[n, k], torch.cat(parts).numpy(), rtol=1e-4, atol=1e-5)
    again = features(model, [], [1], path, pad_id=0, max_tokens=16, quiet=True)
    np.testing.assert_array_equal(again, found)


def test_two_runs_at_once_share_one_pass(
    reward_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = RewardModel.load(reward_model("llama")), Encoder.load(reward_model("llama"))
    trees = [encoder.tree(f"w{i}", ["good", "bad"]) for i in range(8)]
    alone = features(model, trees, [2], tmp_path / "alone.npy", pad_id=encoder.pad_id, max_tokens=8, quiet=True)
    calls, begun, honest = 0, threading.Event(), probe.run_trunk

    def slow(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        begun.set()
        time.sleep(0.02)  # long enough for the other to come in the middle
        return honest(*args, **options)

    monkeypatch.setattr(probe, "run_trunk", slow)

    def measured() -> np.ndarray:
        path = tmp_path / "both.npy"
        return np.array(features(model, trees, [2], path, pad_id=encoder.pad_id, max_tokens=8, quiet=True))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(measured)
        begun.wait()
        for found in (pool.submit(measured).result(), first.result()):
            np.testing.assert_array_equal(found, alone)
    assert calls == len(trees)  # one row of eight tokens at a time, read once
    assert [p.name for p in tmp_path.glob(".*.tmp")] == []


def make(n: int = 300, f: int = 6, flips: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of pairs under a known linear reward, and which labels are wrong."""
    rng = np.random.default_rng(seed)
    both = rng.normal(size=(n, 2, f)) * rng.uniform(0.1, 10, f)
    true = rng.normal(size=f) / both.std((0, 1))
    better = both[:, 0] @ true > both[:, 1] @ true
    wrong = rng.random(n) < flips
    swap = better == wrong
    both[swap] = both[swap][:, ::-1]
    return both.astype(np.float32), wrong


def test_a_fit_is_the_optimum_of_the_penalised_likelihood() -> None:
    both, _ = make(flips=0.2)
    rows = np.arange(50, 250)
    d = (both[:, 0] - both[:, 1]).astype(np.float64)
    d = (d / np.sqrt((d**2).mean(0)))[rows]
    C = 1e-2

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = d @ w
        return float(0.5 * w @ w + C * np.logaddexp(0, -z).sum()), w - C * d.T @ expit(-z)

    best = minimize(objective, np.zeros(6), jac=True, tol=1e-12).x
    np.testing.assert_allclose(Probes(both).fit(rows, C, seed=0), best, rtol=2e-2, atol=2e-3)


def weighed(weights: Sequence[float], flip_probs: Sequence[float]) -> list[Preference]:
    return [Preference("", "", "a", "b", flip_prob=a, weight=w) for w, a in zip(weights, flip_probs, strict=True)]


def test_a_single_pair_is_fitted() -> None:
    """In one dimension, with d scaled to 1 and C = 0.1, the optimum solves w = 0.1 sigmoid(-w)."""
    for pairs in (None, weighed([1], [0])):
        weights = Probes(np.array([[[3.0], [1.0]]], dtype=np.float32), pairs).fit([0], 0.1, seed=0)
        assert weights == pytest.approx([0.048779], abs=2e-3)


def test_pairs_that_count_alike_are_fitted_as_without_weights_bit_for_bit() -> None:
    both, _ = make(flips=0.2)
    plain, alike = Probes(both), Probes(both, weighed([1] * 300, [0] * 300))
    held_out = np.arange(300) % 3 == 0
    fits = [probes.fit(np.arange(200), 0.1, 0) for probes in (plain, alike)]
    np.testing.assert_array_equal(*fits)
    assert plain.loss(fits[0], [3, 8]) == alike.loss(fits[0], [3, 8])
    assert plain.choose_penalty(held_out, 0) == alike.choose_penalty(held_out, 0)


def test_weights_and_doubts_count_as_so_many_pairs_and_reverses() -> None:
    """Weight 2 is the pair twice, 0 is no pair, a certain flip the reverse and a doubted label a share of both."""
    both, _ = make(n=60, flips=0.2)
    weights, doubts = [2.0, 0.0, 1.0, 4.0] * 15, [0.0, 0.0, 1.0, 0.25] * 15
    probes = Probes(both, weighed(weights, doubts))
    forward, backward = [2, 0, 0, 3] * 15, [0, 0, 1, 1] * 15
    spelled = Probes(np.concatenate([np.repeat(both, forward, 0), np.repeat(both[:, ::-1], backward, 0)]))
    spelled.differences *= spelled.scale / probes.scale  # in the units of the same data
    rows = np.arange(len(spelled.features))
    fit = spelled.fit(rows, 0.1, 0)
    np.testing.assert_allclose(probes.fit(np.arange(60), 0.1, 0), fit, rtol=2e-2, atol=2e-3)
    assert probes.loss(fit, np.arange(60)) == pytest.approx(spelled.loss(fit, rows), rel=1e-5)
    assert not probes.fit(np.arange(1, 60, 4), 0.1, 0).any()


def test_the_seed_only_decides_how_pairs_are_shown() -> None:
    both, _ = make(flips=0.2)
    probes = Probes(both)
    first, other = (probes.fit(np.arange(300), 1e-1, seed) for seed in (0, 1))
    np.testing.assert_allclose(first, other, rtol=2e-2, atol=2e-3)


def test_swapping_every_pair_turns_the_weights_around() -> None:
    both, _ = make(flips=0.1)
    rows = np.arange(300)
    forward, backward = Probes(both), Probes(both[:, ::-1].copy())
    np.testing.assert_allclose(forward.fit(rows, 0.1, 0), -backward.fit(rows, 0.1, 0), rtol=1e-3, atol=1e-4)


def test_scores_differ_by_the_margin_that_the_fit_used() -> None:
    both, _ = make(n=40)
    probes = Probes(both)
    weights = probes.fit(np.arange(40), 0.1, 0)
    scores = probes.scores(weights, [3, 8])
    np.testing.assert_allclose(scores[:, 0] - scores[:, 1], probes.differences[[3, 8]] @ weights, rtol=1e-3, atol=1e-4)
    z = (probes.differences @ weights).astype(np.float64)
    assert probes.loss(weights, [3, 8]) == pytest.approx(-np.log(expit(z[[3, 8]])).mean(), rel=1e-5)


def test_flipped_labels_fall_behind() -> None:
    both, wrong = make(flips=0.2)
    probes = Probes(both)
    fit = probes.scores(probes.fit(np.arange(300), 0.1, 0), np.arange(300))
    margin = fit[:, 0] - fit[:, 1]
    assert margin[~wrong].mean() > 0 > margin[wrong].mean()


def test_the_penalty_is_chosen_by_held_out_loss() -> None:
    """A clean rule wants the weakest penalty, pure noise a far stronger one."""
    rng = np.random.default_rng(0)
    held_out = rng.random(300) < 0.3
    noise = Probes(rng.normal(size=(300, 2, 40)).astype(np.float32))
    rule = Probes(make()[0])
    assert noise.choose_penalty(held_out, 0) <= 1e-3
    assert rule.choose_penalty(held_out, 0) == max(STRENGTHS)


def test_a_bootstrap_draws_whole_prompts() -> None:
    keys = [f"p{i // 3}" for i in range(60)]
    rows = bootstrap_rows(keys, 0)
    counts = np.bincount(rows, minlength=60).reshape(20, 3)
    assert (counts == counts[:, :1]).all()
    assert counts[:, 0].sum() == 20
    assert (counts[:, 0] == 0).any()
    assert not np.array_equal(rows, bootstrap_rows(keys, 1))


def test_a_bootstrap_of_a_single_prompt_draws_pairs() -> None:
    rows = bootstrap_rows(["p"] * 20, 0)
    assert len(rows) == 20
    assert 1 < len(set(rows)) < 20
