"""A reward model's bill of health: numbers by hand, planted length biases, temperatures that are known."""

from __future__ import annotations

import json
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import tiny
from steelyard.cli import main
from steelyard.errors import InputError
from steelyard.evaluate.examination import RewardEvaluationConfig, examine_models, read_weighed, training_length
from steelyard.evaluate.health import accuracy_groups, by_length, checkup, correlation, cross_fit, length_bias, scale
from steelyard.evaluate.reward import bootstrap_mean, estimate, resampled_sums
from steelyard.evaluate.units import Units
from steelyard.measure import write_strength
from steelyard.strength import fit_temperature
from steelyard.types import Message, Preference, Strength


def prompts(n: int, each: int = 1) -> list[str]:
    return [f"p{i // each}" for i in range(n)]


class TestBootstrap:
    def test_it_agrees_with_the_bootstrap_of_a_mean(self) -> None:
        values = np.random.default_rng(0).normal(2, 1, 90)
        sums = resampled_sums(np.stack([values, np.ones(90)], axis=1), clusters=prompts(90, 3), draws=4000)
        assert estimate(sums[:, 0] / sums[:, 1]) == pytest.approx(
            bootstrap_mean(values, clusters=prompts(90, 3), draws=4000), abs=0.03
        )

    def test_what_is_not_defined_is_none(self) -> None:
        assert estimate(np.array([np.nan, 1.0, 2.0])) == [None, None, None]
        assert estimate(np.array([1.0, np.nan])) == [1.0, None, None]


class TestTemperature:
    def test_a_known_temperature_is_found_and_helps(self) -> None:
        rng = np.random.default_rng(0)
        true = rng.normal(0, 1.5, 6000)
        label = np.where(rng.random(6000) < 1 / (1 + np.exp(-true)), 1, -1)
        claimed = 3 * true * label  # three times too sure
        found = cross_fit(claimed, prompts(6000, 2))
        assert found["temperature"] == pytest.approx(3, rel=0.1)
        assert [h["temperature"] for h in found["halves"]] == pytest.approx([3, 3], rel=0.15)
        assert sum(h["fitted"] for h in found["halves"]) == 6000
        assert found["nll_gain"][1] > 0
        assert found["nll"][0] - found["nll_scaled"][0] == pytest.approx(found["nll_gain"][0])
        assert found["ece"] > 0.1 > 3 * found["ece_scaled"]
        assert found["ece_scaled"] < 2.5 * found["ece_scaled_floor"] < 0.05

    def test_no_pair_is_judged_by_a_temperature_that_saw_it(self) -> None:
        """Two prompts, two halves: each half's margins are divided by the other's own fit."""
        a, b = np.array([2.0, 1.0, -1.0, 3.0]), np.array([4.0, -2.0, 1.0, 5.0, -0.5])
        found = cross_fit(np.concatenate([a, b]), ["a"] * 4 + ["b"] * 5)
        scaled = np.concatenate([a / fit_temperature(b), b / fit_temperature(a)])
        assert found["nll_scaled"][0] == pytest.approx(np.log1p(np.exp(-scaled)).mean())
        assert sum(row["n"] for row in found["bins_scaled"]) == 9

    @pytest.mark.parametrize(
        ("margin", "names", "said"),
        [
            ([1.0, 2.0, 1.0, 2.0], ["a", "a", "b", "b"], "0 negative"),
            ([-1.0, -2.0, 1.0, -2.0], ["a", "a", "b", "b"], "mean is positive"),
            ([1.0, -0.5], ["a", "a"], "1 prompts and 2 folds"),
        ],
    )
    def test_where_none_can_be_fitted_the_reason_is_given(
        self, margin: list[float], names: list[str], said: str
    ) -> None:
        found = cross_fit(np.array(margin), names)
        assert found["temperature"] is None
        assert said in found["reason"]
        assert found["ece"] >= 0


