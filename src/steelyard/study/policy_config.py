"""The study file of `steelyard study policy`: a grid of cells, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from steelyard import measure, ppo_settings
from steelyard.baselines import BaselineConfig
from steelyard.config import Config, Device, Seed, merged
from steelyard.denoise import RepairOptions
from steelyard.errors import InputError
from steelyard.evaluate.policy import PolicyEvaluationConfig
from steelyard.measure import Scoring
from steelyard.ppo_settings import PPOConfig
from steelyard.recipe import (
    Recipe,
    Settings,
    build,
    folder_names,
    repair_arm,
    reward_config,
    sft_config,
    strength_config,
    world_config,
)
from steelyard.simulate.annotators import AnnotatorConfig, Bias
from steelyard.study.folder import refuse_seeds
from steelyard.train.dpo import DPOConfig

Kind = Literal["none", "uniform", "bradley_terry", "systematic", "mixed"]
PLAIN, AS_LABELLED = "plain", "none"  # the control arm; the repair that changes nothing
OF_ARMS = {"method", "members"}  # what an arm has beside the fields of its stage
Way = tuple[str, str, float | None]


@dataclass(frozen=True, order=True)
class Cell:
    """One policy a seed: the label noise its reward model saw, the repair, the arm, the KL weight (none with DPO)."""

    noise: str
    rate: float
    repair: str
    arm: str
    kl_coef: float | None

    @property
    def world(self) -> str:
        """The noise, in words and as the name of a folder."""
        return "clean" if self.rate == 0 else f"{self.noise} {100 * self.rate:g} %"

    @property
    def data(self) -> tuple[str, str]:
        """(world, repair): what decides the reward models."""
        return self.world, self.repair

    @property
    def way(self) -> Way:
        """(repair, arm, KL weight): how its policy is trained, whatever the labels."""
        return self.repair, self.arm, self.kl_coef

    @property
    def place(self) -> str:
        """Its folder below a seed's `runs`."""
        weight = "offline" if self.kl_coef is None else f"kl-{self.kl_coef:g}"
        return "/".join((self.world.replace(" %", ""), self.repair, self.arm, weight))


