"""`steelyard study data`: what the kinds of preference data do, and what repairs are worth.

Secrets of RLHF II (arXiv 2401.06080), sections 2.3 to 2.5, App. A and C: reward models on bands of strength, on sets
that grow from either end, on repaired bands, on repaired data sets; validation segments over steps; reward inflation.
One job is one reward model. Within an analysis all models take equally many steps of equally many pairs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from steelyard.data.export import write_preferences
from steelyard.data.load import load_preferences
from steelyard.errors import InputError
from steelyard.parallel import default_workers, run_jobs
from steelyard.recipe import build, slug
from steelyard.stages import Files, prepare, sft, weigh
from steelyard.study import data_sets
from steelyard.study.data_config import PLAIN, DataStudy, check
from steelyard.study.data_models import (
    SCORES,
    Job,
    average_and_score,
    ensemble_scores,
    load_scores,
    save_scores,
    start_model,
    train_and_score,
)
from steelyard.study.data_sets import WHOLE, DataSet, Input
from steelyard.study.data_tables import ENSEMBLE_FILE, Plan, examine_study, summary_tables
from steelyard.study.folder import FREE, StudyFolder
from steelyard.summary import tables
from steelyard.train.optim import total_steps
from steelyard.train.reward import RewardConfig
from steelyard.types import Preference, Strength


def run_data_study(study: DataStudy, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Run the analyses that `study` names into `out`; returns the findings (also in study.json).

    Finished models are skipped, an interrupted one goes on. Analyses and seeds may be added to a study later.
    Raises InputError, naming the field, for a study that cannot be run, before anything starts.
    """
    given, study = study, check(study)
    with StudyFolder(out, given, resume=resume, command=command, free=(*FREE, "analyses", "against")) as folder:
        files = folder.stage("data", lambda: prepare(study, out))
        model = folder.stage("SFT", lambda: sft(study, files, out))
        source = folder.stage("strength", lambda: _measure(study, files, model, out, resume))
        if study.needs_members():
            keep = "keep_members" in given.strength
            folder.stage("ensemble on validation pairs", lambda: _ensemble(source, files, out, keep))
        start = _input(study, files, source, model, out)
        plan, jobs = plan_models(study, start)
        folder.stage("reward models", lambda: _train(study, jobs))
        if plan.averages:
            folder.stage("weight averages", lambda: _average(study, plan, jobs))
        found = folder.stage("tables", lambda: examine_study(study, plan, start))
        folder.finish(study.name, study.seed, found, [*tables(out), *summary_tables(found)])
    return found


def _measure(study: DataStudy, files: Files, model: str, out: Path, resume: bool) -> Path:
    """The folder of the strength that repairs read: measured here, or the one given."""
    if study.strength_folder is not None:
        return Path(study.strength_folder)
    for scoring in study.scorings:
        weigh(study, files, model, out, scoring, resume)
    return out / "strength" / study.repair_from


def _ensemble(source: Path, files: Files, out: Path, keep: bool) -> None:
    """The members' scores of the validation pairs. Full members that were measured here are then removed."""
    if not (out / ENSEMBLE_FILE).exists():
        ids, scores = ensemble_scores(source, files.validation["original"])
        save_scores(out / ENSEMBLE_FILE, ids, scores)
    for member in () if keep else (out / "strength").glob("*/members/*/model"):
        shutil.rmtree(member.parent)


def read_strengths(path: Path, pairs: Sequence[Preference]) -> list[Strength | None]:
    """The strengths of a strength.parquet in the order of `pairs`; None for a pair that is not there.

    Raises InputError where an id is there with other texts: that strength belongs to another pair.
    """
    rows = {row["id"]: row for row in pq.read_table(path).to_pylist()}
    found: list[Strength | None] = []
    for pair in pairs:
        row = rows.get(pair.id)
        if row is not None and (row["chosen"], row["rejected"]) != (pair.chosen, pair.rejected):
            raise InputError(f"{path}: pair {pair.id} has other texts than {pair.source or 'the data'}; measure anew")
        names = ("strength_mean", "strength_std", "votes", "voters", "p_flip", "suggested_action", "reason")
        found.append(None if row is None else Strength(*(row[name] for name in names)))
    return found


