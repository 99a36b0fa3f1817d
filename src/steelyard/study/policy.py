"""`steelyard study policy`: how far can a policy be pushed along a reward model before it gets worse?

The over-optimisation protocol of Gao et al. (arXiv 2210.10760) on the small world, where the true reward of any text
is known: gold and proxy reward against sqrt(KL), for a grid of cells (label noise, repair, way of training, KL
weight), each with several seeds. Labels, SFT, reward models and baselines are made once a seed and shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steelyard.data.export import write_preferences
from steelyard.data.load import load_preferences
from steelyard.denoise import repair
from steelyard.errors import InputError
from steelyard.measure import measure
from steelyard.parallel import default_workers, run_jobs
from steelyard.ppo_settings import PPOConfig
from steelyard.recipe import reward_config, sft_config, strength_config
from steelyard.run_dir import RunDir
from steelyard.simulate.annotators import annotate
from steelyard.simulate.world import gold
from steelyard.stages import Files, examination_prompts, prepare, require_training_prompts
from steelyard.study.folder import FREE, StudyFolder
from steelyard.study.policy_config import (
    AS_LABELLED,
    Cell,
    PolicyStudy,
    annotators,
    baseline_config,
    check,
    dpo_config,
    evaluation_config,
    is_dpo,
    members,
    needs_baselines,
    ppo_config,
    recipe_of,
    repair_of,
)
from steelyard.study.policy_jobs import (
    EXAMINED,
    Exam,
    RunJob,
    sample_all,
    train_and_examine,
    train_and_look,
    train_start,
)
from steelyard.study.policy_places import labels_of, of_seed, reward_of, run_of, start_of
from steelyard.study.policy_tables import examine_study, summary_tables
from steelyard.train.reward import RewardConfig

NEW_MEMBER = 1_000_000  # between the seeds of an ensemble's members: no study has so many seeds
Job = tuple[Any, ...]


def run_policy_study(study: PolicyStudy, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Run the cells that `study` names into `out`; returns the findings (also in study.json).

    Finished models are skipped, an interrupted one goes on. Seeds, cells, arms and repairs may be added later.
    Raises InputError, naming the field, for a study that cannot be run, before anything starts.
    """
    check(study)
    free = (*FREE, "cells", "at_kl", "recommended", "against", "compare")
    with StudyFolder(out, study, resume=resume, command=command, free=free, growing=("arms", "repairs")) as folder:
        files, exam = folder.stage("data", lambda: _prepare(study, out))
        grid = study.grid()
        folder.stage("labels", lambda: label(study, grid, files, out))
        folder.stage("SFT", lambda: _start(study, files, out))
        folder.stage("strength and repair", lambda: repair_all(study, grid, out))
        folder.stage("reward models", lambda: _rewards(study, grid, files, exam, out))
        scored = folder.stage("baselines", lambda: _baselines(study, grid, files, out))
        folder.stage("policies", lambda: _policies(study, grid, files, scored, exam, out))
        found = folder.stage("tables", lambda: examine_study(study, out))
        folder.finish(study.name, study.world_seed, found, summary_tables(found))
    return found


# ---- stages ----------------------------------------------------------------------------------------------------


def _each(study: PolicyStudy, work: Callable[..., Any], jobs: Sequence[Job], labels: Sequence[str]) -> list[Any]:
    """The jobs side by side, each told as it ends."""
    if not jobs:
        return []
    return run_jobs(
        work,
        jobs,
        workers=min(len(jobs), study.workers or default_workers(study.device)),
        threads=study.threads,
        labels=labels,
        on_done=lambda i, _: print(f"  {labels[i]}", flush=True),
    )


def _prepare(study: PolicyStudy, out: Path) -> tuple[Files, Exam]:
    """The files of all seeds, and the held-out prompts that all policies answer."""
    recipe, config = recipe_of(study, study.seeds[0]), evaluation_config(study)
    files = prepare(recipe, out)
    length = int(study.ppo.get("max_length", PPOConfig.model_fields["max_length"].default))
    prompts = examination_prompts(recipe, files, config, length, "evaluate")
    for cell in {c.arm: c for c in study.grid() if c.kl_coef is not None}.values():
        each = ("",) * members(study, cell.arm)
        ppo = ppo_config(study, cell, 0, policy="", rewards=each, prompts=files.prompts, baselines=each, gold=None)
        require_training_prompts(recipe, files, ppo, f"arms.{cell.arm}")
    return files, Exam(tuple(prompts), config, length, study.looks)


def label(study: PolicyStudy, grid: Sequence[Cell], files: Files, out: Path) -> None:
    """The training pairs of every seed and kind of noise, labelled anew by annotators of that seed."""
    pairs = load_preferences(files.preferences).preferences
    for seed in study.seeds:
        for cell in {c.world: c for c in grid}.values():
            path = labels_of(out, seed, (cell.world, AS_LABELLED))
            if not path.exists():
                try:
                    labelled, _ = annotate(pairs, gold, annotators(study, cell), seed)
                except InputError as error:
                    raise InputError(f"cells: noise {cell.noise}, rate {cell.rate:g}: {error}") from None
                path.parent.mkdir(parents=True, exist_ok=True)
                write_preferences(labelled, path)


def _start(study: PolicyStudy, files: Files, out: Path) -> None:
    if study.sft is None:
        return
    jobs, labels = [], []
    tokenizer = files.tokenizer if study.model == "scratch" else None
    for seed in study.seeds:
        target = of_seed(out, seed) / "sft"
        if not (target / "result.json").exists():
            config = sft_config(recipe_of(study, seed), data=files.sft, tokenizer=tokenizer)
            jobs.append((config, target))
            labels.append(f"SFT, seed {seed}")
    _each(study, train_start, jobs, labels)