class CellBlock(Config):
    """Cells of the grid: every combination of what one block names. A single value may stand for a list."""

    noise: tuple[Kind, ...] = Field(("none",), min_length=1, description="kinds of label noise; mixed: equal thirds")
    rate: tuple[float, ...] = Field((0.0,), min_length=1, description="share of wrong labels; 0: none, of any kind")
    repair: tuple[str, ...] = Field((AS_LABELLED,), min_length=1, description="names of `repairs`, or none")
    arm: tuple[str, ...] = Field(min_length=1, description="names of `arms`")
    kl_coef: tuple[float, ...] | None = Field(
        None, min_length=1, description="weights of the KL penalty; none given: that of `ppo`"
    )

    @field_validator("noise", "rate", "repair", "arm", "kl_coef", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | float | int) else value

    @field_validator("rate")
    @classmethod
    def _shares(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError(f"must be shares from 0 to below 1, got {list(rates)}")
        return rates


class Settled(Config):
    """A way of training, whatever the labels."""

    arm: str = Field(description="one of `arms`")
    repair: str = Field(AS_LABELLED, description="one of `repairs`, or none")
    kl_coef: float | None = Field(None, ge=0, description="weight of the KL penalty; none given: that of `ppo`")


class Asked(Config):
    """A comparison that no rule makes: gold of one way of training less gold of another, on the same labels."""

    of: Settled
    less: Settled


class PolicyStudy(Config):
    """Over-optimisation of policies on the small world. Sections hold the fields of the matching commands."""

    name: str = Field("Over-optimisation", description="title of the report")
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2, 3, 4), min_length=1, description="of each: labels, SFT, reward models, baselines, policies"
    )
    world_seed: int = Field(0, ge=0, description="of prompts and of the texts to learn from; the same for all seeds")
    world: Settings = Field(default_factory=dict, description="sizes of the small world (fields of `simulate`)")
    bias: Bias = Field("length", description="what systematic noise likes")
    model: str = Field("scratch", description="model folder to start from, or `scratch`")
    sft: Settings | None = Field(None, description="fields of `steelyard train sft`; none given: the model as it comes")
    strength: Settings = Field(default_factory=dict, description="fields of `steelyard strength`; repairs read it")
    scoring: Scoring = Field("out-of-fold", description="the strength that repairs read")
    repairs: dict[str, Settings] = Field(
        default_factory=dict,
        description="name -> fields of `steelyard repair`, and `reward`: what differs in the reward model's training",
    )
    against: dict[str, str] = Field(
        default_factory=dict, description="a repair's control -- another of `repairs` -- beside the labels as they are"
    )
    reward: Settings = Field(default_factory=dict, description="fields of `steelyard train reward`, for all models")
    baselines: Settings = Field(default_factory=dict, description="offline sampling: fields of `steelyard sample`")
    ppo: Settings = Field(default_factory=dict, description="fields of `steelyard train ppo`, for all its arms")
    dpo: Settings = Field(default_factory=dict, description="fields of `steelyard train dpo`, for all its arms")
    arms: dict[str, Settings] = Field(
        default_factory=lambda: {PLAIN: {"reward": "plain"}, "contrastive": {"reward": "contrastive"}},
        description="name -> fields that differ; `members`: size of an ensemble of reward models; `method: dpo`",
    )
    cells: tuple[CellBlock, ...] = Field(
        min_length=1,
        description="blocks of cells, whose union the study is, each: " + ", ".join(CellBlock.model_fields),
    )
    looks: int = Field(6, ge=1, description="points of a run at which its policy answers the held-out prompts")
    evaluate: Settings = Field(default_factory=dict, description="how: fields of `steelyard evaluate policy`")
    at_kl: tuple[float, ...] = Field((1.0, 2.0, 4.0), description="distances (nats) at which arms are compared")
    recommended: Settled | None = Field(None, description="settings set against plain PPO in the main figure")
    compare: tuple[Asked, ...] = Field((), description="further comparisons, each `of` and `less` as `recommended` is")
    device: Device = "cpu"
    workers: int | None = Field(
        None, ge=1, description="models trained side by side; none given: one per CPU, on a GPU one"
    )
    threads: int = Field(1, ge=1, description="threads of each of them")

    def grid(self) -> list[Cell]:
        """The cells, each once; in the order of the file, but those of the same labels and repair together."""
        found: dict[Cell, None] = {}
        for block in self.cells:
            for noise, rate, repair, arm in product(block.noise, block.rate, block.repair, block.arm):
                kind = "none" if rate == 0 else noise
                for weight in self._weights(arm, block.kl_coef):
                    found[Cell(kind, rate, repair, arm, weight)] = None
        worlds, data = (list(dict.fromkeys(getattr(c, name) for c in found)) for name in ("world", "data"))
        return sorted(found, key=lambda c: (worlds.index(c.world), data.index(c.data)))

    def _weights(self, arm: str, given: tuple[float, ...] | None) -> tuple[float | None, ...]:
        return (None,) if is_dpo(self, arm) else given or (self.kl_coef,)

    @property
    def kl_coef(self) -> float:
        """The weight of the KL penalty where a cell names none."""
        weight = self.ppo.get("kl_coef", PPOConfig.model_fields["kl_coef"].default)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise InputError(f"ppo.kl_coef: must be a number of at least 0, got {weight!r}")
        return float(weight)

    @property
    def main(self) -> Way | None:
        """The recommended settings."""
        return None if self.recommended is None else self.way(self.recommended)

    def way(self, settled: Settled) -> Way:
        """The settings with their KL weight filled in."""
        weights = self._weights(settled.arm, None if settled.kl_coef is None else (settled.kl_coef,))
        return settled.repair, settled.arm, weights[0]


def is_dpo(study: PolicyStudy, arm: str) -> bool:
    """Whether an arm is trained by DPO."""
    return study.arms.get(arm, {}).get("method", "ppo") == "dpo"


