"""A recipe: the settings of a whole run, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from steelyard import measure, ppo_settings
from steelyard.baselines import BaselineConfig
from steelyard.config import Config, Device, explain, merged
from steelyard.data.load import OnInvalid
from steelyard.denoise import RepairOptions
from steelyard.errors import InputError
from steelyard.evaluate.endpoint import read_key
from steelyard.evaluate.judge import JudgeConfig
from steelyard.evaluate.policy import PolicyEvaluationConfig
from steelyard.measure import Scoring, StrengthConfig
from steelyard.ppo_settings import PPOConfig
from steelyard.simulate.write import WorldConfig
from steelyard.train.dpo import DPOConfig
from steelyard.train.reward import RewardConfig
from steelyard.train.sft import SFTConfig

C = TypeVar("C", bound=Config)
Settings = dict[str, Any]

METHODS = ("ppo", "dpo")
# Of a reward model's training: what decides which pairs are read, in which order, and where.
_ALIKE = {"max_length", "on_overlong", "on_invalid", "precision", "device", "seed"}
_OF_ARMS = {"method", "rm", "data"}  # what a policy arm has beside the fields of its stage


class DataConfig(Config):
    """The user's own files."""

    preferences: str = Field(description="training pairs")
    validation: str | None = Field(None, description="validation pairs with other prompts than the training pairs")
    prompts: str | None = Field(None, description="prompts for PPO; none given: those of the preferences")
    eval_prompts: str | None = Field(None, description="prompts on which policies are examined")
    limit: int | None = Field(None, ge=1, description="use only the first usable pairs")
    validation_limit: int | None = Field(None, ge=1, description="examine on the first usable pairs only")
    truth_column: str | None = Field(None, description="column with 1 label right, -1 wrong, 0 tie: evaluation only")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")


class PolicyConfig(Config):
    """The policy side of a recipe."""

    baselines: Settings = Field(default_factory=dict, description="offline sampling: fields of `steelyard sample`")
    ppo: Settings = Field(default_factory=dict, description="fields of `steelyard train ppo`, for all its arms")
    dpo: Settings = Field(default_factory=dict, description="fields of `steelyard train dpo`, for all its arms")
    arms: dict[str, Settings] = Field(
        default_factory=lambda: {"plain PPO": {"reward": "plain"}, "contrastive PPO": {"reward": "contrastive"}},
        description="name -> fields that differ, and `rm`: the reward model's arm; an arm with `method: dpo` has "
        "`data`: the repair arm whose pairs it learns from",
    )
    evaluate: Settings = Field(default_factory=dict, description="examination of the policies")
    judge: Settings | None = Field(None, description="fields of `steelyard evaluate judge`; none given: no judge")
    limit_eval: int | None = Field(None, ge=1, description="examine on the first prompts only")


class Recipe(Config):
    """A whole run. Sections hold the fields of the matching commands; paths between stages are filled in."""

    name: str = Field("run", description="title of the report")
    seed: int = Field(0, ge=0, description="seed of every stage that does not set its own")
    world: Settings | None = Field(None, description="the built-in small world (fields of `steelyard simulate`)")
    data: DataConfig | None = Field(None, description="or the user's files: " + ", ".join(DataConfig.model_fields))
    model: str = Field("scratch", description="model folder to start from, or `scratch` (small world)")
    sft: Settings | None = Field(None, description="fields of `steelyard train sft`; none given: the model as it comes")
    strength: Settings = Field(default_factory=dict, description="fields of `steelyard strength`")
    scorings: tuple[Scoring, ...] = Field(("out-of-fold",), description="which strengths are measured")
    repair_from: Scoring = Field("out-of-fold", description="the strength that repairs read")
    repair: dict[str, Settings] = Field(
        default_factory=lambda: {"plain": {"recipe": "keep"}},
        description="arm -> fields of `steelyard repair`, and `reward`: what differs in its reward model's training",
    )
    reward: Settings = Field(default_factory=dict, description="fields of `steelyard train reward`, for all arms")
    policy: PolicyConfig | None = Field(
        None, description=", ".join(PolicyConfig.model_fields) + "; none given: stop before them"
    )
    device: Device = "cpu"
    workers: int | None = Field(
        None, ge=1, description="arms trained side by side; none given: one per CPU, on a GPU one"
    )
    threads: int = Field(1, ge=1, description="threads of each of them")


