"""The stages of a recipe. Each reads files, leaves files, and does nothing where it has finished before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steelyard.baselines import outlook, sample_baselines
from steelyard.config import Config
from steelyard.data.encode import Encoder
from steelyard.data.export import write_preferences
from steelyard.data.load import load_preferences, say_if_shared
from steelyard.denoise import RepairOptions, repair, undoubted
from steelyard.errors import InputError
from steelyard.evaluate.answers import FOLDER, read_folder, write_answers
from steelyard.evaluate.examination import examine_sets, open_model, reward_file
from steelyard.evaluate.judge import JudgeConfig, judge
from steelyard.evaluate.policy import PolicyEvaluationConfig, answer, compare, difficulty, prompts_that_fit
from steelyard.measure import Scoring, measure
from steelyard.parallel import default_workers, run_jobs
from steelyard.recipe import (
    PolicyConfig,
    Recipe,
    Settings,
    arm_data,
    arm_reward,
    arms_by,
    baseline_config,
    dpo_config,
    evaluation_config,
    evaluation_length,
    needs_baselines,
    ppo_config,
    repair_arm,
    reward_config,
    sft_config,
    strength_config,
    world_config,
)
from steelyard.run_dir import completed, write_json_atomic, write_text_atomic
from steelyard.scorer import load_scorer
from steelyard.simulate.write import FILES, WorldConfig, write_world
from steelyard.train.dpo import DPOConfig, train_dpo
from steelyard.train.ppo import PPOConfig, train_ppo, training_prompts
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.train.sft import SFTConfig, train_sft
from steelyard.types import Preference, Prompt, Strength

GOLD = "steelyard.simulate.world:gold"


class Files(Config):
    """Where the stages find their input."""

    preferences: str
    validation: dict[str, str]
    prompts: str
    eval_prompts: str | None
    sft: str | None
    tokenizer: str | None
    truth: dict[str, int] | None
    noise: dict[str, str]
    gold: str | None


def prepare(recipe: Recipe, out: Path) -> Files:
    """The files of the stages: the small world written out, or clean copies of the user's pairs.

    Raises InputError for files that a later stage could not use.
    """
    files = _write_files(recipe, out)
    if recipe.policy is not None:
        config = evaluation_config(recipe, recipe.policy)
        examination_prompts(recipe, files, config, evaluation_length(recipe.policy), "policy.evaluate")
        for name in arms_by(recipe.policy, "ppo"):
            ppo = ppo_config(
                recipe, recipe.policy, name, model="", prompts=files.prompts, reward_model="", baselines="", gold=None
            )
            require_training_prompts(recipe, files, ppo, f"policy.arms.{name}")
    return files


def _write_files(recipe: Recipe, out: Path) -> Files:
    if recipe.world is not None:
        folder, world = out / "data", world_config(recipe)
        kept = folder / FILES["world"]
        if kept.exists() and completed(json.loads(kept.read_text()), WorldConfig) != world.model_dump(mode="json"):
            raise InputError(
                f"{folder}: holds the world of other settings, perhaps of a refused run; remove that folder, or "
                "give another one (--out)"
            )
        if not folder.exists():
            write_world(world, folder)
        path = {name: str(folder / file) for name, file in FILES.items()}
        truth, noise = _read_truth(Path(path["truth"]))
        validation_truth, _ = _read_truth(Path(path["validation_truth"]))
        return Files(
            preferences=path["preferences"],
            validation=_validation_sets(
                load_preferences(path["validation"]).preferences, validation_truth, out / "validation"
            ),
            prompts=path["prompts"],
            eval_prompts=path["eval_prompts"],
            sft=path["sft"],
            tokenizer=path["tokenizer"],
            truth=truth,
            noise=noise,
            gold=GOLD,
        )
    data = recipe.data
    if data is None:
        raise InputError("a recipe needs `world` or `data`")
    loaded = load_preferences(data.preferences, on_invalid=data.on_invalid)
    print(loaded.report.text(), flush=True)
    # The stages read a clean copy: what was malformed has been reported here, once.
    pairs = loaded.preferences[: data.limit]
    (out / "data").mkdir(exist_ok=True)
    preferences = str(write_preferences(pairs, out / "data" / "preferences.jsonl", overwrite=True))
    validation: dict[str, str] = {}
    if data.validation is not None:
        held_out = load_preferences(data.validation, on_invalid=data.on_invalid)
        print(held_out.report.text(), flush=True)
        examined = held_out.preferences[: data.validation_limit]
        labels = truth_column(examined, data.truth_column, data.validation)
        validation = _validation_sets(examined, labels, out / "validation")
    return Files(
        preferences=preferences,
        validation=validation,
        prompts=data.prompts or preferences,
        eval_prompts=data.eval_prompts or validation.get("original"),
        sft=None,
        tokenizer=None,
        truth=truth_column(pairs, data.truth_column, data.preferences),
        noise={},
        gold=None,
    )


def start_tokenizer(recipe: Recipe, files: Files) -> str:
    """The folder with the tokenizer of all stages' models, before any of them is there."""
    return files.tokenizer if recipe.model == "scratch" and files.tokenizer is not None else recipe.model


