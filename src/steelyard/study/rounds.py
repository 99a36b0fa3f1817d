"""`steelyard study rounds`: does renewing the reward model keep rounds of PPO from turning? (Secrets of RLHF II, 3.2)

In the small world gold says where a policy really stands. From one SFT model and, for each seed, one first reward
model, every arm goes through the same number of rounds; arms differ in what happens to the reward model between them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from steelyard import iterate
from steelyard.config import Config, Device, Seed, merged
from steelyard.errors import InputError
from steelyard.evaluate.seeds import compare_arms
from steelyard.iterate import run_rounds
from steelyard.parallel import default_workers, run_jobs
from steelyard.recipe import Recipe, Settings, build, check, world_config
from steelyard.rounds_settings import RoundsConfig, check_settings
from steelyard.stages import GOLD, Files, prepare, sft
from steelyard.study.arms import require_arms
from steelyard.study.folder import FREE, Curve, StudyFolder, difference_table
from steelyard.study.rounds_judges import BY_JUDGE, JUDGED, choices, judge_run, write_judge_pairs
from steelyard.train.reward import RewardConfig, train_reward

_KINDS = {"MetaRM": "metarm", "plain reward model": "plain", "fixed reward model": "fixed"}
_META = {"meta", "meta_prompts", "meta_sample"}
IDLE = {"metarm": set[str](), "plain": _META, "fixed": _META | {"rm", "reward_from"}}
"""Shared settings that an arm has no use for, by its `reward`."""
BY_ROUND = ("gold", "first", "current", "kl", "ppl_sft", "length")
BY_STEP = ("ppo/reward_raw", "ppo/gold", "ppo/return", "ppo/kl_plain", "ppo/ppl_sft", "ppo/length")


class RoundsStudy(Config):
    """Rounds with several kinds of reward models on the small world. Sections hold the matching commands' fields."""

    name: str = Field("Rounds", description="title of the report")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="one first reward model and one run an arm")
    world_seed: int = Field(0, ge=0, description="of the world and SFT")
    world: Settings = Field(
        default_factory=dict, description="the built-in small world (fields of `steelyard simulate`)"
    )
    model: str = Field("scratch", description="model folder to start from, or `scratch`")
    sft: Settings | None = Field(None, description="fields of `steelyard train sft`; none given: the model as it comes")
    reward: Settings = Field(default_factory=dict, description="fields of `train reward`: the first reward models")
    iterate: Settings = Field(default_factory=dict, description="fields of `iterate`, for all arms that have them")
    arms: dict[str, Settings] = Field(
        default_factory=lambda: {name: {"reward": kind} for name, kind in _KINDS.items()},
        description="name -> fields of `iterate` that differ (of sections: their fields)",
    )
    control: str = Field("plain reward model", description="the arm that the others are compared with")
    judge_pairs: int | None = Field(
        None,
        ge=2,
        description="pairs of other texts on which each seed's judge is trained, as `reward` says",
    )
    judge_kl_prices: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.02, 0.03, 0.05, 0.1), description="with judge_pairs: what a nat of KL may cost where one chooses"
    )
    device: Device = "cpu"
    workers: int | None = Field(None, ge=1, description="runs side by side; none given: one per CPU, on a GPU one")
    threads: int = Field(1, ge=1, description="threads of each of them")

    @model_validator(mode="after")
    def _all_rounds(self) -> RoundsStudy:
        own = {"patience", "gold", "keep_by"}
        sections = [("iterate", self.iterate, own)]
        sections += [(f"arms.{name}", settings, own | {"rounds"}) for name, settings in self.arms.items()]
        for where, settings, taken in sections:
            if clash := taken & set(settings):
                raise ValueError(
                    f"{where}: {', '.join(sorted(clash))} is the study's own: all arms go through the same rounds "
                    "(`iterate.rounds` says how many), examined by gold"
                )
            if self.judge_pairs is not None and "judge" in settings:
                raise ValueError(f"{where}: judge is the study's own with judge_pairs; leave one of the two out")
        if self.judge_pairs is None and "judge_kl_prices" in self.given():
            raise ValueError("judge_kl_prices: no effect without judge_pairs; leave out, or give judge_pairs")
        return self