def build(config: type[C], where: str, settings: Mapping[str, Any], **filled: Any) -> C:
    """A stage's configuration from a recipe's section. Raises InputError naming section and field."""
    clash = set(settings) & set(filled)
    if clash:
        raise InputError(f"{where}: {', '.join(sorted(clash))} is filled in by the recipe's other parts; leave it out")
    try:
        return config(**{**settings, **filled})
    except ValidationError as error:
        raise InputError(explain(error, lambda field: f"{where}.{field}")) from None


def _everywhere(recipe: Recipe) -> Settings:
    """What every stage that runs models has unless its section says otherwise."""
    return {"seed": recipe.seed, "device": recipe.device}


def world_config(recipe: Recipe) -> WorldConfig:
    """The small world's settings."""
    return build(WorldConfig, "world", {"seed": recipe.seed} | (recipe.world or {}))


def sft_config(recipe: Recipe, *, data: str | None, tokenizer: str | None) -> SFTConfig:
    """Settings of the SFT stage; `data` and `tokenizer` are the small world's, None with the user's files."""
    world = {name: value for name, value in (("data", data), ("tokenizer", tokenizer)) if value is not None}
    return build(SFTConfig, "sft", _everywhere(recipe) | (recipe.sft or {}), model=recipe.model, **world)


def strength_config(recipe: Recipe, scoring: Scoring, *, data: str, model: str) -> StrengthConfig:
    """Settings of one scoring. The folds are the out-of-fold scoring's alone."""
    settings = _everywhere(recipe) | recipe.strength
    if scoring == "in-sample" and "out-of-fold" in recipe.scorings:
        settings.pop("folds", None)
    return build(StrengthConfig, "strength", settings, data=data, model=model, scoring=scoring)


def repair_arm(where: str, settings: Mapping[str, Any]) -> tuple[RepairOptions, Settings]:
    """(how an arm's pairs are repaired, what is different in the training of its reward model: its `reward`)."""
    own = dict(settings)
    reward = own.pop("reward", {})
    if not isinstance(reward, dict):
        raise InputError(f"{where}.reward: must hold fields of `steelyard train reward`, got {reward!r}")
    if alike := _ALIKE & set(reward):
        raise InputError(f"{where}.reward: {', '.join(sorted(alike))}: must be the same for all arms; use `reward`")
    return build(RepairOptions, where, own), reward


def reward_config(
    recipe: Recipe,
    options: RepairOptions,
    own: Mapping[str, Any] | None = None,
    *,
    data: str,
    model: str,
    validation: dict[str, str],
    where: str = "reward",
) -> RewardConfig:
    """Settings of one arm's reward model: the shared ones, and over them the arm's `own`, section by section."""
    settings = merged(_everywhere(recipe) | recipe.reward, own or {})
    fixed = {"data": data, "model": model, "validation": validation, "margin_in_flip": options.margin_in_flip}
    return build(RewardConfig, where, settings, **fixed)


def baseline_config(
    recipe: Recipe, policy: PolicyConfig, *, model: str, prompts: str, reward_model: str
) -> BaselineConfig:
    """Settings of the offline sampling."""
    settings = _everywhere(recipe) | policy.baselines
    return build(BaselineConfig, "policy.baselines", settings, policy=model, prompts=prompts, reward_model=reward_model)


def arm_setting(policy: PolicyConfig, arm: str, name: str) -> Any:
    """What a policy arm has for one field of PPO: its own, the shared one, or the default."""
    return (policy.ppo | policy.arms[arm]).get(name, PPOConfig.model_fields[name].default)


