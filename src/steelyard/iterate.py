"""Rounds: sample from the moved policy, renew the reward model, PPO, examine (Secrets of RLHF II, section 3.2).

A reward model learned from the SFT model's neighbourhood judges badly where PPO leads. So each round draws responses
from the policy as it is, trains the reward model once more (MetaRM on those responses, plainly, or not at all), goes
on with PPO from that policy, and examines it. The KL is measured from the SFT model throughout. The best round is
kept, by a criterion that is not the reward that was optimised; when the examination turns, it stops.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from steelyard import ppo_settings
from steelyard.baselines import BaselineConfig, fingerprint, sample_baselines
from steelyard.config import Config, Device, explain
from steelyard.data.encode import Encoder
from steelyard.data.load import say_if_shared
from steelyard.errors import InputError
from steelyard.evaluate.examination import training_length
from steelyard.evaluate.policy import PolicyEvaluationConfig
from steelyard.evaluate.rounds import CURRENT, FIRST, GOLD, JUDGE, Keep, Pairs, choose, examine_round, held_out
from steelyard.models.reward import require_reward_model
from steelyard.ppo_settings import PPOConfig
from steelyard.run_dir import RunDir, write_json_atomic
from steelyard.scorer import load_scorer
from steelyard.train.metarm import MetaRMConfig, train_metarm
from steelyard.train.pairwise import read_pairs
from steelyard.train.ppo import train_ppo, training_prompts
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.types import Prompt

C = TypeVar("C", bound=Config)
Settings = dict[str, Any]
RECORD = "rounds.json"


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


def run_rounds(config: RoundsConfig, out: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Go through the rounds, leaving a folder for each in `out`; returns the record, also in `out/rounds.json`.

    Killed at any moment and resumed, it leaves the same bytes. Raises InputError for settings that do not fit, before
    anything runs.
    """
    check(config)
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return json.loads((out / RECORD).read_text())
        run.restore()
        say_if_shared(config.prompts, config.eval_prompts)
        prompts, encoder, _ = examination(config)
        training_prompts(_ppo(config, Round(1, "", ""), baselines=""), encoder, quiet=True)
        now = Round(0, config.sft, config.reward_model)
        examined: list[dict[str, Any]] = []
        for number in range(config.rounds + 1):
            failure = ""
            try:
                now = advance(config, now, out, quiet=quiet) if number else now
                examined.append(_examine(config, now, prompts, encoder.max_length, out))
            except FloatingPointError as error:
                # A guard of PPO's, training that diverged, a policy that can answer no more: this way leads no
                # further, and what there is, is kept. Of the SFT model there must be an answer.
                if not examined:
                    raise
                failure = f"round {number} failed: {error.__cause__ or error}"
            record = _record(config, examined, failure)
            write_json_atomic(out / RECORD, record)
            if record["best"] is not None:
                _keep(config, record["best"], out)
            if not quiet:
                print(_line(record), flush=True)
            if record["stopped"]:
                break
        run.finish({"rounds": len(examined) - 1, "best": record["best"], "stopped": record["stopped"]})
        return record


def advance(config: RoundsConfig, before: Round, out: Path, *, quiet: bool) -> Round:
    """The next round, up to its policy. Every stage does nothing where it has finished before."""
    number, folder = before.number + 1, _folder(out, before.number + 1)
    reward_model = config.reward_model
    if config.reward != "fixed":
        meta = ""
        if config.reward == "metarm":
            meta = str(sample_baselines(_meta_sample(config, number, before.policy), folder / "meta"))
        start = before.reward_model if config.reward_from == "previous" else config.reward_model
        wanted = _reward(config, number, model=start, meta=meta)
        if isinstance(wanted, MetaRMConfig):
            train_metarm(wanted, folder / "rm", resume=True, quiet=quiet)
        else:
            train_reward(wanted, folder / "rm", resume=True, quiet=quiet)
        reward_model = str(folder / "rm" / "model")
    now = Round(number, before.policy, reward_model)
    baselines = ""
    if _relative(config):
        baselines = str(sample_baselines(_baselines(config, now), out / "baselines"))
    train_ppo(_ppo(config, now, baselines=baselines), folder / "ppo", resume=True, quiet=quiet)
    return now._replace(policy=str(folder / "ppo" / "model"))


