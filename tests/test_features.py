"""Overlap of chosen and rejected features: clouds made by hand, resampling, the verb and its section of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, silhouette_score

import tiny
from conftest import Folders
from steelyard.cli import main
from steelyard.data.encode import Encoder
from steelyard.data.load import load_preferences
from steelyard.evaluate.features import (
    CLOUDS,
    MEASURES,
    FeatureOptions,
    components,
    overlap,
    picture,
    read_features,
)
from steelyard.evaluate.seeds import compare_arms, mean_over_seeds
from steelyard.models.reward import RewardModel
from steelyard.report import build_report


def names(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


def figures(features: Any, prompts: list[str] | None = None) -> dict[tuple[str, str], float]:
    found = overlap(features, names(len(features)) if prompts is None else prompts)
    return {(cloud, m): float(v.mean()) for cloud, values in found.items() for m, v in values.items()}


class TestOverlap:
    def test_clouds_far_apart(self) -> None:
        f = np.random.default_rng(0).normal(0, 0.1, (60, 2, 5))
        f[:, 0] += 3
        f[:, 1] -= 3
        found = figures(f)
        assert all(found[cloud, "probe_auroc"] == 1 for cloud in CLOUDS)
        assert all(found[cloud, m] > 0.9 for cloud in CLOUDS for m in MEASURES)

    def test_clouds_in_one_place(self) -> None:
        found = figures(np.random.default_rng(1).normal(size=(200, 2, 5)))
        for cloud in CLOUDS:
            assert abs(found[cloud, "silhouette_cosine"]) < 0.03
            assert abs(found[cloud, "silhouette_euclidean"]) < 0.03
            assert abs(found[cloud, "probe_auroc"] - 0.5) < 0.1

    def test_labels_permuted_within_pairs_leave_nothing(self) -> None:
        rng = np.random.default_rng(2)
        f = rng.normal(0, 0.5, (200, 2, 5))
        f[:, 0] += 2
        swapped = np.where((rng.random(200) < 0.5)[:, None, None], f[:, ::-1], f)
        before, after = figures(f), figures(swapped)
        assert before["differences", "probe_auroc"] > 0.99
        assert abs(after["differences", "probe_auroc"] - 0.5) < 0.1
        assert abs(after["pairs", "silhouette_euclidean"]) < 0.05 < before["pairs", "silhouette_euclidean"]

    def test_a_common_part_of_a_pair_hides_it_from_pairs_and_not_from_differences(self) -> None:
        """Each prompt has a place of its own, far from the others': only the difference says who was chosen."""
        rng = np.random.default_rng(3)
        f = rng.normal(0, 30, (100, 1, 4)) + rng.normal(0, 0.2, (100, 2, 4))
        f[:, 0, 0] += 1
        found = figures(f)
        assert found["differences", "probe_auroc"] > 0.95
        assert found["differences", "silhouette_cosine"] > 0.5
        assert found["pairs", "probe_auroc"] < 0.6
        assert abs(found["pairs", "silhouette_euclidean"]) < 0.05

    def test_silhouettes_are_those_of_the_two_clouds(self) -> None:
        f = np.random.default_rng(4).normal(size=(30, 2, 3))
        f[:, 0] += 0.7
        found = figures(f)
        labels = [0] * 30 + [1] * 30
        for metric in ("cosine", "euclidean"):
            expected = silhouette_score(np.concatenate([f[:, 0], f[:, 1]]), labels, metric=metric)
            assert found["pairs", f"silhouette_{metric}"] == pytest.approx(expected)

    def test_swapping_the_two_changes_nothing(self) -> None:
        f = np.random.default_rng(5).normal(size=(40, 2, 3))
        f[:, 0] += 0.5
        one, other = figures(f), figures(f[:, ::-1])
        for key, value in one.items():
            assert other[key] == pytest.approx(value, abs=1e-9)

    def test_the_probe_never_sees_the_prompt_it_judges(self) -> None:
        """Which of two sides is chosen is a matter of the prompt alone: known prompts would give it all away."""
        rng = np.random.default_rng(6)
        sides = rng.choice([-1.0, 1.0], 20)
        f = np.zeros((200, 2, 20))
        for i in range(200):
            f[i, 0, i % 20], f[i, 1, i % 20] = sides[i % 20], -sides[i % 20]
        f += rng.normal(0, 0.01, f.shape)
        by_prompt = figures(f, [f"p{i % 20}" for i in range(200)])
        by_row = figures(f)
        assert by_row["differences", "probe_auroc"] > 0.99
        assert by_prompt["differences", "probe_auroc"] < 0.7

    def test_features_without_any_difference(self) -> None:
        f = np.random.default_rng(7).normal(size=(20, 1, 3)).repeat(2, 1)
        found = figures(f)
        assert found["pairs", "probe_auroc"] == found["differences", "probe_auroc"] == 0.5
        assert all(np.isfinite(v) for v in found.values())
        assert found["differences", "silhouette_euclidean"] == 0

    def test_refuses_what_cannot_be_split(self) -> None:
        f = np.zeros((3, 2, 2))
        with pytest.raises(ValueError, match="two different"):
            overlap(f, ["a", "a", "a"])
        with pytest.raises(ValueError, match="one prompt for each of the 3"):
            overlap(f, ["a", "b"])


