"""The whole road from a noisy preference file to a better policy, as one recipe of resumable stages.

simulate (or the user's files) -> SFT -> strength -> repair -> reward models -> examination -> baselines -> PPO ->
evaluation -> report. Every stage leaves a folder and is skipped when it has finished.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from steelyard import __version__
from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.config import Config
from steelyard.data.encode import Encoder
from steelyard.data.export import write_preferences
from steelyard.data.load import OnInvalid, load_preferences, load_prompts
from steelyard.denoise import RepairOptions, repair
from steelyard.errors import InputError
from steelyard.evaluate.policy import PolicyEvaluationConfig, answer, compare
from steelyard.evaluate.reward import examine
from steelyard.measure import Scoring, StrengthConfig, measure
from steelyard.models.reward import RewardModel
from steelyard.parallel import default_workers, run_jobs
from steelyard.run_dir import write_json_atomic, write_text_atomic
from steelyard.scorer import load_scorer
from steelyard.simulate.write import FILES, WorldConfig, write_world
from steelyard.train.ppo import PPOConfig, train_ppo
from steelyard.train.reward import RewardConfig, read_pairs, train_reward
from steelyard.train.sft import SFTConfig, train_sft
from steelyard.types import Preference, Strength

C = TypeVar("C", bound=Config)
Settings = dict[str, Any]
GOLD = "steelyard.simulate.world:gold"


class DataConfig(Config):
    """The user's own files."""

    preferences: str = Field(description="training pairs")
    validation: str | None = Field(None, description="validation pairs with other prompts than the training pairs")
    prompts: str | None = Field(None, description="prompts for PPO; none given: those of the preferences")
    eval_prompts: str | None = Field(None, description="prompts on which policies are examined")
    limit: int | None = Field(None, ge=1, description="use only the first usable pairs")
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


