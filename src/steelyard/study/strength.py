"""`steelyard study strength`: how good is preference strength, for what price? Kinds of member, scorings, sizes, seeds.

Each ensemble is trained once with its largest number of members; smaller ones are its first members. On the small
world every seed has a world, an SFT model and members of its own; on your data every seed has members of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from steelyard.config import Config, Device, Seed, merged
from steelyard.data.distinct import tokens_of
from steelyard.data.encode import Encoder
from steelyard.data.load import load_preferences
from steelyard.errors import InputError
from steelyard.measure import measure
from steelyard.members.config import IDLE, Scoring, StrengthConfig, check, held_out_plan
from steelyard.members.cost import Cost
from steelyard.members.lora import require_peft
from steelyard.members.run import prepare as prepare_members
from steelyard.members.run import shared_tokens
from steelyard.parallel import default_workers, run_jobs
from steelyard.recipe import DataConfig, Recipe, Settings, build, distinct_names
from steelyard.recipe import check as check_recipe
from steelyard.run_dir import write_json_atomic
from steelyard.stages import Files, prepare, sft
from steelyard.study.folder import StudyFolder, refuse_seeds
from steelyard.study.strength_compare import compare, tables
from steelyard.study.strength_runs import Run

APART = 1000  # member m of a run has the seed of the run + m: runs with neighbouring seeds would share members
BACKENDS: dict[str, Settings] = {name: {"backend": name} for name in ("full", "lora", "layers", "head")}
_READ = {"preferences", "truth_column", "limit", "on_invalid"}


class StrengthStudy(Config):
    """Quality of strength against its cost. Sections hold the fields of the matching commands."""

    name: str = Field("Strength: quality and cost", description="title of the report")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="repetitions of everything")
    world: Settings | None = Field(None, description="the built-in small world (fields of `steelyard simulate`)")
    data: DataConfig | None = Field(None, description="or your file: preferences, truth_column, limit, on_invalid")
    model: str = Field("scratch", description="model folder to start from, or `scratch` (small world)")
    sft: Settings | None = Field(None, description="fields of `steelyard train sft`; none given: the model as it comes")
    strength: Settings = Field(
        default_factory=dict, description="fields of `steelyard strength` for all backends; each takes those it reads"
    )
    backends: dict[str, Settings] = Field(
        default_factory=lambda: dict(BACKENDS), min_length=1, description="name -> fields of `steelyard strength`"
    )
    reference: str = Field("full", description="whose strength the others' is correlated with, if it is a backend")
    scorings: tuple[Scoring, ...] = Field(("in-sample", "out-of-fold"), min_length=1, description="which are measured")
    sizes: tuple[int, ...] = Field((1, 3, 5, 10), min_length=1, description="numbers of members, the largest trained")
    device: Device = "cpu"
    workers: int | None = Field(
        None, ge=1, description="ensembles measured side by side; none given: one per CPU, on a GPU one"
    )
    threads: int = Field(1, ge=1, description="threads of each of them")


def run_strength_study(study: StrengthStudy, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Measure every ensemble and compare; returns the findings (also in study.json)."""
    check_study(study)
    with StudyFolder(out, study, resume=resume, command=command) as folder:
        places = {seed: out / (f"world-{seed}" if study.world is not None else "data-set") for seed in study.seeds}
        files: dict[Path, Files] = {}
        models: dict[Path, str] = {}
        for seed, place in places.items():
            if place not in files:
                files[place] = folder.stage(f"data, {place.name}", partial(_prepare, study, seed, place))
                models[place] = folder.stage(
                    f"SFT, {place.name}", partial(sft, recipe_of(study, seed), files[place], place)
                )
        configs = {
            (seed, backend, scoring): config_of(
                study, backend, scoring, seed, data=files[place].preferences, model=models[place]
            )
            for seed, place in places.items()
            for backend in study.backends
            for scoring in study.scorings
        }
        folder.stage("shared passes", lambda: _share(study, configs, places))
        folder.stage("ensembles", lambda: _measure(study, configs, places, files))
        runs = [
            read_run_of(backend, scoring, seed, places[seed], files[places[seed]]) for seed, backend, scoring in configs
        ]
        found = folder.stage(
            "comparison", lambda: compare(runs, study.sizes, study.reference, same_pairs=study.world is None)
        )
        folder.finish(study.name, study.seeds[0], found, tables(found))
    return found


def check_study(study: StrengthStudy) -> None:
    """Refuse contradictions, and what is missing, before anything runs."""
    for field in ("seeds", "sizes", "scorings"):
        values = getattr(study, field)
        if len(set(values)) < len(values):
            raise InputError(f"{field}: must differ from each other, got {list(values)}")
    distinct_names("backends", study.backends)
    sections = {"world": study.world, "sft": study.sft, "strength": study.strength}
    refuse_seeds(sections | {f"backends.{name}": own for name, own in study.backends.items()})
    if min(study.sizes) < 1:
        raise InputError(f"sizes: an ensemble has at least one member, got {list(study.sizes)}")
    if study.data is not None:
        if study.data.truth_column is None:
            raise InputError("data.truth_column: the study needs the truth of the labels; name its column (1, 0, -1)")
        if idle := study.data.given() - _READ:
            raise InputError(f"data: {', '.join(sorted(idle))}: no effect in this study; leave it out")
    check_recipe(recipe_of(study, study.seeds[0]))
    for backend in study.backends:
        for scoring in study.scorings:
            config = config_of(study, backend, scoring, study.seeds[0], data="", model="")
            try:
                check(config)
                held_out_plan(config, [str(prompt) for prompt in range(config.folds)])
            except InputError as error:
                raise InputError(f"backends.{backend}: {error}") from None
            if config.backend == "lora":
                require_peft()


