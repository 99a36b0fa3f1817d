"""The study of preference data: its sets, its compute, its numbers, its resumption, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import tiny
from conftest import Folders
from steelyard.cli import main
from steelyard.data.export import write_preferences
from steelyard.data.load import load_preferences
from steelyard.errors import InputError
from steelyard.evaluate.seeds import mean_over_seeds
from steelyard.evaluate.units import Units
from steelyard.measure import read_scores
from steelyard.models.reward import RewardModel
from steelyard.report import build_report
from steelyard.study import data_sets
from steelyard.study.data_config import BandsRepairConfig, DataStudy, check
from steelyard.study.data_models import Job, average, ensemble_scores, load_scores, start_model, train_and_score
from steelyard.study.data_tables import HeldOut, by_length, findings, mean_curve
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.types import Preference, Strength

OPTIM = {"lr": 3e-3}
TINY: dict[str, Any] = {
    "name": "Tiny study",
    "world": {"sft": 24, "preferences": 70, "validation": 40, "rl_prompts": 8, "eval_prompts": 4},
    "sft": {
        "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 192}, "batch_size": 8, "max_length": 160,
        "optim": OPTIM,
    },
    "strength": {
        "backend": "full", "members": 2, "folds": 2, "workers": 1, "max_length": 160,
        "member": {"batch_size": 8, "optim": OPTIM},
    },
    "reward": {"batch_size": 8, "max_length": 160, "optim": OPTIM, "log_every": 2, "save_every": 4},
    "seeds": [0, 1],
    "repair": {
        "plain": {"recipe": "keep"}, "soft+margin": {"recipe": "soft+margin", "margin_in_flip": False},
        "drop": {"recipe": "drop", "q": 0.2}, "random flip": {"recipe": "random flip", "q": 0.3},
        "oracle flip": {"recipe": "oracle flip"},
        "drop, shuffled": {"recipe": "drop", "q": 0.2, "shuffle": True},
    },
    "against": {"drop": "drop, shuffled"},
    "bands": {"count": 3, "epochs": 2},
    "growth": {"fractions": [0.5, 1]},
    "bands_repair": {"flip": [1], "soft": [1, 3]},
    "dynamics": {"epochs": 2, "segments": 4, "examinations": 3},
    "warm": {"members": 2},
    "workers": 1,
}  # fmt: skip


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str, **changes: Any) -> int:
    """`steelyard study data study.yaml --out run` in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    monkeypatch.chdir(folder)
    return main(["study", "data", "study.yaml", "--out", "run", *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A finished study of everything."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        assert start(folder, patch) == 0
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def found_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run" / "study.json").read_text())
    return content


def strengths(*means: float) -> list[Strength]:
    return [Strength(m, 0.1, 1, 2, 0.8 if m < 0 else 0.1) for m in means]


def pairs(n: int) -> list[Preference]:
    return [Preference(f"p{i}", "x", f"good {i}", f"bad {i}") for i in range(n)]


# ---- sets ------------------------------------------------------------------------------------------------------


def test_bands_and_growing_sets_are_cut_from_the_weakest_to_the_strongest() -> None:
    measured = strengths(0.3, -2.0, 1.0, 0.3, -0.5, 4.0, 0.0)
    # Weakest first: -2 (1), -.5 (4), 0 (6), .3 (0), .3 (3), 1 (2), 4 (5); ties in input order.
    assert data_sets.band_rows(measured, 3) == [[1, 4, 6], [0, 3], [2, 5]]
    assert data_sets.growth_rows(measured, 0.3, "weakest") == [1, 4]
    assert data_sets.growth_rows(measured, 0.3, "strongest") == [5, 2]
    assert data_sets.growth_rows(measured, 0.01, "strongest") == [5]
    assert sorted(data_sets.growth_rows(measured, 1, "weakest")) == list(range(7))
    assert data_sets.growth_name(1, "weakest") == data_sets.growth_name(1, "strongest") == data_sets.WHOLE
    assert data_sets.growth_rows(strengths(*range(100)), 0.29, "weakest") == list(range(29))


def test_treatments_of_a_band_flip_first_and_then_read_the_turned_strength() -> None:
    config = BandsRepairConfig(margin_scale=0.5, margin_cap=1.5)
    given, measured = pairs(2), strengths(-1.0, -4.0)
    assert data_sets.treatments(True) == (
        "plain", "flipped", "flipped+soft", "flipped+margin", "flipped+soft+margin",
    )  # fmt: skip
    assert data_sets.treatments(False) == ("plain", "soft", "margin", "soft+margin")
    assert data_sets.treated(given, measured, "plain", config) == given
    both = data_sets.treated(given, measured, "flipped+soft+margin", config)
    assert [(p.chosen, p.rejected) for p in both] == [("bad 0", "good 0"), ("bad 1", "good 1")]
    assert [p.flip_prob for p in both] == pytest.approx([0.2, 0.2])  # 1 - .8: the label is turned
    assert [p.margin for p in both] == [0.5, 1.5]  # .5 * |-1|; .5 * |-4| bounded
    alone = data_sets.treated(given, measured, "soft+margin", config)
    assert [p.flip_prob for p in alone] == [0.8, 0.8]
    assert [p.margin for p in alone] == [-0.5, -1.5]
    fixed = data_sets.treated(given, measured, "soft", BandsRepairConfig(alpha=0.4))
    assert [p.flip_prob for p in fixed] == [0.4, 0.4]


@pytest.mark.parametrize(("n", "most"), [(16, 1), (13, 2), (3, 3), (1, 8)])
def test_every_pass_fills_its_batches_and_no_pair_is_seen_twice_more_often_than_another(n: int, most: int) -> None:
    rows = data_sets.full_batches(n, 8, seed=3)
    times = np.bincount(rows, minlength=n)
    assert len(rows) % 8 == 0
    assert len(rows) == -(-n // 8) * 8
    assert times.min() >= 1
    assert times.max() <= most
    assert times.max() - times.min() <= 1
    assert rows == data_sets.full_batches(n, 8, seed=3)


# ---- numbers ---------------------------------------------------------------------------------------------------


def test_the_two_level_bootstrap_by_hand() -> None:
    # Two seeds, two prompts of one pair; differences 0 and 1 in seed one, the same in seed two: no spread over seeds.
    mean, low, high = mean_over_seeds(np.array([[0.0, 1.0], [0.0, 1.0]]), clusters=["a", "b"], draws=4000)
    # Prompts drawn: aa (1/4), ab or ba (1/2), bb (1/4): 0, 1/2, 1. The 2.5 % quantile is 0, the 97.5 % one is 1.
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    # One prompt: nothing to draw but seeds. Means 0 and 1, each deviation from .5 stretched by sqrt(2).
    mean, low, high = mean_over_seeds(np.array([[0.0, 0.0], [1.0, 1.0]]), clusters=["a", "a"], draws=4000)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - 0.5 * 2**0.5, 0.5 + 0.5 * 2**0.5))
    # Clusters keep their pairs together: prompt a has three pairs, b one; ab gives 3/4, not 1/2.
    mean, _, _ = mean_over_seeds(np.array([[1.0, 1.0, 1.0, 0.0]]), clusters=["a", "a", "a", "b"])
    assert mean == 0.75


def test_findings_say_which_arms_beat_plain_and_how_many_would_by_chance() -> None:
    def row(arm: str, low: float, high: float) -> dict[str, Any]:
        return {"set": "original", "arm": arm, "difference": {"value": (low + high) / 2, "low": low, "high": high}}

    plain = {"set": "original", "arm": "plain"}
    said = findings([plain, row("a", 0.01, 0.03), row("b", -0.05, -0.01), row("c", -0.01, 0.01), row("d", 0.0, 0.1)])
    assert said[0] == (
        "On the set original, a (+0.020 [+0.010, +0.030]) beats plain training with an interval that excludes 0. "
        "Below plain: b (-0.030 [-0.050, -0.010]). The other 2 of 4 arms are not told apart from plain."
    )
    assert "about 0.2 of the arms" in said[1]
    assert "no arm beats plain training" in findings([plain, row("c", -0.01, 0.01)])[0]
    assert findings([plain]) == []


def test_a_curve_is_the_mean_of_the_seeds_at_common_steps() -> None:
    runs = [{"m": {1: 0.0, 2: 1.0, 3: 5.0}}, {"m": {1: 1.0, 2: 3.0}}]
    assert mean_curve(runs, "m") == {"steps": [1, 2], "mean": [0.5, 2.0], "low": [0.0, 1.0], "high": [1.0, 3.0]}
    long = [{"m": {s: float(s) for s in range(1000)}}]
    assert len(mean_curve(long, "m")["steps"]) <= 160  # as many points as a figure draws without thinning


def test_every_accuracy_follows_from_the_stored_scores(whole: Path) -> None:
    run, found = whole / "run", found_in(whole)
    truth = {r["id"]: not r["wrong"] for r in rows_of(run / "data/validation_truth.jsonl")}

    def accuracy(folders: list[Path], name: str) -> list[float]:
        means = []
        for folder in folders:
            stored = np.load(folder / "scores.npz")
            right = stored["scores"][:, 0] > stored["scores"][:, 1]
            labels = np.array([truth[i] for i in stored["ids"]])
            if name == "relabelled":
                right = right == labels
            means.append(float(right[labels].mean() if name == "agreement" else right.mean()))
        return means

    places = {
        "plain": "all", "soft+margin": "arm-soft+margin", "drop": "arm-drop", "random flip": "arm-random-flip-seed-{}",
        "oracle flip": "arm-oracle-flip", "drop, shuffled": "arm-drop-shuffled-seed-{}",
    }  # fmt: skip
    plain = {n: accuracy([run / f"models/all/9-steps/seed-{s}" for s in (0, 1)], n) for n in ("original", "relabelled")}
    for row in found["arms"]:
        if row["arm"] in places and row["set"] != "agreement":
            folders = [run / "models" / places[row["arm"]].format(s) / "9-steps" / f"seed-{s}" for s in (0, 1)]
            seeds = accuracy(folders, row["set"])
            assert row["seeds"] == pytest.approx(seeds)
            assert row["value"] == pytest.approx(np.mean(seeds))
            if row["arm"] != "plain":
                assert row["difference"]["seeds"] == pytest.approx(np.subtract(seeds, plain[row["set"]]))
                assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
    by_arm = {(r["arm"], r["set"]): np.array(r["seeds"]) for r in found["arms"]}
    assert [(r["arm"], r["against"], r["set"]) for r in found["controls"]] == [
        ("drop", "drop, shuffled", name) for name in ("original", "relabelled", "agreement")
    ]
    for row in found["controls"]:
        assert row["seeds"] == pytest.approx(by_arm["drop", row["set"]] - by_arm["drop, shuffled", row["set"]])
        assert row["low"] <= row["value"] <= row["high"]
    texts = {r["id"]: len(r["chosen"]) - len(r["rejected"]) for r in rows_of(run / "validation/original.jsonl")}
    seen = set()
    for row in (r for r in found["arms_by_length"] if r["arm"] == "plain"):
        kept = load_preferences(run / f"validation/{row['set']}.jsonl").preferences
        longer = {p.id: len(p.chosen) - len(p.rejected) for p in kept}
        wanted = {i for i, more in longer.items() if (more > 0 if row["better"] == "longer" else more < 0)}
        assert row["n"] == len(wanted) > 0
        for seed, value in enumerate(row["seeds"]):
            stored = np.load(run / f"models/all/9-steps/seed-{seed}/scores.npz")
            first = dict(zip(stored["ids"].tolist(), stored["scores"][:, 0] > stored["scores"][:, 1], strict=True))
            # Of unequal texts, the same length difference means the same label.
            assert value == pytest.approx(np.mean([first[i] == (texts[i] == longer[i]) for i in wanted]))
        seen.add((row["set"], row["better"]))
    assert seen == {(n, b) for n in ("original", "relabelled", "agreement") for b in ("longer", "shorter")}
    assert {r["arm"] for r in found["arms_by_length"]} == {r["arm"] for r in found["arms"]}
    for row in found["bands"]:
        steps = found["compute"][[c["analysis"] for c in found["compute"]].index("bands")]["steps"]
        folders = [run / "models" / f"band-{row['band']:02d}" / f"{steps}-steps" / f"seed-{s}" for s in (0, 1)]
        assert row["seeds"] == pytest.approx(accuracy(folders, row["set"]))
    ensemble = np.load(run / "ensemble.npz")
    mean = (ensemble["scores"][..., 0] - ensemble["scores"][..., 1]).mean(0)
    own = next(r for r in found["arms"] if (r["arm"], r["set"]) == ("ensemble", "original"))
    assert own["value"] == pytest.approx((mean > 0).mean())
    assert own["models"] == 2
    # The whole set is one model, wherever it is needed: as plain arm and as the end of both curves.
    wholes = [r["seeds"] for r in found["growth"] if r["fraction"] == 1 and r["set"] == "original"]
    assert wholes == [plain["original"]] * 2


def test_a_side_of_one_pair_or_one_prompt_has_no_interval_and_is_left_out() -> None:
    longer = np.array([3, 1, -2, -1, 0, -4])
    units = Units.of("prompts", ["a", "a", "b", "c", "d", "e"])
    everything = (np.arange(6), np.ones(6))
    one_pair = (np.array([0, 1, 2, 4]), np.ones(4))
    sets = {"original": everything, "relabelled": one_pair}
    held = HeldOut([*"uvwxyz"], longer, sets, {n: units.take(rows) for n, (rows, _) in sets.items()}, {})
    right, wrong = np.tile([1.0, 0.0], (2, 6, 1)), np.tile([0.0, 1.0], (2, 6, 1))
    found = by_length({"plain": right, "drop": wrong}, held)
    assert [(r["set"], r["better"], r["arm"], r["n"], r["value"]) for r in found] == [
        ("original", "shorter", "plain", 3, 1), ("original", "shorter", "drop", 3, 0),
    ]  # fmt: skip


def test_segments_and_inflation_follow_from_the_metrics(whole: Path) -> None:
    run, found = whole / "run", found_in(whole)
    folders = [run / f"models/dynamics-with-segments/18-steps/seed-{s}" for s in (0, 1)]
    logs = [rows_of(f / "metrics.jsonl") for f in folders]
    segments = found["segments"]["segments"]
    assert [s["segment"] for s in segments] == [1, 2, 3, 4]
    assert [s["n"] for s in segments] == [10, 10, 10, 10]
    assert [s["strength_mean"] for s in segments] == sorted(s["strength_mean"] for s in segments)
    assert segments[0]["steps"] == [6, 12, 18]
    # At the end, by the scores themselves: no other path through the code.
    stored = [np.load(f / "scores.npz") for f in folders]
    ensemble = np.load(run / "ensemble.npz")
    weakest = np.argsort((ensemble["scores"][..., 0] - ensemble["scores"][..., 1]).astype(float).mean(0))[:10]
    last = np.mean([(s["scores"][weakest, 0] > s["scores"][weakest, 1]).mean() for s in stored])
    assert segments[0]["mean"][-1] == pytest.approx(last)
    rows = {(r["on"], r["what"]): r for r in found["inflation"]}
    chosen, gap = rows["validation", "chosen"], rows["validation", "gap"]
    assert chosen["mean"][-1] == pytest.approx(np.mean([s["scores"][:, 0].astype(float).mean() for s in stored]))
    assert rows["validation", "rejected"]["mean"][-1] == pytest.approx(
        np.mean([s["scores"][:, 1].astype(float).mean() for s in stored])
    )
    assert gap["low"][-1] == pytest.approx(min(log[-1]["validation/original/margin"] for log in logs))
    first = [next(line for line in log if "train/margin" in line) for log in logs]
    expected = np.mean([line["train/reward_mean"] + line["train/margin"] / 2 for line in first])
    assert rows["train", "chosen"]["mean"][0] == pytest.approx(expected)


# ---- compute, averages, members --------------------------------------------------------------------------------


def test_all_models_of_an_analysis_take_the_same_steps_of_the_same_number_of_pairs(whole: Path) -> None:
    found = {c["analysis"]: c for c in found_in(whole)["compute"]}
    assert set(found) == {"dynamics", "arms", "warm", "growth", "bands", "bands_repair"}
    assert {c["pairs_per_step"] for c in found.values()} == {8}
    # 70 pairs: 9 steps a pass of 72 (2 seen twice). Half of them: 35 pairs, 40 a pass, 5 steps: 9 steps are 1.8 passes.
    assert (found["growth"]["steps"], found["growth"]["passes_least"], found["growth"]["passes_most"]) == (9, 1, 1.8)
    # Bands of 24, 23, 23 pairs: 3 steps a pass.
    assert (found["bands"]["steps"], found["bands"]["models"]) == (6, 6)
    assert found["arms"]["models"] == 12
    for result in (whole / "run" / "models").glob("*/*/*/result.json"):
        steps = int(result.parts[-3].removesuffix("-steps"))
        assert json.loads(result.read_text())["steps"] == steps
        logged = [row["step"] for row in rows_of(result.parent / "metrics.jsonl")]
        assert max(logged) == steps
        config = json.loads((result.parent / "config.json").read_text())
        assert config["margin_in_flip"] == ("arm-soft+margin" not in result.parts)
    assert not list((whole / "run" / "models").glob("*/*/*/model")), "weights are not kept"
    assert not list((whole / "run" / "strength").glob("*/members/*/model"))


def test_random_flips_differ_between_seeds_and_the_oracle_knows(whole: Path) -> None:
    run = whole / "run"
    before = {p.id: p.chosen for p in load_preferences(run / "data" / "preferences.jsonl").preferences}

    def turned(name: str) -> set[str]:
        return {p.id for p in load_preferences(run / "sets" / f"{name}.jsonl").preferences if p.chosen != before[p.id]}

    first, second = turned("arm-random-flip-seed-0"), turned("arm-random-flip-seed-1")
    assert len(first) == len(second) == 21  # .3 of 70
    assert first != second
    wrong = {r["id"] for r in rows_of(run / "data/truth.jsonl") if r["wrong"]}
    assert turned("arm-oracle-flip") == wrong


def test_a_weight_average_is_the_mean_of_the_weights_from_one_head(
    tmp_path: Path, language_model: Folders, planted: dict[str, str]
) -> None:
    settings: dict[str, Any] = {"data": planted["clean"], "batch_size": 16, "max_length": 64, "optim": OPTIM}
    first = RewardConfig(model=language_model("llama"), seed=3, **settings)
    begin = start_model(first.model, first, tmp_path / "start")
    second = RewardConfig(model=begin, seed=4, **settings)
    train_reward(first, tmp_path / "a", quiet=True)
    train_reward(second, tmp_path / "b", quiet=True)
    # The brother began where the plain model did.
    same = RewardConfig(model=begin, seed=3, **settings)
    train_reward(same, tmp_path / "c", quiet=True)
    a, b, c = (RewardModel.load(tmp_path / name / "model").state_dict() for name in "abc")
    assert all(torch.equal(a[name], c[name]) for name in a)
    mean = average([tmp_path / "a" / "model", tmp_path / "b" / "model"], first).state_dict()
    for name, weight in mean.items():
        expected = (a[name].numpy().astype(np.float64) + b[name].numpy().astype(np.float64)) / 2
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scoring", ["in-sample", "out-of-fold"])
def test_linear_members_fitted_again_score_as_they_did(
    scoring: str, tmp_path: Path, language_model: Folders, planted: dict[str, str]
) -> None:
    from steelyard.measure import StrengthConfig, measure

    pairs = [
        replace(p, weight=0.1 + i % 5, flip_prob=0.1 * (i % 3))
        for i, p in enumerate(load_preferences(planted["noisy"]).preferences)
    ]
    data = str(write_preferences(pairs, tmp_path / "weighed.jsonl"))
    settings: dict[str, Any] = {"scoring": scoring, "members": 2, "max_length": 64}
    config = StrengthConfig(data=data, model=language_model("llama"), **settings)
    folder = tmp_path / "strength" / scoring
    measure(config, load_preferences(data).preferences, folder, quiet=True)
    # On the very pairs that it measured, a member gives what it gave, and gives it to pairs it did not judge, too.
    ids, again = ensemble_scores(folder, data)
    stored, index = read_scores(folder)
    assert again.shape == stored.shape
    assert ids == [pairs[i].id for i in index]
    judged = ~np.isnan(stored)
    np.testing.assert_allclose(again[judged], stored[judged], rtol=1e-4, atol=1e-4)
    new_ids, new = ensemble_scores(folder, planted["held-out"])
    assert new.shape == (2, 64, 2)
    assert len(new_ids) == 64
    assert np.isfinite(new).all()
    # Another penalty behind the same name is noticed.
    probe = json.loads((folder / "probe.json").read_text())
    (folder / "probe.json").write_text(json.dumps(probe | {"penalty": probe["penalty"] * 1000}))
    with pytest.raises(InputError, match="could not be fitted again"):
        ensemble_scores(folder, planted["held-out"])


# ---- sittings --------------------------------------------------------------------------------------------------


def scores(run: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(run)): np.load(p)["scores"].tobytes() for p in sorted((run / "models").rglob("scores.npz"))
    }