def _input(study: DataStudy, files: Files, source: Path, model: str, out: Path) -> Input:
    """Only measured pairs take part, in all analyses."""
    pairs = load_preferences(files.preferences).preferences
    strengths = read_strengths(source / "strength.parquet", pairs)
    kept = [(p, s) for p, s in zip(pairs, strengths, strict=True) if s is not None]
    if len(kept) < max(study.bands.count, 2):
        raise InputError(f"{source}: holds the strength of {len(kept)} of the {len(pairs)} training pairs only")
    if len(kept) < len(pairs):
        print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs have no strength and are left out", flush=True)
    ids = {p.id for p, _ in kept}
    truth = None if files.truth is None else {i: t for i, t in files.truth.items() if i in ids}
    scoring = json.loads((source / "result.json").read_text())["scoring"]
    return Input([p for p, _ in kept], [s for _, s in kept], truth, files.validation, model, out, scoring)


def _train(study: DataStudy, jobs: Sequence[Job]) -> None:
    """The models that are not there yet, side by side."""
    todo = [job for job in jobs if not job.done]
    print(f"{len(todo)} of {len(jobs)} reward models to train", flush=True)
    if todo:
        run_jobs(
            train_and_score,
            [(job,) for job in todo],
            workers=min(len(todo), study.workers or default_workers(study.device)),
            threads=study.threads,
            labels=[job.label for job in todo],
            on_done=lambda i, _: print(f"  {todo[i].label}", flush=True),
        )


def _average(study: DataStudy, plan: Plan, jobs: Sequence[Job]) -> None:
    """Weight averages of every seed; the averaged models' own weights are then no longer needed."""
    by_folder = {job.folder: job for job in jobs}
    firsts = [by_folder[members[0]] for members, _ in plan.averages.values()]
    todo = [
        (members, first.config, first.examined_on, out)
        for first, (members, out) in zip(firsts, plan.averages.values(), strict=True)
    ]
    run_jobs(
        average_and_score,
        todo,
        workers=min(len(todo), study.workers or default_workers(study.device)),
        threads=study.threads,
        labels=[f"WARM, seed {seed}" for seed in plan.averages],
    )
    for members, _ in plan.averages.values():
        for member in members:
            shutil.rmtree(member / "model", ignore_errors=True)


def plan_models(study: DataStudy, start: Input) -> tuple[Plan, list[Job]]:
    """Every reward model that the analyses need, each once, with the data sets written; and who needs which."""
    maker = _Maker(study, start)
    # All models of a seed before the next seed's: what is dear comes as early for one seed as for all.
    for seed in study.seeds:
        if study.wants("segments", "inflation"):
            maker.dynamics(seed)
        if study.wants("arms"):
            for arm in study.repair:
                arm_set = data_sets.arm_set(study, arm, seed, start.pairs, start.strengths, start.wrong)
                maker.add("arms", arm, seed, arm_set, maker.steps)
            if "WARM" in study.scorers:
                maker.brothers(seed)
        if study.wants("growth"):
            for end in ("weakest", "strongest"):
                for fraction in study.growth.fractions:
                    rows = data_sets.growth_rows(start.strengths, fraction, end)
                    whole = data_sets.growth_name(fraction, end) == WHOLE
                    pairs = start.pairs if whole else [start.pairs[i] for i in rows]
                    grown = DataSet(data_sets.growth_name(fraction, end), pairs)
                    maker.add("growth", f"{end} {fraction:g}", seed, grown, maker.steps)
        if study.wants("bands", "bands_repair"):
            maker.bands(seed)
    return maker.plan, list(maker.jobs.values())