def recipe_of(study: StrengthStudy, seed: int) -> Recipe:
    """The part that this study shares with a recipe: data and supervised fine-tuning."""
    shared = {name: getattr(study, name) for name in ("name", "world", "data", "model", "sft", "device", "threads")}
    return Recipe(seed=seed, **shared)


def config_of(
    study: StrengthStudy, backend: str, scoring: Scoring, seed: int, *, data: str, model: str
) -> StrengthConfig:
    """Settings of one ensemble."""
    own = study.backends[backend]
    kind = build(StrengthConfig, f"backends.{backend}", {"backend": backend} | own, data=data, model=model).backend
    idle = IDLE[kind] | ({"folds"} if scoring == "in-sample" else set())
    offered: Settings = {"device": study.device} | study.strength
    shared = {name: value for name, value in offered.items() if name not in idle}
    # `workers` of an ensemble: its members one after the other, so that their times are their own.
    one = {} if kind == "head" else {"workers": 1}
    filled: Settings = {"data": data, "model": model, "scoring": scoring, "members": max(study.sizes)}
    filled |= {"seed": APART * seed, "backend": kind} | one
    given = merged(shared, {name: value for name, value in own.items() if name != "backend"})
    return build(StrengthConfig, f"backends.{backend}", given, **filled)


def _prepare(study: StrengthStudy, seed: int, place: Path) -> Files:
    place.mkdir(parents=True, exist_ok=True)
    files = prepare(recipe_of(study, seed), place)
    if not any(t < 0 for t in (files.truth or {}).values()):
        raise InputError("the study needs labels that are known to be wrong; there are none")
    return files


def run_folder(place: Path, backend: str, scoring: Scoring, seed: int) -> Path:
    """Where one ensemble is."""
    return place / "runs" / f"{backend.replace('/', '-')}-{scoring}-seed-{seed}"


def _shared_file(place: Path, backend: str) -> Path:
    return place / "shared" / f"{backend.replace('/', '-')}.json"


def _share(study: StrengthStudy, configs: Mapping[Any, StrengthConfig], places: Mapping[int, Path]) -> None:
    """What all ensembles of a kind read of the frozen trunk, computed and timed once in each place."""
    jobs: dict[Path, tuple[StrengthConfig, Path, Path]] = {}
    for (seed, backend, scoring), config in configs.items():
        target = _shared_file(places[seed], backend)
        if config.backend in ("layers", "head") and not target.exists():
            jobs.setdefault(target, (config, run_folder(places[seed], backend, scoring, seed), target))
    if jobs:
        run_jobs(
            share,
            list(jobs.values()),
            workers=min(len(jobs), study.workers or default_workers(study.device)),
            threads=study.threads,
            labels=[f"shared pass, {target.stem}" for target in jobs],
        )


def share(config: StrengthConfig, folder: Path, target: Path) -> None:
    """A job: one shared pass. After an interruption the times are those of the rest, in proportion to its tokens."""
    encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
    trees = encoder.encode(load_preferences(config.data, on_invalid=config.on_invalid).preferences).trees
    whole = shared_tokens(config, tokens_of(trees, config.max_tokens))
    cost = prepare_members(config, encoder, trees, folder, quiet=True)
    stretch = whole / cost.tokens if cost.tokens else 1.0
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target, asdict(Cost(whole, stretch * cost.wall, stretch * cost.cpu, cost.memory)))


def _measure(
    study: StrengthStudy,
    configs: Mapping[tuple[int, str, Scoring], StrengthConfig],
    places: Mapping[int, Path],
    files: Mapping[Path, Files],
) -> None:
    jobs, labels = [], []
    for (seed, backend, scoring), config in configs.items():
        own = files[places[seed]]
        jobs.append((config, own.truth, own.noise, run_folder(places[seed], backend, scoring, seed)))
        labels.append(f"{backend}, {scoring}, seed {seed}")
    run_jobs(
        measure_one,
        jobs,
        workers=min(len(jobs), study.workers or default_workers(study.device)),
        threads=study.threads,
        labels=labels,
        on_done=lambda i, _: print(f"  {labels[i]}: measured", flush=True),
    )


def measure_one(config: StrengthConfig, truth: dict[str, int], noise: dict[str, str], folder: Path) -> None:
    """A job: one ensemble."""
    if not (folder / "result.json").exists():
        preferences = load_preferences(config.data, on_invalid=config.on_invalid).preferences
        measure(config, preferences, folder, truth=truth, noise=noise, resume=True, quiet=True)


def read_run_of(backend: str, scoring: Scoring, seed: int, place: Path, files: Files) -> Run:
    """What one ensemble left."""
    folder = run_folder(place, backend, scoring, seed)
    cost = json.loads((folder / "cost.json").read_text())
    shared = Cost(**cost["shared"])
    if _shared_file(place, backend).exists():
        shared = Cost(**json.loads(_shared_file(place, backend).read_text())).plus(shared)
    return Run.read(
        folder, backend=backend, scoring=scoring, seed=seed, shared=shared,
        members=[Cost(**c) for c in cost["members"]],
        preferences=load_preferences(files.preferences).preferences, truth=files.truth or {},
    )  # fmt: skip
