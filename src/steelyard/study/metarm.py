"""`steelyard study metarm`: does MetaRM tell a shifted policy's responses apart better? (Secrets of RLHF II, 3.2)

A policy is moved away from the SFT model by PPO; reward models are trained plainly, by MetaRM on the moved policy's
responses, and by its controls: eta = 0, a random direction of the same norm, and an unshifted meta set. All see the
same pairs in the same order for the same steps. In the small world the truth about any response is known; of your own
files only the held-out pairs have labels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.errors import InputError
from steelyard.evaluate.seeds import compare_arms
from steelyard.evaluate.spread import ACCURACY, examine_spread, histograms, read_responses, stack
from steelyard.evaluate.units import units_of
from steelyard.losses.meta import Direction
from steelyard.parallel import default_workers, run_jobs
from steelyard.recipe import Settings, build
from steelyard.run_dir import write_text_atomic
from steelyard.sampling import SamplingConfig
from steelyard.stages import Files, prepare, sft
from steelyard.study.arms import ArmsStudy, held_out_pairs, places, require_arms
from steelyard.study.folder import StudyFolder, difference_table, mean_curves
from steelyard.train import ppo
from steelyard.train.metarm import MetaRMConfig, train_metarm
from steelyard.train.ppo import PPOConfig, train_ppo
from steelyard.train.reward import RewardConfig, train_reward

CONTROL = "eta = 0"
SHIFTED, UNSHIFTED = "shifted policy", "SFT policy"
SHIFT_SEED = 1_000_000  # far from the seeds that people give to arms, and the same when a study gets more of them


class MetaRMStudy(ArmsStudy):
    """MetaRM against its controls. Sections hold the fields of the matching commands."""

    name: str = Field("MetaRM", description="title of the report")
    policy: str | None = Field(None, description="folder of a shifted policy; none given: PPO with the fields of `ppo`")
    ppo: Settings = Field(default_factory=dict, description="fields of `steelyard train ppo`: makes the shifted policy")
    reward: Settings = Field(
        default_factory=dict, description="fields that `train reward` and `train metarm` share, for all arms"
    )
    meta: Settings = Field(
        default_factory=dict, description="fields of `train metarm` alone, such as meta_batch_size and normalisation"
    )
    k: int = Field(5, ge=2, description="responses to each prompt, in the meta sets and held out")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how they are drawn")
    etas: tuple[float, ...] = Field((5e-6,), min_length=1, description="lengths of the meta step, all shown")
    control_etas: tuple[float, ...] | None = Field(
        None, description="those at which the random and the unshifted control run; none given: all"
    )

    @model_validator(mode="after")
    def _grid(self) -> MetaRMStudy:
        if any(eta <= 0 for eta in self.etas):
            raise ValueError(f"etas: must be above 0 (eta = 0 is always among the controls), got {list(self.etas)}")
        if extra := set(self.control_etas or ()) - set(self.etas):
            raise ValueError(f"control_etas: must be some of etas = {list(self.etas)}, got {sorted(extra)}")
        if self.policy is not None and self.ppo:
            raise ValueError("ppo: no effect when a shifted policy is given; leave out one of `policy` and `ppo`")
        return self


@dataclass(frozen=True)
class Arm:
    """One way of training; without a meta set it is `train reward`."""

    name: str
    meta: str | None = None
    eta: float = 0.0
    direction: Direction = "gradient"


def arms(study: MetaRMStudy) -> list[Arm]:
    """Plain training, eta = 0, the grid on the shifted set, and the two controls at some of its etas."""
    found = [Arm("plain"), Arm(CONTROL, SHIFTED)]
    found += [Arm(f"MetaRM, eta {eta:g}", SHIFTED, eta) for eta in study.etas]
    for eta in study.etas if study.control_etas is None else study.control_etas:
        found += [Arm(f"random, eta {eta:g}", SHIFTED, eta, "random"), Arm(f"unshifted, eta {eta:g}", UNSHIFTED, eta)]
    return found


def run_metarm(study: MetaRMStudy, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Shift a policy, train and examine every arm with every seed; returns the findings (also in study.json)."""
    recipe = study.recipe()
    require_arms([arm.name for arm in arms(study)], CONTROL, study.seeds)
    for arm in arms(study):
        config_of(study, arm, study.seeds[0], data="", model="", validation={}, responses={})
    shift_configs(study, model="", files=None, out=out)
    with StudyFolder(out, study, resume=resume, command=command) as folder:
        files = folder.stage("data", lambda: prepare(recipe, out))
        model = folder.stage("SFT", lambda: sft(recipe, files, out))
        moved = folder.stage("shifted policy", lambda: shift(study, model, files, out))
        responses = folder.stage("samples", lambda: sample_all(study, model, moved, files, out))
        folder.stage("reward models", lambda: _reward_models(study, files, model, responses, out))
        found = folder.stage("comparison", lambda: _compare(study, files, responses, out))
        found["policies"] = _policies(files, responses, out)
        folder.finish(study.name, study.world_seed, found, _tables(found))
    return found


