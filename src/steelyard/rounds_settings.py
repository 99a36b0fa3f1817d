"""The settings of rounds, and of every stage in them: what each round's commands would have been told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from steelyard import ppo_settings
from steelyard.baselines import BaselineConfig
from steelyard.config import Config, Device, explain, merged
from steelyard.errors import InputError
from steelyard.evaluate.policy import PolicyEvaluationConfig
from steelyard.evaluate.rounds import GOLD, JUDGE, Keep
from steelyard.ppo_settings import PPOConfig
from steelyard.train.metarm import MetaRMConfig
from steelyard.train.reward import RewardConfig

C = TypeVar("C", bound=Config)
Settings = dict[str, Any]


class RoundsConfig(Config):
    """Rounds of sampling, reward model, PPO and examination. Sections hold the fields of the matching commands."""

    sft: str = Field(description="the SFT model's folder: round 1 starts from it, and it is the reference of the KL")
    reward_model: str = Field(description="reward-model folder that the rounds begin with")
    prompts: str = Field(description="prompts of PPO: JSONL, CSV or Parquet, or a preference file")
    eval_prompts: str = Field(description="held-out prompts of the examination")
    rounds: int = Field(4, ge=1, description="rounds at most")
    patience: int | None = Field(
        1, ge=1, description="stop after so many rounds without a better one; null: go through all rounds"
    )
    reward: Literal["metarm", "plain", "fixed"] = Field(
        "metarm", description="the reward model in each round: MetaRM, trained on plainly, or left as it is"
    )
    reward_from: Literal["previous", "first"] = Field(
        "previous", description="each round's reward model goes on from the previous round's, or from the first"
    )
    data: str | None = Field(None, description="preferences that it is trained on; not for fixed")
    rm: Settings = Field(default_factory=dict, description="fields that `train reward` and `train metarm` share")
    meta: Settings = Field(default_factory=dict, description="fields of `train metarm` alone, such as eta")
    meta_prompts: str | None = Field(
        None, description="prompts of the meta set, such as another domain's; none given: those of PPO"
    )
    meta_sample: Settings = Field(
        default_factory=dict, description="fields of `sample` for the meta set (k 5; sampling as in PPO)"
    )
    ppo: Settings = Field(default_factory=dict, description="fields of `train ppo`")
    baselines: Literal["sft", "current"] = Field(
        "sft", description="whose responses the baselines are: the SFT model's, or the policy's as each round starts"
    )
    baseline_sample: Settings = Field(
        default_factory=dict, description="fields of `sample` for the baselines (k 3; sampling as in PPO)"
    )
    validation: dict[str, str] = Field(
        default_factory=dict, description="name -> preference file, on which reward models are examined"
    )
    gold: str | None = Field(None, description="`module:function` of a gold scorer: examines, never trains")
    judge: str | None = Field(None, description="reward-model folder that was trained on other data: examines")
    keep_by: Literal["gold", "judge", "nothing"] | None = Field(
        None, description="criterion of the best round; none given: gold, else the judge, else nothing"
    )
    keep: Keep = Field(
        "best", description="by that criterion: the best round, or the earliest not told apart from it at 95 %"
    )
    kl_price: float = Field(0.0, ge=0, description="taken from the criterion for each nat of KL")
    evaluate: Settings = Field(
        default_factory=dict, description="the examination: fields of `evaluate policy` such as k (sampling as in PPO)"
    )
    device: Device = "cpu"
    seed: int = Field(0, ge=0, description="every round's sampling and order follow from it and the round's number")


class Round(NamedTuple):
    """Where a round stands: its number, its policy's and its reward model's folder."""

    number: int
    policy: str
    reward_model: str


def check_settings(config: RoundsConfig) -> None:
    """Raise InputError for settings that are missing, have no effect, or do not fit together; opens no file."""
    if config.reward != "fixed" and config.data is None:
        raise InputError(f"data: reward = {config.reward} trains the reward model; name its preferences, or use fixed")
    for name, needed in ((GOLD, config.gold), (JUDGE, config.judge)):
        if config.keep_by == name and needed is None:
            raise InputError(f"keep_by: {name} needs `{name}`; give it, or choose by something else")
    idle: list[tuple[set[str], str]] = []
    if config.reward != "metarm":
        idle.append(({"meta", "meta_prompts", "meta_sample"}, f"with reward = {config.reward}"))
    if config.reward == "fixed":
        idle.append(({"data", "rm", "reward_from"}, "with reward = fixed"))
    if not relative(config):
        idle.append(({"baselines", "baseline_sample"}, "with ppo.reward = plain"))
    if criterion(config)[0] is None:
        turning = set() if config.patience is None else {"patience"}
        idle.append((turning | {"kl_price", "keep"}, "where no criterion tells rounds apart; give gold or judge"))
    for names, reason in idle:
        if useless := names & config.given():
            raise InputError(f"{', '.join(sorted(useless))}: no effect {reason}; leave out")
    if useless := {"tie", "strata"} & set(config.evaluate):
        raise InputError(
            f"evaluate: {', '.join(sorted(useless))}: no effect in rounds, which count no wins and no strata; leave out"
        )
    some = Round(1, "", "")
    # PPO's own section first: the others take over from it, faults too.
    optimise, stored = ppo_config(config, some, baselines=""), baselines_config(config, some)
    reward_config(config, 1, model="", meta="")
    meta_config(config, 1, "")
    how = evaluation_config(config)
    try:
        ppo_settings.check(optimise)
    except InputError as error:
        raise InputError(f"ppo: {error}") from None
    if relative(config):
        ppo_settings.check_baselines(optimise, stored, "ppo", "baseline_sample")
    if config.kl_price and (bent := how.sampling.bent()):
        raise InputError(
            "kl_price: the examination's answers must be drawn from the policy as it is, for only then is their mean "
            f"log-ratio the KL; give evaluate.sampling without {', '.join(bent)}, or leave kl_price out"
        )


def criterion(config: RoundsConfig) -> tuple[str | None, str]:
    """(what chooses the best round, and why that; None: nothing does)."""
    if config.keep_by == "nothing":
        return None, "asked not to choose: all rounds are kept"
    if config.gold is not None and config.keep_by != "judge":
        return GOLD, f"the gold scorer {config.gold}"
    if config.judge is not None:
        why = f"the reward model {config.judge}, trained on other data: a stand-in for people, no truth"
        if not config.kl_price:
            # recipes/policy-study: without a price judges kept rounds far behind the turn.
            why += ", which can climb on where people would turn away: set kl_price, so that distance costs something"
        return JUDGE, why
    return None, (
        "no gold scorer and no reward model trained on other data were given: the rewards that the rounds optimise "
        "cannot tell a better policy from one that deceives them, so all rounds are kept and none is called best"
    )


def _build(kind: type[C], where: str, settings: Mapping[str, Any], defaults: Settings, **filled: Any) -> C:
    """A stage's settings from a section. Raises InputError naming section and field."""
    if clash := set(settings) & set(filled):
        raise InputError(f"{where}: {', '.join(sorted(clash))} is filled in by the rounds; leave it out")
    try:
        return kind(**{**merged(defaults, settings), **filled})
    except ValidationError as error:
        raise InputError(explain(error, lambda field: f"{where}.{field}")) from None


