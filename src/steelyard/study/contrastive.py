"""`steelyard study contrastive`: does contrastive learning help a reward model? (Secrets of RLHF II, section 3.1)

Plain training, SimCSE and SwAV on pairs and on differences, and the control that any claim needs: beta = 0 with the
same dropout and the same doubled forward. Same data, same order of data, same steps for all; several seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import Field

from steelyard.data.encode import Encoder
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.evaluate.features import (
    CLOUDS,
    MEASURES,
    FeatureOptions,
    Features,
    describe,
    overlap,
    read_features,
    require_enough,
)
from steelyard.evaluate.reward import wins
from steelyard.evaluate.seeds import compare_arms
from steelyard.evaluate.units import units_of
from steelyard.models.reward import RewardModel
from steelyard.parallel import default_workers, run_jobs
from steelyard.recipe import Recipe, Settings, build
from steelyard.run_dir import write_json_atomic, write_text_atomic
from steelyard.stages import Files, prepare, sft, start_tokenizer
from steelyard.study.arms import ArmsStudy, held_out_pairs, places, require_arms
from steelyard.study.folder import StudyFolder, difference_table, mean_curves
from steelyard.train.pairwise import read_pairs
from steelyard.train.reward import RewardConfig, train_reward

Examined = dict[str, Any]

ARMS: dict[str, Settings] = {
    "plain": {},
    "control": {"method": "simcse", "beta": 0},
    "SimCSE pairs": {"method": "simcse", "features": "pairs"},
    "SimCSE differences": {"method": "simcse", "features": "differences"},
    "SwAV pairs": {"method": "swav", "features": "pairs"},
    "SwAV differences": {"method": "swav", "features": "differences"},
}


class ContrastiveStudy(ArmsStudy):
    """Contrastive learning against its control. Sections hold the fields of the matching commands."""

    name: str = Field("Contrastive learning", description="title of the report")
    reward: Settings = Field(default_factory=dict, description="fields of `steelyard train reward`, for all arms")
    arms: dict[str, Settings] = Field(
        default_factory=lambda: dict(ARMS), description="name -> fields of its `contrastive` section; none: plain"
    )
    control: str = Field("control", description="the arm that all others are compared with")
    features: FeatureOptions = Field(default_factory=FeatureOptions, description="overlap figures and picture")
    features_set: str | None = Field(
        None, description="validation set whose features are examined; none given: relabelled if there is one"
    )


def run_contrastive(study: ContrastiveStudy, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Train and examine every arm with every seed; returns the findings (also in study.json).

    Finished models are skipped, an interrupted one goes on. Seeds and arms may be added later.
    """
    recipe = study.recipe()
    require_arms(study.arms, study.control, study.seeds)
    for arm in study.arms:
        reward_config(study, arm, study.seeds[0], data="", model="", validation={})
    with StudyFolder(out, study, resume=resume, command=command, growing=("arms",)) as folder:
        files = folder.stage("data", lambda: _prepare(study, recipe, out))
        model = folder.stage("SFT", lambda: sft(recipe, files, out))
        folder.stage("reward models", lambda: _reward_models(study, files, model, out))
        found = folder.stage("comparison", lambda: _compare(study, files, out))
        tables = [
            difference_table("Contrastive learning: accuracy on held-out pairs", found["accuracy"], study.control),
            difference_table("Overlap of chosen and rejected features", found["overlap"], study.control),
        ]
        folder.finish(study.name, study.world_seed, found, tables)
    return found


def reward_config(
    study: ContrastiveStudy, arm: str, seed: int, *, data: str, model: str, validation: dict[str, str]
) -> RewardConfig:
    """Settings of one reward model: arms differ in their `contrastive` section, seeds in `seed`, nothing else does."""
    if fixed := {"contrastive", "seed"} & set(study.reward):
        raise InputError(f"reward: {', '.join(sorted(fixed))} is the study's own; use `arms` and `seeds`")
    where = f"arms.{arm}: reward" if study.arms[arm] else "reward"
    filled = {"data": data, "model": model, "validation": validation, "seed": seed, "contrastive": study.arms[arm]}
    return build(RewardConfig, where, {"device": study.device} | study.reward, **filled)


def _prepare(study: ContrastiveStudy, recipe: Recipe, out: Path) -> Files:
    files = prepare(recipe, out)
    chosen = _features_set(study, files)
    if chosen not in files.validation:
        raise InputError(f"features_set must be one of the validation sets {list(files.validation)}, got {chosen!r}")
    config = reward_config(study, study.control, study.seeds[0], data="", model="", validation={})
    encoder = Encoder.load(start_tokenizer(recipe, files), max_length=config.max_length, on_overlong=config.on_overlong)
    pairs, _ = read_pairs(files.validation[chosen], encoder, on_invalid=config.on_invalid)
    require_enough(_prompts(pairs[: study.features.limit]), files.validation[chosen])
    return files


def _features_set(study: ContrastiveStudy, files: Files) -> str:
    return study.features_set or ("relabelled" if "relabelled" in files.validation else "original")