@pytest.mark.usefixtures("no_figures")
def test_resumed_after_its_end_nothing_is_trained_and_the_numbers_stay(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, bytes_before = found_in(whole), scores(whole / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a finished model was trained again"))
        assert start(whole, patch, "--resume") == 0
    assert found_in(whole) == before
    assert scores(whole / "run") == bytes_before
    capsys.readouterr()
    assert start(whole, monkeypatch) == 2
    assert "holds a study already; go on with --resume" in capsys.readouterr().err
    assert start(whole, monkeypatch, "--resume", "--set", "reward.optim.lr=0.001") == 2
    assert "holds a study with other settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_interrupted_and_grown_a_study_comes_to_the_same_scores(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "later"
    # First sitting: some analyses of one seed, without weight averages; stopped in the middle of a model.
    step, count = torch.optim.AdamW.step, 0

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 25:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopping)
        assert start(folder, patch, analyses=["growth"], seeds=[0]) == 130
    assert not (folder / "run" / "study.json").exists()
    assert start(folder, monkeypatch, "--resume", analyses=["growth"], seeds=[0]) == 0
    assert set(found_in(folder)) & {"bands", "growth", "arms"} == {"growth"}
    # Then everything: the plain model, whose weights are wanted only now, comes out the same.
    assert start(folder, monkeypatch, "--resume") == 0
    assert scores(folder / "run") == scores(whole / "run")
    wanted, got = found_in(whole), found_in(folder)
    for found in (wanted, got):
        for row in found["compute"]:
            del row["seconds"]
    assert got == wanted


# ---- files of one's own ----------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, language_model: Folders) -> dict[str, Any]:
    """A study of the user's files: planted pairs, few prompts, truth in a column."""
    data = {}
    for name, n, seed in (("preferences", 64, 1), ("validation", 24, 2)):
        rows, wrong = tiny.planted_pairs(n, flips=0.2, seed=seed)
        rows = [
            r | {"truth": -1 if w else 0 if i % 7 == 0 else 1} for i, (r, w) in enumerate(zip(rows, wrong, strict=True))
        ]
        data[name] = tiny.write_jsonl(tmp_path / f"{name}.jsonl", [r | {"prompt": r["prompt"][:2]} for r in rows])
    return {
        "data": data | {"truth_column": "truth"}, "model": language_model("llama"), "seeds": [5], "workers": 1,
        "strength": {"members": 2, "max_length": 64}, "analyses": ["arms", "segments"],
        "repair": {"plain": {"recipe": "keep"}, "flip": {"recipe": "flip"}},
        "dynamics": {"epochs": 1, "segments": 2, "examinations": 2},
        "reward": {"batch_size": 8, "max_length": 64, "optim": OPTIM, "trainable_layers": 1,
                   "activation_cache": str(tmp_path / "cache")},
    }  # fmt: skip


@pytest.mark.usefixtures("no_figures")
def test_a_study_of_ones_own_files_with_few_prompts_and_a_strength_measured_before(
    mine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(mine))
    monkeypatch.chdir(tmp_path)
    assert main(["study", "data", "study.yaml", "--out", "one"]) == 0
    found = json.loads(Path("one/study.json").read_text())
    assert {s["set"]: s["unit"] for s in found["sets"]} == dict.fromkeys(
        ("original", "relabelled", "agreement"), "pairs"
    )
    held = {s["set"]: s["n"] for s in found["sets"]}
    rows, wrong = tiny.planted_pairs(24, flips=0.2, seed=2)
    ties = {i for i in range(len(rows)) if i % 7 == 0 and not wrong[i]}
    assert held == {"original": 24, "relabelled": 24 - len(ties), "agreement": 24 - len(ties) - int(wrong.sum())}
    page = Path("one/report.html").read_text()
    assert "the bootstrap draws pairs" in page
    assert "alone (there is one seed; nothing is known of another)" in page
    # The same with the strength given: the same members, the same numbers.
    again = {k: v for k, v in mine.items() if k != "strength"} | {"strength_folder": "one/strength/out-of-fold"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    assert main(["study", "data", "again.yaml", "--out", "two"]) == 0
    second = json.loads(Path("two/study.json").read_text())
    assert second["arms"] == found["arms"]
    assert second["segments"] == found["segments"]


def test_a_strength_of_other_pairs_is_refused(
    mine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(mine | {"analyses": ["bands"], "bands": {"count": 2}}))
    assert main(["study", "data", "study.yaml", "--out", "one"]) == 0
    rows = rows_of(Path(mine["data"]["preferences"]))
    other = tiny.write_jsonl(tmp_path / "other.jsonl", [r | {"chosen": r["chosen"] + " w1"} for r in rows])
    changed = {k: v for k, v in mine.items() if k != "strength"} | {"data": mine["data"] | {"preferences": other}}
    changed |= {"strength_folder": "one/strength/out-of-fold", "analyses": ["bands"]}
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    assert main(["study", "data", "changed.yaml", "--out", "two"]) == 2
    assert "pair p0 has other texts" in capsys.readouterr().err


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": {}}, "^policy: a study of data"),
        ({"seeds": [1, 1]}, r"^seeds: must differ from each other, got \[1, 1\]"),
        ({"analyses": ["bands", "bands"]}, "^analyses: must differ"),
        ({"reward": {"seed": 3}}, "^reward: seed is filled in"),
        ({"reward": {"epochz": 3}}, "^reward.epochz: no such setting"),
        ({"reward": {"eval_every": 3}}, "^reward: eval_every is filled in"),
        ({"repair": {"flip": {"recipe": "flip"}}}, "^repair.plain: all arms are compared with it"),
        ({"repair": {"plain": {"recipe": "keep"}, "b": {"recipe": "keep"}}}, "^repair.b: recipe keep is the arm plain"),
        ({"repair": {"plain": {"recipe": "keep"}, "WARM": {"recipe": "flip"}}}, "^repair.WARM: this name belongs"),
        ({"repair": {"plain": {"recipe": "keep"}, "b": {"recipe": "drop", "q": 2}}}, "^repair.b.q: must be at most 1"),
        ({"repair": {"plain": {"recipe": "keep"}, "a b": {"recipe": "drop"}, "a-b": {"recipe": "flip"}}},
         "^repair: 'a b' and 'a-b' differ only in spaces, hyphens, slashes or commas"),
        ({"repair": {"plain": {"recipe": "keep"}, "r": {"recipe": "random flip"}, "r seed 0": {"recipe": "flip"}}},
         "^repair: 'r, seed 0' and 'r seed 0' differ only"),
        ({"against": {"flip": "flp"}}, "^against.flip: must name `repair`"),
        ({"against": {"flip": "flip"}}, "^against.flip: an arm cannot be its own control"),
        ({"bands": {"count": 4}, "bands_repair": {"soft": [5]}}, r"^bands_repair.soft: bands are 1 .* to 4, got \[5\]"),
        ({"bands_repair": {"flip": [], "soft": []}}, "^bands_repair: name bands"),
        ({"world": None, "data": {"preferences": __file__}}, "^data.validation: the study compares"),
        ({"strength": {"backend": "full", "keep_members": False}}, "^strength.keep_members: `segments`"),
        ({"strength": {"backend": "lora"}}, "^strength.backend: members of kind 'lora'"),
        ({"strength_folder": "nowhere"}, "^strength_folder: nowhere has no strength.parquet"),
        ({"world": None}, "either `world` .* or `data`"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_run_is_refused_before_it_starts(changes: dict[str, Any], said: str) -> None:
    study = DataStudy.model_validate({"world": {}, "sft": {}} | changes)
    with pytest.raises(InputError, match=said):
        check(study)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("growth.fractions=[0.5, 0.2]", "growth.fractions: must be shares above 0 up to 1, ascending"),
        ("growth.fractions=[0.5, 2]", "growth.fractions: must be shares above 0"),
        ("analyses=[nothing]", "analyses.0: must be 'bands', 'growth'"),
        ("warm.members=1", "warm.members: must be at least 2, got 1"),
        ("seeds=[]", "seeds: must have at least 1"),
        ("bandz=1", "bandz: no such setting"),
    ],
)
def test_wrong_settings_are_named(
    setting: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, monkeypatch, "--set", setting) == 2
    assert f"study.yaml: {said}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": {"max_length": 96}}, "strength.max_length = 512, but reward.max_length = 96: both must be equal"),
        (
            {"strength": {"on_overlong": "drop"}},
            "strength.on_overlong = drop, but reward.on_overlong = truncate-prompt",
        ),
    ],
)
def test_strength_and_reward_models_must_read_the_same_pairs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(DataStudy.model_validate({"world": {}, "sft": {}} | changes))


