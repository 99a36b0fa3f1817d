"""Whole recipes through the command line, in tiny: every stage, resumed, interrupted, on a world and on files."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from conftest import Folders
from steelyard.cli import main
from steelyard.denoise import RepairOptions
from steelyard.errors import InputError
from steelyard.evaluate.answers import read_folder
from steelyard.recipe import Recipe, arm_reward, arms_by, check, dpo_config, evaluation_length, ppo_config
from steelyard.run_dir import RunDir, acquire
from steelyard.stages import GOLD
from steelyard.summary import Stages

OPTIM = {"lr": 3e-3}
TINY: dict[str, Any] = {
    "name": "Tiny",
    "world": {"sft": 24, "preferences": 32, "validation": 12, "rl_prompts": 8, "eval_prompts": 4},
    "sft": {
        "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 192}, "batch_size": 8, "max_length": 160,
        "optim": OPTIM, "save_every": 2, "log_every": 1,
    },
    "strength": {
        "backend": "full", "members": 2, "folds": 2, "workers": 1, "max_length": 160,
        "member": {"batch_size": 8, "optim": OPTIM},
    },
    "scorings": ["in-sample", "out-of-fold"],
    "repair": {"plain": {"recipe": "keep"}, "flip+margin": {"recipe": "flip+margin"},
               "oracle flip": {"recipe": "oracle flip"}},
    "reward": {"batch_size": 8, "max_length": 160, "optim": OPTIM, "save_every": 2, "log_every": 1},
    "policy": {
        "baselines": {"k": 2, "max_length": 160, "sampling": {"max_new_tokens": 6}},
        "ppo": {
            "steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "max_length": 160, "save_every": 1,
            "sampling": {"max_new_tokens": 6}, "actor": {"lr": 1e-3}, "critic": {"lr": 1e-3}, "scale_warmup": 8,
        },
        "dpo": {"batch_size": 8, "max_length": 160, "optim": OPTIM, "eval_every": 2, "answers": 4, "log_every": 1,
                "save_every": 1, "sampling": {"max_new_tokens": 6}},
        "arms": {"plain PPO": {"reward": "plain"}, "contrastive PPO": {"rm": "flip+margin"},
                 "DPO": {"method": "dpo", "data": "flip+margin", "beta": 0.2}},
        "evaluate": {"k": 1, "sampling": {"max_new_tokens": 6}},
    },
    "workers": 1,
}  # fmt: skip
STAGES = [
    "data", "SFT", "strength, in-sample", "strength, out-of-fold", "repair", "reward models", "examination",
    "baselines", "PPO", "DPO", "policy evaluation",
]  # fmt: skip
TIMED = {"timings.jsonl", "cost.json", "stages.json", "summary.json", "run.json", "report.html", "recipe.yaml"}


DPO = {"method": "dpo"}
JUDGE = {"url": "http://localhost:1/v1", "model": "wise"}


@contextmanager
def at_event(hook: Callable[[int], None]) -> Iterator[None]:
    """Call `hook(n)` before the n-th line or renamed file: the moments at which a run leaves something behind."""
    places: list[tuple[Any, str]] = [(os, "replace"), (RunDir, "_append")]
    before = [getattr(owner, name) for owner, name in places]
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            hook(count - 1)
            return original(*args, **kwargs)

        return wrapper

    for (owner, name), original in zip(places, before, strict=True):
        setattr(owner, name, counted(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, before, strict=True):
            setattr(owner, name, original)


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """`steelyard run recipe.yaml --out run` in the folder: relative paths, so that two runs leave the same bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    monkeypatch.chdir(folder)
    return main(["run", "recipe.yaml", "--out", "run", *more])


def results(out: Path) -> dict[str, bytes]:
    """Everything a run leaves but times; a strength's result.json without its seconds."""
    found = {}
    for path in sorted(out.rglob("*")):
        kept = path.is_file() and path.name not in TIMED and not path.name.startswith(".")
        if not kept or "checkpoints" in path.parts or path.suffix == ".npz":
            continue
        content = path.read_bytes()
        if path.name == "result.json" and "strength" in path.parts:
            content = json.dumps(json.loads(content) | {"seconds": 0}).encode()
        found[str(path.relative_to(out))] = content
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, int]:
    """An uninterrupted run, and how many events it had."""
    folder = tmp_path_factory.mktemp("whole")
    events: list[int] = []
    with pytest.MonkeyPatch.context() as patch, at_event(events.append):
        assert start(folder, patch) == 0
    return folder, len(events)