def members(study: PolicyStudy, arm: str) -> int:
    """How many reward models pay an arm."""
    return int(study.arms[arm].get("members", 1))


def control_of(study: PolicyStudy, cell: Cell, grid: list[Cell]) -> Cell | None:
    """Plain PPO with the same labels, repair and KL weight; of DPO, with the study's own weight where it is there."""
    same = [c for c in grid if c.arm == PLAIN and c.data == cell.data]
    if cell.kl_coef is None:
        same.sort(key=lambda c: c.kl_coef != study.kl_coef)
    else:
        same = [c for c in same if c.kl_coef == cell.kl_coef]
    return same[0] if same else None


def recipe_of(study: PolicyStudy, seed: int) -> Recipe:
    """What the stages of a recipe need for one seed: a world without noise (labels are made per cell)."""
    if clash := {"seed", "noise"} & set(study.world):
        raise InputError(f"world: {', '.join(sorted(clash))}: use `world_seed`, `bias` and the cells' `noise`, `rate`")
    noise = {"uniform": 0.0, "bradley_terry": 0.0, "systematic": 0.0, "bias": study.bias}
    return Recipe(
        name=study.name, seed=seed, world={**study.world, "seed": study.world_seed, "noise": noise}, model=study.model,
        sft=study.sft, strength=study.strength, scorings=(study.scoring,), repair_from=study.scoring,
        reward=study.reward, device=study.device, threads=study.threads,
    )  # fmt: skip


def annotators(study: PolicyStudy, cell: Cell) -> AnnotatorConfig:
    """The noise of a cell's labels."""
    kinds = ("uniform", "bradley_terry", "systematic")
    shares = dict.fromkeys(kinds, 0.0)
    for kind in kinds if cell.noise == "mixed" else (cell.noise,) if cell.rate else ():
        shares[kind] = cell.rate / (3 if cell.noise == "mixed" else 1)
    return AnnotatorConfig(**shares, bias=study.bias)


def ppo_config(
    study: PolicyStudy, cell: Cell, seed: int, *, policy: str, rewards: tuple[str, ...], prompts: str,
    baselines: tuple[str, ...], gold: str | None,
) -> PPOConfig:  # fmt: skip
    """Settings of one PPO run. Shared settings that an arm makes idle are left out; where a reward is scaled, so is
    its KL penalty: all arms with one `kl_coef` pay the same price for a nat."""
    where, own = f"arms.{cell.arm}", {n: v for n, v in study.arms[cell.arm].items() if n not in OF_ARMS}
    if clash := {"kl_coef", "scale_kl"} & own.keys() | {"scale_kl"} & study.ppo.keys():
        raise InputError(f"{where}: {', '.join(sorted(clash))}: the study decides; name KL weights in `cells`")
    both = study.ppo | own

    def setting(name: str) -> Any:
        return both.get(name, PPOConfig.model_fields[name].default)

    fixed: Settings = {"policy": policy, "prompts": prompts, "gold": gold, "kl_coef": cell.kl_coef}
    fixed["reward_model"] = rewards[0] if len(rewards) == 1 else rewards
    idle = ppo_settings.idle(setting("reward"), setting("advantage"))
    if len(rewards) == 1:  # an ensemble's arm beside it may want them
        idle |= {"aggregate", "uncertainty_weight"}
    elif setting("aggregate") != "uncertainty-weighted":
        idle |= {"uncertainty_weight"}
    if setting("reward") != "plain":
        own_files = baselines[: len(rewards)]
        fixed["baselines"] = own_files[0] if len(own_files) == 1 else own_files
    scaled = setting("scaling") == "std" or (setting("reward") == "contrastive" and setting("scaling") != "none")
    if not scaled:
        idle |= ppo_settings.SCALING - own.keys() - ({"scaling"} if setting("reward") == "contrastive" else set())
    elif cell.kl_coef:
        fixed["scale_kl"] = True
    shared = {n: v for n, v in study.ppo.items() if n not in idle and n != "kl_coef"}
    return build(PPOConfig, where, {"seed": seed, "device": study.device} | merged(shared, own), **fixed)