def test_the_study_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "data"]) == 2
    assert "name the study" in capsys.readouterr().err


def test_without_a_truth_there_is_no_oracle_unless_it_is_asked_for(mine: dict[str, Any]) -> None:
    del mine["data"]["truth_column"], mine["repair"]
    assert "oracle flip" not in check(DataStudy.model_validate(mine)).repair
    asked = mine | {"repair": {"plain": {"recipe": "keep"}, "o": {"recipe": "oracle flip"}}}
    with pytest.raises(InputError, match=r"^repair.o: oracle flip needs the truth"):
        check(DataStudy.model_validate(asked))


def test_the_scoring_of_the_repairs_is_a_choice() -> None:
    wanted = {"world": {}, "sft": {}, "scorings": ["in-sample"], "repair_from": "in-sample"}
    assert check(DataStudy.model_validate(wanted)).repair_from == "in-sample"


# ---- report ----------------------------------------------------------------------------------------------------


def test_the_report_shows_every_analysis(whole: Path, tmp_path: Path) -> None:
    page = (whole / "run" / "report.html").read_text()
    for words in (
        "Arms less plain training", "One band of strength alone", "Growing the training set",
        "Flipping the weakest bands", "Soft labels and margins within a band", "4 validation segments over steps",
        "Reward inflation", "Equal compute", "cf. Figs. 21, 22", "cf. Fig. 20", "cf. Fig. 4",
        "with an interval that excludes 0", "Arms less their own controls", "Arms by length",
    ):  # fmt: skip
        assert words in page, words
    part = tmp_path / "run"
    shutil.copytree(whole / "run", part, ignore=shutil.ignore_patterns("models", "sets", "data"))
    found = json.loads((part / "study.json").read_text())
    for name in ("arms", "arms_by_length", "findings", "segments", "growth"):
        del found[name]
    (part / "study.json").write_text(json.dumps(found))
    page = build_report(part).read_text()
    assert "One band of strength alone" in page
    assert "Growing the training set" not in page
    assert "Arms less plain training" not in page
    (part / "study.json").write_text(json.dumps(found | {"seeds": "many"}))
    with pytest.raises(InputError, match=r"study.json: field seeds"):
        build_report(part)


def test_a_model_that_counts_as_done_has_its_cost(
    tmp_path: Path, language_model: Folders, planted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RewardConfig(data=planted["clean"], model=language_model("llama"), max_length=64, optim=OPTIM)
    job = Job(tmp_path / "one", config, list(range(8)), planted["held-out"])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("steelyard.study.data_models.save_scores", killed)
        with pytest.raises(KeyboardInterrupt):
            train_and_score(job)
    assert (job.folder / "cost.json").exists()
    assert not job.done
    train_and_score(job)
    assert job.done


def test_scores_are_stored_with_their_ids(whole: Path) -> None:
    ids, stored = load_scores(whole / "run/models/all/9-steps/seed-0/scores.npz")
    assert stored.shape == (40, 2)
    assert ids == [p.id for p in load_preferences(whole / "run/validation/original.jsonl").preferences]