def check(config: RoundsConfig) -> None:
    """Raise InputError for settings or models that do not fit together."""
    check_settings(config)
    encoder = Encoder.load(config.sft)
    require_reward_model(config.reward_model)
    encoder.require_same(config.reward_model, what="reward model", of=config.sft)
    if config.judge is not None:
        require_reward_model(config.judge)
        encoder.require_same(config.judge, what="judge", of=config.sft)
        _require_another(config, config.judge)


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
    if not _relative(config):
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
    optimise, stored = _ppo(config, some, baselines=""), _baselines(config, some)
    _reward(config, 1, model="", meta="")
    _meta_sample(config, 1, "")
    how = _evaluation(config)
    try:
        ppo_settings.check(optimise)
    except InputError as error:
        raise InputError(f"ppo: {error}") from None
    if _relative(config):
        ppo_settings.check_baselines(optimise, stored, "ppo", "baseline_sample")
    if config.kl_price and (bent := how.sampling.bent()):
        raise InputError(
            "kl_price: the examination's answers must be drawn from the policy as it is, for only then is their mean "
            f"log-ratio the KL; give evaluate.sampling without {', '.join(bent)}, or leave kl_price out"
        )


def _require_another(config: RoundsConfig, judge: str) -> None:
    if fingerprint(judge) == fingerprint(config.reward_model):
        raise InputError(f"judge: {judge} is the reward model itself; what was optimised cannot judge")
    stage = Path(judge).parent / "config.json"
    data = json.loads(stage.read_text()).get("data") if stage.exists() else None
    first = Path(config.reward_model).parent / "config.json"
    known = {config.data, json.loads(first.read_text()).get("data") if first.exists() else None}
    if data is not None and Path(data).resolve() in {Path(d).resolve() for d in known if d is not None}:
        raise InputError(f"judge: {judge} was trained on {data}, as the rounds are; give one trained on other data")


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


# ---- settings of the stages ----------------------------------------------------------------------------------------


def _build(kind: type[C], where: str, settings: Mapping[str, Any], defaults: Settings, **filled: Any) -> C:
    """A stage's settings from a section. Raises InputError naming section and field."""
    if clash := set(settings) & set(filled):
        raise InputError(f"{where}: {', '.join(sorted(clash))} is filled in by the rounds; leave it out")
    # A section in a section, such as sampling, keeps what only the defaults say.
    inner = {n: {**defaults[n], **v} for n, v in settings.items() if _both_sections(defaults.get(n), v)}
    try:
        return kind(**{**defaults, **settings, **inner, **filled})
    except ValidationError as error:
        raise InputError(explain(error, lambda field: f"{where}.{field}")) from None


def _both_sections(*values: object) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def seed_of(config: RoundsConfig, number: int) -> int:
    """A round's own seed: no round repeats another's order or random numbers."""
    return config.seed * 1000 + number


def _relative(config: RoundsConfig) -> bool:
    return bool(config.ppo.get("reward", PPOConfig.model_fields["reward"].default) != "plain")


def _where(config: RoundsConfig) -> Settings:
    return {"device": config.device}


def _shared(config: RoundsConfig) -> Settings:
    """What sampling takes over from PPO where its own section does not say otherwise."""
    names = ("sampling", "max_length", "precision", "device")
    return _where(config) | {name: config.ppo[name] for name in names if name in config.ppo}


