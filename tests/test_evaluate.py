"""Measures of reward models and policies: numbers by hand, intervals against known cases, and a planted winner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from conftest import Folders
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.evaluate.policy import (
    Answers,
    PolicyEvaluationConfig,
    answer,
    compare,
    difficulty,
    divergence,
    prompts_that_fit,
)
from steelyard.evaluate.reward import (
    bootstrap_mean,
    examine,
    expected_calibration_error,
    reliability,
    reward_metrics,
    wins,
)
from steelyard.models.policy import PolicyModel
from steelyard.sampling import SamplingConfig
from steelyard.types import Message, Prompt


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


class TestReward:
    def test_calibration_by_hand(self) -> None:
        """Two bins: three pairs at confidence 0.62 (two right), two at 0.93 (one right)."""
        margin = np.array([logit(0.62), logit(0.62), -logit(0.62), logit(0.93), -logit(0.93)])
        rows = reliability(margin)
        assert [(r["n"], round(r["confidence"], 6), round(r["accuracy"], 6)) for r in rows] == [
            (3, 0.62, 0.666667),
            (2, 0.93, 0.5),
        ]
        assert expected_calibration_error(margin) == pytest.approx((3 * (2 / 3 - 0.62) + 2 * (0.93 - 0.5)) / 5)

    def test_certain_and_undecided_pairs(self) -> None:
        assert expected_calibration_error(np.full(4, 1e3)) == 0.0
        assert expected_calibration_error(np.full(4, -1e3)) == 1.0
        assert expected_calibration_error(np.zeros(4)) == 0.0

    def test_labels_drawn_from_the_margins_are_calibrated(self) -> None:
        rng = np.random.default_rng(0)
        margin = rng.normal(0, 2, 20000)
        observed = np.where(rng.random(20000) < 1 / (1 + np.exp(-margin)), margin, -margin)
        assert expected_calibration_error(observed) < 0.015
        assert expected_calibration_error(3 * observed) > 0.05

    def test_metrics_by_hand(self) -> None:
        chosen, rejected = np.array([1.0, 0.0, 2.0], np.float32), np.array([0.0, 1.0, 2.0], np.float32)
        found = reward_metrics(chosen, rejected)
        nll = (np.log(1 + np.exp(-1)) + np.log(1 + np.exp(1)) + np.log(2)) / 3
        assert found["loss"] == pytest.approx(nll)
        assert (found["accuracy"], found["margin"], found["reward_mean"]) == (0.5, 0.0, 1.0)
        assert found["reward_std"] == pytest.approx(np.sqrt(4 / 6))
        assert wins(np.array([2.0, -1.0, 0.0])).tolist() == [1.0, 0.0, 0.5]
        assert np.isfinite(reward_metrics(chosen * 1e4, rejected * 1e4)["loss"])

    def test_examine_reports_both_scales(self) -> None:
        rng = np.random.default_rng(1)
        chosen, rejected = rng.normal(0.5, 1, 200), rng.normal(0, 1, 200)
        found = examine(chosen, rejected, prompts=[f"p{i}" for i in range(200)])
        row = found["row"]
        assert row["accuracy"] == pytest.approx((chosen > rejected).mean())
        assert row["low"] < row["accuracy"] < row["high"]
        assert sum(b["n"] for b in found["bins"]) == row["n"] == 200


class TestBootstrap:
    def test_the_interval_of_a_mean_is_the_normal_one(self) -> None:
        values = np.random.default_rng(0).normal(3, 2, 400)
        mean, low, high = bootstrap_mean(values, draws=4000)
        half = 1.96 * values.std() / np.sqrt(400)
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
        assert bootstrap_mean(values, draws=4000) == (mean, low, high)
        narrow = bootstrap_mean(values, draws=4000, level=0.5)
        assert low < narrow[1] < narrow[2] < high

    def test_copies_of_a_value_add_no_certainty(self) -> None:
        values = np.random.default_rng(1).normal(size=60)
        single = bootstrap_mean(values)
        copies = np.repeat(values, 9)
        clustered = bootstrap_mean(copies, clusters=[f"p{i:03d}" for i in range(60) for _ in range(9)])
        ignored = bootstrap_mean(copies)
        assert clustered == pytest.approx(single)
        assert (single[2] - single[1]) / (ignored[2] - ignored[1]) == pytest.approx(3, rel=0.15)

    def test_prompts_of_unequal_size_count_by_their_values(self) -> None:
        values, clusters = np.array([0.0, 0.0, 0.0, 1.0]), ["a", "a", "a", "b"]
        mean, low, high = bootstrap_mean(values, clusters=clusters)
        assert (mean, low, high) == (0.25, 0.0, 1.0)

    def test_one_prompt_has_no_spread(self) -> None:
        assert bootstrap_mean(np.array([1.0, 2.0]), clusters=["a", "a"]) == (1.5, 1.5, 1.5)


def answers(gold: Any, proxy: Any = None) -> Answers:
    gold_NK = None if gold is None else np.array(gold, float)
    proxy_NK = np.array(proxy if proxy is not None else gold, float)
    zeros = np.zeros_like(proxy_NK)
    texts = [[f"text {n} {k}" for k in range(proxy_NK.shape[1])] for n in range(len(proxy_NK))]
    return Answers(texts, gold_NK, proxy_NK, zeros + 0.5, zeros + 7, zeros + 1)


class TestCompare:
    prompts: tuple[Prompt, ...] = ("a", "b", (Message("user", "c"),))
    config = PolicyEvaluationConfig(k=2, tie=0.1, strata=3, samples=2)

    def tables(self) -> dict[str, Any]:
        arms = {
            "sft": answers([[0, 0], [0, 0], [0, 0]], proxy=[[5, 7], [1, 1], [3, 3]]),
            "ppo": answers([[1, 0.05], [-1, 1], [-0.05, 1]], proxy=[[1, 1], [2, 2], [4, 4]]),
        }
        return compare(arms, self.prompts, self.config, np.array([6.0, 1.0, 3.0]))

    def test_wins_ties_and_losses(self) -> None:
        (row,) = self.tables()["wins"]
        assert (row["a"], row["b"], row["judge"], row["n"]) == ("ppo", "sft", "gold", 6)
        assert (row["win"], row["tie"], row["lose"]) == pytest.approx((3 / 6, 2 / 6, 1 / 6))
        assert row["score"] == pytest.approx(4 / 6)
        assert row["low"] <= row["score"] <= row["high"]

    def test_wins_are_drawn_anew_by_prompt_not_by_row(self) -> None:
        """Four rows of two prompts, one always won and one always lost: two clusters reach from 0 to 1."""
        arms = {"sft": answers([[0, 0]] * 4), "ppo": answers([[1, 1], [-1, -1]] * 2)}
        (row,) = compare(arms, ["a", "b", "a", "b"], self.config, np.zeros(4))["wins"]
        assert (row["score"], row["low"], row["high"], row["n"]) == (0.5, 0.0, 1.0, 8)

    def test_strata_go_from_hard_to_easy_whatever_the_reported_answers_earned(self) -> None:
        rows = [r for r in self.tables()["difficulty"] if r["arm"] == "ppo"]
        assert [(r["stratum"], r["low"], r["high"], r["gold"], r["proxy"], r["n"]) for r in rows] == [
            ("1 of 3", 1.0, 1.0, 0.0, 2.0, 1),
            ("2 of 3", 3.0, 3.0, pytest.approx(0.475), 4.0, 1),
            ("3 of 3", 6.0, 6.0, pytest.approx(0.525), 1.0, 1),
        ]

    def test_strata_have_intervals_over_prompts(self) -> None:
        """Two strata of 20 prompts. In the first half of a stratum earns 0, half 1: a bootstrap mean has a std of
        sqrt(0.25 / 20) = 0.112, so the interval is about 0.5 -+ 0.22; in the second all earn 2."""
        gold = [[0.0, 0.0]] * 10 + [[1.0, 1.0]] * 10 + [[2.0, 2.0]] * 20
        config = PolicyEvaluationConfig(k=2, strata=2)
        prompts = [f"prompt {n}" for n in range(40)]
        hard, easy = compare({"sft": answers(gold)}, prompts, config, np.arange(40.0))["difficulty"]
        assert (hard["gold"], hard["low"], hard["high"], hard["n"]) == (0.5, 0.0, 19.0, 20)
        assert (hard["gold_low"], hard["gold_high"]) == pytest.approx((0.28, 0.72), abs=0.04)
        assert (hard["proxy_low"], hard["proxy_high"]) == (hard["gold_low"], hard["gold_high"])
        assert (easy["gold"], easy["gold_low"], easy["gold_high"]) == (2.0, 2.0, 2.0)

    def test_fewer_prompts_than_strata_leave_the_rest_out(self) -> None:
        rows = compare({"sft": answers([[1, 2]])}, ["a"], self.config, np.zeros(1))["difficulty"]
        assert [(r["stratum"], r["n"]) for r in rows] == [("1 of 3", 1)]

    def test_rows_and_samples(self) -> None:
        tables = self.tables()
        assert [(r["arm"], r["kl"], r["length"], r["ended"]) for r in tables["arms"]] == [
            ("sft", 0.5, 7, 1),
            ("ppo", 0.5, 7, 1),
        ]
        assert [s["prompt"] for s in tables["samples"]] == ["a", "b"]
        assert tables["samples"][1]["responses"]["ppo"] == {"text": "text 1 0", "gold": -1.0, "proxy": 2.0}

    def test_without_a_gold_scorer_nobody_wins(self) -> None:
        arms = {"sft": answers(None, [[0, 1]] * 3), "ppo": answers(None, [[1, 1]] * 3)}
        tables = compare(arms, self.prompts, self.config, np.zeros(3))
        assert tables["wins"] == []
        assert {r["gold"] for r in tables["arms"] + tables["difficulty"]} == {None}


def test_divergence_is_the_difference_of_whole_log_likelihoods(language_model: Folders) -> None:
    policy = PolicyModel.load(language_model("llama"))
    other = PolicyModel(tiny.build_model(tiny.build_config(), seed=9))
    trees = [Tree((5, 6), ((7, 8, 3), (9,))), Tree((10,), ((11, 3), (12, 13, 14, 3)))]
    found = divergence(policy, other, trees, tiny.PAD, 16)

    def likelihood(model: PolicyModel, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([(-100,) * len(prompt) + response])
        with torch.no_grad():
            return -model.hf(input_ids=ids, labels=labels).loss.item() * len(response)

    for n, tree in enumerate(trees):
        for k, r in enumerate(tree.responses):
            expected = likelihood(policy, tree.prompt, r) - likelihood(other, tree.prompt, r)
            assert found[n, k] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert not divergence(policy, policy, trees, tiny.PAD, 4096).any()


def test_policies_answer_the_same_prompts_with_the_same_numbers(language_model: Folders, planted_reward: Path) -> None:
    sft, rm = language_model("llama"), str(planted_reward / "model")
    encoder = Encoder.load(sft)
    config = PolicyEvaluationConfig(k=3, sampling=SamplingConfig(max_new_tokens=6))
    prompts = ["w1 w2", "w3", "w4 w5 w6"]

    def gold(prompt: Prompt, text: str) -> float:
        assert prompt in prompts
        return float(text.split().count("good"))

    first = answer(sft, sft, rm, prompts, encoder, gold, config)
    again = answer(sft, sft, rm, prompts[:2], encoder, gold, config)
    assert first.texts[:2] == again.texts
    assert first.gold_NK is not None
    assert first.gold_NK.tolist() == [[t.split().count("good") for t in row] for row in first.texts]
    assert not first.kl_NK.any()
    assert first.length_NK.max() <= 6
    plain = answer(sft, sft, rm, prompts, encoder, None, config)
    assert plain.gold_NK is None
    np.testing.assert_array_equal(plain.proxy_NK, first.proxy_NK)


def test_a_repeated_prompt_is_examined_once(
    language_model: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": p} for p in ("w1 w2", "w3", "w1 w2", "w1 w2 w3 w4 w5 w6 w7", "w3")]
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    encoder = Encoder.load(language_model("llama"), max_length=12)
    config = PolicyEvaluationConfig(sampling=SamplingConfig(max_new_tokens=6))
    assert prompts_that_fit(file, encoder, config) == ["w1 w2", "w3"]
    assert "2 of 3 different prompts leave room for 6 new tokens within max_length = 12" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"0 of 3 different prompts .* raise max_length"):
        prompts_that_fit(file, Encoder.load(language_model("llama"), max_length=6), config)


def test_difficulty_is_read_off_answers_of_their_own(language_model: Folders, planted_reward: Path) -> None:
    sft, rm = language_model("llama"), str(planted_reward / "model")
    encoder = Encoder.load(sft)
    config = PolicyEvaluationConfig(k=3, sampling=SamplingConfig(max_new_tokens=6))
    prompts = ["w1 w2", "w3", "w4 w5 w6"]
    found = difficulty(sft, rm, prompts, encoder, config)
    reported = answer(sft, sft, rm, prompts, encoder, None, config)
    other = answer(sft, sft, rm, prompts, encoder, None, config.model_copy(update={"seed": 1235}))
    assert np.abs(found - reported.proxy_NK.mean(1)).max() > 1e-3
    np.testing.assert_allclose(found, other.proxy_NK.mean(1))
