"""`study metarm` in tiny: controls that differ only in what they claim, choices against the truth, spread, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from steelyard.cli import main
from steelyard.errors import InputError
from steelyard.evaluate.spread import (
    BINS,
    SPREADS,
    histograms,
    in_units,
    pair_differences,
    read_responses,
    true_choices,
)
from steelyard.simulate.world import gold
from steelyard.stages import GOLD
from steelyard.study.arms import places
from steelyard.study.metarm import MetaRMStudy, arms, config_of, run_metarm
from steelyard.train.metarm import MetaRMConfig

OPTIM = {"lr": 3e-3}
DRAWN = {"max_new_tokens": 6}
TINY: dict[str, Any] = {
    "name": "Tiny",
    "seeds": [3, 4],
    "world": {"sft": 24, "preferences": 32, "validation": 12, "rl_prompts": 8, "eval_prompts": 6},
    "sft": {
        "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 192}, "batch_size": 8, "max_length": 160,
        "optim": OPTIM,
    },
    "ppo": {
        "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "max_length": 160, "sampling": DRAWN,
        "actor": {"lr": 1e-2}, "critic": {"lr": 1e-2},
    },
    "reward": {"batch_size": 8, "max_length": 160, "optim": OPTIM, "log_every": 1, "eval_every": None},
    "meta": {"meta_batch_size": 4},
    "k": 3,
    "sampling": DRAWN,
    "etas": [0.05, 0.5],
    "control_etas": [0.5],
    "workers": 1,
}  # fmt: skip
ARMS = ["plain", "eta = 0", "MetaRM, eta 0.05", "MetaRM, eta 0.5", "random, eta 0.5", "unshifted, eta 0.5"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    root = tmp_path_factory.mktemp("metarm-study")
    (root / "study.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    assert main(["study", "metarm", str(root / "study.yaml"), "--out", str(root / "out")]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def found(done: Path) -> dict[str, Any]:
    return json.loads((done / "study.json").read_text())


def weights(done: Path, arm: str) -> bytes:
    return (places(done, arm, 3)[0] / "model" / "model.safetensors").read_bytes()


class TestArms:
    def test_the_grid_and_its_controls(self) -> None:
        assert [a.name for a in arms(MetaRMStudy(**TINY))] == ARMS
        every = arms(MetaRMStudy(**TINY | {"control_etas": None}))
        assert sum(a.direction == "random" for a in every) == sum(a.meta == "SFT policy" for a in every) == 2

    def test_differ_only_in_what_they_claim(self, done: Path) -> None:
        config = {a: json.loads((places(done, a, 3)[0] / "config.json").read_text()) for a in ARMS}
        base = config["MetaRM, eta 0.5"]

        def differing(arm: str) -> set[str]:
            return {key for key in base if base[key] != config[arm][key]}

        assert differing("eta = 0") == differing("MetaRM, eta 0.05") == {"eta"}
        assert differing("random, eta 0.5") == {"direction"}
        assert differing("unshifted, eta 0.5") == {"meta"}
        shared = config["plain"].keys() & base.keys()
        assert {"batch_size", "data", "epochs", "max_length", "model", "optim", "seed", "validation"} <= shared
        assert all(config["plain"][key] == base[key] for key in shared)

    def test_eta_0_is_plain_training_bit_for_bit(self, done: Path) -> None:
        assert weights(done, "plain") == weights(done, "eta = 0")
        assert len({weights(done, arm) for arm in ARMS}) == len(ARMS) - 1

    def test_the_policy_was_paid_by_another_reward_model(self, done: Path) -> None:
        assert json.loads((done / "rm" / "of the shift" / "config.json").read_text())["seed"] == 1_000_000
        paid_by = json.loads((done / "ppo" / "shifted" / "config.json").read_text())["reward_model"]
        assert paid_by == str(done / "rm" / "of the shift" / "model")
        moved, start = (done / "ppo" / "shifted" / "model", done / "sft" / "model")
        assert (moved / "model.safetensors").read_bytes() != (start / "model.safetensors").read_bytes()

    def test_no_prompt_of_the_meta_set_is_held_out(self, done: Path) -> None:
        config = MetaRMConfig(**json.loads((places(done, ARMS[3], 3)[0] / "config.json").read_text()))
        assert config.meta_validation is not None
        trained, held_out = (set(read_responses(p, GOLD).prompts) for p in (config.meta, config.meta_validation))
        assert (len(trained), len(held_out), len(trained & held_out)) == (8, 6, 0)


class TestFindings:
    def test_every_arm_and_set(self, found: dict[str, Any]) -> None:
        sets = {"original", "relabelled", "agreement", "shifted policy", "SFT policy"}
        assert {(r["set"], r["arm"]) for r in found["accuracy"]} == {(s, a) for s in sets for a in ARMS}
        places_ = {(r["set"], r["measure"], r["arm"]) for r in found["spread"]}
        assert places_ == {(s, u, a) for s in ("shifted policy", "SFT policy") for u in SPREADS for a in ARMS}
        for r in found["accuracy"] + found["spread"]:
            assert len(r["seeds"]) == 2
            if r["arm"] == "plain":
                assert r["difference"]["low"] == r["difference"]["high"] == 0

    def test_choices_are_judged_by_gold(self, done: Path, found: dict[str, Any]) -> None:
        """Recomputed from the stored rewards and the text of the responses, one pair at a time."""
        config = json.loads((places(done, ARMS[2], 3)[0] / "config.json").read_text())
        read = read_responses(config["meta_validation"], GOLD)
        examined = json.loads(places(done, ARMS[2], 3)[1].read_text())
        rewards = examined["rewards"]["shifted policy"]
        import pyarrow.parquet as pq

        texts = pq.read_table(config["meta_validation"])["response"].to_pylist()
        points = []
        for n, prompt in enumerate(read.prompts):
            for i in range(3):
                for j in range(i + 1, 3):
                    truth = gold(prompt, texts[3 * n + i]) - gold(prompt, texts[3 * n + j])
                    margin = rewards[n][i] - rewards[n][j]
                    if truth:
                        points.append(0.5 if margin == 0 else float((margin > 0) == (truth > 0)))
        row = next(r for r in found["accuracy"] if (r["arm"], r["set"]) == (ARMS[2], "shifted policy"))
        assert row["n"] == len(points)
        assert row["seeds"][0] == pytest.approx(np.mean(points))

    def test_report(self, done: Path) -> None:
        page = (done / "report.html").read_text()
        for text in ("MetaRM", "How far the policy has moved", "Reward differences, responses of the shifted policy",
                     "Difference to “eta = 0”: accuracy", "Norm of the meta gradient"):  # fmt: skip
            assert text in page

    def test_a_finished_study_is_left_alone(self, done: Path, found: dict[str, Any]) -> None:
        before = places(done, "plain", 3)[1].stat().st_mtime_ns
        again = run_metarm(MetaRMStudy(**TINY), done, resume=True)
        assert again == found
        assert places(done, "plain", 3)[1].stat().st_mtime_ns == before

    @pytest.mark.usefixtures("no_figures")
    def test_a_given_policy_needs_no_ppo(self, tmp_path: Path, done: Path, found: dict[str, Any]) -> None:
        study = {k: v for k, v in TINY.items() if k != "ppo"}
        study |= {"policy": str(done / "ppo" / "shifted" / "model"), "seeds": [3], "etas": [0.5]}
        again = run_metarm(MetaRMStudy(**study), tmp_path / "out")
        assert not (tmp_path / "out" / "ppo").exists()
        for kind in ("accuracy", "spread"):
            new = {(r["set"], r["measure"], r["arm"]): r["seeds"][0] for r in again[kind]}
            old = {(r["set"], r["measure"], r["arm"]): r["seeds"][0] for r in found[kind]}
            assert new == {key: old[key] for key in new}


@pytest.fixture(scope="module")
def own(done: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("metarm-files")
    shared = {k: v for k, v in TINY.items() if k not in ("world", "sft", "seeds", "etas", "control_etas")}
    rows = [json.loads(line) for line in (done / "data" / "validation.jsonl").read_text().splitlines()]
    texts = [row["chosen"] for row in rows]
    held_out = [
        {"prompt": rows[p]["prompt"], "chosen": texts[3 * p + i], "rejected": texts[3 * p + j]}
        for p in (0, 1)
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    (root / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    data = {"preferences": str(done / "data" / "preferences.jsonl"), "validation": str(root / "held-out.jsonl")}
    study = shared | {"data": data, "model": str(done / "sft" / "model"), "seeds": [3], "etas": [0.5]}
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    assert main(["study", "metarm", str(root / "study.yaml"), "--out", str(root / "out")]) == 0
    return root / "out", json.loads((root / "out" / "study.json").read_text())


class TestFiles:
    """The same with files of one's own: nobody knows which of two sampled responses is better."""

    def test_choices_are_judged_on_held_out_pairs_alone(self, own: tuple[Path, dict[str, Any]]) -> None:
        _, found = own
        assert {r["set"] for r in found["accuracy"]} == {"original"}
        assert {r["set"] for r in found["spread"]} == {"shifted policy", "SFT policy"}
        assert [row["gold"] for row in found["policies"]] == [None, None]

    def test_the_policy_moves_on_the_training_prompts(self, own: tuple[Path, dict[str, Any]], done: Path) -> None:
        out, found = own
        config = json.loads((out / "ppo" / "shifted" / "config.json").read_text())
        assert config["gold"] is None
        assert found["policies"][0]["kl"] is not None
        settings = json.loads((places(out, "MetaRM, eta 0.5", 3)[0] / "config.json").read_text())
        asked = {json.loads(line)["prompt"] for line in (done / "data" / "preferences.jsonl").read_text().splitlines()}
        assert set(read_responses(settings["meta"], None).prompts) == asked

    def test_pairs_that_share_responses_are_drawn_by_response(self, own: tuple[Path, dict[str, Any]]) -> None:
        _, found = own
        assert {(r["n"], r["clusters"], r["unit"]) for r in found["accuracy"]} == {(6, 6, "responses")}

    def test_the_report_has_no_empty_gold(self, own: tuple[Path, dict[str, Any]]) -> None:
        out, _ = own
        table = json.loads((out / "summary.json").read_text())["tables"][0]
        assert table["columns"] == ["policy", "length", "ended", "kl"]
        assert [len(row) for row in table["rows"]] == [4, 4]
        assert "How far the policy has moved" in (out / "report.html").read_text()

    def test_intervals_over_few_units_are_called_too_narrow(self, own: tuple[Path, dict[str, Any]]) -> None:
        out, found = own
        notes = [table["note"] for table in json.loads((out / "summary.json").read_text())["tables"]]
        assert {r["clusters"] for r in found["spread"]} == {2}
        assert "as few as 6 of them" in notes[1]
        assert "as few as 2 of them" in notes[2]


