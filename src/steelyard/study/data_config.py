"""The study file of `steelyard study data`: its settings, all checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from steelyard import recipe
from steelyard.config import Config, Seed
from steelyard.denoise import RECIPES, RepairOptions
from steelyard.errors import InputError
from steelyard.recipe import PolicyConfig, Recipe, Settings, build

Analysis = Literal["bands", "growth", "bands_repair", "segments", "inflation", "arms"]
Scorer = Literal["ensemble", "WARM"]
PLAIN = "plain"
SCORER_NAMES = ("ensemble", "WARM", "mean of WARM's")
BACKENDS = ("full", "head")  # whose members can score pairs that they were not measured on


class BandsConfig(Config):
    """Reward models trained on equal bands of strength."""

    count: int = Field(10, ge=2, description="equal bands by strength; the paper has ten")
    epochs: float = Field(3.0, gt=0, description="passes over a band; also for the repairs within bands")


class GrowthConfig(Config):
    """Training sets that grow from one end of the strength."""

    fractions: tuple[float, ...] = Field(
        tuple(i / 10 for i in range(1, 11)), min_length=1, description="shares of the training pairs, ascending"
    )

    @field_validator("fractions")
    @classmethod
    def _ascending(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < share <= 1 for share in shares) or sorted(set(shares)) != list(shares):
            raise ValueError(f"must be shares above 0 up to 1, ascending, none twice, got {list(shares)}")
        return shares


class BandsRepairConfig(Config):
    """What is done to the labels within single bands (1 = weakest)."""

    flip: tuple[int, ...] = Field((1, 2), description="bands to flip, also with soft labels, margin, and both")
    soft: tuple[int, ...] = Field((1, 4, 10), description="bands that get soft labels, margin, and both")
    alpha: float | None = Field(None, ge=0, le=1, description="flip_prob of soft labels; none: each pair's own p_flip")
    margin_scale: float = Field(1.0, gt=0, description="margin = scale * mean margin")
    margin_cap: float = Field(2.0, gt=0, description="bound on the size of a margin, in units of reward")


class DynamicsConfig(Config):
    """One plain run of several passes, examined as it goes: validation segments and reward inflation."""

    epochs: float = Field(3.0, gt=0, description="passes over the training pairs")
    segments: int = Field(20, ge=2, description="equal parts of the validation pairs by the ensemble's strength")
    examinations: int = Field(20, ge=1, description="about so many examinations over the run")


class WarmConfig(Config):
    """Weight averages (WARM, arXiv 2401.12187)."""

    members: int = Field(3, ge=2, description="M plain models averaged: one head to start from, M orders of the data")


def all_recipes() -> dict[str, Settings]:
    """Every recipe of `denoise.RECIPES` as an arm; "keep" is called plain."""
    return {PLAIN if name == "keep" else name: {"recipe": name} for name in RECIPES}


class DataStudy(Recipe):
    """Secrets of RLHF II, sections 2.3 to 2.5, App. A and C, on one data set. Fields as in a recipe, and these."""

    name: str = Field("Study of preference data", description="title of the report")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="one reward model an arm for each")
    analyses: tuple[Analysis, ...] = Field(get_args(Analysis), min_length=1, description="which analyses to run")
    strength_folder: str | None = Field(
        None, description="strength measured before: a folder with strength.parquet and result.json"
    )
    repair: dict[str, Settings] = Field(
        default_factory=all_recipes, description="arm -> fields of `steelyard repair`; none given: every recipe"
    )
    against: dict[str, str] = Field(
        default_factory=dict,
        description="repair arm -> another one that it is compared with beside plain: its control, such as the same "
        "repair with `shuffle`",
    )
    scorers: tuple[Scorer, ...] = Field(
        get_args(Scorer), description="arms beside the repairs: the strength's ensemble itself, and weight averages"
    )
    policy: PolicyConfig | None = None  # a recipe's; without a description, for it is refused here
    bands: BandsConfig = Field(
        default_factory=BandsConfig, description="bands of strength: " + ", ".join(BandsConfig.model_fields)
    )
    growth: GrowthConfig = Field(
        default_factory=GrowthConfig, description="growing training sets: " + ", ".join(GrowthConfig.model_fields)
    )
    bands_repair: BandsRepairConfig = Field(
        default_factory=BandsRepairConfig,
        description="repairs within bands: " + ", ".join(BandsRepairConfig.model_fields),
    )
    dynamics: DynamicsConfig = Field(
        default_factory=DynamicsConfig,
        description="segments and inflation over steps: " + ", ".join(DynamicsConfig.model_fields),
    )
    warm: WarmConfig = Field(
        default_factory=WarmConfig, description="weight averages: " + ", ".join(WarmConfig.model_fields)
    )

    def wants(self, *analyses: Analysis) -> bool:
        """Whether one of these was asked for."""
        return any(a in self.analyses for a in analyses)

    def needs_members(self) -> bool:
        """Whether the ensemble has to score the validation pairs, too."""
        asked = self.wants("segments") or (self.wants("arms") and "ensemble" in self.scorers)
        # Full members are gone once they have been measured: analyses that are added later may want them.
        return asked or (self.strength_folder is None and self.strength.get("backend") == "full")


def check(study: DataStudy) -> DataStudy:
    """The study with what follows from its settings filled in. Raises InputError before anything starts."""
    if study.policy is not None:
        raise InputError("policy: a study of data trains reward models only; leave it out")
    if study.data is not None and study.data.validation is None:
        raise InputError("data.validation: the study compares reward models on held-out pairs; name their file")
    _distinct("seeds", study.seeds)
    _distinct("analyses", study.analyses)
    _distinct("scorers", study.scorers)
    if fixed := {"data", "model", "validation", "seed", "margin_in_flip", "eval_every"} & set(study.reward):
        raise InputError(f"reward: {', '.join(sorted(fixed))} is filled in by the study's other parts; leave it out")
    study = _without_unknown_truth(study)
    if study.needs_members():
        study = _with_members(study)
    recipe.check(study)
    _check_tokens(study)
    _check_arms(study)
    if study.wants("bands_repair"):
        _check_bands_repair(study)
    if study.strength_folder is not None:
        _check_folder(study, Path(study.strength_folder))
    return study


def _distinct(field: str, values: tuple[Any, ...]) -> None:
    if len(set(values)) < len(values):
        raise InputError(f"{field}: must differ from each other, got {list(values)}")


def _without_unknown_truth(study: DataStudy) -> DataStudy:
    """Where the truth is not known, there is no oracle; an oracle that was asked for by name is an error."""
    known = study.world is not None or (study.data is not None and study.data.truth_column is not None)
    if known or "repair" in study.model_fields_set:
        return study
    arms = {name: settings for name, settings in study.repair.items() if settings["recipe"] != "oracle flip"}
    return study.model_copy(update={"repair": arms})


def _with_members(study: DataStudy) -> DataStudy:
    """Full members must stay on disk until they have scored the validation pairs."""
    if study.strength_folder is not None:
        return study
    backend = study.strength.get("backend", "head")
    if backend not in BACKENDS:
        raise InputError(
            f"strength.backend: members of kind {backend!r} cannot score validation pairs afterwards; use one of "
            f"{list(BACKENDS)}, or leave out the analysis `segments` and the scorer `ensemble`"
        )
    if backend != "full":
        return study
    if study.strength.get("keep_members") is False:
        raise InputError("strength.keep_members: `segments` and the scorer `ensemble` need the members; leave it out")
    return study.model_copy(update={"strength": study.strength | {"keep_members": True}})


def _check_arms(study: DataStudy) -> None:
    if not study.wants("arms"):
        return
    if study.repair.get(PLAIN) != {"recipe": "keep"}:
        raise InputError(f"repair.{PLAIN}: all arms are compared with it; it must be there, as `{{recipe: keep}}`")
    written = []
    for name, settings in study.repair.items():
        options = build(RepairOptions, f"repair.{name}", settings)
        # A control drawn at random is another data set with each seed, named as in `data_sets.arm_set`.
        seeded = [f"{name}, seed {options.seed + seed}" for seed in study.seeds]
        written += seeded if options.drawn else [name]
        if options.recipe == "keep" and name != PLAIN:
            raise InputError(f"repair.{name}: recipe keep is the arm {PLAIN}; leave it out")
        if name in SCORER_NAMES:
            raise InputError(f"repair.{name}: this name belongs to a scorer; choose another")
    recipe.distinct_names("repair", written)
    for name, other in study.against.items():
        if unknown := {name, other} - study.repair.keys():
            raise InputError(f"against.{name}: must name `repair`, of {sorted(study.repair)}, got {sorted(unknown)}")
        if name == other:
            raise InputError(f"against.{name}: an arm cannot be its own control; name another")


def _check_tokens(study: DataStudy) -> None:
    """Strength and reward models must read the same pairs: which are too long depends on these settings."""
    reward = recipe.reward_config(study, RepairOptions(), data="", model="", validation={})
    measured: dict[str, Any] = recipe.strength_config(study, study.repair_from, data="", model="").model_dump()
    where = "strength"
    if study.strength_folder is not None and (path := Path(study.strength_folder) / "config.json").exists():
        measured, where = measured | json.loads(path.read_text()), f"strength_folder: {path}:"
    for name in ("max_length", "on_overlong"):
        if measured[name] != getattr(reward, name):
            join = " " if where.endswith(":") else "."
            raise InputError(
                f"{where}{join}{name} = {measured[name]}, but reward.{name} = {getattr(reward, name)}: both must be "
                "equal, or the ensemble and the reward models would read different pairs"
            )


def _check_bands_repair(study: DataStudy) -> None:
    for name in ("flip", "soft"):
        chosen = getattr(study.bands_repair, name)
        _distinct(f"bands_repair.{name}", chosen)
        if wrong := [band for band in chosen if not 1 <= band <= study.bands.count]:
            raise InputError(f"bands_repair.{name}: bands are 1 (weakest) to {study.bands.count}, got {wrong}")
    if not study.bands_repair.flip + study.bands_repair.soft:
        raise InputError("bands_repair: name bands in `flip` or `soft`, or leave it out of `analyses`")


def _check_folder(study: DataStudy, folder: Path) -> None:
    """The strength that was measured before: what it is, and whether its members can still be asked."""
    for name in ("strength.parquet", "result.json", "config.json"):
        if not (folder / name).exists():
            raise InputError(f"strength_folder: {folder} has no {name}; give a finished strength/<scoring> folder")
    if given := {"strength", "scorings"} & study.model_fields_set:
        raise InputError(f"{', '.join(sorted(given))}: no effect with strength_folder; leave it out")
    result = json.loads((folder / "result.json").read_text())
    if "repair_from" in study.model_fields_set and study.repair_from != result["scoring"]:
        raise InputError(f"repair_from = {study.repair_from}: the strength in {folder} is {result['scoring']}")
    if not study.needs_members():
        return
    if result["backend"] not in BACKENDS:
        raise InputError(f"strength_folder: members of kind {result['backend']!r} cannot score validation pairs")
    kept = len(list((folder / "members").glob("*/model/config.json")))
    if result["backend"] == "full" and kept != result["members"]:
        raise InputError(
            f"strength_folder: {folder} keeps {kept} of {result['members']} members' models, and `segments` and the "
            "scorer `ensemble` need all; measure with keep_members, or leave these two out"
        )