class TestComponents:
    def test_mean_is_the_area_and_spread_its_error(self) -> None:
        rng = np.random.default_rng(0)
        first, second = rng.normal(0.8, 1, 400), rng.normal(0, 1, 400)
        values = components(first, second)
        truth = roc_auc_score([1] * 400 + [0] * 400, np.concatenate([first, second]))
        assert values.mean() == pytest.approx(truth)
        repeats = [
            components(rng.normal(0.8, 1, 400), rng.normal(0, 1, 400)).mean() for _ in range(300)
        ]  # what the area would be on fresh data
        assert values.std() / 20 == pytest.approx(np.std(repeats), rel=0.2)

    def test_by_hand(self) -> None:
        """3 beats 2 and 0; 1 beats 0: area 3 / 4; (1 + 1/2 of being beaten ...) less the area."""
        assert components(np.array([3.0, 1.0]), np.array([2.0, 0.0])).tolist() == [1 + 0.5 - 0.75, 0.5 + 1 - 0.75]
        assert components(np.zeros(2), np.zeros(2)).tolist() == [0.5, 0.5]


class TestSeeds:
    def test_one_seed_is_the_bootstrap_of_a_mean(self) -> None:
        values = np.random.default_rng(0).normal(3, 2, 400)
        mean, low, high = mean_over_seeds(values[None], clusters=names(400), draws=4000)
        half = 1.96 * values.std() / np.sqrt(400)
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)

    def test_seeds_that_differ_widen_the_interval(self) -> None:
        rng = np.random.default_rng(1)
        alike = rng.normal(0, 1, (1, 300)).repeat(5, 0)
        apart = alike + np.array([-1.0, -0.5, 0, 0.5, 1])[:, None]
        assert mean_over_seeds(alike, clusters=names(300)) == pytest.approx(
            mean_over_seeds(alike[:1], clusters=names(300)), abs=0.02
        )
        _, low, high = mean_over_seeds(apart, clusters=names(300), draws=4000)
        error = np.sqrt(np.var([-1, -0.5, 0, 0.5, 1], ddof=1) / 5 + 1 / 300)
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.12)

    def test_copies_of_a_prompt_add_no_certainty(self) -> None:
        values = np.random.default_rng(2).normal(size=(3, 50))
        clusters = [c for c in names(50) for _ in range(8)]
        many = mean_over_seeds(values.repeat(8, 1), clusters=clusters)
        assert many == pytest.approx(mean_over_seeds(values, clusters=names(50)))

    def test_differences_are_paired(self) -> None:
        rng = np.random.default_rng(3)
        base = rng.normal(0, 5, (3, 200))
        rows = compare_arms({"a": base, "b": base + 0.1}, clusters=names(200), control="a")
        assert "difference" not in rows[0]
        difference = rows[1]["difference"]
        assert [difference[x] for x in ("value", "low", "high")] == pytest.approx([0.1] * 3)
        assert difference["seeds"] == pytest.approx([0.1] * 3)
        assert rows[1]["high"] - rows[1]["low"] > 0.5

    def test_refuses_wrong_shapes(self) -> None:
        with pytest.raises(ValueError, match="with 2 examples"):
            mean_over_seeds(np.zeros((3, 4)), clusters=["a", "b"])
        with pytest.raises(ValueError, match="with 4 examples"):
            mean_over_seeds(np.zeros(4), clusters=names(4))