def arms_by(policy: PolicyConfig, method: str) -> list[str]:
    """The policy arms that are trained by one of `METHODS`."""
    return [name for name, settings in policy.arms.items() if settings.get("method", METHODS[0]) == method]


def arm_data(recipe: Recipe, policy: PolicyConfig, arm: str) -> str:
    """The repair arm that a DPO arm learns from: its `data`, or the first one."""
    return str(policy.arms[arm].get("data", default_arm(recipe)))


def arm_reward(recipe: Recipe, policy: PolicyConfig, arm: str) -> str:
    """The reward model's arm that a policy arm is trained against, or (DPO) only examined by: its `rm`.

    Without one: the first repair arm; for DPO the reward model of the pairs that it learns from.
    """
    own = arm_data(recipe, policy, arm) if arm in arms_by(policy, "dpo") else default_arm(recipe)
    return str(policy.arms[arm].get("rm", own))


def needs_baselines(policy: PolicyConfig, arm: str) -> bool:
    """Whether a policy arm is paid relative to stored baselines."""
    return arm in arms_by(policy, "ppo") and bool(arm_setting(policy, arm, "reward") != "plain")


def ppo_config(
    recipe: Recipe,
    policy: PolicyConfig,
    arm: str,
    *,
    model: str,
    prompts: str,
    reward_model: str,
    baselines: str,
    gold: str | None,
) -> PPOConfig:
    """Settings of one PPO arm. What `policy.ppo` says of baselines, scaling or critic is left out where an arm
    has none."""
    shared, own = policy.ppo, {name: v for name, v in policy.arms[arm].items() if name not in ("method", "rm")}
    fixed: Settings = {"policy": model, "prompts": prompts, "reward_model": reward_model, "gold": gold}
    reward, scaling = arm_setting(policy, arm, "reward"), arm_setting(policy, arm, "scaling")
    idle = ppo_settings.idle(reward, arm_setting(policy, arm, "advantage"))
    if needs_baselines(policy, arm):
        fixed["baselines"] = baselines
    if scaling != "std" and reward != "contrastive":
        idle |= ppo_settings.SCALING
    elif scaling == "none":
        idle |= ppo_settings.SCALING - {"scaling"}
    shared = {name: value for name, value in shared.items() if name not in idle}
    return build(PPOConfig, f"policy.arms.{arm}", _everywhere(recipe) | merged(shared, own), **fixed)


def dpo_config(
    recipe: Recipe,
    policy: PolicyConfig,
    arm: str,
    options: RepairOptions,
    *,
    data: str,
    model: str,
    prompts: str,
    reward_model: str,
    validation: dict[str, str],
    gold: str | None,
) -> DPOConfig:
    """Settings of one DPO arm; `options` are those of the repair that wrote its `data`."""
    own = {name: value for name, value in policy.arms[arm].items() if name not in _OF_ARMS}
    seen: Settings = {"prompts": prompts, "reward_model": reward_model, "gold": gold, "validation": validation}
    settings = _everywhere(recipe) | merged(policy.dpo, own)
    return _dpo(f"policy.arms.{arm}", settings, options, seen, data=data, model=model)


def _dpo(where: str, settings: Settings, options: RepairOptions, seen: Settings, **fixed: Any) -> DPOConfig:
    if settings.get("eval_every", DPOConfig.model_fields["eval_every"].default) is not None:
        fixed |= seen
    elif clash := set(settings) & set(seen):
        raise InputError(f"{where}: {', '.join(sorted(clash))}: no effect without eval_every; leave out")
    if settings.get("use_margin", DPOConfig.model_fields["use_margin"].default):
        fixed["margin_in_flip"] = options.margin_in_flip
    return build(DPOConfig, where, settings, **fixed)


def judge_config(recipe: Recipe, policy: PolicyConfig) -> JudgeConfig:
    """Settings of the judges."""
    settings = policy.judge or {}
    if settings.get("reward_models"):
        settings = {"device": recipe.device} | settings
    return build(JudgeConfig, "policy.judge", settings)