def _reward_models(study: ContrastiveStudy, files: Files, model: str, out: Path) -> None:
    jobs, labels = [], []
    # All arms of a seed before the next seed: an interrupted study can be compared on the seeds that it has.
    for seed in study.seeds:
        for arm in study.arms:
            config = reward_config(study, arm, seed, data=files.preferences, model=model, validation=files.validation)
            drawn = seed == study.seeds[0]
            jobs.append((config, *places(out, arm, seed), _features_set(study, files), study.features, drawn))
            labels.append(f"{arm}, seed {seed}")
    run_jobs(
        train_and_examine,
        jobs,
        workers=min(len(jobs), study.workers or default_workers(study.device)),
        threads=study.threads,
        labels=labels,
        on_done=lambda i, _: print(f"  {labels[i]}: trained and examined", flush=True),
    )


def train_and_examine(
    config: RewardConfig, folder: Path, target: Path, features_set: str, options: FeatureOptions, drawn: bool
) -> None:
    """One reward model, and one number for each held-out pair and measure."""
    train_reward(config, folder, resume=True, quiet=True)
    # Drawn only where the study's first seed is this one, which it may not have been before.
    if target.exists() and not (drawn and json.loads(target.read_text())["picture"] is None):
        return
    encoder = Encoder.load(folder / "model", max_length=config.max_length, on_overlong=config.on_overlong)
    model = RewardModel.load(folder / "model", precision=config.precision, device=config.device)
    read = {name: read_pairs(path, encoder, on_invalid=config.on_invalid) for name, path in config.validation.items()}
    trees = {name: found for name, (_, found) in read.items()}
    scored = model.score_sets(trees, pad_id=encoder.pad_id, max_tokens=config.max_tokens)
    shown, pairs = trees[features_set][: options.limit], read[features_set][0][: options.limit]
    prompts = _prompts(pairs)
    features = read_features(model, shown, pad_id=encoder.pad_id, max_tokens=config.max_tokens)
    found = overlap(features, prompts, folds=options.folds, seed=options.seed)
    examined: Examined = {
        "accuracy": {name: wins(r[:, 0].astype(np.float64) - r[:, 1]).tolist() for name, r in scored.items()},
        "prompts": {name: _prompts(own) for name, (own, _) in read.items()},
        "overlap": {cloud: {m: v.tolist() for m, v in values.items()} for cloud, values in found.items()},
        "features_set": features_set,
        "features_prompts": prompts,
        "picture": describe(Features(features, prompts), options, units_of(pairs)) if drawn else None,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(target, json.dumps(examined) + "\n")


def _prompts(pairs: Any) -> list[str]:
    return [prompt_key(p.prompt) for p in pairs]


def _compare(study: ContrastiveStudy, files: Files, out: Path) -> dict[str, Any]:
    """Every arm against the control, by accuracy and by overlap; the pictures of the first seed."""
    examined = {arm: [json.loads(places(out, arm, seed)[1].read_text()) for seed in study.seeds] for arm in study.arms}
    first = examined[study.control][0]
    config = reward_config(study, study.control, study.seeds[0], data="", model="", validation=files.validation)
    pairs = held_out_pairs(config, places(out, study.control, study.seeds[0])[0], first["prompts"])
    units_shown = units_of(pairs[first["features_set"]][: study.features.limit])
    accuracy: list[dict[str, Any]] = []
    for name in first["prompts"]:
        values = _stack(examined, lambda one, name=name: one["accuracy"][name])
        rows = compare_arms(values, clusters=units_of(pairs[name]), control=study.control)
        accuracy += [{"set": name, "measure": "accuracy", **row} for row in rows]
    apart: list[dict[str, Any]] = []
    for cloud in CLOUDS:
        for measure in MEASURES:
            values = _stack(examined, lambda one, c=cloud, m=measure: one["overlap"][c][m])
            rows = compare_arms(values, clusters=units_shown, control=study.control)
            apart += [{"set": cloud, "measure": measure, **row} for row in rows]
    pictures = [{"name": arm, **runs[0]["picture"]} for arm, runs in examined.items()]
    write_json_atomic(out / "examine" / "features.json", {"set": first["features_set"], "models": pictures})
    folders = {arm: [places(out, arm, seed)[0] for seed in study.seeds] for arm in study.arms}
    return {
        "kind": "contrastive",
        "control": study.control,
        "seeds": list(study.seeds),
        "features_set": first["features_set"],
        "accuracy": accuracy,
        "overlap": apart,
        "curves": mean_curves(folders, _is_shown),
    }


def _stack(examined: Mapping[str, list[Examined]], read: Any) -> dict[str, Float[np.ndarray, "S N"]]:
    return {arm: np.array([read(one) for one in runs]) for arm, runs in examined.items()}


def _is_shown(metric: str) -> bool:
    return metric in ("train/contrastive_loss", "train/loss", "train/margin") or metric.endswith("/accuracy")
