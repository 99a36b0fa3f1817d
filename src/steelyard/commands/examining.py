"""Commands that examine reward models and policies."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from steelyard.cli import VERBS
from steelyard.commands.common import OUT, Args, new, show, write
from steelyard.data.encode import Encoder
from steelyard.errors import InputError
from steelyard.evaluate.answers import FOLDER, write_answers
from steelyard.evaluate.examination import RewardEvaluationConfig, examine_models, health_table
from steelyard.evaluate.features import FeatureConfig, examine_features
from steelyard.evaluate.judge import JudgedFilesConfig, judge
from steelyard.evaluate.policy import PolicyEvaluationConfig, answer, compare, difficulty, prompts_that_fit
from steelyard.parallel import default_workers, run_jobs
from steelyard.report import build_report
from steelyard.run_dir import write_json_atomic
from steelyard.scorer import load_scorer
from steelyard.settings import command_line, parse
from steelyard.summary import describe_run, judge_tables, tables


def evaluate_reward(args: Args) -> None:
    """A bill of health of one or several reward models: preference files, benchmarks, report."""
    config, extra = parse(RewardEvaluationConfig, args, verb="evaluate reward", about=VERBS["evaluate reward"], out=OUT)
    began = time.time()
    for name in ("reward.json", "benchmarks.json"):
        new(extra.out / "examine" / name)
    found = examine_models(config)
    for name, content in found.items():
        write(extra.out / "examine" / name, content)
    if not (extra.out / "run.json").exists():
        about = describe_run("Bill of health", 0, began, command_line())
        write_json_atomic(extra.out / "run.json", about | {"seconds": time.time() - began})
    show(tables(extra.out) + [health_table(f) for name, f in found.items() if name == "reward.json"])
    print(f"report: {build_report(extra.out)}")


class PolicyComparisonConfig(PolicyEvaluationConfig):
    """Examination of policies against the SFT model."""

    sft: str = Field(description="the SFT model's folder: reference of the KL")
    policies: dict[str, str] = Field(description="name and folder of each policy: --policies NAME FOLDER ...")
    reward_model: str = Field(description="reward-model folder: the proxy")
    prompts: str = Field(description="held-out prompts")
    gold: str | None = Field(None, description="`module:function` of a gold scorer")
    max_length: int = Field(512, ge=8, description="tokens of prompt and response together")


def evaluate_policy(args: Args) -> None:
    """Sample from each policy on held-out prompts and compare."""
    config, extra = parse(PolicyComparisonConfig, args, verb="evaluate policy", about=VERBS["evaluate policy"], out=OUT)
    if "SFT" in config.policies:
        raise InputError("--policies: the name SFT is the SFT model's own; give the policy another name")
    target = new(extra.out / "evaluate" / "policy.json")
    encoder = Encoder.load(config.sft, max_length=config.max_length)
    prompts = prompts_that_fit(config.prompts, encoder, config)
    others = {"reward model": config.reward_model} | {f"policy {name}": f for name, f in config.policies.items()}
    for what, folder in others.items():
        encoder.require_same(folder, what=what, of=config.sft)
    gold = load_scorer(config.gold) if config.gold else None
    folders = {"SFT": config.sft, **config.policies}
    answers = {
        name: answer(folder, config.sft, config.reward_model, prompts, encoder, gold, config)
        for name, folder in folders.items()
    }
    write_answers(target.parent / FOLDER, answers, prompts)
    hard_N = difficulty(config.sft, config.reward_model, prompts, encoder, config)
    write(target, compare(answers, prompts, config, hard_N))
    show(tables(extra.out))


def evaluate_judge(args: Args) -> None:
    """Win / tie / lose by judges. Given again after an error, it goes on from the verdicts that it has."""
    config, extra = parse(JudgedFilesConfig, args, verb="evaluate judge", about=VERBS["evaluate judge"], out=OUT)
    target = new(extra.out / "evaluate" / "judge.json")
    write(target, judge(config, config.read(), target.parent))
    show(judge_tables(extra.out))
    print(f"\nreport: {build_report(extra.out)}")


def evaluate_features(args: Args) -> None:
    """Overlap of chosen and rejected features of several reward models."""
    config, extra = parse(FeatureConfig, args, verb="evaluate features", about=VERBS["evaluate features"], out=OUT)
    target = new(extra.out / "examine" / "features.json")
    jobs = [(name, config) for name in config.models]
    workers = min(len(jobs), default_workers(config.device))
    found = run_jobs(examine_features, jobs, workers=workers, labels=list(config.models))
    write(target, {"set": Path(config.data).name, "models": found})
    rows = [[m["name"], r["features"], r["measure"], r["value"], r["low"], r["high"]] for m in found for r in m["rows"]]
    columns = ["model", "features", "measure", "value", "low", "high"]
    show([{"title": "Chosen and rejected features apart", "columns": columns, "rows": rows}])
    print(f"\nreport: {build_report(extra.out)}")


COMMANDS = {
    "evaluate reward": evaluate_reward,
    "evaluate policy": evaluate_policy,
    "evaluate judge": evaluate_judge,
    "evaluate features": evaluate_features,
}
