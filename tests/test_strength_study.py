"""`study strength` in tiny: quality and cost by hand, every kind of member through the command line, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

import tiny
from conftest import Folders
from steelyard.cli import main
from steelyard.errors import InputError
from steelyard.evaluate.units import Units
from steelyard.members.cost import Cost, metered
from steelyard.strength import out_of_fold_plan
from steelyard.study.strength import APART, StrengthStudy, check_study, config_of, run_folder, run_strength_study
from steelyard.study.strength_compare import (
    compare,
    confident_rows,
    detected,
    full_model,
    price,
    quality,
    spread,
    tables,
)
from steelyard.study.strength_intervals import weighted_auroc
from steelyard.study.strength_runs import Run

OPTIM = {"lr": 3e-3}
TRAINED = {"batch_size": 16, "optim": OPTIM}
TINY: dict[str, Any] = {
    "name": "Tiny",
    "seeds": [0, 1],
    "world": {
        "sft": 24, "preferences": 60, "validation": 16, "rl_prompts": 1, "eval_prompts": 1,
        "noise": {"uniform": 0.2, "bradley_terry": 0.0, "systematic": 0.0},
    },
    "sft": {
        "scratch": {"layers": 2, "width": 16, "heads": 2, "context": 192}, "batch_size": 8, "max_length": 160,
        "optim": OPTIM,
    },
    "strength": {"max_length": 160, "folds": 2},
    "backends": {
        "whole": {"backend": "full", "member": TRAINED},
        "adapters": {"backend": "lora", "member": {"batch_size": 16}, "lora": {"rank": 2, "lr": 1e-2}},
        "top layer": {"backend": "layers", "member": TRAINED | {"trainable_layers": 1}},
        "head": {"backend": "head"},
    },
    "reference": "whole",
    "sizes": [1, 2],
    "workers": 1,
}  # fmt: skip


def make(margins: Any, truth: Any, **fields: Any) -> Run:
    d = np.array(margins, float)
    N = d.shape[1]
    given: dict[str, Any] = {
        "backend": "full", "scoring": "in-sample", "seed": 0, "longer_N": np.zeros(N), "index_N": np.arange(N),
        "shared": Cost(), "members": [Cost() for _ in d],
    }  # fmt: skip
    return Run(margins_MN=d, truth_N=np.array(truth), **given | fields)


class TestNumbers:
    def test_the_first_members_are_the_smaller_ensemble(self) -> None:
        run = make([[1, np.nan, 3], [3, np.nan, np.nan], [-10, 2, 6]], [1, 1, -1])
        np.testing.assert_array_equal(run.strength(1), [1, np.nan, 3])
        np.testing.assert_array_equal(run.strength(2), [2, np.nan, 3])
        np.testing.assert_array_equal(run.strength(), [-2, 2, 4.5])

    def test_only_judged_pairs_of_known_truth_count(self) -> None:
        # Of the judged ones the wrong pair lies below one right pair and above the other: half of the comparisons.
        run = make([[-1, 0, 1, -9, np.nan]], [1, -1, 1, 0, -1])
        found = quality(run, 1, None)
        assert found["auroc"] == 0.5
        assert found["voted"] == 0.8
        assert found["votes"] == 1.0
        assert found["rank_correlation"] is None

    def test_out_of_fold_votes_are_counted_where_there_are_some(self) -> None:
        run = make([[1, np.nan, 1, np.nan], [np.nan, 1, np.nan, 1], [1, np.nan, np.nan, 1]], [1, -1, 1, 1])
        assert quality(run, 3, None)["votes"] == 1.5
        assert quality(run, 1, None)["voted"] == 0.5

    def test_monotonicity_is_one_where_agreement_rises_with_strength(self) -> None:
        mean = np.arange(200.0)
        rising = np.where(2 * (np.arange(200) % 10) < np.arange(200) // 10, 1, -1)
        assert quality(make([mean], rising), 1, None)["monotonicity"] == pytest.approx(1.0, abs=0.05)
        assert quality(make([-mean], rising), 1, None)["monotonicity"] == pytest.approx(-1.0, abs=0.05)
        assert quality(make([mean], np.ones(200, int)), 1, None)["monotonicity"] is None

    def test_rank_correlation_is_that_with_the_whole_reference(self) -> None:
        run = make([[1, 2, 3, np.nan]], [1, 1, 1, -1])
        assert quality(run, 1, np.array([10.0, 20, 30, -5]))["rank_correlation"] == pytest.approx(1)
        assert quality(run, 1, np.array([10.0, 20, np.nan, -5]))["rank_correlation"] == pytest.approx(1)
        assert quality(run, 1, np.array([3.0, 2, 1, 9]))["rank_correlation"] == pytest.approx(-1)

    def test_what_is_shared_is_paid_at_every_size(self) -> None:
        members = [Cost(10, 1, 2, 50), Cost(20, 2, 3, 70), Cost(40, 3, 4, 60)]
        run = make(np.ones((3, 2)), [1, -1], shared=Cost(100, 5, 6, 55), members=members)
        one = Cost(50, 1, 4, 0)
        assert price(run, 1, one) == {
            "tokens": 110, "wall": 6, "cpu": 8, "memory": 55, "tokens_of_one": 2.2, "cpu_of_one": 2.0
        }  # fmt: skip
        assert price(run, 3, None) == {
            "tokens": 170, "wall": 11, "cpu": 15, "memory": 70, "tokens_of_one": None, "cpu_of_one": None
        }  # fmt: skip

    def test_the_unit_is_a_model_that_trained_on_all_pairs(self) -> None:
        part = make(np.ones((2, 2)), [1, -1], scoring="out-of-fold", members=[Cost(1, 1, 1, 1), Cost(3, 3, 3, 1)])
        whole = make(np.ones((2, 2)), [1, -1], members=[Cost(10, 10, 10, 1), Cost(20, 10, 30, 1)])
        assert full_model([part, whole], "full", 0) == Cost(15, 10, 20, 1)
        shared = make(np.ones((2, 2)), [1, -1], shared=Cost(5, 5, 5, 9), members=whole.members)
        assert full_model([shared], "full", 0) == Cost(20, 15, 25, 9), "by itself it needs what it shares with others"
        assert full_model([part], "full", 0) == Cost(2, 2, 2, 1)
        assert full_model([part], "lora", 0) is None

    def test_readings_of_the_votes(self) -> None:
        margins = [[1, -2, 4, 1], [3, 2, np.nan, -1]]
        found = compare([make(margins, [1, -1, 1, -1])], [2], "full", same_pairs=True)
        by_name = {r["scorer"]: r for r in found["scorers"]}
        # Votes 1, 1/2, 1, 1/2 and means 2, 0, 4, 0: both right pairs above both wrong ones.
        assert by_name["vote fraction"]["auroc"]["mean"] == 1.0
        assert by_name["mean strength"]["auroc"]["mean"] == 1.0
        # Mean / std of 2 / 1, 0 / 2, one vote only, 0 / 1.
        assert by_name["mean / std"]["auroc"]["mean"] == 1.0
        assert found["rows"][0]["rank_correlation"]["mean"] == 1.0

    def test_spread_over_seeds(self) -> None:
        found = spread([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": None}])
        assert found["a"] == {"mean": 2.0, "std": pytest.approx(np.sqrt(2)), "seeds": [1.0, 3.0]}
        assert found["b"] == {"mean": None, "std": None, "seeds": [2.0, None]}
        assert spread([{"a": 1.0}])["a"]["std"] is None
        assert detected(np.array([1.0, 2.0]), np.array([1, 1]))["auroc"] is None

    def test_seeds_of_the_same_pairs_bound_the_rank_correlation(self) -> None:
        runs = [make([[1, 2, 3]], [1, -1, 1], seed=0), make([[3, 2, 1]], [1, -1, 1], seed=1)]
        found = compare(runs, [1], "full", same_pairs=True)
        assert found["between_seeds"] == [{"backend": "full", "scoring": "in-sample", "rank_correlation": -1.0}]
        assert compare(runs, [1], "full", same_pairs=False)["between_seeds"] == []

    def test_weighted_auroc_by_hand(self) -> None:
        scores, wrong = np.array([3.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False])
        weights = np.array([[1.0, 1, 1, 1], [1, 3, 2, 1], [0, 1, 0, 1]])
        # As they are: 3 above 1 and 2, 2 above 1 and tied with 2: 3.5 of 4. Weighted: (1 * 4 + 2 * (3 + .5)) / (3 * 4).
        np.testing.assert_allclose(weighted_auroc(scores, wrong, weights), [3.5 / 4, 11 / 12, np.nan])

    def test_intervals_are_paired_with_the_whole_reference(self) -> None:
        rng = np.random.default_rng(0)
        truth = np.where(rng.random(400) < 0.4, -1, 1)
        seen = truth + rng.normal(size=400)
        runs = []
        for seed in (0, 1):
            good = seen + 0.3 * rng.normal(size=(2, 400))
            runs += [make(good, truth, seed=seed), make(good + 0.05 * rng.normal(size=(2, 400)), truth, seed=seed,
                                                         backend="near"),
                     make(rng.normal(size=(2, 400)), truth, seed=seed, backend="blind")]  # fmt: skip
        found = compare(runs, [1, 2], "full", same_pairs=True)
        rows = {(r["backend"], r["members"]): r for r in found["rows"]}
        for row in rows.values():
            value, low, high = row["auroc_interval"]
            assert value == pytest.approx(row["auroc"]["mean"])
            assert low < value < high
        assert found["unit"] == "pairs"
        assert rows["full", 2]["auroc_difference"] is None
        assert rows["full", 1]["auroc_difference"] is not None
        near, blind = rows["near", 2]["auroc_difference"], rows["blind", 2]["auroc_difference"]
        assert near[0] == pytest.approx(rows["near", 2]["auroc"]["mean"] - rows["full", 2]["auroc"]["mean"])
        assert near[1] < near[0] < near[2]
        assert near[2] - near[1] < 0.3 * (rows["near", 2]["auroc_interval"][2] - rows["near", 2]["auroc_interval"][1])
        assert blind[2] < -0.2
        columns = tables(found)[0]["columns"]
        cells = [dict(zip(columns, row, strict=True)) for row in tables(found)[0]["rows"]]
        assert [c["voted"] for c in cells] == ["100%"] * 6 + [""]
        assert cells[-2]["less all full"].startswith("-0.")

    def test_the_difference_is_on_the_pairs_that_both_judge(self) -> None:
        # The member judges pairs 0 to 3 perfectly; the reference errs there, and is right on 4 and 5.
        reference = make([[2, -1, 1, -2, 5, -5]], [1, 1, -1, -1, 1, -1])
        part = make([[3, 2, -1, -2, np.nan, np.nan]], [1, 1, -1, -1, 1, -1], backend="part")
        rows = compare([reference, part], [1], "full", same_pairs=True)["rows"]
        row = next(r for r in rows if r["backend"] == "part")
        # Reference on 0 to 3: wrong pairs (scores -1, 2) against right ones (-2, 1): 3 of 4 above.
        assert row["auroc_difference"][0] == pytest.approx(1 - 3 / 4)
        assert row["voted"]["mean"] == pytest.approx(4 / 6)

    def test_pairs_of_one_response_widen_the_interval(self) -> None:
        rng = np.random.default_rng(1)
        truth = np.where(rng.random(200) < 0.5, -1, 1)
        # 10 responses a to j, all pairs hold two of them; whether a label is found depends on the first one.
        places = np.stack(
            [np.repeat(np.arange(10), 20), (np.repeat(np.arange(10), 20) + rng.integers(1, 10, 200)) % 10], 1
        )
        margins = truth * np.where(places[:, 0] < 5, 2.0, -2.0) + 0.1 * rng.normal(size=200)
        wide = compare([make(margins[None], truth, units=Units("responses", places))], [1], "full", same_pairs=True)
        narrow = compare([make(margins[None], truth)], [1], "full", same_pairs=True)
        (_, low, high), (_, low_pairs, high_pairs) = (f["rows"][0]["auroc_interval"] for f in (wide, narrow))
        assert high - low > 2 * (high_pairs - low_pairs)
        assert wide["unit"] == "responses"

    def test_a_meter_counts_this_work_alone(self) -> None:
        held = np.ones(30_000_000)
        with metered(5) as first:
            sum(range(200_000))
        assert first.tokens == 5
        assert 0 < first.cpu <= first.wall + 0.05
        with metered() as second:
            more = np.ones(30_000_000)
        assert second.memory > first.memory + 0.8 * more.nbytes
        del held


class TestConfidentLearning:
    @staticmethod
    def noisy(n: int = 400) -> Run:
        rng = np.random.default_rng(0)
        truth = np.where(rng.random(n) < 0.2, -1, 1)
        margins = truth * 1.5 + rng.normal(0, 1, (4, n))
        margins[rng.random((4, n)) < 0.5] = np.nan
        margins[0, np.isnan(margins).all(0)] = 0.1
        return make(margins, truth, scoring="out-of-fold")

    def test_the_filter_finds_planted_errors(self) -> None:
        pytest.importorskip("cleanlab")
        run = self.noisy()
        rows, note = confident_rows([(("full", "out-of-fold"), [run])])
        (row,) = rows
        assert note == ""
        assert row["auroc"]["mean"] > 0.85
        assert 0.05 < row["flagged"]["mean"] < 0.4
        assert row["filter_precision"]["mean"] > 0.5 > 0.3 > (run.truth_N < 0).mean()
        # As many weakest pairs were chosen as the filter chose: equal counts, so precisions compare.
        wrong = (run.truth_N < 0).sum()
        for name in ("filter", "weakest"):
            hits = row[f"{name}_recall"]["mean"] * wrong
            assert hits / row[f"{name}_precision"]["mean"] == pytest.approx(row["flagged"]["mean"] * 400)

    def test_without_cleanlab_the_row_is_left_out_with_a_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("cleanlab", "cleanlab.filter", "cleanlab.rank"):
            monkeypatch.setitem(sys.modules, name, None)
        rows, note = confident_rows([(("full", "out-of-fold"), [self.noisy()])])
        assert rows == []
        assert "cleanlab is not installed" in note

    def test_in_sample_probabilities_are_not_used(self) -> None:
        rows, note = confident_rows([])
        assert rows == []
        assert "add the scoring out-of-fold" in note


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    root = tmp_path_factory.mktemp("strength-study")
    (root / "study.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    assert main(["study", "strength", str(root / "study.yaml"), "--out", str(root / "out")]) == 0
    return root / "out"


class TestTheStudy:
    def test_every_kind_is_measured_at_every_size(self, done: Path) -> None:
        found = json.loads((done / "study.json").read_text())
        kinds = {(r["backend"], r["scoring"], r["members"]) for r in found["rows"]}
        assert kinds == {(b, s, m) for b in TINY["backends"] for s in ("in-sample", "out-of-fold") for m in (1, 2)}
        for row in found["rows"]:
            assert 0 <= row["auroc"]["mean"] <= 1
            assert len(row["auroc"]["seeds"]) == 2
            assert row["cpu"]["mean"] > 0
            assert row["voted"]["mean"] == (1.0 if row["scoring"] == "in-sample" or row["members"] == 2 else 0.5)
        by_kind = {(r["backend"], r["scoring"], r["members"]): r for r in found["rows"]}
        assert by_kind["whole", "in-sample", 2]["rank_correlation"]["mean"] == 1.0
        assert by_kind["whole", "in-sample", 2]["tokens_of_one"]["mean"] == pytest.approx(2.0)
        # Top layer of two, one epoch: half of a pass is shared; a member costs 3 / 2 + a scoring of 1 / 2, a whole
        # model 3 + a scoring.
        one = by_kind["top layer", "in-sample", 1]["tokens_of_one"]["mean"]
        assert one == pytest.approx((0.5 + 1.5 + 0.5) / 4)
        assert by_kind["adapters", "in-sample", 2]["tokens_of_one"]["mean"] == pytest.approx(2 * 3 / 4)
        assert by_kind["head", "in-sample", 2]["tokens_of_one"]["mean"] == pytest.approx(1 / 4)
        assert by_kind["head", "out-of-fold", 2]["tokens_of_one"]["mean"] == pytest.approx(1 / 4)

    def test_seeds_have_worlds_and_members_of_their_own(self, done: Path) -> None:
        texts = [(done / f"world-{seed}" / "data" / "preferences.jsonl").read_text() for seed in (0, 1)]
        assert texts[0] != texts[1]
        seeds = [
            json.loads((run_folder(done / f"world-{s}", "whole", "in-sample", s) / "config.json").read_text())["seed"]
            for s in (0, 1)
        ]
        assert seeds == [0, APART]

    def test_both_scorings_share_one_pass(self, done: Path) -> None:
        for seed in (0, 1):
            place = done / f"world-{seed}"
            assert len(list((place / "runs").glob("features-*.npy"))) == 1
            assert len(list((place / "runs" / "activations").iterdir())) == 1
            for scoring in ("in-sample", "out-of-fold"):
                for backend in ("top layer", "head"):
                    cost = json.loads((run_folder(place, backend, scoring, seed) / "cost.json").read_text())
                    assert cost["shared"]["tokens"] == 0
            for backend in ("top layer", "head"):
                assert json.loads((place / "shared" / f"{backend}.json").read_text())["tokens"] > 0

    def test_the_report_shows_it(self, done: Path) -> None:
        page = (done / "report.html").read_text()
        for text in (
            "Quality and cost of strength",
            "What strength costs",
            "longer text",
            "vote fraction",
            "top layer",
        ):
            assert text in page

    def test_it_goes_on_where_it_stopped(self, done: Path, tmp_path: Path) -> None:
        before = {p: p.stat().st_mtime_ns for p in done.rglob("margins.npz")}
        removed = run_folder(done / "world-1", "whole", "out-of-fold", 1)
        (removed / "result.json").unlink()
        scores = np.load(removed / "margins.npz")["scores"]
        first = json.loads((done / "study.json").read_text())
        assert main(["study", "strength", str(done.parent / "study.yaml"), "--out", str(done)]) == 2
        assert main(["study", "strength", str(done.parent / "study.yaml"), "--out", str(done), "--resume"]) == 0
        again = json.loads((done / "study.json").read_text())
        np.testing.assert_array_equal(np.load(removed / "margins.npz")["scores"], scores)
        changed = {p for p, t in before.items() if p.stat().st_mtime_ns != t}
        assert changed == {removed / "margins.npz"}
        for a, b in zip(first["rows"], again["rows"], strict=True):
            for name in ("auroc", "rank_correlation", "tokens"):
                assert a[name] == b[name]


def test_on_files_every_seed_shares_data_and_passes(language_model: Folders, tmp_path: Path, one_thread: None) -> None:
    rows, wrong = tiny.planted_pairs(60, flips=0.3, seed=1)
    rows = [r | {"ok": -1 if w else 1} for r, w in zip(rows, wrong, strict=True)]
    study = StrengthStudy.model_validate({
        "seeds": [0, 1], "data": {"preferences": tiny.write_jsonl(tmp_path / "d.jsonl", rows), "truth_column": "ok"},
        "model": language_model("llama"), "strength": {"max_length": 64, "folds": 2}, "sizes": [2], "workers": 1,
        "backends": {"head": {"backend": "head"}}, "scorings": ["out-of-fold"],
    })  # fmt: skip
    found = run_strength_study(study, tmp_path / "out")
    assert found["pairs"] == 60
    assert found["wrong"] == wrong.sum()
    assert found["rows"][0]["tokens_of_one"]["mean"] is None
    assert len(found["between_seeds"]) == 1
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["data-set"]
    assert len(list((tmp_path / "out").rglob("features-*.npy"))) == 1
    keys = [r["prompt"] for r in rows]
    plans = [out_of_fold_plan(keys, members=2, folds=2, seed=APART * s) for s in (0, 1)]
    for seed, plan in enumerate(plans):
        folder = run_folder(tmp_path / "out" / "data-set", "head", "out-of-fold", seed)
        np.testing.assert_array_equal(np.isnan(np.load(folder / "margins.npz")["scores"][..., 0]), ~plan)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [1, 1]}, "seeds: must differ"),
        ({"sizes": [0, 2]}, "sizes: an ensemble has at least one member"),
        ({"backends": {"a/b": {"backend": "head"}, "a-b": {"backend": "head"}}}, "backends: 'a/b' and 'a-b' differ"),
        ({"sizes": [1, 3]}, "backends.whole: .*multiple of folds"),
        ({"backends": {"head": {"backend": "head", "member": {"epochs": 2}}}}, "backends.head: member: no effect"),
        ({"backends": {"x": {"backend": "full", "workers": 2}}}, "backends.x: workers is filled in"),
        ({"backends": {"x": {"backend": "fool"}}}, "backends.x.backend: must be"),
        ({"strength": {"member": {"epoch": 1}}}, r"member\.epoch: no such setting"),
        ({"world": None}, "needs either `world`"),
        ({"world": None, "model": "m", "data": {"preferences": "f.jsonl"}}, "data.truth_column: the study needs"),
        (
            {"world": None, "model": "m", "data": {"preferences": "f.jsonl", "truth_column": "t", "validation": "v"}},
            "data: validation: no effect",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_study(StrengthStudy.model_validate(TINY | changes))


def test_shared_settings_reach_the_backends_that_read_them() -> None:
    study = StrengthStudy.model_validate(
        TINY | {"strength": {"folds": 2, "layers": 1, "member": {"epochs": 3}, "max_length": 99}}
    )
    made = {
        (b, s): config_of(study, b, s, 2, data="d", model="m")
        for b in ("whole", "head") for s in ("in-sample", "out-of-fold")
    }  # fmt: skip
    assert made["head", "in-sample"].layers == 1
    assert made["whole", "in-sample"].member.epochs == 3
    assert made["whole", "in-sample"].member.batch_size == 16  # its own section is laid over the shared one
    assert "folds" not in made["whole", "in-sample"].model_fields_set
    assert made["whole", "out-of-fold"].folds == 2
    assert {c.max_length for c in made.values()} == {99}
    assert {c.seed for c in made.values()} == {2 * APART}


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="backend"):
        StrengthStudy.model_validate(TINY | {"backend": "head"})


def test_lora_without_peft_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="needs the package peft"):
        check_study(StrengthStudy.model_validate(TINY))


def test_labels_without_errors_are_refused(language_model: Folders, tmp_path: Path) -> None:
    rows = [r | {"ok": 1} for r in tiny.planted_pairs(8)[0]]
    study = StrengthStudy.model_validate(
        {
            "data": {"preferences": tiny.write_jsonl(tmp_path / "d.jsonl", rows), "truth_column": "ok"},
            "model": language_model("llama"),
            "backends": {"head": {"backend": "head"}},
        }
    )
    with pytest.raises(InputError, match="known to be wrong; there are none"):
        run_strength_study(study, tmp_path / "out")