def shift_configs(study: MetaRMStudy, *, model: str, files: Files | None, out: Path) -> tuple[RewardConfig, PPOConfig]:
    """Settings of the reward model that the shifted policy was paid by, and of its PPO.

    That reward model's seed is none of the arms': the policy has learned to deceive a model that none of them is.
    """
    seed = SHIFT_SEED + study.world_seed
    if seed in study.seeds:
        raise InputError(f"seeds: {seed} is that of the reward model that moves the policy; leave it out")
    data, prompts, gold = ("", "", None) if files is None else (files.preferences, files.prompts, files.gold)
    shared: Settings = {"device": study.device} | study.reward
    reward = build(RewardConfig, "reward", shared, data=data, model=model, validation={}, seed=seed)
    filled = {"policy": model, "reward_model": str(out / "rm" / "of the shift" / "model"), "prompts": prompts}
    settings = {"reward": "plain", "seed": study.world_seed, "device": study.device} | study.ppo
    optimise = build(PPOConfig, "ppo", settings, **filled, gold=gold)
    try:
        ppo.check(optimise)
    except InputError as error:
        raise InputError(f"ppo: {error}") from None
    return reward, optimise


def shift(study: MetaRMStudy, model: str, files: Files, out: Path) -> str:
    """The folder of the policy that has moved: the one given, or the end of a PPO run."""
    if study.policy is not None:
        return study.policy
    reward, optimise = shift_configs(study, model=model, files=files, out=out)
    target = out / "ppo" / "shifted"
    for job, label in (((reward, out / "rm" / "of the shift"), "reward model"), ((optimise, target), "PPO")):
        run_jobs(_train, [job], workers=1, threads=study.threads, labels=[f"shift, {label}"])
    return str(target / "model")


def sample_all(study: MetaRMStudy, model: str, moved: str, files: Files, out: Path) -> dict[str, str]:
    """Files of k responses of both policies: to the RL prompts (the meta sets), and to the held-out ones."""
    found = {}
    length = study.reward.get("max_length", RewardConfig.model_fields["max_length"].default)
    for name, folder in ((SHIFTED, moved), (UNSHIFTED, model)):
        for use, prompts in (("meta", files.prompts), ("held out", files.eval_prompts or files.prompts)):
            config = BaselineConfig(
                policy=folder, prompts=prompts, k=study.k, sampling=study.sampling, max_length=length,
                seed=study.world_seed, device=study.device,
            )  # fmt: skip
            found[f"{name}, {use}"] = str(sample_baselines(config, out / "samples" / name))
    return found


def config_of(
    study: MetaRMStudy, arm: Arm, seed: int, *, data: str, model: str, validation: dict[str, str],
    responses: dict[str, str],
) -> RewardConfig | MetaRMConfig:  # fmt: skip
    """Settings of one reward model. Between MetaRM's arms only `meta`, `eta` and `direction` differ."""
    if fixed := {"seed", "contrastive", "eta", "direction", "k"} & {*study.reward, *study.meta}:
        raise InputError(f"reward and meta: {', '.join(sorted(fixed))}: the study decides; use its own fields, if any")
    filled = {"data": data, "model": model, "validation": validation, "seed": seed}
    # Both commands then have the same default batch, the paper's for MetaRM.
    settings: Settings = {"batch_size": 16, "device": study.device} | study.reward
    if arm.meta is None:
        return build(RewardConfig, "reward", settings, **filled)
    filled |= {
        "meta": responses.get(f"{arm.meta}, meta", ""),
        "meta_validation": responses.get(f"{SHIFTED}, held out", ""),
        "eta": arm.eta, "direction": arm.direction, "k": study.k,
    }  # fmt: skip
    return build(MetaRMConfig, "reward and meta", settings | study.meta, **filled)


def _reward_models(study: MetaRMStudy, files: Files, model: str, responses: dict[str, str], out: Path) -> None:
    jobs, labels = [], []
    held_out = {name: responses[f"{name}, held out"] for name in (SHIFTED, UNSHIFTED)}
    for seed in study.seeds:
        for arm in arms(study):
            config = config_of(
                study, arm, seed, data=files.preferences, model=model, validation=files.validation,
                responses=responses,
            )  # fmt: skip
            jobs.append((config, *places(out, arm.name, seed), held_out, files.gold))
            labels.append(f"{arm.name}, seed {seed}")
    run_jobs(
        train_and_examine,
        jobs,
        workers=min(len(jobs), study.workers or default_workers(study.device)),
        threads=study.threads,
        labels=labels,
        on_done=lambda i, _: print(f"  {labels[i]}: trained and examined", flush=True),
    )


