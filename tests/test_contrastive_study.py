"""`study contrastive` in tiny: arms that differ only in what they claim, findings, resumption, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import steelyard.study.contrastive as study_module
from steelyard.cli import main
from steelyard.errors import InputError
from steelyard.study.arms import places
from steelyard.study.contrastive import ARMS, ContrastiveStudy, reward_config, run_contrastive
from steelyard.study.folder import StudyFolder, mean_curves

OPTIM = {"lr": 3e-3}
TINY: dict[str, Any] = {
    "name": "Tiny",
    "seeds": [3, 4],
    "world": {"sft": 24, "preferences": 32, "validation": 16, "rl_prompts": 4, "eval_prompts": 4},
    "sft": {
        "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 192}, "batch_size": 8, "max_length": 160,
        "optim": OPTIM,
    },
    "reward": {"batch_size": 8, "max_length": 160, "optim": OPTIM, "log_every": 1, "eval_every": 2},
    "features": {"drawn": 8},
    "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The tiny study, with a second control that has SwAV's prototypes, run through the command line."""
    root = tmp_path_factory.mktemp("contrastive-study")
    arms = ARMS | {"SwAV control": {"method": "swav", "beta": 0}}
    (root / "study.yaml").write_text(yaml.safe_dump(TINY | {"arms": arms}, sort_keys=False))
    assert main(["study", "contrastive", str(root / "study.yaml"), "--out", str(root / "out")]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def found(done: Path) -> dict[str, Any]:
    return json.loads((done / "study.json").read_text())


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


def config(done: Path, arm: str, seed: int = 3) -> dict[str, Any]:
    return dict(leaves(json.loads((places(done, arm, seed)[0] / "config.json").read_text())))


def weights(done: Path, arm: str, seed: int = 3) -> bytes:
    return (places(done, arm, seed)[0] / "model" / "model.safetensors").read_bytes()


class TestArms:
    def test_differ_only_in_what_they_claim(self, done: Path) -> None:
        base = config(done, "SimCSE pairs")

        def differing(arm: str, seed: int = 3) -> set[str]:
            other = config(done, arm, seed)
            return {key for key in base.keys() | other.keys() if base.get(key) != other.get(key)}

        assert differing("control") == {"contrastive.beta"}
        assert differing("SimCSE differences") == {"contrastive.features"}
        assert differing("SwAV pairs") == {"contrastive.method"}
        assert differing("plain") == {"contrastive.method"}
        assert differing("SimCSE pairs", 4) == {"seed"}

    def test_control_is_one_whichever_method_it_names(self, done: Path) -> None:
        assert weights(done, "control") == weights(done, "SwAV control")
        assert len({weights(done, arm) for arm in ARMS}) == len(ARMS)

    def test_control_has_dropout_and_both_views(self, done: Path) -> None:
        logs = {
            arm: [json.loads(line) for line in (places(done, arm, 3)[0] / "metrics.jsonl").read_text().splitlines()]
            for arm in ("plain", "control", "SimCSE pairs")
        }
        assert "train/contrastive_loss" in logs["control"][0]
        assert "train/contrastive_loss" not in logs["plain"][0]
        # The first step's masks, order and head are those of the arm that it controls; plain training has no masks.
        assert logs["control"][0]["train/loss"] == logs["SimCSE pairs"][0]["train/loss"]
        assert logs["control"][0]["train/loss"] != logs["plain"][0]["train/loss"]
        steps = {arm: json.loads((places(done, arm, 3)[0] / "result.json").read_text())["steps"] for arm in logs}
        assert set(steps.values()) == {4}


class TestFindings:
    def test_every_arm_set_and_measure(self, found: dict[str, Any]) -> None:
        arms = {*ARMS, "SwAV control"}
        sets = ("original", "relabelled", "agreement")
        assert {(r["set"], r["arm"]) for r in found["accuracy"]} == {(s, a) for s in sets for a in arms}
        assert len(found["overlap"]) == 6 * len(arms)
        assert found["seeds"] == [3, 4]
        for r in found["accuracy"] + found["overlap"]:
            assert len(r["seeds"]) == 2
            assert r["value"] == pytest.approx(sum(r["seeds"]) / 2)
            assert ("difference" in r) == (r["arm"] != "control")
        same = [r for r in found["accuracy"] + found["overlap"] if r["arm"] == "SwAV control"]
        assert all(r["difference"]["low"] == r["difference"]["high"] == 0 for r in same)

    def test_accuracy_is_that_of_training(self, done: Path, found: dict[str, Any]) -> None:
        last = json.loads((places(done, "SwAV pairs", 4)[0] / "metrics.jsonl").read_text().splitlines()[-1])
        row = next(r for r in found["accuracy"] if (r["arm"], r["set"]) == ("SwAV pairs", "agreement"))
        assert row["seeds"][1] == pytest.approx(last["validation/agreement/accuracy"])

    def test_curves_span_the_seeds(self, done: Path, found: dict[str, Any]) -> None:
        (curve,) = [c for c in found["curves"] if (c["arm"], c["metric"]) == ("control", "train/contrastive_loss")]
        each = []
        for seed in (3, 4):
            lines = (places(done, "control", seed)[0] / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            each.append([r["train/contrastive_loss"] for r in rows if "train/contrastive_loss" in r])
        assert curve["steps"] == [1, 2, 3, 4]
        for p in range(4):
            pair = each[0][p], each[1][p]
            assert (curve["low"][p], curve["high"][p]) == (min(pair), max(pair))
            assert math.isclose(curve["mean"][p], sum(pair) / 2)

    def test_report(self, done: Path) -> None:
        page = (done / "report.html").read_text()
        for text in ("Contrastive learning", "Difference to “control”: accuracy", "Contrastive loss", "Features"):
            assert text in page
        features = json.loads((done / "examine" / "features.json").read_text())
        assert features["set"] == "relabelled"
        assert page.count("<image") == len(features["models"]) == 7


class TestResume:
    @pytest.mark.usefixtures("no_figures")
    def test_goes_on_where_it_stopped(
        self, tmp_path: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped after the third model: what is there is kept, and the findings are those of an unbroken run."""
        study = ContrastiveStudy(**TINY | {"arms": ARMS | {"SwAV control": {"method": "swav", "beta": 0}}})
        train, begun = study_module.train_reward, 0

        def stopping(*args: Any, **kwargs: Any) -> dict[str, Any]:
            nonlocal begun
            begun += 1
            if begun == 4:
                raise KeyboardInterrupt
            return train(*args, **kwargs)

        monkeypatch.setattr(study_module, "train_reward", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_contrastive(study, tmp_path / "out")
        kept = (tmp_path / "out" / "examined" / "plain" / "seed-3.json").stat().st_mtime_ns
        times = json.loads((tmp_path / "out" / "stages.json").read_text())
        with pytest.raises(InputError, match="--resume"):
            run_contrastive(study, tmp_path / "out")
        again = run_contrastive(study, tmp_path / "out", resume=True)
        assert (tmp_path / "out" / "examined" / "plain" / "seed-3.json").stat().st_mtime_ns == kept
        assert again == found
        assert times[-1]["name"] == "reward models"
        rest = json.loads((tmp_path / "out" / "stages.json").read_text())[len(times) - 1]
        assert rest["seconds"] > times[-1]["seconds"] > 0
        assert rest["note"] == ""

    @pytest.mark.usefixtures("no_figures")
    def test_gets_another_seed_and_trains_only_that(self, tmp_path: Path) -> None:
        study = ContrastiveStudy(**TINY | {"arms": {"plain": {}, "control": ARMS["control"]}, "seeds": [3]})
        run_contrastive(study, tmp_path)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("examined/*/*.json")}
        again = run_contrastive(study.model_copy(update={"seeds": (3, 9)}), tmp_path, resume=True)
        assert again["seeds"] == [3, 9]
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert len(list(tmp_path.glob("examined/*/*.json"))) == 2 * len(before) == 4
        pictures = [json.loads((tmp_path / "examine" / "features.json").read_text())["models"]]
        for seeds in ((9, 3), (9,)):  # Of the first seed, also where it was not the first one at its examination.
            run_contrastive(study.model_copy(update={"seeds": seeds}), tmp_path, resume=True)
            pictures.append(json.loads((tmp_path / "examine" / "features.json").read_text())["models"])
        assert pictures[0] != pictures[1] == pictures[2]

    @pytest.mark.usefixtures("no_figures")
    def test_gets_another_arm_and_trains_only_that(self, tmp_path: Path) -> None:
        study = ContrastiveStudy(**TINY | {"arms": {"control": ARMS["control"]}, "seeds": [3]})
        run_contrastive(study, tmp_path)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("examined/*/*.json")}
        again = run_contrastive(
            study.model_copy(update={"arms": {"control": ARMS["control"], "plain": {}}}), tmp_path, resume=True
        )
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert len(list(tmp_path.glob("examined/*/*.json"))) == 2 * len(before) == 2
        assert {row["arm"] for row in again["accuracy"]} == {"control", "plain"}
        note = json.loads((tmp_path / "summary.json").read_text())["tables"][0]["note"]
        assert note.startswith("95 % intervals over pairs alone (there is one seed;")

    def test_refuses_other_settings(self, done: Path) -> None:
        with pytest.raises(InputError, match="other settings of world_seed"):
            run_contrastive(ContrastiveStudy(**TINY | {"world_seed": 9}), done, resume=True)

    def test_a_default_that_is_written_out_is_no_other_setting(self, done: Path) -> None:
        stored = yaml.safe_load((done / "study.yaml").read_text())
        for spelled in ({"world_seed": 0}, {"features": {"drawn": 8, "folds": 5}}):
            StudyFolder(done, ContrastiveStudy(**stored | spelled), resume=True, command="").__exit__()
        with pytest.raises(InputError, match="other settings of features "):
            StudyFolder(done, ContrastiveStudy(**stored | {"features": {"folds": 4}}), resume=True, command="")


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"control": "none"}, "control must be one of the arms"),
            ({"seeds": [1, 1]}, "seeds must differ"),
            ({"arms": {"control": {}, "a": {"method": "simcse", "prototypes": 3}}}, "arms.a: reward.contrastive"),
            ({"arms": {"control": {}, "a": {"method": "other"}}}, "arms.a: reward.contrastive.method"),
            ({"reward": {"seed": 1}}, "seed is the study's own"),
            ({"reward": {"contrastive": {"method": "simcse"}}}, "contrastive is the study's own"),
            ({"reward": {"batch": 1}}, "batch: no such setting"),
            ({"world": None, "data": {"preferences": "x"}}, "data.validation"),
            ({"features_set": "none"}, "features_set must be one of"),
            ({"world": TINY["world"] | {"validation": 3}}, "needs at least 4 usable pairs"),
        ],
    )
    def test_names_the_field(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            run_contrastive(ContrastiveStudy(**TINY | changes), tmp_path / "out")
        assert not (tmp_path / "out" / "study.yaml").exists()
        assert not (tmp_path / "out" / "sft").exists()

    def test_the_world_of_a_refused_run_is_not_taken_for_the_mended_one(self, tmp_path: Path) -> None:
        arms: dict[str, Any] = {"arms": {"control": {}}, "seeds": [3]}
        with pytest.raises(InputError, match="needs at least 4 usable pairs"):
            run_contrastive(ContrastiveStudy(**TINY | arms | {"world": TINY["world"] | {"validation": 3}}), tmp_path)
        with pytest.raises(InputError, match=r"data: holds the world of other settings.*; remove that folder"):
            run_contrastive(ContrastiveStudy(**TINY | arms), tmp_path)
        shutil.rmtree(tmp_path / "data")
        found = run_contrastive(ContrastiveStudy(**TINY | arms), tmp_path)
        assert found["accuracy"][0]["n"] == 16

    def test_single_settings_are_changed_on_the_command_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(TINY))
        study = ["study", "contrastive"]
        args = [str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--set", "reward.batch_size=0"]
        assert main([*study, *args]) == 2
        assert "reward.batch_size: must be at least 1, got 0" in capsys.readouterr().err
        assert main(study) == 2
        assert "name the study" in capsys.readouterr().err
        assert main([*study, *args[:-1], "controll=plain"]) == 2
        assert "study.yaml: controll: no such setting" in capsys.readouterr().err

    def test_a_file_in_the_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="must be a folder"):
            StudyFolder(tmp_path / "file", ContrastiveStudy(**TINY), resume=False, command="")

    def test_a_folder_in_which_another_process_works(self, tmp_path: Path) -> None:
        study = ContrastiveStudy(**TINY)
        with (
            StudyFolder(tmp_path, study, resume=False, command=""),
            pytest.raises(InputError, match=f"one process at a time, but process {os.getpid()} has it open"),
        ):
            run_contrastive(study, tmp_path, resume=True)
        StudyFolder(tmp_path, study, resume=True, command="").__exit__()  # It was given back.


def test_the_study_files_of_the_repository_are_valid() -> None:
    for path in sorted((Path(__file__).parents[1] / "recipes" / "reward-study").glob("contrastive*.yaml")):
        settings = yaml.safe_load(path.read_text())
        if "data" in settings:  # Files are named on the command line.
            settings["data"] |= {"preferences": "x", "validation": "y"}
        study = ContrastiveStudy(**settings)
        assert len(study.seeds) >= 2
        for arm in study.arms:
            assert reward_config(study, arm, 0, data="", model="", validation={}).batch_size == 16


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    rows = [{"step": s, "train/loss": float(s), "other": 0.0} for s in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (curve,) = mean_curves({"a": [tmp_path]}, lambda m: m == "train/loss")
    assert len(curve["steps"]) <= 150
    assert curve["steps"] == curve["mean"] == curve["low"]