def _meta_sample(config: RoundsConfig, number: int, policy: str) -> BaselineConfig:
    prompts = config.prompts if config.meta_prompts is None else config.meta_prompts
    defaults = {"k": 5} | _shared(config)
    filled = {"policy": policy, "prompts": prompts, "reward_model": None, "seed": seed_of(config, number)}
    return _build(BaselineConfig, "meta_sample", config.meta_sample, defaults, **filled)


def _baselines(config: RoundsConfig, now: Round) -> BaselineConfig:
    current = config.baselines == "current"
    # Behind all rounds' own seeds: with the round's, the first k would be the meta set's very responses.
    seed = seed_of(config, config.rounds + now.number if current else 0)
    filled = {
        "policy": now.policy if current else config.sft, "prompts": config.prompts, "reward_model": now.reward_model,
        "seed": seed,
    }  # fmt: skip
    return _build(BaselineConfig, "baseline_sample", config.baseline_sample, _shared(config), **filled)


def _reward(config: RoundsConfig, number: int, *, model: str, meta: str) -> RewardConfig | MetaRMConfig:
    """Settings of a round's reward model. MetaRM and plain training have the same default batch, the paper's."""
    filled: Settings = {
        "data": config.data or "", "model": model, "validation": config.validation, "seed": seed_of(config, number),
    }  # fmt: skip
    if config.reward != "metarm":
        return _build(RewardConfig, "rm", config.rm, {"batch_size": 16} | _where(config), **filled)
    if both := set(config.rm) & set(config.meta):
        raise InputError(f"rm and meta: {', '.join(sorted(both))} stands in both; leave one out")
    filled |= {"meta": meta, "k": _meta_sample(config, number, "").k}
    return _build(MetaRMConfig, "rm and meta", config.rm | config.meta, _where(config), **filled)


def _ppo(config: RoundsConfig, now: Round, *, baselines: str) -> PPOConfig:
    filled: Settings = {
        "policy": now.policy, "reference": config.sft, "reward_model": now.reward_model, "prompts": config.prompts,
        "gold": config.gold, "seed": seed_of(config, now.number),
    }  # fmt: skip
    if _relative(config):
        filled["baselines"] = baselines
    return _build(PPOConfig, "ppo", config.ppo, _where(config), **filled)


def examination(config: RoundsConfig) -> tuple[list[Prompt], Encoder, PolicyEvaluationConfig]:
    """(held-out prompts, what reads them, how answers are drawn). Raises InputError for too few prompts."""
    encoder = Encoder.load(config.sft, max_length=_ppo(config, Round(1, "", ""), baselines="").max_length)
    how = _evaluation(config)
    return held_out(config.eval_prompts, encoder, how), encoder, how


def _evaluation(config: RoundsConfig) -> PolicyEvaluationConfig:
    """The examination samples as PPO does where its own section does not say otherwise."""
    shared = {name: value for name, value in _shared(config).items() if name in ("sampling", "device")}
    return _build(PolicyEvaluationConfig, "evaluate", config.evaluate, shared)


# ---- examination and choice ----------------------------------------------------------------------------------------


def _folder(out: Path, number: int) -> Path:
    return out / f"round-{number:02d}"


def _examine(config: RoundsConfig, now: Round, prompts: Sequence[Prompt], length: int, out: Path) -> dict[str, Any]:
    target = _folder(out, now.number) / "examine" / "round.json"
    if not target.exists():
        rewards = {FIRST: config.reward_model, CURRENT: now.reward_model}
        if config.judge is not None:
            rewards[JUDGE] = config.judge
        found = examine_round(
            now.policy, config.sft, rewards, prompts, load_scorer(config.gold) if config.gold else None,
            _validation(config), _evaluation(config), max_length=length,
        )  # fmt: skip
        write_json_atomic(target, {"round": now.number} | found)
    return json.loads(target.read_text())