def seed_of(config: RoundsConfig, number: int) -> int:
    """A round's own seed: no round repeats another's order or random numbers."""
    return config.seed * 1000 + number


def relative(config: RoundsConfig) -> bool:
    return bool(config.ppo.get("reward", PPOConfig.model_fields["reward"].default) != "plain")


def _where(config: RoundsConfig) -> Settings:
    return {"device": config.device}


def _shared(config: RoundsConfig) -> Settings:
    """What sampling takes over from PPO where its own section does not say otherwise."""
    names = ("sampling", "max_length", "precision", "device")
    return _where(config) | {name: config.ppo[name] for name in names if name in config.ppo}


def meta_config(config: RoundsConfig, number: int, policy: str) -> BaselineConfig:
    prompts = config.prompts if config.meta_prompts is None else config.meta_prompts
    defaults = {"k": 5} | _shared(config)
    filled = {"policy": policy, "prompts": prompts, "reward_model": None, "seed": seed_of(config, number)}
    return _build(BaselineConfig, "meta_sample", config.meta_sample, defaults, **filled)


def baselines_config(config: RoundsConfig, now: Round) -> BaselineConfig:
    current = config.baselines == "current"
    # Behind all rounds' own seeds: with the round's, the first k would be the meta set's very responses.
    seed = seed_of(config, config.rounds + now.number if current else 0)
    filled = {
        "policy": now.policy if current else config.sft, "prompts": config.prompts, "reward_model": now.reward_model,
        "seed": seed,
    }  # fmt: skip
    return _build(BaselineConfig, "baseline_sample", config.baseline_sample, _shared(config), **filled)


def reward_config(config: RoundsConfig, number: int, *, model: str, meta: str) -> RewardConfig | MetaRMConfig:
    """Settings of a round's reward model. MetaRM and plain training have the same default batch, the paper's."""
    filled: Settings = {
        "data": config.data or "", "model": model, "validation": config.validation, "seed": seed_of(config, number),
    }  # fmt: skip
    if config.reward != "metarm":
        return _build(RewardConfig, "rm", config.rm, {"batch_size": 16} | _where(config), **filled)
    if both := set(config.rm) & set(config.meta):
        raise InputError(f"rm and meta: {', '.join(sorted(both))} stands in both; leave one out")
    filled |= {"meta": meta, "k": meta_config(config, number, "").k}
    return _build(MetaRMConfig, "rm and meta", config.rm | config.meta, _where(config), **filled)


def ppo_config(config: RoundsConfig, now: Round, *, baselines: str) -> PPOConfig:
    filled: Settings = {
        "policy": now.policy, "reference": config.sft, "reward_model": now.reward_model, "prompts": config.prompts,
        "gold": config.gold, "seed": seed_of(config, now.number),
    }  # fmt: skip
    if relative(config):
        filled["baselines"] = baselines
    return _build(PPOConfig, "ppo", config.ppo, _where(config), **filled)


def evaluation_config(config: RoundsConfig) -> PolicyEvaluationConfig:
    """The examination samples as PPO does where its own section does not say otherwise."""
    shared = {name: value for name, value in _shared(config).items() if name in ("sampling", "device")}
    return _build(PolicyEvaluationConfig, "evaluate", config.evaluate, shared)