def places(out: Path, arm: str, seed: int) -> Path:
    """The folder of one run of rounds."""
    return out / "arms" / arm.replace("/", "-") / f"seed-{seed}"


def run_rounds_study(study: RoundsStudy, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Every arm with every seed through all rounds; returns the findings (also in study.json).

    Finished models are skipped, an interrupted one goes on. Seeds and arms may be added later.
    """
    fields = ("name", "world", "model", "sft", "device", "workers", "threads")
    shared = {name: getattr(study, name) for name in fields}
    recipe = Recipe(seed=study.world_seed, **shared)
    check(recipe)
    require_arms(study.arms, study.control, study.seeds)
    for arm in study.arms:
        config = rounds_config(study, arm, study.seeds[0], model="", first="", files=None)
        if study.judge_pairs is not None and study.judge_kl_prices:
            config = config.model_copy(update={"kl_price": max(study.judge_kl_prices)})
        try:
            check_settings(config)
        except InputError as error:
            raise InputError(f"arms.{arm}: {error}") from None
    first_config(study, study.seeds[0], model="", files=None)
    free = (*FREE, "judge_pairs", "judge_kl_prices")
    with StudyFolder(out, study, resume=resume, command=command, free=free, growing=("arms",)) as folder:
        files = folder.stage("data", lambda: prepare(recipe, out))
        model = folder.stage("SFT", lambda: sft(recipe, files, out))
        folder.stage("first reward models", lambda: _first(study, model, files, out))
        folder.stage("rounds", lambda: _rounds(study, model, files, out))
        if study.judge_pairs is not None:
            folder.stage("judges", lambda: _judges(study, recipe, model, files, out))
        found = folder.stage("comparison", lambda: compare(study, out))
        folder.finish(study.name, study.world_seed, found, _tables(found))
    return found


def first_config(study: RoundsStudy, seed: int, *, model: str, files: Files | None) -> RewardConfig:
    """Settings of the reward model that all arms of a seed begin with."""
    filled: Settings = {"data": "", "validation": {}}
    if files is not None:
        filled = {"data": files.preferences, "validation": files.validation}
    return build(RewardConfig, "reward", {"device": study.device} | study.reward, model=model, seed=seed, **filled)


def rounds_config(
    study: RoundsStudy, arm: str, seed: int, *, model: str, first: str, files: Files | None
) -> RoundsConfig:
    """Settings of one run. What `iterate` says of the reward model is left out where an arm has no use for it."""
    own = study.arms[arm]
    kind = own.get("reward", study.iterate.get("reward", RoundsConfig.model_fields["reward"].default))
    given: Settings = {"device": study.device} | study.iterate
    settings = merged({name: value for name, value in given.items() if name not in IDLE.get(kind, set())}, own)
    filled: Settings = {"prompts": "", "eval_prompts": "", "validation": {}}
    if files is not None:
        prompts = files.eval_prompts or files.prompts
        filled = {"prompts": files.prompts, "eval_prompts": prompts, "validation": files.validation}
    if kind != "fixed":
        filled["data"] = "" if files is None else files.preferences
    filled |= {"sft": model, "reward_model": first, "gold": GOLD, "patience": None, "seed": seed}
    return build(RoundsConfig, f"arms.{arm}", settings, **filled)


def _first(study: RoundsStudy, model: str, files: Files, out: Path) -> None:
    jobs = [(first_config(study, s, model=model, files=files), out / "first" / f"seed-{s}") for s in study.seeds]
    _run(study, _train_first, jobs, [f"first reward model, seed {s}" for s in study.seeds])


def _rounds(study: RoundsStudy, model: str, files: Files, out: Path) -> None:
    jobs, labels = [], []
    for seed in study.seeds:
        first = str(out / "first" / f"seed-{seed}" / "model")
        for arm in study.arms:
            config = rounds_config(study, arm, seed, model=model, first=first, files=files)
            jobs.append((config, places(out, arm, seed)))
            labels.append(f"{arm}, seed {seed}")
    _run(study, _go_through, jobs, labels)


def _judges(study: RoundsStudy, recipe: Recipe, model: str, files: Files, out: Path) -> None:
    """One judge a seed, and its rewards of the examined answers of all rounds."""
    assert study.judge_pairs is not None
    root, jobs = out / "judges", []
    prompts = files.eval_prompts or files.prompts
    for seed in study.seeds:
        # No seed of a world is another study's own by chance: they begin behind it.
        world = world_config(recipe).model_copy(update={"seed": study.world_seed + 1_000_000 + seed})
        data = write_judge_pairs(world, study.judge_pairs, prompts, root / f"pairs-{study.judge_pairs}-{seed}.jsonl")
        config = first_config(study, seed, model=model, files=files).model_copy(update={"data": str(data)})
        jobs.append((config, root / f"seed-{seed}"))
    _run(study, _train_first, jobs, [f"judge, seed {s}" for s in study.seeds])
    runs, labels = [], []
    for seed in study.seeds:
        first, judge = (str(out / kind / f"seed-{seed}" / "model") for kind in ("first", "judges"))
        for arm in study.arms:
            one = rounds_config(study, arm, seed, model=model, first=first, files=files)
            runs.append((one, judge, places(out, arm, seed)))
            labels.append(f"judged: {arm}, seed {seed}")
    _run(study, judge_run, runs, labels)


def _run(study: RoundsStudy, work: Any, jobs: list[tuple[Any, ...]], labels: list[str]) -> None:
    run_jobs(
        work,
        jobs,
        workers=min(len(jobs), study.workers or default_workers(study.device)),
        threads=study.threads,
        labels=labels,
        on_done=lambda i, _: print(f"  {labels[i]}: done", flush=True),
    )


def _train_first(config: RewardConfig, out: Path) -> None:
    train_reward(config, out, resume=True, quiet=True)


def _go_through(config: RoundsConfig, out: Path) -> None:
    run_rounds(config, out, resume=True, quiet=True)


# ---- findings ------------------------------------------------------------------------------------------------------


def compare(study: RoundsStudy, out: Path) -> dict[str, Any]:
    """Gold of every arm in every round and in the round it kept, against the control's; courses over rounds.

    A seed in which a run of some arm failed is left out of all arms, and named. Raises InputError if none is left.
    """
    everything = {(a, s): json.loads((places(out, a, s) / iterate.RECORD).read_text())
                  for a in study.arms for s in study.seeds}  # fmt: skip
    failed = [{"arm": a, "seed": s, "error": r["stopped"]} for (a, s), r in everything.items() if r["stopped"]]
    seeds = [s for s in study.seeds if all(f["seed"] != s for f in failed)]
    if not seeds:
        said = "; ".join(f"{f['arm']}, seed {f['seed']}: {f['error']}" for f in failed)
        raise InputError(f"arms: in every seed a run failed, so nothing can be compared ({said})")
    records = {a: [everything[a, s] for s in seeds] for a in study.arms}
    count = len(records[study.control][0]["rounds"])
    examined = {a: [[_read(out, a, s, n) for n in range(count)] for s in seeds] for a in study.arms}
    prompts = examined[study.control][0][0]["prompts"]
    rows: list[dict[str, Any]] = []
    for name in [*range(1, count), "the round kept"]:
        # The kept round was chosen on every other prompt: it is measured on the rest.
        part = slice(1, None, 2) if isinstance(name, str) else slice(None)
        values = {
            arm: np.array([
                np.array(one[record["best"]["round"] if isinstance(name, str) else name]["values"]["gold"])[part]
                for one, record in zip(examined[arm], records[arm], strict=True)
            ])
            for arm in study.arms
        }  # fmt: skip
        clusters = [p for p in prompts[part] for _ in range(values[study.control].shape[2])]
        flat = {arm: v.reshape(len(v), -1) for arm, v in values.items()}
        label = name if isinstance(name, str) else f"round {name}"
        compared = compare_arms(flat, clusters=clusters, control=study.control)
        rows += [{"set": label, "measure": "gold", **row} for row in compared]
    turns = [
        {"arm": arm, "seed": seed, "best": record["best"]["round"], "rounds": count - 1,
         "gain": record["best"]["gain"]["value"]}
        for arm, found in records.items() for seed, record in zip(seeds, found, strict=True)
    ]  # fmt: skip
    chosen: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    if study.judge_pairs is not None:
        judged = {(a, s): examined[a][i] for a in study.arms for i, s in enumerate(seeds)}
        chosen, kept = choices(judged, list(study.arms), seeds, study.judge_kl_prices)
    return {
        "kind": "rounds",
        "control": study.control,
        "seeds": seeds,
        "failed": failed,
        "rows": rows,
        "turns": turns,
        "choices": chosen,
        "kept": kept,
        "by_round": [c for arm, found in records.items() for c in _by_round(arm, found)],
        "by_step": [c for arm in study.arms for c in _by_step(seeds, arm, out, count)],
    }


def _read(out: Path, arm: str, seed: int, number: int) -> dict[str, Any]:
    folder = places(out, arm, seed) / f"round-{number:02d}" / "examine"
    found: dict[str, Any] = json.loads((folder / "round.json").read_text())
    if (folder / JUDGED).exists():
        found["values"] |= json.loads((folder / JUDGED).read_text())
    return found


def _by_round(arm: str, records: list[dict[str, Any]]) -> list[Curve]:
    """Every figure of the examination, and the accuracy of each round's reward model, over rounds."""
    curves = []
    for metric in BY_ROUND:
        values_SR = np.array([[row[metric] for row in record["rounds"]] for record in records])
        curves.append(_curve(arm, metric, list(range(values_SR.shape[1])), values_SR))
    rows = [[{a["set"]: a["accuracy"] for a in row["accuracy"] if a["model"] == "current"} for row in record["rounds"]]
            for record in records]  # fmt: skip
    for name in rows[0][0]:
        if all(name in row for one in rows for row in one):
            values_SR = np.array([[row[name] for row in one] for one in rows])
            curves.append(_curve(arm, f"accuracy/{name}", list(range(values_SR.shape[1])), values_SR))
    return curves


def _by_step(seeds: Sequence[int], arm: str, out: Path, count: int) -> list[Curve]:
    """PPO's metrics over the steps of all rounds, one after the other."""
    logged = []
    for seed in seeds:
        files = [places(out, arm, seed) / f"round-{n:02d}" / "ppo" / "metrics.jsonl" for n in range(1, count)]
        logged.append([json.loads(line) for file in files for line in file.read_text().splitlines()])
    steps = list(range(1, len(logged[0]) + 1))
    return [_curve(arm, m, steps, np.array([[row[m] for row in one] for one in logged])) for m in BY_STEP]


def _curve(arm: str, metric: str, steps: list[int], values_SP: Any) -> Curve:
    ends = {"mean": values_SP.mean(0), "low": values_SP.min(0), "high": values_SP.max(0)}
    return {"arm": arm, "metric": metric, "steps": steps} | {name: v.tolist() for name, v in ends.items()}


def _tables(found: dict[str, Any]) -> list[dict[str, Any]]:
    kept = {
        "title": "Rounds: what was kept",
        "columns": ["arm", "seed", "round kept", "of", "gain over SFT"],
        "rows": [[t["arm"], t["seed"], t["best"], t["rounds"], t["gain"]] for t in found["turns"]],
        "note": "Chosen by gold on half of the held-out prompts; the gain is that on the other half. Round 0 is SFT.",
    }
    tables = [difference_table("Rounds: gold", found["rows"], found["control"]), kept]
    if found["choices"]:
        tables.append(difference_table("Rounds: what each rule keeps", found["choices"], BY_JUDGE))
    return tables