def run_recipe(recipe: Recipe, out: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Run every stage into `out` and write the report; returns the summary (also in summary.json)."""
    check(recipe)
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    stored = out / "recipe.yaml"
    if stored.exists() and not resume:
        raise InputError(f"{out}: holds a run already; go on with --resume, or give another folder (--out)")
    if stored.exists() and stored.read_text() != text:
        raise InputError(f"{out}: holds a run of another recipe ({stored}); give another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(stored, text)
    run = _Run(recipe, out, resume)
    began = time.time()
    files = run.stage("data", lambda: _data(recipe, out))
    model = run.stage("SFT", lambda: _sft(recipe, files, out))
    measured = {
        scoring: run.stage(f"strength, {scoring}", partial(_strength, recipe, files, model, out, scoring, resume))
        for scoring in recipe.scorings
    }
    arms = run.stage("repair", lambda: _repair(recipe, files, measured[recipe.repair_from], out))
    run.stage("reward models", lambda: _reward_models(recipe, files, model, arms, out))
    run.stage("examination", lambda: _examine(recipe, files, list(arms), out))
    if (policy := recipe.policy) is not None:
        scored = run.stage("baselines", lambda: _baselines(recipe, policy, files, model, out))
        run.stage("PPO", lambda: _ppo(recipe, policy, files, model, scored, out))
        run.stage("policy evaluation", lambda: _evaluate(recipe, policy, files, model, out))
    about = describe_run(recipe.name, recipe.seed, began, command)
    write_json_atomic(out / "run.json", about | {"seconds": sum(s["seconds"] for s in run.stages)})
    summary = {"tables": tables(out), "stages": run.stages}
    write_json_atomic(out / "summary.json", summary)
    return summary


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
        if settings.get("rm", _default_arm(recipe)) not in recipe.repair:
            raise InputError(f"policy.arms.{name}.rm must be one of {list(recipe.repair)}, got {settings.get('rm')!r}")


class _Run:
    """Times the stages and says what is going on."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool) -> None:
        self.out, self.resume = out, resume
        self.path = out / "stages.json"
        stored = json.loads(self.path.read_text()) if self.path.exists() else []
        self.stages: list[dict[str, Any]] = stored
        print(f"{recipe.name}: {out}", flush=True)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        entry = next((s for s in self.stages if s["name"] == name), None)
        if entry is None:
            entry = {"name": name, "seconds": 0.0, "note": ""}
            self.stages.append(entry)
        entry["seconds"] += seconds
        write_json_atomic(self.path, self.stages)
        print(f"{name}: {seconds:.0f} s", flush=True)
        return result


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
    on_invalid: OnInvalid


def _data(recipe: Recipe, out: Path) -> Files:
    if recipe.world is not None:
        folder = out / "data"
        if not folder.exists():
            write_world(build(WorldConfig, "world", {"seed": recipe.seed} | recipe.world), folder)
        path = {name: str(folder / file) for name, file in FILES.items()}
        truth, noise = _read_truth(Path(path["truth"]))
        validation_truth, _ = _read_truth(Path(path["validation_truth"]))
        return Files(
            preferences=path["preferences"],
            validation=_validation_sets(path["validation"], validation_truth, out / "validation", "error"),
            prompts=path["prompts"],
            eval_prompts=path["eval_prompts"],
            sft=path["sft"],
            tokenizer=path["tokenizer"],
            truth=truth,
            noise=noise,
            gold=GOLD,
            on_invalid="error",
        )
    data = recipe.data
    if data is None:
        raise InputError("a recipe needs `world` or `data`")
    loaded = load_preferences(data.preferences, on_invalid=data.on_invalid)
    print(loaded.report.text(), flush=True)
    preferences, pairs = data.preferences, loaded.preferences[: data.limit]
    if data.limit is not None:
        preferences = str(write_preferences(pairs, out / "data" / "preferences.jsonl", overwrite=True))
    truth_of = truth_column(pairs, data.truth_column, data.preferences)
    labels: dict[str, int] | None = None
    validation: dict[str, str] = {}
    if data.validation is not None:
        held_out = load_preferences(data.validation, on_invalid=data.on_invalid)
        print(held_out.report.text(), flush=True)
        labels = truth_column(held_out.preferences, data.truth_column, data.validation)
        validation = _validation_sets(data.validation, labels, out / "validation", data.on_invalid)
    return Files(
        preferences=preferences,
        validation=validation,
        prompts=data.prompts or preferences,
        eval_prompts=data.eval_prompts,
        sft=None,
        tokenizer=None,
        truth=truth_of,
        noise={},
        gold=None,
        on_invalid=data.on_invalid,
    )


def _read_truth(path: Path) -> tuple[dict[str, int], dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["id"]: -1 if r["wrong"] else 1 for r in rows}, {r["id"]: r["noise"] for r in rows}


def truth_column(preferences: Sequence[Preference], column: str | None, file: str) -> dict[str, int] | None:
    """The truth by id from a column of the file; None without a column. Raises InputError for other values."""
    if column is None:
        return None
    truth = {}
    for p in preferences:
        value = p.row.get(column)
        if value not in (-1, 0, 1):
            raise InputError(f"{p.source}: column {column!r} must be 1, 0 or -1 (right, tie, wrong), got {value!r}")
        truth[p.id] = int(value)
    return truth


def _validation_sets(path: str, truth: dict[str, int] | None, out: Path, on_invalid: OnInvalid) -> dict[str, str]:
    """The paper's three sets: original labels, labels of the judge, pairs on which both agree (section 2.5)."""
    original = load_preferences(path, on_invalid=on_invalid).preferences
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


def _sft(recipe: Recipe, files: Files, out: Path) -> str:
    if recipe.sft is None:
        return recipe.model
    settings: Settings = {"seed": recipe.seed} | recipe.sft
    if files.sft is not None:
        settings["data"] = files.sft
    if recipe.model == "scratch":
        settings["tokenizer"] = files.tokenizer
    config = build(SFTConfig, "sft", settings, model=recipe.model)
    run_jobs(_train_sft, [(config, out / "sft")], workers=1, threads=recipe.threads, labels=["SFT"])
    return str(out / "sft" / "model")


def _train_sft(config: SFTConfig, out: Path) -> dict[str, Any]:
    # run_recipe has asked for --resume already: within a recipe every stage goes on.
    return train_sft(config, out, resume=True)


def _strength(
    recipe: Recipe, files: Files, model: str, out: Path, scoring: Scoring, resume: bool
) -> list[Strength | None]:
    settings = {"seed": recipe.seed} | recipe.strength
    if scoring == "in-sample":
        settings.pop("folds", None)
    config = build(
        StrengthConfig,
        "strength",
        settings,
        data=files.preferences,
        model=model,
        scoring=scoring,
        on_invalid=files.on_invalid,
    )
    preferences = load_preferences(files.preferences, on_invalid=files.on_invalid).preferences
    folder = out / "strength" / scoring
    return measure(config, preferences, folder, truth=files.truth, noise=files.noise, resume=resume)


def _repair(
    recipe: Recipe, files: Files, strengths: list[Strength | None], out: Path
) -> dict[str, tuple[str, RepairOptions]]:
    """Write every arm's repaired data set, and what was changed; returns the files."""
    preferences = load_preferences(files.preferences, on_invalid=files.on_invalid).preferences
    wrong = None if files.truth is None else {i for i, t in files.truth.items() if t < 0}
    arms = {}
    for name, settings in recipe.repair.items():
        options = build(RepairOptions, f"repair.{name}", settings)
        repaired, changes = repair(preferences, strengths, options, wrong=wrong)
        path = out / "repair" / f"{name.replace(' ', '-')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_preferences(repaired, path, overwrite=True)
        lines = [json.dumps({"id": c.id, "action": c.action, "evidence": c.evidence}) for c in changes]
        write_text_atomic(path.with_suffix(".changes.jsonl"), "".join(line + "\n" for line in lines))
        arms[name] = (str(path), options)
    return arms


def _reward_models(
    recipe: Recipe, files: Files, model: str, arms: Mapping[str, tuple[str, RepairOptions]], out: Path
) -> None:
    jobs = []
    for name, (data, options) in arms.items():
        config = build(
            RewardConfig,
            "reward",
            {"seed": recipe.seed} | recipe.reward,
            data=data,
            model=model,
            validation=files.validation,
            margin_in_flip=options.margin_in_flip,
        )
        jobs.append((config, out / "rm" / name))
    run_jobs(
        _train_reward,
        jobs,
        workers=min(len(jobs), recipe.workers or default_workers()),
        threads=recipe.threads,
        labels=[f"reward model, {name}" for name in arms],
        on_done=lambda i, _: print(f"  {list(arms)[i]} trained", flush=True),
    )


def _train_reward(config: RewardConfig, out: Path) -> dict[str, Any]:
    return train_reward(config, out, resume=True, quiet=True)


def _examine(recipe: Recipe, files: Files, arms: Sequence[str], out: Path) -> None:
    target = out / "examine" / "reward.json"
    if target.exists() or not files.validation:
        return
    jobs = [(str(out / "rm" / name / "model"), files.validation, build_reward(recipe)) for name in arms]
    results = run_jobs(examine_model, jobs, workers=min(len(jobs), recipe.workers or default_workers()))
    rows: list[Any] = []
    bins: list[Any] = []
    for name, sets in zip(arms, results, strict=True):
        for set_name, found in sets.items():
            rows.append({"arm": name, "set": set_name, **found["row"]})
            bins.append({"arm": name, "set": set_name, "bins": found["bins"]})
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target, {"rows": rows, "reliability": bins, "by_strength": []})