def dpo_config(study: PolicyStudy, cell: Cell, seed: int, *, data: str, model: str) -> DPOConfig:
    """Settings of one DPO run. It is looked at as PPO runs are, so it examines nothing itself."""
    own = {n: v for n, v in study.arms[cell.arm].items() if n not in OF_ARMS}
    settings = {"seed": seed, "device": study.device, "eval_every": None} | merged(study.dpo, own)
    if settings.get("use_margin", DPOConfig.model_fields["use_margin"].default) and "margin_in_flip" not in settings:
        settings["margin_in_flip"] = repair_of(study, cell.repair)[0].margin_in_flip
    return build(DPOConfig, f"arms.{cell.arm}", settings, data=data, model=model)


def repair_of(study: PolicyStudy, name: str) -> tuple[RepairOptions, Settings]:
    """(a repair's options, what differs in its reward model's training); `keep` for the labels as they are."""
    return repair_arm(f"repairs.{name}", study.repairs.get(name, {"recipe": "keep"}))


def baseline_config(study: PolicyStudy, seed: int, *, policy: str, prompts: str, reward_model: str) -> BaselineConfig:
    """Settings of the offline sampling for one reward model."""
    fixed = {"policy": policy, "prompts": prompts, "reward_model": reward_model}
    return build(BaselineConfig, "baselines", {"seed": seed, "device": study.device} | study.baselines, **fixed)


def evaluation_config(study: PolicyStudy) -> PolicyEvaluationConfig:
    """How policies answer."""
    return build(PolicyEvaluationConfig, "evaluate", {"device": study.device} | study.evaluate)


def needs_baselines(study: PolicyStudy, arm: str) -> bool:
    """Whether an arm is paid relative to stored baselines."""
    return not is_dpo(study, arm) and (study.ppo | study.arms[arm]).get("reward", "contrastive") != "plain"


def check(study: PolicyStudy) -> None:
    """Refuse what cannot be run, before anything starts. Raises InputError naming the field."""
    for field in ("seeds", "at_kl"):
        values = getattr(study, field)
        if len(set(values)) < len(values):
            raise InputError(f"{field}: must differ from each other, got {list(values)}")
    if any(x <= 0 for x in study.at_kl):
        raise InputError(f"at_kl: must be above 0 nats, got {list(study.at_kl)}")
    if study.model == "scratch" and study.sft is None:
        raise InputError("`model: scratch` needs an `sft` section: a model without training cannot be rewarded")
    if study.model != "scratch" and not Path(study.model).is_dir():
        raise InputError(f"model: {study.model}: no such folder")
    sections = {name: getattr(study, name) for name in ("sft", "strength", "reward", "baselines", "ppo", "dpo")}
    refuse_seeds(sections | {f"arms.{name}": own for name, own in study.arms.items()})
    _check_arms(study)
    _check_cells(study)
    _check_stages(study)