def _validation(config: RoundsConfig) -> dict[str, Pairs]:
    """The validation sets, read as the reward model's training reads them."""
    rm = _reward(config, 1, model="", meta="")
    fixed = config.reward == "fixed" and config.validation
    length = training_length(config.reward_model, None) if fixed else rm.max_length
    encoder = Encoder.load(config.sft, max_length=length, on_overlong=rm.on_overlong)
    return {name: read_pairs(path, encoder, on_invalid=rm.on_invalid) for name, path in config.validation.items()}


def _record(config: RoundsConfig, examined: Sequence[Mapping[str, Any]], failure: str = "") -> dict[str, Any]:
    """What rounds.json holds; nothing in it depends on where the folder is."""
    by, why = criterion(config)
    best, stopped = None, failure
    if by is not None:
        best = choose(examined, by, config.kl_price, config.keep)
        since = len(examined) - 1 - best["round"]
        if not failure and config.patience is not None and since >= config.patience:
            better = "better round than" if config.keep == "best" else "round told apart as better than"
            stopped = f"the examination has turned: no {better} {best['round']} for {since}"
        best["model"] = f"round-{best['round']:02d}/ppo/model" if best["round"] else config.sft
    return {
        "kind": "rounds",
        "reward": config.reward,
        "reward_from": config.reward_from,
        "baselines": config.baselines if _relative(config) else None,
        "meta_prompts": config.meta_prompts,
        "criterion": {"by": by, "why": why, "kl_price": config.kl_price, "keep": config.keep},
        "rounds": [{"round": e["round"], **e["row"], "accuracy": e["accuracy"]} for e in examined],
        "best": best,
        "stopped": stopped,
    }


def _line(record: Mapping[str, Any]) -> str:
    row = record["rounds"][-1]
    shown = [f"{n} {row[n]:.3f}" for n in (GOLD, JUDGE, FIRST, CURRENT, "kl", "ppl_sft", "length") if n in row]
    said = f"round {row['round']}: {', '.join(shown)}"
    if record["best"] is not None:
        said += f"; kept so far: round {record['best']['round']}"
    return f"{said}; {record['stopped']}" if record["stopped"] else said


def _keep(config: RoundsConfig, best: Mapping[str, Any], out: Path) -> None:
    """`best/best.json`, and beside it `model`: a link to the best round's model."""
    folder = out / "best"
    write_json_atomic(folder / "best.json", dict(best))
    target = Path("..") / best["model"] if best["round"] else Path(config.sft).resolve()
    link, partial = folder / "model", folder / ".model.partial"
    partial.unlink(missing_ok=True)
    partial.symlink_to(target, target_is_directory=True)
    os.replace(partial, link)


def rounds_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """The rounds, for people: one row each, the kept one marked."""
    names = [n for n in (GOLD, JUDGE, FIRST, CURRENT) if n in record["rounds"][0]]
    words = {FIRST: "first reward model", CURRENT: "current reward model"}
    kept = None if record["best"] is None else record["best"]["round"]
    rows = []
    for r in record["rounds"]:
        label = ("0 (SFT)" if r["round"] == 0 else str(r["round"])) + (" kept" if r["round"] == kept else "")
        cells = [f"{r[n]:.3f} [{r[f'{n}_low']:.3f}, {r[f'{n}_high']:.3f}]" for n in names]
        rows.append([label, *cells, r["kl"], r["ppl_sft"], r["length"]])
    earliest = record["criterion"].get("keep") == "earliest"  # Records of earlier versions do not say.
    how = " The earliest round not told apart from the best is kept." if earliest else ""
    note = f"Chosen by: {record['criterion']['why']}.{how}"
    if record["best"] is not None:
        gain = record["best"]["gain"]
        note += (
            f" Round {kept} was chosen on half of the prompts; on the other half it is worth {gain['value']:.3f} "
            f"[{gain['low']:.3f}, {gain['high']:.3f}] more than the SFT model."
        )
    columns = ["round", *(words.get(n, n) for n in names), "KL to SFT", "PPL under SFT", "length"]
    return {"title": "Rounds", "columns": columns, "rows": rows, "note": f"{note} {record['stopped']}".strip()}