class TestSpread:
    def test_choices_by_hand(self) -> None:
        gold_NK = np.array([[1.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
        rewards = np.array([[0.3, 0.3, 0.9], [5.0, 6.0, 7.0]])
        values, rows = true_choices(rewards, gold_NK)  # (1, 2) ties in reward, (1, 3) is wrong, the rest tie in gold
        assert (values.tolist(), rows) == ([0.5, 0.0], [0, 0])

    def test_units_by_hand(self) -> None:
        rewards = np.array([[0.0, 4.0], [1.0, 3.0]])  # range 4, mean 2, std sqrt(10 / 4)
        assert pair_differences(rewards).tolist() == [[4.0], [2.0]]
        assert in_units(rewards, "range", 9.0).tolist() == [[1.0], [0.5]]
        assert in_units(rewards, "std", 9.0) == pytest.approx(np.array([[4.0], [2.0]]) / np.sqrt(2.5))
        assert in_units(rewards, "training std", 2.0).tolist() == [[2.0], [1.0]]

    @pytest.mark.parametrize("unit", SPREADS)
    def test_no_scale_and_no_offset_can_game_it(self, unit: str) -> None:
        rewards = np.random.default_rng(0).normal(size=(40, 5))
        once, scaled = in_units(rewards, unit, 0.7), in_units(30 * rewards - 8, unit, 30 * 0.7)
        np.testing.assert_allclose(once, scaled, rtol=1e-9, atol=1e-12)

    def test_equal_rewards_have_no_spread(self) -> None:
        for unit in SPREADS:
            assert not in_units(np.full((3, 2), 0.7), unit, 0.0).any()

    def test_histograms_are_shares_of_all_seeds(self) -> None:
        flat = {"rewards": {"s": [[0.0, 0.0], [1.0, 1.0]]}, "training_std": 1.0}
        wide = {"rewards": {"s": [[0.0, 1.0], [1.0, 0.0]]}, "training_std": 0.1}
        rows = {h["unit"]: h for h in histograms({"a": [flat, wide]}, "s")}
        for h in rows.values():
            assert len(h["shares"]) == BINS
            assert sum(h["shares"]) == pytest.approx(1)
            assert (h["shares"][0], h["n"]) == (0.5, 4)
        assert rows["range"]["edges"][-1] == 1
        assert rows["range"]["shares"][-1] == 0.5
        assert rows["std"]["shares"][BINS // 2] == 0.5  # 1 / 0.5 = 2 of 4
        assert rows["training std"]["shares"][-1] == 0.5  # 10, beyond the end
        assert rows["training std"]["mean"] == pytest.approx(5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"reward": {"contrastive": {}}}, "contrastive: the study decides"),
            ({"meta": {"eta": 1}}, "eta: the study decides"),
            ({"reward": {"trainable_layers": 1}}, "trainable_layers: no such setting"),
            ({"meta": {"meta_batch": 1}}, "meta_batch: no such setting"),
            ({"ppo": {"stepz": 1}}, "ppo.stepz: no such setting"),
            ({"ppo": {"gold": "x"}}, "ppo: gold is filled in"),
            ({"seeds": [2, 2]}, "seeds must differ"),
            ({"world": None}, "either `world`"),
            ({"world": None, "data": {"preferences": "x"}}, "data.validation: the study compares"),
        ],
    )
    def test_names_the_field(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            run_metarm(MetaRMStudy(**TINY | changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"etas": [0.0]}, "etas: must be above 0"),
            ({"control_etas": [0.3]}, "control_etas: must be some of"),
            ({"policy": "x"}, "ppo: no effect"),
        ],
    )
    def test_names_contradictions(
        self, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(TINY | changes))
        assert main(["study", "metarm", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metarm.yaml", "metarm-ukp.yaml"])
def test_the_study_files_of_the_repository_are_valid(name: str) -> None:
    path = Path(__file__).parents[1] / "recipes" / "reward-study" / name
    read = yaml.safe_load(path.read_text())
    read.get("data", {}).update(preferences="named on the command line")
    study = MetaRMStudy(**read)
    assert len(study.seeds) >= 3
    for arm in arms(study):
        config_of(study, arm, 0, data="", model="", validation={}, responses={})
