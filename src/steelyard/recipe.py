"""A recipe: the settings of a whole run, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from steelyard.config import Config
from steelyard.data.load import OnInvalid
from steelyard.denoise import RepairOptions
from steelyard.errors import InputError
from steelyard.measure import Scoring

C = TypeVar("C", bound=Config)
Settings = dict[str, Any]


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
    ppo: Settings = Field(default_factory=dict, description="fields of `steelyard train ppo`, for all arms")
    arms: dict[str, Settings] = Field(
        default_factory=lambda: {"plain PPO": {"reward": "plain"}, "contrastive PPO": {"reward": "contrastive"}},
        description="name -> fields that differ, and `rm`: the reward model's arm",
    )
    evaluate: Settings = Field(default_factory=dict, description="examination of the policies")
    limit_eval: int | None = Field(None, ge=1, description="examine on the first prompts only")


class Recipe(Config):
    """A whole run. Sections hold the fields of the matching commands; paths between stages are filled in."""

    name: str = Field("run", description="title of the report")
    seed: int = Field(0, ge=0, description="seed of every stage that does not set its own")
    world: Settings | None = Field(None, description="the built-in small world (fields of `steelyard simulate`)")
    data: DataConfig | None = Field(None, description="or the user's files")
    model: str = Field("scratch", description="model folder to start from, or `scratch` (small world)")
    sft: Settings | None = Field(None, description="supervised fine-tuning; none given: the model as it comes")
    strength: Settings = Field(default_factory=dict, description="fields of `steelyard strength`")
    scorings: tuple[Scoring, ...] = Field(("out-of-fold",), description="which strengths are measured")
    repair_from: Scoring = Field("out-of-fold", description="the strength that repairs read")
    repair: dict[str, Settings] = Field(
        default_factory=lambda: {"plain": {"recipe": "keep"}}, description="arm -> fields of `steelyard repair`"
    )
    reward: Settings = Field(default_factory=dict, description="fields of `steelyard train reward`, for all arms")
    policy: PolicyConfig | None = Field(None, description="baselines, PPO and evaluation; none given: stop before")
    workers: int | None = Field(None, ge=1, description="arms trained side by side; none given: one per CPU")
    threads: int = Field(1, ge=1, description="threads of each of them")


def build(config: type[C], where: str, settings: Mapping[str, Any], **filled: Any) -> C:
    """A stage's configuration from a recipe's section. Raises InputError naming section and field."""
    clash = set(settings) & set(filled)
    if clash:
        raise InputError(f"{where}: {', '.join(sorted(clash))} is filled in by the recipe's other parts; leave it out")
    try:
        return config(**{**settings, **filled})
    except ValidationError as error:
        lines = [f"{where}.{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise InputError("\n".join(lines)) from None


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
    for name, settings in recipe.repair.items():
        build(RepairOptions, f"repair.{name}", settings)
    for name, settings in (recipe.policy.arms if recipe.policy else {}).items():
        if settings.get("rm", default_arm(recipe)) not in recipe.repair:
            raise InputError(f"policy.arms.{name}.rm must be one of {list(recipe.repair)}, got {settings.get('rm')!r}")


def default_arm(recipe: Recipe) -> str:
    """The reward model that the policy side uses unless an arm names another: the first one."""
    return next(iter(recipe.repair))