def evaluation_length(policy: PolicyConfig) -> int:
    """Tokens of prompt and response in the policies' examination: as in training, of PPO where there is any."""
    settings, config = (policy.ppo, PPOConfig) if arms_by(policy, "ppo") else (policy.dpo, DPOConfig)
    return int(settings.get("max_length", config.model_fields["max_length"].default))


def evaluation_config(recipe: Recipe, policy: PolicyConfig) -> PolicyEvaluationConfig:
    """Settings of the policies' examination."""
    return build(PolicyEvaluationConfig, "policy.evaluate", {"device": recipe.device} | policy.evaluate)


def check(recipe: Recipe) -> None:
    """Refuse contradictions before anything runs."""
    if (recipe.world is None) == (recipe.data is None):
        raise InputError("a recipe needs either `world` (the built-in small world) or `data` (your files)")
    if recipe.model == "scratch" and recipe.sft is None:
        raise InputError("`model: scratch` needs an `sft` section: a model without training cannot be rewarded")
    if recipe.data is not None and recipe.sft is not None and recipe.model == "scratch":
        raise InputError("`model: scratch` is for the small world; with `data`, name a model folder")
    if recipe.repair_from not in recipe.scorings:
        raise InputError(f"repair_from = {recipe.repair_from} must be one of scorings = {list(recipe.scorings)}")
    if not recipe.repair:
        raise InputError("repair: name at least one arm, such as `plain: {recipe: keep}`")
    distinct_names("repair", recipe.repair)
    folder_names("repair", recipe.repair)
    _check_files(recipe)
    _check_stages(recipe)
    if recipe.policy is not None:
        _check_policy(recipe, recipe.policy)


def slug(name: str) -> str:
    """A name as part of a path."""
    return name.replace(",", "").replace(" ", "-").replace("/", "-")


def distinct_names(field: str, names: Iterable[str]) -> None:
    """Raise InputError where two names become the same file or folder name: one would take the other's results."""
    by_slug: dict[str, str] = {}
    for name in names:
        if (other := by_slug.setdefault(slug(name), name)) != name:
            raise InputError(
                f"{field}: {other!r} and {name!r} differ only in spaces, hyphens, slashes or commas, and would share "
                "their files; rename one"
            )


def folder_names(field: str, names: Iterable[str]) -> None:
    """Raise InputError where a name cannot be that of a folder."""
    if wrong := [name for name in names if "/" in name or name in ("", ".", "..")]:
        raise InputError(f"{field}: {wrong[0]!r} cannot name a folder; choose another name")


def _check_files(recipe: Recipe) -> None:
    """The user's files must be there: some are read only hours after the start."""
    for name in ("preferences", "validation", "prompts", "eval_prompts"):
        path = getattr(recipe.data, name, None)
        if path is not None and not Path(path).exists():
            raise InputError(f"data.{name}: {path}: no such file")
    if recipe.model != "scratch" and not Path(recipe.model).is_dir():
        raise InputError(f"model: {recipe.model}: no such folder")


def _check_stages(recipe: Recipe) -> None:
    """Every section up to the reward models, with empty paths for what earlier stages will leave."""
    if recipe.world is not None:
        world_config(recipe)
    if recipe.sft is not None:
        made = "" if recipe.world is not None else None
        sft_config(recipe, data=made, tokenizer=made if recipe.model == "scratch" else None)
    for scoring in recipe.scorings:
        config = strength_config(recipe, scoring, data="", model="")
        try:
            measure.check(config)
            measure.held_out_plan(config, [str(prompt) for prompt in range(config.folds)])
        except InputError as error:
            raise InputError(f"strength: {error}") from None
    for name, settings in recipe.repair.items():
        options, own = repair_arm(f"repair.{name}", settings)
        if options.recipe == "oracle flip" and recipe.data is not None and recipe.data.truth_column is None:
            raise InputError(f"repair.{name}: oracle flip needs the truth: name its column in data.truth_column")
        where = f"repair.{name}: reward" if own else "reward"
        reward_config(recipe, options, own, data="", model="", validation={}, where=where)