def _train(config: RewardConfig | MetaRMConfig | PPOConfig, out: Path) -> None:
    if isinstance(config, RewardConfig):
        train_reward(config, out, resume=True, quiet=True)
    elif isinstance(config, MetaRMConfig):
        train_metarm(config, out, resume=True, quiet=True)
    else:
        train_ppo(config, out, resume=True, quiet=True)


def train_and_examine(
    config: RewardConfig | MetaRMConfig, folder: Path, target: Path, held_out: dict[str, str], gold: str | None
) -> None:
    """One reward model; its choices on held-out pairs and its rewards of both policies' held-out responses."""
    _train(config, folder)
    if not target.exists():
        found = examine_spread(
            str(folder / "model"), config.validation, held_out, gold,
            max_length=config.max_length, on_overlong=config.on_overlong, on_invalid=config.on_invalid,
            max_tokens=config.max_tokens, device=config.device,
        )  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(target, json.dumps(found) + "\n")


def _compare(study: MetaRMStudy, files: Files, responses: dict[str, str], out: Path) -> dict[str, Any]:
    """Every arm against eta = 0, by accuracy and by spread; histograms over all seeds."""
    chosen = arms(study)
    names = [arm.name for arm in chosen]
    examined = {n: [json.loads(places(out, n, seed)[1].read_text()) for seed in study.seeds] for n in names}
    config = config_of(
        study, chosen[0], study.seeds[0], data="", model="", validation=files.validation, responses=responses
    )
    first = examined[names[0]][0]["accuracy"][ACCURACY]
    prompts = {name: first[name]["prompts"] for name in files.validation}
    pairs = held_out_pairs(config, places(out, names[0], study.seeds[0])[0], prompts)
    units = {name: units_of(read) for name, read in pairs.items()}
    found: dict[str, list[dict[str, Any]]] = {"accuracy": [], "spread": []}
    for kind, rows in found.items():
        for measure, of_sets in examined[CONTROL][0][kind].items():
            for name, of_set in of_sets.items():
                values = stack(examined, kind, measure, name)
                compared = compare_arms(values, clusters=units.get(name, of_set["prompts"]), control=CONTROL)
                rows += [{"set": name, "measure": measure, **row} for row in compared]
    folders = {n: [places(out, n, seed)[0] for seed in study.seeds] for n in names}
    return {
        "kind": "metarm",
        "control": CONTROL,
        "seeds": list(study.seeds),
        "k": study.k,
        "arms": [{"arm": a.name, "meta": a.meta, "eta": a.eta, "direction": a.direction} for a in chosen],
        **found,
        "histograms": histograms(examined, SHIFTED) + histograms(examined, UNSHIFTED),
        "curves": mean_curves(folders, lambda m: m in ("train/loss", "meta/spread", "meta/gradient_norm")),
    }


def _policies(files: Files, responses: dict[str, str], out: Path) -> list[dict[str, Any]]:
    """How far the policy has moved: gold reward where it is known, length, ends and, after our own PPO, KL."""
    rows = []
    for name in (SHIFTED, UNSHIFTED):
        read = read_responses(responses[f"{name}, held out"], files.gold)
        gold = None if read.gold_NK is None else float(read.gold_NK.mean())
        rows.append({"policy": name, "prompts": len(read.prompts), "gold": gold, "length": read.length,
                     "ended": read.ended, "kl": None})  # fmt: skip
    log = out / "ppo" / "shifted" / "metrics.jsonl"
    if log.exists():
        rows[0]["kl"] = json.loads(log.read_text().splitlines()[-1])["ppo/kl"]
    return rows


def _tables(found: dict[str, Any]) -> Sequence[dict[str, Any]]:
    shown = [name for name, value in found["policies"][0].items() if name != "prompts" and value is not None]
    moved = {
        "title": "How far the policy has moved (held-out prompts)",
        "columns": shown,
        "rows": [[row[c] for c in shown] for row in found["policies"]],
        "note": "KL to the SFT model in the last PPO step, nats a response." if "kl" in shown else "",
    }
    return [
        moved,
        difference_table("MetaRM: accuracy", found["accuracy"], CONTROL),
        difference_table("MetaRM: reward differences of k responses to one prompt", found["spread"], CONTROL),
    ]