def build_reward(recipe: Recipe) -> Settings:
    """The tokenisation settings that scoring must share with training."""
    fields = RewardConfig.model_fields
    names = ("max_length", "on_overlong", "max_tokens", "precision")
    return {name: recipe.reward.get(name, fields[name].default) for name in names}


def examine_model(folder: str, validation: dict[str, str], settings: Settings) -> dict[str, Any]:
    """One reward model on each validation set; `settings` are those of `build_reward`, or some of them."""
    on_overlong = settings.get("on_overlong", "truncate-prompt")
    encoder = Encoder.load(folder, max_length=settings["max_length"], on_overlong=on_overlong)
    model = RewardModel.load(folder, precision=settings.get("precision", "float32"))
    found = {}
    for name, path in validation.items():
        pairs, trees = read_pairs(path, encoder)
        rewards = model.score(trees, pad_id=encoder.pad_id, max_tokens=settings.get("max_tokens", 4096))
        prompts = [str(p.prompt) for p in pairs]
        found[name] = examine(rewards[:, 0], rewards[:, 1], prompts=prompts)
    return found


def _default_arm(recipe: Recipe) -> str:
    return next(iter(recipe.repair))


def _baselines(recipe: Recipe, policy: PolicyConfig, files: Files, model: str, out: Path) -> dict[str, str]:
    """Scored baselines for every reward model that a contrastive arm uses; the responses are sampled once."""
    arms = {
        settings.get("rm", _default_arm(recipe))
        for settings in policy.arms.values()
        if settings.get("reward", "contrastive") == "contrastive"
    }
    scored = {}
    for arm in sorted(arms):
        config = build(
            BaselineConfig,
            "policy.baselines",
            {"seed": recipe.seed} | policy.baselines,
            policy=model,
            prompts=files.prompts,
            reward_model=str(out / "rm" / arm / "model"),
        )
        scored[arm] = str(sample_baselines(config, out / "baselines"))
    return scored