class TestLength:
    def test_sides_by_hand(self) -> None:
        """Within a tenth of the longer one counts as near equal: 10 against 9 does, 10 against 8 does not."""
        chosen, rejected = np.array([10, 10, 8, 20, 5]), np.array([9, 8, 10, 10, 5])
        margin = np.array([1.0, -1.0, 1.0, 2.0, 0.0])
        sides = by_length(margin, chosen, rejected, prompts(5))["sides"]
        assert [(s["side"], s["n"], s["accuracy"]) for s in sides] == [
            ("chosen longer", 2, 0.5),
            ("near equal", 2, 0.75),
            ("chosen shorter", 1, 1.0),
        ]

    def test_an_empty_side_has_no_accuracy(self) -> None:
        sides = by_length(np.array([1.0, 1.0]), np.array([9, 9]), np.array([2, 3]), prompts(2))["sides"]
        assert sides[2] == {"side": "chosen shorter", "n": 0, "accuracy": None, "low": None, "high": None}

    def test_groups_are_ascending_of_equal_count_and_keep_ties_together(self) -> None:
        value = np.array([3.0] * 12 + [1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
        groups = accuracy_groups(np.ones(20), value, prompts(20), groups=4)
        assert sum(g["n"] for g in groups) == 20
        assert [g["mean"] for g in groups] == sorted(g["mean"] for g in groups)
        assert all(a["to"] < b["from"] for a, b in pairwise(groups))
        even = accuracy_groups(np.arange(40) % 2, np.arange(40.0), prompts(40), groups=4)
        assert [(g["n"], g["accuracy"], g["from"], g["to"]) for g in even] == [
            (10, 0.5, 0.0, 9.0), (10, 0.5, 10.0, 19.0), (10, 0.5, 20.0, 29.0), (10, 0.5, 30.0, 39.0),
        ]  # fmt: skip

    def test_a_model_of_length_alone_is_caught(self) -> None:
        rng = np.random.default_rng(0)
        chosen, rejected = rng.integers(5, 60, 300), rng.integers(5, 60, 300)
        found = length_bias(chosen * 0.5, rejected * 0.5, chosen, rejected, prompts(300))
        for name in ("pearson", "spearman", "pair_pearson", "pair_spearman", "prefers_longer"):
            assert found[name][0] == pytest.approx(1)

    def test_a_model_that_ignores_length_is_cleared(self) -> None:
        rng = np.random.default_rng(1)
        chosen, rejected = rng.integers(5, 60, 800), rng.integers(5, 60, 800)
        found = length_bias(rng.normal(1, 1, 800), rng.normal(0, 1, 800), chosen, rejected, prompts(800))
        for name, null in (("pearson", 0), ("spearman", 0), ("pair_pearson", 0), ("prefers_longer", 0.5)):
            low, high = np.array(found[name][1:], dtype=np.float64)
            assert low < null < high

    def test_within_pairs_neither_labels_nor_prompts_count(self) -> None:
        """Easy prompts have long answers and high rewards; inside a pair the reward does not know the length."""
        rng = np.random.default_rng(2)
        easy = rng.normal(0, 3, 500)
        lengths = np.maximum(1, 100 + 20 * easy[:, None] + rng.normal(0, 10, (500, 2))).astype(int)
        rewards = easy[:, None] + rng.normal(0, 0.5, (500, 2))
        found = length_bias(rewards[:, 0], rewards[:, 1], lengths[:, 0], lengths[:, 1], prompts(500))
        turned = length_bias(rewards[:, 1], rewards[:, 0], lengths[:, 1], lengths[:, 0], prompts(500))
        assert (found["pearson"][0] or 0) > 0.9
        assert abs(found["pair_pearson"][0] or 0) < 0.1
        assert [v[0] for v in turned.values()] == pytest.approx([v[0] for v in found.values()])

    def test_correlations_are_the_textbook_ones(self) -> None:
        rng = np.random.default_rng(3)
        length = rng.integers(1, 400, (60, 2))
        reward = np.log(length) + rng.normal(0, 0.7, (60, 2))
        found = length_bias(reward[:, 0], reward[:, 1], length[:, 0], length[:, 1], prompts(60))
        assert found["pearson"][0] == pytest.approx(np.corrcoef(reward.T.ravel(), length.T.ravel())[0, 1])
        assert found["spearman"][0] == pytest.approx(spearmanr(reward.ravel(), length.ravel()).statistic)
        centred = [(v - v.mean(1, keepdims=True)).ravel() for v in (reward, length.astype(float))]
        assert found["pair_pearson"][0] == pytest.approx(np.corrcoef(*centred)[0, 1])
        assert correlation(np.ones(3), np.arange(3.0), prompts(3)) == [None, None, None]


class TestScale:
    def test_by_hand(self) -> None:
        """Prompt a: 1, 3; prompt b: -1, -3. Mean 0, variance 5, of which 4 between the prompts and 1 within."""
        found = scale(np.array([3.0, -1.0]), np.array([1.0, -3.0]), ["a", "b"], normal=(1.0, 2.0))
        assert (found["n"], found["mean"][0], found["positive"][0]) == (4, 0.0, 0.5)
        assert found["std"][0] == pytest.approx(np.sqrt(5))
        assert (found["prompt_std"], found["between"], found["skew"]) == pytest.approx((1.0, 0.8, 0.0))
        assert (found["drift"], found["stretch"]) == pytest.approx((-0.5, np.sqrt(5) / 2))
        assert found["percentiles"]["50"] == 0.0

    def test_nothing_recorded_and_no_spread(self) -> None:
        found = scale(np.zeros(2), np.zeros(2), ["a", "b"])
        assert [found[k] for k in ("normal", "drift", "stretch", "between", "skew")] == [None] * 5
        assert scale(np.zeros(2), np.zeros(2), ["a", "b"], normal=(0.0, 0.0))["drift"] is None


def test_pairs_without_a_strength_are_left_out_of_its_groups_only() -> None:
    rng = np.random.default_rng(0)
    length, strength = np.full(40, 5), np.where(np.arange(40) < 10, np.nan, 1.0)
    args: Any = {"prompts": prompts(40), "chosen_length_N": length, "rejected_length_N": length}
    found = checkup(rng.normal(1, 1, 40), rng.normal(0, 1, 40), strength_N=strength, **args)
    assert sum(g["n"] for g in found["by_strength"]) == 30
    assert sum(s["n"] for s in found["by_length"]["sides"]) == 40
    assert "by_strength" not in checkup(np.ones(40), np.zeros(40), strength_N=np.full(40, np.nan), **args)
    assert found["longer_is_right"] == [0.5, 0.5, 0.5], "equal lengths tell nothing"


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_few_units_leave_some_resamples_empty_without_a_warning(pairs: int) -> None:
    """Three responses of one prompt: a draw of them may hold neither side of any pair."""
    units = Units.of("responses", ["a", "b", "a"][:pairs], ["b", "c", "c"][:pairs])
    args: Any = {"prompts": ["p"] * pairs, "units": units, "normal": (0.0, 1.0)}
    lengths: Any = {"chosen_length_N": np.arange(pairs) + 3, "rejected_length_N": np.full(pairs, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkup(np.arange(pairs) + 0.5, np.ones(pairs), strength_N=np.ones(pairs), **args, **lengths)
    assert found["scale"]["mean"][0] == pytest.approx((np.arange(pairs).mean() + 1.5) / 2)


# ---- files and models ----------------------------------------------------------------------------------------------


def weighed(folder: Path, rows: list[dict[str, Any]], means: list[float]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [r[name] for r in rows] for name in ("id", "prompt", "chosen", "rejected")}
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns | {"strength_mean": means}), folder / "strength.parquet")
    return folder


def test_two_models_one_report(
    planted_reward: Path, reward_model: Any, planted: dict[str, str], tmp_path: Path
) -> None:
    rows = tiny.planted_pairs(64, seed=2)[0]
    data = tiny.write_jsonl(tmp_path / "own.jsonl", [r | {"strength_mean": i / 8 - 4} for i, r in enumerate(rows)])
    good, random = str(planted_reward / "model"), reward_model("llama")
    out = tmp_path / "out"
    args = ["--model", good, random, "--data", data, planted["clean"], "--max-length", "64", "--out", str(out)]
    assert main(["evaluate", "reward", *args]) == 0
    found = json.loads((out / "examine/reward.json").read_text())
    arms = {planted_reward.name, Path(random).name}
    for name in ("rows", "reliability", "temperature", "by_length", "length", "scale"):
        assert {(r["arm"], r["set"]) for r in found[name]} == {
            (a, s) for a in arms for s in ("own.jsonl", "clean.jsonl")
        }
    assert {r["set"] for r in found["by_strength"]} == {"own.jsonl"}, "the other file carries none"
    recorded = {r["arm"]: r["normal"] for r in found["scale"]}
    assert recorded[Path(random).name] == [0.3, 1.7]
    page = (out / "report.html").read_text()
    for title in ("Health of the reward models", "Fitted temperature", "Accuracy by length difference", "Reward and"):
        assert title in page
    assert "Accuracy by strength" in page


def test_a_model_is_examined_with_the_length_of_its_training(
    planted_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(planted_reward / "model")
    assert training_length(model, None) == 64
    assert training_length(model, 64) == 64
    assert capsys.readouterr().out == ""
    assert training_length(model, 32) == 32
    assert "was trained with max_length = 64 and is examined with 32" in capsys.readouterr().out
    config = json.loads((planted_reward / "model" / "config.json").read_text())
    del config["steelyard_max_length"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert training_length(str(tmp_path), None) == 512
    assert "does not say with which max_length it was trained; 512 is taken" in capsys.readouterr().out


def test_strengths_may_come_from_a_folder(planted_reward: Path, tmp_path: Path) -> None:
    rows = tiny.planted_pairs(40, seed=2)[0]
    data = tiny.write_jsonl(tmp_path / "own.jsonl", rows)
    turned = {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    folder = weighed(tmp_path / "w" / "strength" / "in-sample", [rows[0] | turned, *rows[1:30]], [2.0, *range(1, 30)])
    strengths = read_weighed(str(tmp_path / "w"))
    assert read_weighed(str(folder)).means == strengths.means
    model = str(planted_reward / "model")
    settings = {"model": model, "data": (data,), "max_length": 64, "strength": str(tmp_path / "w")}
    (entry,) = examine_models(RewardEvaluationConfig(**settings))["reward.json"]["by_strength"]
    assert sum(g["n"] for g in entry["groups"]) == 30
    assert entry["groups"][0]["from"] == -2.0, "its label was turned after it was weighed"
    copied = tiny.write_jsonl(tmp_path / "copy.jsonl", [{k: r[k] for k in r if k != "id"} for r in rows])
    (again,) = examine_models(RewardEvaluationConfig(**settings | {"data": (copied,)}))["reward.json"]["by_strength"]
    assert again["groups"] == entry["groups"], "its ids come from another file's name, its texts are the same"
    other = weighed(tmp_path / "other", [r | {"id": f"x{i}", "prompt": "w1"} for i, r in enumerate(rows)], [1.0] * 40)
    with pytest.raises(InputError, match="of other pairs"):
        examine_models(RewardEvaluationConfig(**settings | {"strength": str(other)}))
    weighed(tmp_path / "w" / "strength" / "out-of-fold", rows, [1.0] * 40)
    with pytest.raises(InputError, match=r"one strength.parquet.*in-sample.*out-of-fold"):
        read_weighed(str(tmp_path / "w"))


def test_strengths_of_conversations_are_found_by_their_texts(tmp_path: Path) -> None:
    prompt, p = (Message("system", "w1"), Message("user", "w2")), Strength(2.0, 1.0, 3.0, 4, 0.1)
    pairs = [Preference("p:1", prompt, "good", "bad"), Preference("p:2", "w3", "good", "bad")]
    write_strength(tmp_path / "strength.parquet", pairs, [p, p], None, None)
    strengths = read_weighed(str(tmp_path))
    found = [strengths.of(Preference("annotated:1", *texts)) for texts in (
        (prompt, "good", "bad"), (prompt, "bad", "good"), ("w3", "bad", "good"), ("w4", "good", "bad")
    )]  # fmt: skip
    assert found == pytest.approx([2.0, -2.0, -2.0, np.nan], nan_ok=True)


def test_what_a_file_holds_is_said_once_for_several_models(
    planted_reward: Path, reward_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.planted_pairs(8, seed=2)[0]
    rows[3]["rejected"], rows[5]["rejected"] = rows[3]["chosen"], f" {rows[5]['chosen']}"
    data = tiny.write_jsonl(tmp_path / "own.jsonl", rows)
    models = (str(planted_reward / "model"), reward_model("llama"))
    found = examine_models(RewardEvaluationConfig(model=models, data=(data,), max_length=64))
    said = capsys.readouterr().out
    assert said.count(f"{data}: 8 rows read, 7 usable (format: trl)\n  identical: 1 (") == 1
    assert said.count(f"{data}: 1 pairs left out: chosen and rejected are the same tokens\n") == 1
    left_out = "1 pairs left out: chosen and rejected are the same tokens; 1 pairs left out: chosen equals rejected"
    assert [(r["n"], r["left_out"]) for r in found["reward.json"]["rows"]] == [(6, left_out)] * 2
    same = tiny.write_jsonl(tmp_path / "same.jsonl", [r | {"rejected": r["chosen"]} for r in rows])
    with pytest.raises(InputError, match=r"no usable pair .*\(8 pairs left out: chosen equals rejected\)"):
        examine_models(RewardEvaluationConfig(model=models, data=(same,), max_length=64))


def test_of_a_run_the_model_in_it_is_named(planted_reward: Path, planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"holds a run, not a model; name the model in it: {planted_reward}/model"):
        examine_models(RewardEvaluationConfig(model=(str(planted_reward),), data=(planted["clean"],)))
    shutil.copy(planted_reward / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        training_length(str(tmp_path), None)


def test_malformed_rows_are_refused_or_skipped_and_counted(planted_reward: Path, tmp_path: Path) -> None:
    rows = tiny.planted_pairs(8, seed=2)[0]
    rows[3] = {"prompt": "w1", "chosen": 3, "rejected": "w2"}
    data = tiny.write_jsonl(tmp_path / "own.jsonl", rows)
    settings: Any = {"model": str(planted_reward / "model"), "data": (data,), "max_length": 64}
    with pytest.raises(InputError, match=r"own.jsonl:4: chosen must be text"):
        examine_models(RewardEvaluationConfig(**settings))
    found = examine_models(RewardEvaluationConfig(**settings, on_invalid="skip"))
    assert [(r["n"], r["left_out"]) for r in found["reward.json"]["rows"]] == [(7, "1 malformed rows skipped")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "nothing to examine on"),
        ({"rewardbench": "x", "strength": "y"}, "strength: no effect without data"),
        ({"model": (), "data": ("x",)}, "model"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardEvaluationConfig(**{"model": "rm"} | settings)


def test_a_model_named_twice_is_refused(tmp_path: Path, planted: dict[str, str]) -> None:
    with pytest.raises(InputError, match="names a folder twice: a, a"):
        examine_models(RewardEvaluationConfig(model=("a", "a"), data=(planted["clean"],)))
