"""`steelyard iterate` and `study rounds` in tiny: arms differ in what they claim, figures repeat what runs left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from steelyard import iterate
from steelyard.cli import main
from steelyard.errors import InputError
from steelyard.parallel import JobError
from steelyard.ppo_settings import PPOConfig
from steelyard.rounds_settings import check_settings
from steelyard.stages import GOLD
from steelyard.study.rounds import RoundsStudy, places, rounds_config, run_rounds_study

OPTIM = {"lr": 3e-3}
DRAWN = {"max_new_tokens": 6}
ARMS = ("MetaRM", "plain reward model", "fixed reward model")
TINY: dict[str, Any] = {
    "name": "Tiny",
    "seeds": [3, 4],
    "world": {"sft": 24, "preferences": 32, "validation": 12, "rl_prompts": 8, "eval_prompts": 6},
    "sft": {
        "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 192}, "batch_size": 8, "max_length": 160,
        "optim": OPTIM,
    },
    "reward": {"batch_size": 8, "max_length": 160, "optim": OPTIM, "log_every": 1, "eval_every": None},
    "iterate": {
        "rounds": 2,
        "rm": {"batch_size": 8, "max_length": 160, "optim": OPTIM, "log_every": 1, "eval_every": None},
        "meta": {"eta": 0.5, "meta_batch_size": 4},
        "meta_sample": {"k": 3},
        "ppo": {
            "reward": "plain", "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "max_length": 160,
            "sampling": DRAWN, "actor": {"lr": 1e-2}, "critic": {"lr": 1e-2},
        },
        "evaluate": {"k": 2, "sampling": DRAWN},
    },
    "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    root = tmp_path_factory.mktemp("rounds-study")
    (root / "study.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    assert main(["study", "rounds", str(root / "study.yaml"), "--out", str(root / "out")]) == 0
    return root / "out"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_recipe_has_no_contradiction() -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "policy-study" / "rounds.yaml"
    study = RoundsStudy(**yaml.safe_load(recipe.read_text()))
    kinds = set()
    for arm in study.arms:
        config = rounds_config(study, arm, 0, model="", first="", files=None)
        check_settings(config)
        kinds.add(config.reward)
    assert kinds == {"metarm", "plain", "fixed"}


@pytest.mark.usefixtures("no_figures")
def test_a_seed_with_a_failed_run_is_left_out_by_name(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = iterate.train_ppo

    def guarded(config: PPOConfig, out: Path, **how: Any) -> Any:
        if "MetaRM/seed-3/round-02" in str(out):
            raise FloatingPointError("the policy has left")
        return honest(config, out, **how)

    monkeypatch.setattr(iterate, "train_ppo", guarded)
    study = RoundsStudy(**TINY | {"arms": {"MetaRM": {"reward": "metarm"}, "plain reward model": {"reward": "plain"}}})
    found = run_rounds_study(study, tmp_path / "out")
    assert found["failed"] == [{"arm": "MetaRM", "seed": 3, "error": "round 2 failed: the policy has left"}]
    assert found["seeds"] == [4]
    assert {t["seed"] for t in found["turns"]} == {4}
    assert all(len(row["seeds"]) == 1 for row in found["rows"])
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Runs that failed" in page
    assert "round 2 failed: the policy has left" in page
    with pytest.raises(InputError, match="in every seed a run failed, so nothing can be compared"):
        run_rounds_study(study.model_copy(update={"seeds": (3,)}), tmp_path / "out", resume=True)


class TestStudy:
    def test_arms_share_all_but_what_becomes_of_the_reward_model(self, done: Path) -> None:
        configs = {a: read(places(done, a, 3) / "config.json") for a in ARMS}
        base = configs["plain reward model"]

        def differing(arm: str) -> set[str]:
            return {key for key in base if base[key] != configs[arm][key]}

        assert differing("MetaRM") == {"reward", "meta", "meta_sample"}
        assert differing("fixed reward model") == {"reward", "data", "rm"}
        assert base["reward_model"] == str(done / "first" / "seed-3" / "model")
        assert (base["gold"], base["patience"], base["seed"]) == (GOLD, None, 3)
        start = [read(places(done, a, 3) / "round-00" / "examine" / "round.json")["values"] for a in ARMS]
        assert start[0] == start[1] == start[2]

    def test_gold_by_round_and_of_the_kept_round(self, done: Path) -> None:
        found = read(done / "study.json")
        rows = {(r["set"], r["arm"]): r for r in found["rows"]}
        assert rows.keys() == {(s, a) for s in ("round 1", "round 2", "the round kept") for a in ARMS}
        turns = {(t["arm"], t["seed"]): t for t in found["turns"]}
        for arm in ARMS:
            for place, seed in enumerate((3, 4)):
                gold = [
                    np.array(read(places(done, arm, seed) / f"round-0{n}" / "examine" / "round.json")["values"]["gold"])
                    for n in range(3)
                ]
                assert rows["round 2", arm]["seeds"][place] == pytest.approx(gold[2].mean())
                best = int(np.argmax([g[::2].mean() for g in gold]))
                assert turns[arm, seed]["best"] == best
                assert rows["the round kept", arm]["seeds"][place] == pytest.approx(gold[best][1::2].mean())
                assert turns[arm, seed]["gain"] == pytest.approx((gold[best] - gold[0])[1::2].mean())

    def test_curves_join_the_rounds(self, done: Path) -> None:
        found = read(done / "study.json")
        by_step = {(c["arm"], c["metric"]): c for c in found["by_step"]}
        course = by_step["MetaRM", "ppo/kl_plain"]
        logged = [
            [
                json.loads(line)["ppo/kl_plain"]
                for n in (1, 2)
                for line in (places(done, "MetaRM", s) / f"round-0{n}/ppo/metrics.jsonl").read_text().splitlines()
            ]
            for s in (3, 4)
        ]
        assert course["steps"] == [1, 2, 3, 4]
        np.testing.assert_allclose(course["mean"], np.mean(logged, 0))
        by_round = {(c["arm"], c["metric"]): c for c in found["by_round"]}
        assert by_round["MetaRM", "gold"]["steps"] == [0, 1, 2]
        assert {m for _, m in by_round} >= {"gold", "first", "current", "kl", "accuracy/original"}

    def test_the_report_shows_it(self, done: Path) -> None:
        page = (done / "report.html").read_text()
        assert "Rounds, arm by arm" in page
        assert "Accuracy: relabelled" in page
        assert "Difference to “plain reward model”" in page

    def test_resumed_it_repeats_its_findings(self, done: Path) -> None:
        before = (done / "study.json").read_bytes()
        study = RoundsStudy(**TINY)
        run_rounds_study(study, done, resume=True)
        assert (done / "study.json").read_bytes() == before

    @pytest.mark.parametrize(
        ("own", "said"),
        [
            ({"arms": {"x": {}}}, "control must be one of the arms"),
            ({"iterate": {"ppo": {"reward": "plain", "steps": -1}}}, "ppo.steps: must be at least 1"),
            ({"reward": {"lr": 1}}, "reward.lr: no such setting"),
        ],
    )
    def test_contradictions_are_refused_before_anything_runs(
        self, own: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=said):
            run_rounds_study(RoundsStudy(**TINY | own), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.usefixtures("no_figures")
    def test_judges_may_be_asked_later_which_rounds_they_would_keep(self, done: Path) -> None:
        out, plain = done, (done / "study.json").read_bytes()
        before = json.loads(plain)
        assert (before["choices"], before["kept"]) == ([], [])
        run_rounds_study(RoundsStudy(**TINY | {"judge_pairs": 32}), out, resume=True)
        found = read(out / "study.json")
        assert {k: v for k, v in found.items() if k not in ("choices", "kept")} == {
            k: v for k, v in before.items() if k not in ("choices", "kept")
        }
        held_out = {
            json.loads(line)["prompt"] for line in (out / "data" / "eval_prompts.jsonl").read_text().splitlines()
        }
        for seed in (3, 4):
            file = out / "judges" / f"pairs-32-{seed}.jsonl"
            pairs = [json.loads(line) for line in file.read_text().splitlines()]
            assert held_out.isdisjoint(p["prompt"] for p in pairs)
            trained = read(out / "judges" / f"seed-{seed}" / "config.json")
            assert (trained["data"], trained["seed"]) == (str(out / "judges" / f"pairs-32-{seed}.jsonl"), seed)
        rules = {(k["rule"], k["arm"], k["seed"]): k for k in found["kept"]}
        rows = {row["arm"]: row for row in found["choices"]}
        folder = places(out, "MetaRM", 3)
        gold = [np.array(read(folder / f"round-0{n}" / "examine" / "round.json")["values"]["gold"]) for n in range(3)]
        judge = [np.array(read(folder / f"round-0{n}" / "examine" / "judge.json")["judge"]) for n in range(3)]
        best = int(np.argmax([j[::2].mean() for j in judge]))
        one = rules["judge: best", "MetaRM", 3]
        assert (one["round"], one["gold"]) == (best, pytest.approx(gold[best][1::2].mean()))
        kl = [np.array(read(folder / f"round-0{n}" / "examine" / "round.json")["values"]["kl"]) for n in range(3)]
        dear = int(np.argmax([(j - 0.1 * nats)[::2].mean() for j, nats in zip(judge, kl, strict=True)]))
        assert rules["judge less 0.1 a nat: best", "MetaRM", 3]["round"] == dear
        assert rules["last round", "MetaRM", 3]["gold"] == pytest.approx(gold[2][1::2].mean())
        assert all(rules["judge: earliest", a, s]["round"] <= rules["judge: best", a, s]["round"]
                   for a in ARMS for s in (3, 4))  # fmt: skip
        first = [np.array(read(folder / f"round-0{n}" / "examine" / "round.json")["values"]["first"]) for n in range(3)]
        best = int(np.argmax([x[::2].mean() for x in first]))
        assert rules["first reward model: best", "MetaRM", 3]["round"] == best
        dear = int(np.argmax([(x - 0.1 * nats)[::2].mean() for x, nats in zip(first, kl, strict=True)]))
        assert rules["first reward model less 0.1 a nat: best", "MetaRM", 3]["round"] == dear
        assert rules["first reward model: earliest", "MetaRM", 3]["round"] <= best
        assert [rules[name, "MetaRM", 3]["round"] for name in ("round 1", "last round")] == [1, 2]
        assert "round 2" not in rows, "the last round has a name of its own"
        over_arms = np.mean([rules["last round", arm, 4]["gold"] for arm in ARMS])
        assert rows["last round"]["seeds"][1] == pytest.approx(over_arms)
        assert rows["last round"]["difference"]["seeds"][1] == pytest.approx(
            over_arms - np.mean([rules["judge: best", arm, 4]["gold"] for arm in ARMS])
        )
        assert main(["report", str(out)]) == 0
        assert "Rounds that each rule keeps (gold)" in (out / "report.html").read_text()
        run_rounds_study(RoundsStudy(**TINY), out, resume=True)
        assert (out / "study.json").read_bytes() == plain

    def test_a_judge_does_not_read_answers_other_than_those_examined(self, done: Path) -> None:
        folder = places(done, "MetaRM", 4) / "round-01" / "examine"
        honest = (folder / "round.json").read_text()
        changed = json.loads(honest)
        changed["values"]["gold"][0][0] += 1.0
        (folder / "judge.json").unlink(missing_ok=True)
        try:
            (folder / "round.json").write_text(json.dumps(changed))
            with pytest.raises(JobError, match="its answers cannot be drawn again"):
                run_rounds_study(RoundsStudy(**TINY | {"judge_pairs": 32}), done, resume=True)
        finally:
            (folder / "round.json").write_text(honest)
        run_rounds_study(RoundsStudy(**TINY), done, resume=True)

    def test_a_price_of_kl_needs_answers_of_the_policy_as_it_is(self, tmp_path: Path) -> None:
        bent = TINY["iterate"] | {"evaluate": {"k": 2, "sampling": DRAWN | {"top_p": 0.9}}}
        with pytest.raises(InputError, match=r"^arms\.MetaRM: kl_price: the examination's answers must be drawn"):
            run_rounds_study(RoundsStudy(**TINY | {"iterate": bent, "judge_pairs": 32}), tmp_path / "out")

    def test_prices_are_idle_without_a_judge(self) -> None:
        with pytest.raises(ValueError, match="judge_kl_prices: no effect without judge_pairs"):
            RoundsStudy(**TINY | {"judge_kl_prices": [0.1]})

    def test_one_judge_at_a_time(self) -> None:
        with pytest.raises(ValueError, match="judge is the study's own with judge_pairs"):
            RoundsStudy(**TINY | {"judge_pairs": 32, "arms": {"x": {"judge": "folder"}}})

    @pytest.mark.parametrize("own", [{"iterate": {"patience": 2}}, {"arms": {"x": {"rounds": 3}}}])
    def test_all_arms_go_through_the_same_rounds(self, own: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="is the study's own"):
            RoundsStudy(**TINY | own)


def test_iterate_from_a_file_leaves_a_report(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read(places(done, "MetaRM", 3) / "config.json")
    given = {k: v for k, v in config.items() if v not in (None, {}) and k != "baselines"}
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(given))
    args = ["iterate", str(tmp_path / "rounds.yaml"), "--out", str(tmp_path / "out"), "--set", "rounds=1"]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "round 0: gold" in said
    assert "0 (SFT)" in said
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("PPO in each round", "Fig. 17", "By round", "Kept: round", "Set: the policy"):
        assert words in page
    assert main(args) == 2
    assert "--resume" in capsys.readouterr().err
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")}
    assert main([*args, "--resume"]) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")} == before