def _ppo(recipe: Recipe, policy: PolicyConfig, files: Files, model: str, scored: Mapping[str, str], out: Path) -> None:
    jobs = []
    for name, settings in policy.arms.items():
        own = dict(settings)
        arm = own.pop("rm", _default_arm(recipe))
        merged = {"seed": recipe.seed} | policy.ppo | own
        if merged.get("reward", "contrastive") == "contrastive":
            merged["baselines"] = scored[arm]
        config = build(
            PPOConfig,
            f"policy.arms.{name}",
            merged,
            policy=model,
            reward_model=str(out / "rm" / arm / "model"),
            prompts=files.prompts,
            gold=files.gold,
        )
        jobs.append((config, out / "ppo" / name))
    run_jobs(
        _train_ppo,
        jobs,
        workers=min(len(jobs), recipe.workers or default_workers()),
        threads=recipe.threads,
        labels=list(policy.arms),
        on_done=lambda i, _: print(f"  {list(policy.arms)[i]} trained", flush=True),
    )


def _train_ppo(config: PPOConfig, out: Path) -> dict[str, Any]:
    return train_ppo(config, out, resume=True, quiet=True)


def _evaluate(recipe: Recipe, policy: PolicyConfig, files: Files, model: str, out: Path) -> None:
    target = out / "evaluate" / "policy.json"
    if target.exists():
        return
    config = build(PolicyEvaluationConfig, "policy.evaluate", policy.evaluate)
    ppo = build(PPOConfig, "policy.ppo", policy.ppo, policy=model, reward_model="", prompts="")
    encoder_length = ppo.max_length
    prompts = [p.prompt for p in load_prompts(files.eval_prompts or files.prompts).items]
    encoder = Encoder.load(model, max_length=encoder_length)
    room = encoder_length - config.sampling.max_new_tokens
    prompts = [p for p in prompts if len(encoder.prompt_ids(p)) <= room][: policy.limit_eval]
    first = out / "rm" / _default_arm(recipe) / "model"
    jobs: list[tuple[Any, ...]] = [(model, model, str(first), prompts, encoder_length, files.gold, config)]
    for name, settings in policy.arms.items():
        rm = out / "rm" / settings.get("rm", _default_arm(recipe)) / "model"
        jobs.append((str(out / "ppo" / name / "model"), model, str(rm), prompts, encoder_length, files.gold, config))
    workers = min(len(jobs), recipe.workers or default_workers())
    results = run_jobs(_answer, jobs, workers=workers, threads=recipe.threads)
    answers = dict(zip(["SFT", *policy.arms], results, strict=True))
    found = compare(answers, prompts, config, first="SFT") | {"frontier": _frontier(policy, out)}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target, found)


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
    """Gold and (normalised) proxy reward by KL, along each PPO run."""
    points = []
    for name in policy.arms:
        folder = out / "ppo" / name
        reward = json.loads((folder / "config.json").read_text())["reward_model"]
        config = json.loads((Path(reward) / "config.json").read_text())
        mean, std = config.get("steelyard_reward", (0.0, 1.0))
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            m = json.loads(line)
            points.append(
                {
                    "arm": name,
                    "step": m["step"],
                    "kl": m["ppo/kl"],
                    "gold": m.get("ppo/gold"),
                    "proxy": (m["ppo/reward_raw"] - mean) / std,
                }
            )
    return points


