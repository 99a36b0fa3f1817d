"""The whole road from a noisy preference file to a better policy, as one recipe of resumable stages.

simulate (or the user's files) -> SFT -> strength -> repair -> reward models -> examination -> baselines -> PPO
and DPO -> evaluation -> judges -> report. Every stage leaves a folder and is skipped when it has finished.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from steelyard import stages
from steelyard.errors import InputError
from steelyard.recipe import Recipe, arms_by, check, judge_config
from steelyard.run_dir import acquire, completed, write_json_atomic, write_text_atomic
from steelyard.summary import Stages, describe_run, tables


def run_recipe(recipe: Recipe, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Run every stage into `out`; returns the summary (also in summary.json), from which `build_report` draws the page.

    Raises:
        InputError: the recipe contradicts itself, before anything runs; its files or models do not fit; or `out` is
            in use, or holds a run of another recipe, or one and `resume` is not set.
        FloatingPointError, parallel.JobError: a stage's training, or a judge, failed.
    """
    check(recipe)
    lock = acquire(out)
    try:
        return _run_stages(recipe, out, resume, command)
    finally:
        os.close(lock)


def _run_stages(recipe: Recipe, out: Path, resume: bool, command: str) -> dict[str, Any]:
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    stored = out / "recipe.yaml"
    if stored.exists() and not resume:
        raise InputError(f"{out}: holds a run already; go on with --resume, or give another folder (--out)")
    if stored.exists() and (other := _differ(yaml.safe_load(stored.read_text()), recipe)):
        raise InputError(
            f"{out}: holds a run of another recipe ({stored}); it differs in {', '.join(other)}; give another folder"
        )
    write_text_atomic(stored, text)
    print(f"{recipe.name}: {out}", flush=True)
    run, began = Stages(stored), time.time()
    files = run.stage("data", lambda: stages.prepare(recipe, out))
    model = run.stage("SFT", lambda: stages.sft(recipe, files, out))
    measured = {
        scoring: run.stage(f"strength, {scoring}", partial(stages.weigh, recipe, files, model, out, scoring, resume))
        for scoring in recipe.scorings
    }
    arms = run.stage("repair", lambda: stages.repair_all(recipe, files, measured[recipe.repair_from], out))
    run.stage("reward models", lambda: stages.reward_models(recipe, files, model, arms, out))
    run.stage("examination", lambda: stages.examine_all(recipe, files, list(arms), out))
    if (policy := recipe.policy) is not None:
        if arms_by(policy, "ppo"):
            scored = run.stage("baselines", lambda: stages.baselines(recipe, policy, files, model, out))
            run.stage("PPO", lambda: stages.optimise(recipe, policy, files, model, scored, out))
        if arms_by(policy, "dpo"):
            run.stage("DPO", lambda: stages.prefer(recipe, policy, files, model, arms, out))
        run.stage("policy evaluation", lambda: stages.evaluate(recipe, policy, files, model, out))
        if policy.judge is not None:
            run.stage("judges", lambda: stages.judge_all(judge_config(recipe, policy), out))
    about = describe_run(recipe.name, recipe.seed, began, command)
    write_json_atomic(out / "run.json", about | {"seconds": sum(s["seconds"] for s in run.rows)})
    summary = {"tables": tables(out), "stages": run.rows}
    write_json_atomic(out / "summary.json", summary)
    return summary


def _differ(stored: dict[str, Any], recipe: Recipe) -> list[str]:
    """The sections in which two recipes differ; how many workers share the jobs decides no result."""
    before, now = completed(stored, Recipe), recipe.model_dump(mode="json")
    return sorted(k for k in before.keys() | now.keys() if k != "workers" and before.get(k) != now.get(k))