def _check_policy(recipe: Recipe, policy: PolicyConfig) -> None:
    if not policy.arms:
        raise InputError("policy.arms: name at least one arm, such as `plain PPO: {reward: plain}`")
    folder_names("policy.arms", policy.arms)
    if "SFT" in policy.arms:
        raise InputError("policy.arms: SFT is the name of the model that the arms start from; choose another name")
    for name, settings in policy.arms.items():
        if (method := settings.get("method", METHODS[0])) not in METHODS:
            raise InputError(f"policy.arms.{name}.method must be one of {list(METHODS)}, got {method!r}")
        if method == "dpo" and arm_data(recipe, policy, name) not in recipe.repair:
            raise InputError(
                f"policy.arms.{name}.data must be one of {list(recipe.repair)}, got {settings.get('data')!r}"
            )
        if arm_reward(recipe, policy, name) not in recipe.repair:
            raise InputError(f"policy.arms.{name}.rm must be one of {list(recipe.repair)}, got {settings.get('rm')!r}")
    for method, shared in (("ppo", policy.ppo), ("dpo", policy.dpo)):
        if shared and not arms_by(policy, method):
            raise InputError(
                f"policy.{method}: no effect without an arm of `method: {method}`; leave it out, or add one"
            )
    baseline_config(recipe, policy, model="", prompts="", reward_model="")
    evaluation_config(recipe, policy)
    _check_ppo(recipe, policy)
    _check_dpo(recipe, policy)
    if policy.judge is not None:
        _check_judge(recipe, policy)


def _check_ppo(recipe: Recipe, policy: PolicyConfig) -> None:
    build(PPOConfig, "policy.ppo", policy.ppo, policy="", reward_model="", prompts="")
    for name in arms_by(policy, "ppo"):
        config = ppo_config(recipe, policy, name, model="", prompts="", reward_model="", baselines="", gold=None)
        try:
            ppo_settings.check(config)
        except InputError as error:
            raise InputError(f"policy.arms.{name}: {error}") from None
        if needs_baselines(policy, name):
            stored = baseline_config(recipe, policy, model="", prompts="", reward_model="")
            ppo_settings.check_baselines(config, stored, f"policy.arms.{name}", "policy.baselines")


def _check_dpo(recipe: Recipe, policy: PolicyConfig) -> None:
    paths: Settings = {"prompts": "", "reward_model": "", "gold": None, "validation": {}}
    _dpo("policy.dpo", policy.dpo, RepairOptions(), paths, data="", model="")
    for name in arms_by(policy, "dpo"):
        data = arm_data(recipe, policy, name)
        options, _ = repair_arm(f"repair.{data}", recipe.repair[data])
        dpo_config(recipe, policy, name, options, data="", model="", **paths)


def _check_judge(recipe: Recipe, policy: PolicyConfig) -> None:
    """Also what the judges need later: it would be missed only hours after the start."""
    config = judge_config(recipe, policy)
    policies = ["SFT", *policy.arms]
    if config.against is not None and config.against not in policies:
        raise InputError(f"policy.judge.against must be one of {policies}, got {config.against!r}")
    k = evaluation_config(recipe, policy).k
    if config.per_prompt > k:
        raise InputError(f"policy.judge.per_prompt must be at most policy.evaluate.k = {k}, got {config.per_prompt}")
    for folder in config.reward_models:
        if not Path(folder).is_dir():
            raise InputError(f"policy.judge.reward_models: {folder}: no such folder")
    try:
        read_key(config)
    except InputError as error:
        raise InputError(f"policy.judge.{error}") from None


def default_arm(recipe: Recipe) -> str:
    """The reward model that the policy side uses unless an arm names another: the first one."""
    return next(iter(recipe.repair))