class _Maker:
    """Collects jobs; the same data set with the same steps and seed is one model, whoever asks for it."""

    def __init__(self, study: DataStudy, start: Input) -> None:
        self.study, self.start = study, start
        self.plan, self.jobs = Plan(), dict[Path, Job]()
        usual = self._config("", {})
        self.batch_size, self.steps = usual.batch_size, total_steps(len(start.pairs), usual.batch_size, usual.epochs)

    def add(
        self, analysis: str, name: str, seed: int, data: DataSet, steps: int, *, keep: bool = False, **settings: Any
    ) -> Job:
        """One reward model for an analysis; `settings` are those that differ (and `label`, for a place of its own)."""
        label = settings.pop("label", data.name)
        order = settings.pop("order", seed)
        name_of_seed = f"seed-{seed}" if order == seed else f"seed-{seed}-order-{order}"
        folder = self.start.out / "models" / slug(label) / f"{steps}-steps" / name_of_seed
        rows = data_sets.full_batches(len(data.pairs), self.batch_size, seed)
        filled = {"seed": order, "epochs": steps / (len(rows) // self.batch_size)}
        filled |= {"margin_in_flip": data.margin_in_flip} | settings
        config = self._config(self._written(data), filled)
        before = self.jobs.get(folder)
        keep = keep or (before is not None and before.keep)
        self.jobs[folder] = Job(folder, config, rows, self.start.validation["original"], keep)
        self.plan.need(analysis, name, seed, folder)
        return self.jobs[folder]

    def dynamics(self, seed: int) -> None:
        """The plain run that is examined as it goes."""
        study, whole = self.study, DataSet(WHOLE, self.start.pairs)
        steps = total_steps(len(self.start.pairs), self.batch_size, study.dynamics.epochs)
        validation = dict(self.start.validation)
        if study.wants("segments"):
            validation |= _segments(study, self.start)
        every = max(1, steps // study.dynamics.examinations)
        label = "dynamics with segments" if study.wants("segments") else "dynamics"
        settings: dict[str, Any] = {"label": label, "validation": validation, "eval_every": every}
        self.add("dynamics", PLAIN, seed, whole, steps, **settings)

    def brothers(self, seed: int) -> None:
        """The other members of this seed's weight average: the plain model's head, other orders of the data."""
        study = self.study
        average = self.start.out / "models" / "WARM" / f"seed-{seed}"
        keep = not (average / SCORES).exists()
        first = self.add("arms", PLAIN, seed, DataSet(WHOLE, self.start.pairs), self.steps, keep=keep)
        members = [first.folder]
        for number in range(1, study.warm.members):
            # Orders that no study seed uses.
            order = 1_000_000 * number + seed
            folder = self.start.out / "models" / "start" / f"seed-{seed}"
            model = start_model(self.start.model, first.config, folder)
            whole = DataSet(WHOLE, self.start.pairs)
            members.append(
                self.add("warm", f"{order}", seed, whole, self.steps, keep=keep, order=order, model=model).folder
            )
        self.plan.averages[seed] = (members, average)

    def bands(self, seed: int) -> None:
        """Plain models on the bands, and repaired bands."""
        study, start = self.study, self.start
        rows = data_sets.band_rows(start.strengths, study.bands.count)
        steps = total_steps(len(rows[0]), self.batch_size, study.bands.epochs)

        def add(analysis: str, band: int, treatment: str) -> None:
            pairs = [start.pairs[i] for i in rows[band - 1]]
            strengths = [start.strengths[i] for i in rows[band - 1]]
            done = data_sets.treated(pairs, strengths, treatment, study.bands_repair)
            data = DataSet(data_sets.treated_name(band, treatment), done)
            self.add(analysis, f"{band} {treatment}", seed, data, steps)

        if study.wants("bands"):
            for band in range(1, study.bands.count + 1):
                add("bands", band, "plain")
        if study.wants("bands_repair"):
            for flipped, chosen in ((True, study.bands_repair.flip), (False, study.bands_repair.soft)):
                for band in chosen:
                    for treatment in data_sets.treatments(flipped):
                        add("bands_repair", band, treatment)

    def _config(self, data: str, filled: dict[str, Any]) -> RewardConfig:
        filled = {"model": self.start.model, "eval_every": None} | filled
        model = filled.pop("model")
        settings = {"device": self.study.device} | self.study.reward | filled
        return build(RewardConfig, "reward", settings, data=data, model=model)

    def _written(self, data: DataSet) -> str:
        path = self.start.out / "sets" / f"{slug(data.name)}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_preferences(data.pairs, path)
        return str(path)


def _segments(study: DataStudy, start: Input) -> dict[str, str]:
    """The validation pairs in equal segments by the ensemble's mean margin, as files."""
    ids, scores = load_scores(start.out / ENSEMBLE_FILE)
    mean = (scores[..., 0].astype(np.float64) - scores[..., 1]).mean(0)
    by_id = {p.id: p for p in load_preferences(start.validation["original"]).preferences}
    count = min(study.dynamics.segments, len(ids))
    files = {}
    for number, rows in enumerate(data_sets.segment_rows(mean, count), 1):
        path = start.out / "validation" / f"segment-{number:02d}.jsonl"
        if not path.exists():
            write_preferences([by_id[ids[i]] for i in rows], path)
        files[f"segment-{number:02d}"] = str(path)
    return files