def test_every_stage_leaves_what_the_report_shows(whole: tuple[Path, int]) -> None:
    run = whole[0] / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert [s["name"] for s in summary["stages"]] == STAGES
    titles = [table["title"] for table in summary["tables"]]
    assert titles == [
        "Finding wrong labels, in-sample", "Finding wrong labels, out-of-fold",
        "Reward models: accuracy on held-out pairs", "Policies on held-out prompts", "Win / tie / lose by gold",
    ]  # fmt: skip
    assert [row[0] for row in summary["tables"][2]["rows"]] == ["plain", "flip+margin", "oracle flip"]
    assert [row[0] for row in summary["tables"][3]["rows"]] == ["SFT", "plain PPO", "contrastive PPO", "DPO"]
    page = (run / "report.html").read_text()
    assert "contrastive PPO" in page
    assert "Tiny" in page
    # The oracle turned exactly the labels that the world knows to be wrong.
    wrong = {r["id"] for r in map(json.loads, (run / "data/truth.jsonl").read_text().splitlines()) if r["wrong"]}
    turned = {r["id"] for r in map(json.loads, (run / "repair/oracle-flip.changes.jsonl").read_text().splitlines())}
    assert turned == wrong
    # What the PPO section says of contrastive rewards is for the contrastive arm alone.
    arms = ("plain PPO", "contrastive PPO")
    configs = {arm: json.loads((run / "ppo" / arm / "config.json").read_text()) for arm in arms}
    assert configs["contrastive PPO"]["scale_warmup"] == 8
    assert configs["contrastive PPO"]["reward_model"] == "run/rm/flip+margin/model"
    assert configs["plain PPO"]["baselines"] is None
    assert configs["plain PPO"]["actor"]["decay"] is False, "a rate of one's own must not bring the decay back"
    # DPO learns from the pairs of its repair arm, and is seen by the reward model of the same pairs.
    dpo = json.loads((run / "dpo" / "DPO" / "config.json").read_text())
    assert (dpo["data"], dpo["beta"], dpo["gold"]) == ("run/repair/flip+margin.jsonl", 0.2, GOLD)
    assert dpo["reward_model"] == "run/rm/flip+margin/model"
    found = json.loads((run / "evaluate" / "policy.json").read_text())
    assert [(w["a"], w["b"]) for w in found["wins"]][-1] == ("DPO", "contrastive PPO")
    points = {arm: [p["step"] for p in found["frontier"] if p["arm"] == arm] for arm in TINY["policy"]["arms"]}
    assert points == {"plain PPO": [1, 2, 3], "contrastive PPO": [1, 2, 3], "DPO": [2, 4]}
    assert all(p["gold"] is not None and p["proxy"] is not None for p in found["frontier"])
    assert "DPO, step by step" in page
    # What the policies said stays, for judges.
    answers = read_folder(run)
    assert list(answers) == ["SFT", *TINY["policy"]["arms"]]
    assert [len(held) for held in answers.values()] == [4] * 4