def repair_all(study: PolicyStudy, grid: Sequence[Cell], out: Path) -> None:
    """The repaired files, by a strength that is measured once for every seed and kind of noise."""
    for seed in study.seeds:
        for data in dict.fromkeys(c.data for c in grid):
            path = labels_of(out, seed, data)
            if path.exists():
                continue
            labelled = labels_of(out, seed, (data[0], AS_LABELLED))
            pairs = load_preferences(labelled).preferences
            options, _ = repair_of(study, data[1])
            if options.recipe == "keep":
                write_preferences(pairs, path)
                continue
            recipe = recipe_of(study, seed)
            model = start_of(study, out, seed)
            config = strength_config(recipe, study.scoring, data=str(labelled), model=model)
            folder = of_seed(out, seed) / "strength" / data[0].replace(" %", "")
            strengths = measure(config, pairs, folder, resume=True, quiet=True)
            wrong = {p.id for p in pairs if gold(p.prompt, p.chosen) < gold(p.prompt, p.rejected)}
            repaired, _ = repair(pairs, strengths, options, wrong=wrong)
            write_preferences(repaired, path)
            print(f"  {data[0]}, {data[1]}, seed {seed}: repaired", flush=True)


def _rewards(study: PolicyStudy, grid: Sequence[Cell], files: Files, exam: Exam, out: Path) -> None:
    """Every reward model that a cell asks for: one a (labels, repair) and seed, more for ensembles."""
    jobs, labels = [], []
    most: dict[tuple[str, str], int] = {}
    for cell in grid:
        most[cell.data] = max(most.get(cell.data, 1), members(study, cell.arm))
    for seed in study.seeds:
        for data, size in most.items():
            for member in range(size):
                folder = reward_of(out, seed, data, member)
                if not (folder / EXAMINED).exists():
                    jobs.append((reward_job(study, seed, data, member, out), folder, files.validation["original"]))
                    labels.append(f"reward model {member}, {data[0]}, {data[1]}, seed {seed}")
    k = baseline_config(study, 0, policy="", prompts="", reward_model="").k
    _each(study, train_and_examine, [(*job, exam, k) for job in jobs], labels)


def reward_job(study: PolicyStudy, seed: int, data: tuple[str, str], member: int, out: Path) -> RewardConfig:
    """Settings of one reward model; an ensemble's further members differ in head and order of the data."""
    recipe = recipe_of(study, seed)
    settings = {"eval_every": None} | recipe.reward | {"seed": seed + NEW_MEMBER * member}
    recipe = recipe.model_copy(update={"reward": settings})
    start, pairs = start_of(study, out, seed), str(labels_of(out, seed, data))
    return reward_config(recipe, *repair_of(study, data[1]), data=pairs, model=start, validation={})


Scored = dict[tuple[int, str, str], list[str]]
"""(seed, world, repair) -> scored baselines, one file by each reward model that an arm reads them of."""


def _baselines(study: PolicyStudy, grid: Sequence[Cell], files: Files, out: Path) -> Scored:
    """One job a seed: its responses are sampled once."""
    most: dict[tuple[str, str], int] = {}
    for cell in grid:
        if needs_baselines(study, cell.arm):
            most[cell.data] = max(most.get(cell.data, 1), members(study, cell.arm))
    wanted = [(data, member) for data, size in most.items() for member in range(size)]
    jobs: list[Job] = []
    for seed in study.seeds:
        policy = start_of(study, out, seed)
        configs = [
            baseline_config(
                study,
                seed,
                policy=policy,
                prompts=files.prompts,
                reward_model=str(reward_of(out, seed, data, member) / "model"),
            )
            for data, member in wanted
        ]
        jobs.append((configs, of_seed(out, seed) / "baselines"))
    found = _each(study, sample_all, jobs if wanted else [], [f"baselines, seed {seed}" for seed in study.seeds])
    scored: Scored = {}
    for seed, paths in zip(study.seeds, found, strict=False):
        for (data, _), path in zip(wanted, paths, strict=True):
            scored.setdefault((seed, *data), []).append(path)
    return scored


def _policies(
    study: PolicyStudy, grid: Sequence[Cell], files: Files, scored: Scored, exam: Exam, out: Path
) -> None:  # fmt: skip
    """All cells of a seed before the next seed's."""
    jobs = [run_job(study, cell, seed, files, scored, exam, out) for seed in study.seeds for cell in grid]
    todo = [job for job in jobs if not job.done]
    for job in jobs:
        if job.done:  # Opened for its check alone: an arm's name may have come to mean other settings.
            RunDir.open(job.folder, job.config, resume=True).close()
    print(f"{len(todo)} of {len(jobs)} policies to train", flush=True)
    names = [f"seed {job.folder.relative_to(out / 'seeds').as_posix().replace('/runs/', ', ')}" for job in todo]
    _each(study, train_and_look, [(job,) for job in todo], names)


def run_job(
    study: PolicyStudy, cell: Cell, seed: int, files: Files, scored: Scored, exam: Exam, out: Path
) -> RunJob:  # fmt: skip
    """One policy's job."""
    start = start_of(study, out, seed)
    rewards = tuple(str(reward_of(out, seed, cell.data, m) / "model") for m in range(members(study, cell.arm)))
    folder = run_of(out, seed, cell)
    if is_dpo(study, cell.arm):
        data = str(labels_of(out, seed, cell.data))
        return RunJob(folder, dpo_config(study, cell, seed, data=data, model=start), start, rewards, exam)
    config = ppo_config(
        study, cell, seed, policy=start, rewards=rewards, prompts=files.prompts,
        baselines=tuple(scored.get((seed, *cell.data), ())), gold=files.gold,
    )  # fmt: skip
    return RunJob(folder, config, start, rewards, exam)