def _check_arms(study: PolicyStudy) -> None:
    if study.arms.get(PLAIN, {}).get("reward") != "plain" or is_dpo(study, PLAIN):
        raise InputError(f"arms.{PLAIN}: all arms are compared with it; it must be there, with `reward: plain`")
    if AS_LABELLED in study.repairs:
        raise InputError(f"repairs.{AS_LABELLED}: this name belongs to the labels as they are; choose another")
    folder_names("arms", study.arms)
    folder_names("repairs", study.repairs)
    for name, settings in study.arms.items():
        if (method := settings.get("method", "ppo")) not in ("ppo", "dpo"):
            raise InputError(f"arms.{name}.method: must be ppo or dpo, got {method!r}")
        size = settings.get("members", 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or (size > 1 and is_dpo(study, name)):
            raise InputError(f"arms.{name}.members: must be a whole number from 1 on, and 1 with DPO, got {size!r}")
    for name, other in study.against.items():
        if unknown := {name, other} - study.repairs.keys():
            raise InputError(f"against.{name}: must name `repairs`, of {sorted(study.repairs)}, got {sorted(unknown)}")
        if name == other:
            raise InputError(f"against.{name}: a repair cannot be its own control; name another")


def _require_known(study: PolicyStudy, where: str, repairs: Sequence[str], arms: Sequence[str]) -> None:
    for name, given, known in (
        ("arm", arms, set(study.arms)),
        ("repair", repairs, {AS_LABELLED, *study.repairs}),
    ):
        if unknown := set(given) - known:
            raise InputError(f"{where}.{name}: must be of {sorted(known)}, got {sorted(unknown)}")


def _check_cells(study: PolicyStudy) -> None:
    grid = study.grid()
    for i, block in enumerate(study.cells):
        _require_known(study, f"cells.{i}", block.repair, block.arm)
        if any(block.rate) and "none" in block.noise:
            raise InputError(f"cells.{i}.noise: none goes with rate 0 only, got rates {list(block.rate)}")
    for cell in grid:
        if control_of(study, cell, grid) is None:
            raise InputError(
                f"cells: {cell.place} has no {PLAIN} arm with the same labels, repair and kl_coef to be compared with; "
                "add one"
            )
    if study.recommended is not None:
        _require_known(study, "recommended", (study.recommended.repair,), (study.recommended.arm,))
    if study.main is not None and study.main not in {c.way for c in grid}:
        raise InputError(f"recommended: no cell has repair, arm and kl_coef = {study.main}; add some")
    for i, asked in enumerate(study.compare):
        for name, settled in (("of", asked.of), ("less", asked.less)):
            _require_known(study, f"compare.{i}.{name}", (settled.repair,), (settled.arm,))
        of, less = study.way(asked.of), study.way(asked.less)
        if of == less:
            raise InputError(f"compare.{i}: of and less are the same, repair, arm and kl_coef = {of}; name two")
        if not {c.world for c in grid if c.way == of} & {c.world for c in grid if c.way == less}:
            raise InputError(
                f"compare.{i}: no labels have cells of both repair, arm and kl_coef = {of} and {less}; add some"
            )


def _check_stages(study: PolicyStudy) -> None:
    recipe = recipe_of(study, study.seeds[0])
    world_config(recipe)
    if study.sft is not None:
        sft_config(recipe, data="", tokenizer="" if study.model == "scratch" else None)
    evaluation = evaluation_config(study)
    if evaluation.k < 2:
        raise InputError(f"evaluate.k: must be at least 2, to tell prompts from chance, got {evaluation.k}")
    if bent := evaluation.sampling.bent():
        raise InputError(
            "evaluate.sampling: policies must answer as they are, for the KL is the mean log-ratio of these answers at "
            f"temperature 1; leave out {', '.join(f'{n} = {x:g}' for n, x in bent.items())}"
        )
    if any(repair_of(study, cell.repair)[0].recipe != "keep" for cell in study.grid()):
        config = strength_config(recipe, study.scoring, data="", model="")
        try:
            measure.check(config)
        except InputError as error:
            raise InputError(f"strength: {error}") from None
    for cell in study.grid():
        options, own = repair_of(study, cell.repair)
        where = f"repairs.{cell.repair}: reward" if own else "reward"
        reward_config(recipe, options, own, data="", model="", validation={}, where=where)
        annotators(study, cell)
        _check_cell(study, cell)
    baseline_config(study, 0, policy="", prompts="", reward_model="")


def _check_cell(study: PolicyStudy, cell: Cell) -> None:
    if is_dpo(study, cell.arm):
        dpo_config(study, cell, 0, data="", model="")
        return
    rewards = tuple(str(m) for m in range(members(study, cell.arm)))
    config = ppo_config(study, cell, 0, policy="", rewards=rewards, prompts="", baselines=rewards, gold=None)
    try:
        ppo_settings.check(config)
    except InputError as error:
        raise InputError(f"arms.{cell.arm}: {error}") from None
    if needs_baselines(study, cell.arm):
        stored = baseline_config(study, 0, policy="", prompts="", reward_model="")
        ppo_settings.check_baselines(config, stored, f"arms.{cell.arm}", "baselines")