def examination_prompts(
    recipe: Recipe, files: Files, config: PolicyEvaluationConfig, max_length: int, where: str
) -> list[Prompt]:
    """The held-out prompts that policies answer. Raises InputError, naming the section `where`, if none leaves room."""
    encoder = Encoder.load(start_tokenizer(recipe, files), max_length=max_length)
    try:
        return prompts_that_fit(files.eval_prompts or files.prompts, encoder, config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def require_training_prompts(recipe: Recipe, files: Files, config: PPOConfig, where: str) -> None:
    """Raise InputError, naming the section `where`, if too few prompts leave room for PPO's responses.

    Then baselines have room too: that theirs is no smaller is checked with the settings.
    """
    encoder = Encoder.load(start_tokenizer(recipe, files), max_length=config.max_length)
    try:
        training_prompts(config, encoder, quiet=True)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _read_truth(path: Path) -> tuple[dict[str, int], dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["id"]: -1 if r["wrong"] else 1 for r in rows}, {r["id"]: r["noise"] for r in rows}


def truth_column(preferences: Sequence[Preference], column: str | None, file: str) -> dict[str, int] | None:
    """The truth by id from a column of the file; None without a column. Raises InputError if no row has it, and for
    other values."""
    if column is None:
        return None
    columns = dict.fromkeys(name for p in preferences for name in p.row)
    if preferences and column not in columns:
        raise InputError(f"{file}: no column {column!r} (truth_column); its columns: {', '.join(columns)}")
    truth = {}
    for p in preferences:
        value = p.row.get(column)
        if isinstance(value, str) and value.strip() in ("-1", "0", "1"):  # A CSV's cells are texts.
            value = int(value)
        if isinstance(value, bool) or value not in (-1, 0, 1):
            raise InputError(f"{p.source}: column {column!r} must be 1, 0 or -1 (right, tie, wrong), got {value!r}")
        truth[p.id] = int(value)
    return truth


def _validation_sets(original: list[Preference], truth: dict[str, int] | None, out: Path) -> dict[str, str]:
    """The paper's three sets: original labels, labels of the judge, pairs on which both agree (section 2.5)."""
    sets: dict[str, list[Preference]] = {"original": original}
    if truth is not None:
        turned = [
            p if truth[p.id] > 0 else replace(p, chosen=p.rejected, rejected=p.chosen) for p in original if truth[p.id]
        ]
        sets |= {"relabelled": turned, "agreement": [p for p in original if truth[p.id] > 0]}
    out.mkdir(parents=True, exist_ok=True)
    return {
        name: str(write_preferences(pairs, out / f"{name}.jsonl", overwrite=True))
        for name, pairs in sets.items()
        if pairs
    }


def sft(recipe: Recipe, files: Files, out: Path) -> str:
    """Supervised fine-tuning; returns the model folder that the other stages start from."""
    if recipe.sft is None:
        return recipe.model
    tokenizer = files.tokenizer if recipe.model == "scratch" else None
    config = sft_config(recipe, data=files.sft, tokenizer=tokenizer)
    run_jobs(_train_sft, [(config, out / "sft")], workers=1, threads=recipe.threads, labels=["SFT"])
    return str(out / "sft" / "model")


def _train_sft(config: SFTConfig, out: Path) -> dict[str, Any]:
    # run_recipe has asked for --resume already: within a recipe every stage goes on.
    return train_sft(config, out, resume=True)


def weigh(recipe: Recipe, files: Files, model: str, out: Path, scoring: Scoring, resume: bool) -> list[Strength | None]:
    """Strength of every training pair, in order."""
    config = strength_config(recipe, scoring, data=files.preferences, model=model)
    preferences = load_preferences(files.preferences).preferences
    folder = out / "strength" / scoring
    return measure(config, preferences, folder, truth=files.truth, noise=files.noise, resume=resume)


def repair_all(
    recipe: Recipe, files: Files, strengths: list[Strength | None], out: Path
) -> dict[str, tuple[str, RepairOptions]]:
    """Write every arm's repaired data set, and what was changed; returns the files."""
    preferences = load_preferences(files.preferences).preferences
    wrong = None if files.truth is None else {i for i, t in files.truth.items() if t < 0}
    arms = {}
    for name, settings in recipe.repair.items():
        options, _ = repair_arm(f"repair.{name}", settings)
        repaired, changes = repair(preferences, strengths, options, wrong=wrong)
        if note := undoubted(strengths, options):
            print(f"  {name}: {note}")
        path = out / "repair" / f"{name.replace(' ', '-')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_preferences(repaired, path, overwrite=True)
        lines = [json.dumps({"id": c.id, "action": c.action, "evidence": c.evidence}) for c in changes]
        write_text_atomic(path.with_suffix(".changes.jsonl"), "".join(line + "\n" for line in lines))
        arms[name] = (str(path), options)
    return arms


def reward_models(
    recipe: Recipe, files: Files, model: str, arms: Mapping[str, tuple[str, RepairOptions]], out: Path
) -> None:
    """One reward model for each repaired data set."""
    jobs = []
    for name, (data, options) in arms.items():
        _, own = repair_arm(f"repair.{name}", recipe.repair[name])
        config = reward_config(recipe, options, own, data=data, model=model, validation=files.validation)
        jobs.append((config, out / "rm" / name))
    run_jobs(
        _train_reward,
        jobs,
        workers=min(len(jobs), recipe.workers or default_workers(recipe.device)),
        threads=recipe.threads,
        labels=[f"reward model, {name}" for name in arms],
        on_done=lambda i, _: print(f"  {list(arms)[i]} trained", flush=True),
    )


def _train_reward(config: RewardConfig, out: Path) -> dict[str, Any]:
    return train_reward(config, out, resume=True, quiet=True)


def examine_all(recipe: Recipe, files: Files, arms: Sequence[str], out: Path) -> None:
    """Every reward model on every validation set."""
    target = out / "examine" / "reward.json"
    if target.exists() or not files.validation:
        return
    jobs = [(str(out / "rm" / name / "model"), files.validation, build_reward(recipe)) for name in arms]
    results = run_jobs(examine_model, jobs, workers=min(len(jobs), recipe.workers or default_workers(recipe.device)))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target, reward_file(dict(zip(arms, results, strict=True))))