def describe_run(name: str, seed: int, began: float, command: str) -> dict[str, Any]:
    """Versions and origin, for the report."""
    import torch
    import transformers

    commit = ""
    git = shutil.which("git")
    if git is not None:
        here = Path(__file__).resolve().parent
        asked = subprocess.run([git, "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = asked.stdout.strip() if asked.returncode == 0 else ""
    return {
        "name": name,
        "version": __version__,
        "commit": commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "platform": f"{sys.platform} {platform.machine()}, {default_workers()} CPUs",
        },
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "command": command,
    }


def tables(out: Path) -> list[dict[str, Any]]:
    """The summary's tables, from the files that the stages left."""
    found = []
    for scoring in ("in-sample", "out-of-fold"):
        path = out / "strength" / scoring / "result.json"
        if path.exists() and (rows := json.loads(path.read_text()).get("detection")):
            found.append(
                {
                    "title": f"Finding wrong labels, {scoring}",
                    "columns": ["noise", "scorer", "AUROC", "average precision", "wrong", "pairs"],
                    "rows": [
                        [r["noise"], r["scorer"], r["auroc"], r["average_precision"], r["positives"], r["n"]]
                        for r in rows
                    ],
                    "note": "A kind of noise is told from the right labels; a single member is the mean over members.",
                }
            )
    if (path := out / "examine" / "reward.json").exists():
        rows = json.loads(path.read_text())["rows"]
        sets = list(dict.fromkeys(r["set"] for r in rows))
        by_arm: dict[str, dict[str, Any]] = {r["arm"]: {} for r in rows}
        for r in rows:
            by_arm[r["arm"]][r["set"]] = r
        found.append(
            {
                "title": "Reward models: accuracy on held-out pairs",
                "columns": ["arm", *(f"{s} (n = {next(r['n'] for r in rows if r['set'] == s)})" for s in sets)],
                "rows": [
                    [arm, *(f"{c[s]['accuracy']:.3f} [{c[s]['low']:.3f}, {c[s]['high']:.3f}]" for s in sets)]
                    for arm, c in by_arm.items()
                ],
                "note": "95 % bootstrap intervals by prompt. One seed each: differences inside them are no finding.",
            }
        )
    if (path := out / "evaluate" / "policy.json").exists():
        result = json.loads(path.read_text())
        found.append(
            {
                "title": "Policies on held-out prompts",
                "columns": ["policy", "gold", "proxy", "KL to SFT", "length", "ended"],
                "rows": [
                    [a["arm"], _interval(a, "gold"), _interval(a, "proxy"), a["kl"], a["length"], a["ended"]]
                    for a in result["arms"]
                ],
                "note": "Proxy: the policy's own reward model, normalised. One seed each.",
            }
        )
        if result["wins"]:
            found.append(
                {
                    "title": "Win / tie / lose by gold",
                    "columns": ["policy", "against", "win", "tie", "lose", "score"],
                    "rows": [
                        [w["a"], w["b"], w["win"], w["tie"], w["lose"], _interval(w, "score", "")]
                        for w in result["wins"]
                    ],
                    "note": "Score: wins and half the ties, with a 95 % bootstrap interval by prompt.",
                }
            )
    return found


def _interval(row: Mapping[str, Any], name: str, prefix: str | None = None) -> str:
    start = f"{name}_" if prefix is None else prefix
    if row[name] is None:
        return "unknown"
    return f"{row[name]:.3f} [{row[f'{start}low']:.3f}, {row[f'{start}high']:.3f}]"