@pytest.mark.usefixtures("no_figures")
def test_resumed_after_its_end_a_run_repeats_its_summary_and_computes_nothing(
    whole: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole[0] / "run"
    before, tables = results(run), json.loads((run / "summary.json").read_text())["tables"]

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished stage was computed again")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", never)
        patch.setattr("steelyard.baselines.sample", never)
        patch.setattr("steelyard.evaluate.policy.sample", never)
        patch.setattr("steelyard.models.reward.RewardModel.score", never)
        assert start(whole[0], patch, "--resume") == 0
        # The stored recipe does as well as the one given.
        assert main(["run", "run/recipe.yaml", "--out", "run", "--resume"]) == 0
        # Another number of workers decides no result; a default that is written out is no other setting.
        assert main(["run", "run/recipe.yaml", "--out", "run", "--resume", "--set", "workers=1", "seed=0"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tables"] == tables
    assert [s["name"] for s in summary["stages"]] == STAGES
    assert results(run) == before

    with monkeypatch.context() as patch:
        assert start(whole[0], patch) == 2
        assert "holds a run already; go on with --resume" in capsys.readouterr().err
        assert start(whole[0], patch, "--resume", "--set", "seed=5") == 2
        refused = capsys.readouterr().err
        assert "holds a run of another recipe" in refused
        assert "differs in seed" in refused
        lock = acquire(run)
        assert start(whole[0], patch, "--resume") == 2
        assert "one process at a time" in capsys.readouterr().err
        os.close(lock)
    assert results(run) == before


@pytest.mark.usefixtures("no_figures")
def test_interrupted_again_and_again_a_run_leaves_the_same_files(
    whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, total = whole

    def stop_at(event: int) -> Callable[[int], None]:
        def hook(n: int) -> None:
            if n == event:
                raise KeyboardInterrupt

        return hook

    resume: list[str] = []
    for share in (0.12, 0.2, 0.2, 0.2, 0.15):
        with at_event(stop_at(int(total * share))):
            assert start(tmp_path, monkeypatch, *resume) == 130
        resume = ["--resume"]
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()
    assert start(tmp_path, monkeypatch, "--resume") == 0
    expected, found = results(folder / "run"), results(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pairs with a column of truth: 1, or -1 where the planted rule is turned; every seventh is a tie."""
    folder = tmp_path_factory.mktemp("files")
    made = {}
    for name, n, seed in (("train", 40, 1), ("held-out", 21, 2)):
        rows, wrong = tiny.planted_pairs(n, flips=0.3, seed=seed)
        for i, row in enumerate(rows):
            row["judge"] = 0 if i % 7 == 6 else -1 if wrong[i] else 1
        made[name] = tiny.write_jsonl(folder / f"{name}.jsonl", rows)
    return made


@pytest.mark.usefixtures("no_figures")
def test_a_recipe_on_the_users_files(
    files: dict[str, str], language_model: Folders, tmp_path: Path, one_thread: None
) -> None:
    recipe = {
        "data": {
            "preferences": files["train"], "validation": files["held-out"], "truth_column": "judge", "limit": 24,
        },
        "model": language_model("llama"),
        "strength": {"members": 4, "folds": 2, "max_length": 64},
        "repair": {"plain": {"recipe": "keep"}, "oracle": {"recipe": "oracle flip"}},
        "reward": {"batch_size": 8, "max_length": 64, "optim": OPTIM},
        "workers": 1,
    }  # fmt: skip
    path, out = tmp_path / "mine.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path), "--out", str(out)]) == 0
    assert len((out / "data/preferences.jsonl").read_text().splitlines()) == 24
    sets = {name: [json.loads(x) for x in (out / "validation" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("original", "relabelled", "agreement")}  # fmt: skip
    given = [json.loads(line) for line in Path(files["held-out"]).read_text().splitlines()]
    assert [r["chosen"] for r in sets["original"]] == [r["chosen"] for r in given]
    assert [r["id"] for r in sets["relabelled"]] == [r["id"] for r in given if r["judge"]]
    assert all("good" in r["chosen"].split() for r in sets["relabelled"])
    assert [r["id"] for r in sets["agreement"]] == [r["id"] for r in given if r["judge"] == 1]
    rows = json.loads((out / "examine/reward.json").read_text())["rows"]
    assert {(r["arm"], r["set"]): r["n"] for r in rows} == {
        (arm, name): len(pairs) for arm in ("plain", "oracle") for name, pairs in sets.items()
    }
    first = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()][:24]
    turned = [json.loads(line)["id"] for line in (out / "repair/oracle.changes.jsonl").read_text().splitlines()]
    assert turned == [r["id"] for r in first if r["judge"] == -1]
    assert not (out / "ppo").exists()


def test_stages_add_up_their_seconds_and_say_where_some_are_lost(tmp_path: Path) -> None:
    settings, times = tmp_path / "recipe.yaml", tmp_path / "stages.json"

    def interrupted() -> None:
        time.sleep(0.02)
        raise KeyboardInterrupt

    Stages(settings).stage("data", lambda: None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Stages(settings).stage("SFT", interrupted)
    _, row = json.loads(times.read_text())
    assert row["seconds"] >= 0.04
    assert row["note"] == ""
    times.write_text(Stages(settings).stage("SFT", times.read_text))  # what `kill -9` leaves
    Stages(settings).stage("SFT", lambda: None)
    assert [r["note"].startswith("killed") for r in json.loads(times.read_text())] == [False, True]


def test_a_recipe_refused_for_its_data_may_be_mended_in_the_same_folder(
    files: dict[str, str], language_model: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    recipe = {"data": {"preferences": files["train"], "truth_column": "jugde"}, "model": language_model("llama")}
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "train.jsonl: no column 'jugde'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_answers_without_room_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, monkeypatch, "--set", "policy.evaluate.sampling.max_new_tokens=160") == 2
    said = capsys.readouterr().err
    assert "policy.evaluate: run/data/eval_prompts.jsonl: 0 of 4 different prompts leave room for 160 new" in said
    assert not (tmp_path / "run" / "sft").exists()


def test_ppo_without_room_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = [f"policy.{part}.sampling.max_new_tokens=158" for part in ("ppo", "baselines")]
    assert start(tmp_path, monkeypatch, "--set", *longer) == 2
    said = capsys.readouterr().err
    assert re.search(r"policy\.arms\.[^:]+: run/data/prompts.jsonl: 0 of \d+ prompts leave room for 158 new", said)
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"world": None}, "either `world` .* or `data`"),
        ({"data": {"preferences": "p.jsonl"}}, "either `world` .* or `data`"),
        ({"world": None, "data": {"preferences": __file__}}, "`model: scratch` is for the small world"),
        ({"sft": None}, "needs an `sft` section"),
        ({"sft": {"data": "mine.jsonl"}}, "^sft: data is filled in"),
        ({"model": "nowhere"}, "^model: nowhere: no such folder"),
        ({"world": {"validation": 9000}}, r"^world.validation: must be at most 800, got 9000"),
        ({"scorings": ["in-sample"]}, "^repair_from = out-of-fold must be one of scorings"),
        ({"strength": {"members": 3}}, "^strength: members must be a multiple of folds, got 3 members and 2 folds"),
        ({"strength": {"member": {"epochs": 2}}}, "^strength: member: no effect with backend = head"),
        ({"strength": {"scoring": "in-sample"}}, "^strength: scoring is filled in"),
        ({"scorings": ["in-sample"], "repair_from": "in-sample", "strength": {"folds": 2}}, "^strength: folds: no eff"),
        ({"repair": {}}, "^repair: name at least one arm"),
        ({"repair": {"..": {"recipe": "keep"}}}, r"^repair: '\.\.' cannot name a folder"),
        ({"repair": {"a b": {"recipe": "keep"}, "a-b": {"recipe": "flip"}}}, "^repair: 'a b' and 'a-b' differ only in"),
        ({"repair": {"a": {"recipe": "keep", "q": 0.1}}}, "^repair.a: recipe 'keep' does not read q"),
        ({"repair": {"a": {"recipe": "flip", "q": 2}}}, "^repair.a.q: must be at most 1, got 2"),
        ({"reward": {"epochz": 2}}, "^reward.epochz: no such setting"),
        ({"repair": {"a": {"recipe": "keep", "reward": {"epochz": 2}}}}, "^repair.a: reward.epochz: no such setting"),
        ({"repair": {"a": {"recipe": "keep", "reward": 3}}}, "^repair.a.reward: must hold fields of"),
        (
            {"repair": {"a": {"recipe": "keep", "reward": {"seed": 3, "max_length": 9}}}},
            "^repair.a.reward: max_length, seed: must be the same for all arms",
        ),
        ({"reward": {"optim": {"lr": "fast"}}}, "^reward.optim.lr: must be a number, got 'fast'"),
        ({"policy": {"ppo": {"steps": 0}}}, "^policy.ppo.steps: must be at least 1, got 0"),
        (
            {"policy": {"baselines": {"k": 2}, "ppo": {"k": 3}}},
            r"^policy\.baselines\.k: must be at least the 3 baselines that policy\.arms\.contrastive",
        ),
        ({"policy": {"baselines": {"kk": 0}}}, "^policy.baselines.kk: no such setting"),
        ({"policy": {"evaluate": {"k": 0}}}, "^policy.evaluate.k: must be at least 1"),
        ({"policy": {"arms": {"a": {"rm": "none"}}}}, r"^policy.arms.a.rm must be one of \['plain'\], got 'none'"),
        ({"policy": {"arms": {"a": {"reward": "plain", "k": 2}}}}, "^policy.arms.a: k: no effect with reward = plain"),
        ({"policy": {"arms": {"a": {"reward": "plain", "kl_horizon": 9}}}}, "^policy.arms.a: kl_horizon: no effect"),
        ({"policy": {"arms": {"a": {"gold": "x:y"}}}}, "^policy.arms.a: gold is filled in"),
        ({"policy": {"arms": {}}}, "^policy.arms: name at least one arm"),
        ({"policy": {"arms": {"a": {"method": "sft"}}}}, r"^policy.arms.a.method must be one of \['ppo', 'dpo'\]"),
        ({"policy": {"arms": {"a": {"data": "plain"}}}}, "^policy.arms.a.data: no such setting"),
        ({"policy": {"arms": {"a": DPO | {"data": "x"}}}}, r"^policy.arms.a.data must be one of \['plain'\], got 'x'"),
        ({"policy": {"arms": {"a": DPO | {"rm": "x"}}}}, r"^policy.arms.a.rm must be one of \['plain'\], got 'x'"),
        ({"policy": {"arms": {"a": DPO | {"beta": 0}}}}, "^policy.arms.a.beta: must be above 0, got 0"),
        ({"policy": {"arms": {"a": DPO | {"kl_coef": 0.1}}}}, "^policy.arms.a.kl_coef: no such setting"),
        ({"policy": {"arms": {"a": DPO | {"gold": "x:y"}}}}, "^policy.arms.a: gold is filled in"),
        ({"policy": {"arms": {"a": DPO | {"eval_every": None, "gold": "x:y"}}}}, "^policy.arms.a: gold: no effect"),
        ({"policy": {"arms": {"a": DPO | {"eval_every": None, "answers": 3}}}}, "^policy.arms.a: answers: no effect"),
        ({"policy": {"arms": {"a": DPO}, "dpo": {"betta": 1}}}, "^policy.dpo.betta: no such setting"),
        ({"policy": {"arms": {"a": DPO}, "ppo": {"steps": 1}}}, "^policy.ppo: no effect without an arm of `method:"),
        ({"policy": {"dpo": {"beta": 1}}}, "^policy.dpo: no effect without an arm of `method: dpo"),
        ({"policy": {"judge": {}}}, "^policy.judge: nobody judges"),
        ({"policy": {"judge": JUDGE | {"urls": "x"}}}, "^policy.judge.urls: no such setting"),
        ({"policy": {"judge": JUDGE | {"against": "x"}}}, r"^policy.judge.against must be one of \['SFT', 'plain PPO'"),
        ({"policy": {"judge": JUDGE | {"per_prompt": 3}}}, "^policy.judge.per_prompt must be at most .*k = 2, got 3"),
        ({"policy": {"judge": JUDGE | {"key_variable": "NOT_THERE"}}}, "^policy.judge.key_variable: .*NOT_THERE is no"),
        ({"policy": {"judge": {"reward_models": ["gone"]}}}, "^policy.judge.reward_models: gone: no such folder"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_before_the_first_stage(changes: dict[str, Any], said: str) -> None:
    recipe = Recipe.model_validate({"world": {}, "sft": {}} | changes)
    with pytest.raises(InputError, match=said):
        check(recipe)


def test_missing_files_and_a_missing_truth_are_refused_before_the_first_stage(
    files: dict[str, str], language_model: Folders
) -> None:
    data: dict[str, Any] = {"preferences": files["train"]}
    mine: dict[str, Any] = {"model": language_model("llama")}
    check(Recipe.model_validate(mine | {"data": data}))
    for name in ("preferences", "validation", "prompts", "eval_prompts"):
        with pytest.raises(InputError, match=rf"^data.{name}: none.jsonl: no such file"):
            check(Recipe.model_validate(mine | {"data": data | {name: "none.jsonl"}}))
    with pytest.raises(InputError, match=r"^sft.data: is needed"):
        check(Recipe.model_validate(mine | {"data": data, "sft": {}}))
    with pytest.raises(InputError, match=r"^repair.o: oracle flip needs the truth"):
        check(Recipe.model_validate(mine | {"data": data, "repair": {"o": {"recipe": "oracle flip"}}}))


def test_an_arm_that_changes_one_field_of_a_section_keeps_the_rest_of_the_shared_one() -> None:
    ppo = {"sampling": {"max_new_tokens": 8}, "critic": {"lr": 3e-4, "warmup": 0}, "prompts_per_step": 4}
    dpo = {"sampling": {"max_new_tokens": 9}, "optim": {"lr": 1e-5, "warmup": 0}}
    arms = {
        "hot": {"sampling": {"temperature": 0.7}, "critic": {"lr": 1e-3}},
        "DPO": {"method": "dpo", "sampling": {"temperature": 0.7}, "optim": {"lr": 1e-3}},
    }
    recipe = Recipe.model_validate({"world": {}, "sft": {}, "policy": {"ppo": ppo, "dpo": dpo, "arms": arms}})
    assert recipe.policy is not None
    paths: dict[str, Any] = {"model": "m", "prompts": "p", "reward_model": "r", "gold": None}
    hot = ppo_config(recipe, recipe.policy, "hot", baselines="b", **paths)
    assert (hot.sampling.max_new_tokens, hot.sampling.temperature) == (8, 0.7)
    assert (hot.critic.lr, hot.critic.warmup, hot.critic.decay) == (1e-3, 0, False)
    offline = dpo_config(recipe, recipe.policy, "DPO", RepairOptions(), data="d", validation={"v": "f"}, **paths)
    assert (offline.sampling.max_new_tokens, offline.sampling.temperature) == (9, 0.7)
    assert (offline.optim.lr, offline.optim.warmup) == (1e-3, 0)


def test_shared_policy_settings_reach_only_the_arms_that_read_them() -> None:
    shared = {"k": 2, "scaling": "abs", "scale_warmup": 8, "critic": {"lr": 1e-3}, "steps": 7}
    shared |= {"baseline": "shrunk", "lsc_reference": "all", "group_std": False}
    arms = {
        "plain": {"reward": "plain"},
        "contrastive": {},
        "par": {"reward": "par"},
        "lsc": {"reward": "lsc"},
        "group": {"reward": "plain", "advantage": "group"},
        "rloo": {"reward": "plain", "advantage": "rloo"},
        "scaled": {"reward": "plain", "scaling": "std"},
        "unscaled": {"scaling": "none"},
    }
    recipe = Recipe.model_validate({"world": {}, "sft": {}, "policy": {"ppo": shared, "arms": arms}})
    check(recipe)
    assert recipe.policy is not None
    paths: dict[str, Any] = {"model": "m", "prompts": "p", "reward_model": "r", "baselines": "b", "gold": None}
    found = {name: ppo_config(recipe, recipe.policy, name, **paths) for name in arms}
    assert all(config.steps == 7 for config in found.values())

    def reached(name: str, value: Any) -> list[str]:
        return [arm for arm, config in found.items() if getattr(config, name) == value]

    assert reached("baselines", "b") == reached("k", 2) == ["contrastive", "par", "lsc", "unscaled"]
    assert reached("baseline", "shrunk") == ["contrastive", "unscaled"]
    assert reached("lsc_reference", "all") == ["lsc"]
    assert reached("group_std", False) == ["group"]
    assert reached("scale_warmup", 8) == ["contrastive", "scaled"]
    with_critic = [arm for arm, config in found.items() if config.critic.lr == 1e-3]
    assert with_critic == ["plain", "contrastive", "par", "lsc", "scaled", "unscaled"]


def test_dpo_arms_get_the_settings_of_their_repair() -> None:
    repair = {"plain": {"recipe": "keep"}, "soft": {"recipe": "soft+margin", "margin_in_flip": False}}
    arms = {"first": DPO, "soft": DPO | {"data": "soft", "use_margin": True},
            "other": DPO | {"data": "soft", "rm": "plain"},
            "blind": DPO | {"data": "soft", "eval_every": None}}  # fmt: skip
    policy = {"dpo": {"beta": 0.3, "max_length": 99}, "arms": arms}
    recipe = Recipe.model_validate({"world": {}, "sft": {}, "repair": repair, "policy": policy})
    check(recipe)
    assert recipe.policy is not None
    assert (arms_by(recipe.policy, "dpo"), arms_by(recipe.policy, "ppo")) == (list(arms), [])
    assert [arm_reward(recipe, recipe.policy, name) for name in arms] == ["plain", "soft", "plain", "soft"]
    assert evaluation_length(recipe.policy) == 99
    options = RepairOptions.model_validate(repair["soft"])
    paths: dict[str, Any] = {"data": "d", "model": "m", "prompts": "p", "reward_model": "r", "gold": None}
    found = {n: dpo_config(recipe, recipe.policy, n, options, validation={"v": "f"}, **paths) for n in arms}
    assert {(c.beta, c.max_length, c.data, c.model) for c in found.values()} == {(0.3, 99, "d", "m")}
    assert {n: (c.use_margin, c.margin_in_flip) for n, c in found.items()} == {
        "first": (False, True), "soft": (True, False), "other": (False, True), "blind": (False, True)
    }  # fmt: skip
    assert (found["soft"].prompts, found["soft"].reward_model, found["soft"].validation) == ("p", "r", {"v": "f"})
    assert (found["blind"].prompts, found["blind"].reward_model, found["blind"].validation) == (None, None, {})