def build_reward(recipe: Recipe) -> Settings:
    """The tokenisation settings that scoring must share with training."""
    config = reward_config(recipe, RepairOptions(), data="", model="", validation={})
    return {name: getattr(config, name) for name in ("max_length", "on_overlong", "max_tokens", "precision", "device")}


def examine_model(folder: str, validation: dict[str, str], settings: Settings) -> dict[str, Any]:
    """One reward model on each validation set; `settings` are those of `build_reward`, or some of them."""
    how = {name: settings[name] for name in ("max_length", "on_overlong", "precision", "device") if name in settings}
    model, encoder = open_model(folder, **how)
    return examine_sets(model, encoder, validation, max_tokens=settings.get("max_tokens", 4096))


def baselines(recipe: Recipe, policy: PolicyConfig, files: Files, model: str, out: Path) -> dict[str, str]:
    """Scored baselines for every reward model whose arm needs them; the responses are sampled once."""
    arms = {arm_reward(recipe, policy, name) for name in policy.arms if needs_baselines(policy, name)}
    scored = {}
    for arm in sorted(arms):
        reward = str(out / "rm" / arm / "model")
        config = baseline_config(recipe, policy, model=model, prompts=files.prompts, reward_model=reward)
        # Small models gain nothing from more threads, and beside another busy process lose a factor of twenty.
        job = (config, out / "baselines")
        (path,) = run_jobs(sample_baselines, [job], workers=1, threads=recipe.threads, labels=[f"baselines, {arm}"])
        print(f"  {arm}: {outlook(path)}", flush=True)
        scored[arm] = str(path)
    return scored


def optimise(
    recipe: Recipe, policy: PolicyConfig, files: Files, model: str, scored: Mapping[str, str], out: Path
) -> None:
    """PPO, for every arm of that method."""
    jobs = []
    for name in arms_by(policy, "ppo"):
        arm = arm_reward(recipe, policy, name)
        config = ppo_config(
            recipe, policy, name, model=model, prompts=files.prompts, reward_model=str(out / "rm" / arm / "model"),
            baselines=scored.get(arm, ""), gold=files.gold,
        )  # fmt: skip
        jobs.append((config, out / "ppo" / name))
    _train_arms(recipe, _train_ppo, jobs, arms_by(policy, "ppo"))