def test_picture_is_repeatable_and_small() -> None:
    f = np.random.default_rng(0).normal(size=(50, 2, 6)).astype(np.float32)
    f[:, 0] += 8
    options = FeatureOptions(drawn=20)
    drawn = picture(f, options)
    assert drawn == picture(f, options)
    chosen, rejected = np.array(drawn["chosen"]), np.array(drawn["rejected"])
    assert chosen.shape == rejected.shape == (17, 2)  # every third
    assert drawn["perplexity"] == 11
    within = np.linalg.norm(chosen - chosen.mean(0), axis=1).max()
    assert np.linalg.norm(chosen.mean(0) - rejected.mean(0)) > within


def test_features_are_those_that_the_head_reads(planted: dict[str, str], planted_reward: Path) -> None:
    folder = planted_reward / "model"
    encoder, model = Encoder.load(folder, max_length=64), RewardModel.load(folder)
    trees = encoder.encode(load_preferences(planted["held-out"]).preferences).trees
    found = read_features(model, trees, pad_id=encoder.pad_id, max_tokens=200)
    assert found.shape == (len(trees), 2, 32)
    again = found @ model.head.weight.detach().numpy()[0]
    rewards = model.score(trees, pad_id=encoder.pad_id)
    np.testing.assert_allclose(again, rewards, atol=1e-4)


class TestVerb:
    def test_models_side_by_side(
        self, tmp_path: Path, planted: dict[str, str], planted_reward: Path, reward_model: Folders,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("steelyard.commands.examining.default_workers", lambda device: 1)
        out = tmp_path / "features"
        args = ["evaluate", "features", "--models", "trained", str(planted_reward / "model"), "random"]
        args += [reward_model("llama"), "--data", planted["held-out"], "--drawn", "20", "--out", str(out)]
        assert main(args) == 0
        found = json.loads((out / "examine" / "features.json").read_text())
        assert [m["name"] for m in found["models"]] == ["trained", "random"]
        rows = {m["name"]: {(r["features"], r["measure"]): r for r in m["rows"]} for m in found["models"]}
        best = rows["trained"]["differences", "probe_auroc"]
        assert best["value"] > 0.9
        assert best["low"] <= best["value"] <= best["high"]
        for cloud in CLOUDS:
            assert rows["trained"][cloud, "silhouette_cosine"]["value"] > 0.2
            assert (
                rows["trained"][cloud, "silhouette_cosine"]["value"]
                > (rows["random"][cloud, "silhouette_cosine"]["value"])
            )
        page = (out / "report.html").read_text()
        assert "How far chosen and rejected features lie apart" in page
        assert page.count("<image") == 2
        assert main(args) == 2  # never overwritten

    def test_too_few_pairs(self, tmp_path: Path, planted_reward: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.planted_pairs(3)[0])
        args = ["--models", "a", str(planted_reward / "model"), "--data", data, "--out", str(tmp_path / "out")]
        assert main(["evaluate", "features", *args]) == 2
        assert "needs at least 4 usable pairs" in capsys.readouterr().err


def test_report_draws_the_contrastive_loss(tmp_path: Path) -> None:
    for arm in ("plain", "SimCSE"):
        (tmp_path / "rm" / arm).mkdir(parents=True)
        rows = [{"step": s, "train/loss": 0.6, "train/accuracy": 0.5} for s in (1, 2)]
        if arm == "SimCSE":
            rows = [r | {"train/contrastive_loss": 2.0} for r in rows]
        tiny.write_jsonl(tmp_path / "rm" / arm / "metrics.jsonl", rows)
    page = build_report(tmp_path).read_text()
    assert "Contrastive loss" in page