def prefer(
    recipe: Recipe,
    policy: PolicyConfig,
    files: Files,
    model: str,
    repaired: Mapping[str, tuple[str, RepairOptions]],
    out: Path,
) -> None:
    """DPO, for every arm of that method, on the repaired pairs that it names."""
    jobs = []
    for name in arms_by(policy, "dpo"):
        data, options = repaired[arm_data(recipe, policy, name)]
        reward = str(out / "rm" / arm_reward(recipe, policy, name) / "model")
        config = dpo_config(
            recipe, policy, name, options, data=data, model=model, prompts=files.prompts, reward_model=reward,
            validation=files.validation, gold=files.gold,
        )  # fmt: skip
        jobs.append((config, out / "dpo" / name))
    _train_arms(recipe, _train_dpo, jobs, arms_by(policy, "dpo"))


def _train_arms(
    recipe: Recipe, train: Callable[..., Any], jobs: Sequence[tuple[Any, Path]], names: Sequence[str]
) -> None:
    run_jobs(
        train,
        jobs,
        workers=min(len(jobs), recipe.workers or default_workers(recipe.device)),
        threads=recipe.threads,
        labels=names,
        on_done=lambda i, _: print(f"  {names[i]} trained", flush=True),
    )


def _train_ppo(config: PPOConfig, out: Path) -> dict[str, Any]:
    return train_ppo(config, out, resume=True, quiet=True)


def _train_dpo(config: DPOConfig, out: Path) -> dict[str, Any]:
    return train_dpo(config, out, resume=True, quiet=True)


def evaluate(recipe: Recipe, policy: PolicyConfig, files: Files, model: str, out: Path) -> None:
    """Every policy on held-out prompts."""
    target = out / "evaluate" / "policy.json"
    if target.exists():
        return
    config = evaluation_config(recipe, policy)
    encoder_length = evaluation_length(policy)
    encoder = Encoder.load(model, max_length=encoder_length)
    say_if_shared(files.prompts, files.eval_prompts or files.prompts)
    prompts = prompts_that_fit(files.eval_prompts or files.prompts, encoder, config)[: policy.limit_eval]
    # The SFT model's proxy reward is comparable with the arms' only under their own reward model.
    rewards = {name: str(out / "rm" / arm_reward(recipe, policy, name) / "model") for name in policy.arms}
    first = next(iter(rewards.values()))
    jobs: list[tuple[Any, ...]] = [(model, model, first, prompts, encoder_length, files.gold, config)]
    for name, reward in rewards.items():
        trained = str(out / _method(policy, name) / name / "model")
        jobs.append((trained, model, reward, prompts, encoder_length, files.gold, config))
    workers = min(len(jobs), recipe.workers or default_workers(recipe.device))
    results = run_jobs(_answer, jobs, workers=workers, threads=recipe.threads)
    (hard_N,) = run_jobs(difficulty, [(model, first, prompts, encoder, config)], workers=1, threads=recipe.threads)
    answers = dict(zip(["SFT", *policy.arms], results, strict=True))
    found = compare(answers, prompts, config, hard_N) | {"frontier": _frontier(policy, out)}
    write_answers(target.parent / FOLDER, answers, prompts)
    write_json_atomic(target, found)


def judge_all(config: JudgeConfig, out: Path) -> None:
    """Judges' verdicts on the answers that the examination left."""
    target = out / "evaluate" / "judge.json"
    if not target.exists():
        write_json_atomic(target, judge(config, read_folder(out), target.parent))


def _method(policy: PolicyConfig, arm: str) -> str:
    """How a policy arm is trained, which is also the name of the folder that holds its stage folder."""
    return "dpo" if arm in arms_by(policy, "dpo") else "ppo"


def _answer(
    policy: str,
    reference: str,
    reward: str,
    prompts: Any,
    length: int,
    gold: str | None,
    config: PolicyEvaluationConfig,
) -> Any:
    encoder = Encoder.load(policy, max_length=length)
    return answer(policy, reference, reward, prompts, encoder, load_scorer(gold) if gold else None, config)


def _frontier(policy: PolicyConfig, out: Path) -> list[dict[str, Any]]:
    """Gold and (normalised) proxy reward by KL (at temperature 1, as in the examination), along each policy's run.

    A DPO run has points only where it was examined.
    """
    points = []
    for name in policy.arms:
        kind = _method(policy, name)
        folder, kl = out / kind / name, {"ppo": "ppo/kl_plain", "dpo": "dpo/kl"}[kind]
        reward = json.loads((folder / "config.json").read_text())["reward_model"]
        mean, std = 0.0, 1.0
        if reward is not None:
            mean, std = json.loads((Path(reward) / "config.json").read_text()).get("steelyard_reward", (0.0, 1.0))
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            m = json.loads(line)
            if kl in m:
                proxy = (m[f"{kind}/reward_raw"] - mean) / std
                point = {"arm": name, "step": m["step"], "kl": m[kl], "gold": m.get(f"{kind}/gold"), "proxy": proxy}
                points.append(point)
    return points
