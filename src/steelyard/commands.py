"""What each verb of the command line does: settings in, library calls, a few lines out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import Field
from rich.console import Console
from rich.table import Table

from steelyard.baselines import BaselineConfig, outlook, sample_baselines
from steelyard.cli import VERBS
from steelyard.config import Config
from steelyard.data.encode import Encoder
from steelyard.data.export import refuse_annotated, write_annotated, write_preferences, write_published
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.denoise import RepairOptions, repair
from steelyard.errors import InputError
from steelyard.evaluate.answers import FOLDER, write_answers
from steelyard.evaluate.examination import RewardEvaluationConfig, examine_models, health_table
from steelyard.evaluate.features import FeatureConfig, examine_features
from steelyard.evaluate.judge import JudgedFilesConfig, judge
from steelyard.evaluate.policy import PolicyEvaluationConfig, answer, compare, difficulty, prompts_that_fit
from steelyard.iterate import RoundsConfig, rounds_table, run_rounds
from steelyard.measure import StrengthConfig, measure, read_scores
from steelyard.parallel import default_workers, run_jobs
from steelyard.pipeline import run_recipe
from steelyard.recipe import Recipe
from steelyard.report import build_report
from steelyard.run_dir import write_json_atomic, write_text_atomic
from steelyard.scorer import load_scorer
from steelyard.settings import checked, command_line, override, parse, read_yaml
from steelyard.simulate.annotators import AnnotatorConfig, annotate
from steelyard.simulate.write import WorldConfig, write_world
from steelyard.stages import truth_column
from steelyard.study.contrastive import ContrastiveStudy, run_contrastive
from steelyard.study.data import run_data_study
from steelyard.study.data_config import DataStudy
from steelyard.study.metarm import MetaRMStudy, run_metarm
from steelyard.study.policy import run_policy_study
from steelyard.study.policy_config import PolicyStudy
from steelyard.study.rounds import RoundsStudy, run_rounds_study
from steelyard.study.strength import StrengthStudy, run_strength_study
from steelyard.summary import describe_run, judge_tables, tables
from steelyard.train.dpo import DPOConfig, train_dpo
from steelyard.train.metarm import MetaRMConfig, train_metarm
from steelyard.train.ppo import PPOConfig, train_ppo
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.train.sft import SFTConfig, train_sft

C = TypeVar("C", bound=Config)
Args = Sequence[str]
OUT: Any = (Path, tyro.MISSING, "folder to write to")
RESUME: Any = (bool, False, "go on with the run that the folder holds")


def demo(args: Args) -> None:
    """The built-in recipe `demo.yaml`, with overrides."""
    recipe = resources.files("steelyard") / "recipes" / "demo.yaml"
    with resources.as_file(recipe) as path:
        _run(path, args, "demo", Path("runs/demo"))


def run(args: Args) -> None:
    """A recipe from a YAML file."""
    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            _run(Path(), ["--help"], "run RECIPE.yaml", None)
        raise InputError("name the recipe: `steelyard run recipe.yaml --out runs/name`")
    _run(Path(args[0]), args[1:], "run", None)


def _run(path: Path, args: Args, verb: str, out: Path | None) -> None:
    recipe, extra = _from_file(Recipe, path, args, verb, VERBS[verb.split()[0]], out)
    summary = run_recipe(recipe, extra.out, resume=extra.resume, command=command_line())
    page = build_report(extra.out)
    _show(summary["tables"])
    print(f"\nreport: {page}")


def _from_file(config: type[C], path: Path, args: Args, verb: str, about: str, out: Path | None) -> tuple[C, Any]:
    """(settings of the YAML file with the changes of --set, --out and --resume)."""

    class RunOptions(Config):
        """Where to, and changes of single settings."""

        set: tuple[str, ...] = Field((), description="changes such as `policy.ppo.steps=20` (values in YAML)")

    where = (Path, tyro.MISSING if out is None else out, "folder to write to")
    options, extra = parse(RunOptions, args, verb=verb, about=about, out=where, resume=RESUME)
    return checked(config, override(read_yaml(path), options.set), lambda f: f"{path.name}: {f}"), extra


class AuditConfig(StrengthConfig):
    """Weigh every preference of a file and say which ones to doubt."""

    truth_column: str | None = Field(
        None, description="column with 1 label right, -1 wrong, 0 tie: to see how well it works, never to train on"
    )


def audit(args: Args) -> None:
    """Strength of each pair, the file back with columns, a report with the worst pairs."""
    if args and not args[0].startswith("-") and not args[0].endswith((".yaml", ".yml")):
        args = ["--data", *args]
    config, extra = parse(
        AuditConfig, args, verb="audit", about=VERBS["audit"] + " (the file may be given first, without --data)",
        out=OUT, resume=RESUME,
    )  # fmt: skip
    _weigh(config, config.truth_column, extra.out, extra.resume, report=True)


def strength(args: Args) -> None:
    """As `audit`, without a report."""
    config, extra = parse(StrengthConfig, args, verb="strength", about=VERBS["strength"], out=OUT, resume=RESUME)
    _weigh(config, None, extra.out, extra.resume, report=False)


def _weigh(config: StrengthConfig, column: str | None, out: Path, resume: bool, *, report: bool) -> None:
    began = time.time()
    loaded = load_preferences(config.data, on_invalid=config.on_invalid)
    print(loaded.report.text())
    refuse_annotated(loaded)
    truth = truth_column(loaded.preferences, column, config.data)
    own = StrengthConfig(**{k: getattr(config, k) for k in config.model_fields_set if k in StrengthConfig.model_fields})
    folder = out / "strength" / config.scoring
    measured = measure(own, loaded.preferences, folder, truth=truth, resume=resume)
    result = json.loads((folder / "result.json").read_text())
    if result["left_out"]:
        print(result["left_out"])
    strengths = {p.id: s for p, s in zip(loaded.preferences, measured, strict=True) if s is not None}
    annotated = write_annotated(loaded, strengths, out / "annotated.jsonl", overwrite=True)
    scores, index = read_scores(folder)
    published = write_published(
        [loaded.preferences[i] for i in index], out / "published_format.jsonl",
        chosen_scores_NM=scores[..., 0].T, rejected_scores_NM=scores[..., 1].T, overwrite=True,
    )  # fmt: skip
    actions = result["actions"]
    print(
        f"{result['pairs']} pairs weighed by {result['members']} reward models in {result['seconds']:.0f} s: "
        f"{result['share_negative']:.1%} have a negative mean margin; suggested: flip {actions['flip']}, soften "
        f"{actions['soften']}, keep {actions['keep']}"
    )
    print(f"annotated rows: {annotated}\npublished format: {published}")
    if report:
        name = f"Audit of {Path(config.data).name}"
        about = describe_run(name, config.seed, began, command_line())
        write_json_atomic(out / "run.json", about | {"seconds": time.time() - began})
        summary = {"tables": tables(out), "stages": [{"name": "strength", "seconds": result["seconds"], "note": ""}]}
        write_json_atomic(out / "summary.json", summary)
        _show(summary["tables"])
        print(f"report: {build_report(out)}")


def simulate(args: Args) -> None:
    """A small world; or, with --data and --scorer, the user's pairs relabelled by noisy annotators."""
    if not any(a.partition("=")[0] == "--data" for a in args):
        config, extra = parse(
            WorldConfig, args, verb="simulate", out=OUT,
            about=VERBS["simulate"] + ". To relabel your own pairs: `--data FILE --scorer module:function --out FILE`",
        )  # fmt: skip
        for name, path in write_world(config, extra.out).items():
            print(f"{name}: {path}")
        return
    noise, extra = parse(
        AnnotatorConfig, args, verb="simulate", about="relabel pairs with simulated annotators of known noise",
        data=(str, tyro.MISSING, "preferences to relabel"),
        scorer=(str, tyro.MISSING, "module:function (prompt, response) -> float that knows the truth"),
        out=(Path, tyro.MISSING, "file to write (.jsonl, .csv, .parquet); the truth goes to FILE.truth.jsonl"),
        seed=(int, 0, "seed of the annotators"), on_invalid=(OnInvalid, "error", "malformed rows: error or skip"),
    )  # fmt: skip
    loaded = load_preferences(extra.data, on_invalid=extra.on_invalid)
    print(loaded.report.text())
    labels, truth = annotate(loaded.preferences, load_scorer(extra.scorer), noise, extra.seed)
    write_preferences(labels, extra.out)
    lines = [
        {"id": t.id, "wrong": t.wrong, "noise": t.noise, "gold_chosen": t.gold_chosen, "gold_rejected": t.gold_rejected}
        for t in truth
    ]
    write_text_atomic(extra.out.with_suffix(".truth.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{sum(t.wrong for t in truth)} of {len(truth)} labels are wrong; labels: {extra.out}")


def train(config_type: type[Config], function: Callable[..., dict[str, Any]], verb: str) -> Callable[[Args], None]:
    """The command of a training stage."""

    def command(args: Args) -> None:
        config, extra = parse(config_type, args, verb=verb, about=VERBS[verb], out=OUT, resume=RESUME)
        result = function(config, extra.out, resume=extra.resume)
        print(json.dumps(result, indent=2))
        print(f"model: {extra.out / 'model'}")

    return command


def repair_command(args: Args) -> None:
    """Repair an annotated file."""
    options, extra = parse(
        RepairOptions, args, verb="repair", about=VERBS["repair"],
        data=(str, tyro.MISSING, "annotated preferences, as `audit` or `strength` write them"),
        out=(Path, tyro.MISSING, "file to write: .jsonl, .csv or .parquet"),
        on_invalid=(OnInvalid, "error", "malformed rows: error or skip"),
    )  # fmt: skip
    if options.recipe == "oracle flip":
        raise InputError("--recipe oracle flip needs the truth; use it in a recipe (`steelyard run`) with truth_column")
    loaded = load_preferences(extra.data, on_invalid=extra.on_invalid)
    print(loaded.report.text())
    if not loaded.strengths and options.recipe != "keep":
        raise InputError(f"{extra.data}: no strengths in it; measure them first (`steelyard audit` or `strength`)")
    strengths = [loaded.strengths.get(p.id) for p in loaded.preferences]
    repaired, changes = repair(loaded.preferences, strengths, options)
    write_preferences(repaired, extra.out)
    log = extra.out.with_suffix(".changes.jsonl")
    rows = [{"id": c.id, "action": c.action, "evidence": c.evidence} for c in changes]
    write_text_atomic(log, "".join(json.dumps(row) + "\n" for row in rows))
    counts = {a: sum(c.action == a for c in changes) for a in dict.fromkeys(c.action for c in changes)}
    said = ", ".join(f"{a} {n}" for a, n in counts.items()) or "nothing changed"
    print(f"{len(repaired)} of {len(loaded.preferences)} pairs written to {extra.out}: {said}\nevidence: {log}")


def sample_command(args: Args) -> None:
    """Offline baselines."""
    config, extra = parse(BaselineConfig, args, verb="sample", about=VERBS["sample"], out=OUT)
    path = sample_baselines(config, extra.out)
    if config.reward_model is not None:
        print(outlook(path))
    print(f"baselines: {path}")


def evaluate_reward(args: Args) -> None:
    """A bill of health of one or several reward models: preference files, benchmarks, report."""
    config, extra = parse(RewardEvaluationConfig, args, verb="evaluate reward", about=VERBS["evaluate reward"], out=OUT)
    began = time.time()
    for name in ("reward.json", "benchmarks.json"):
        _new(extra.out / "examine" / name)
    found = examine_models(config)
    for name, content in found.items():
        _write(extra.out / "examine" / name, content)
    if not (extra.out / "run.json").exists():
        about = describe_run("Bill of health", 0, began, command_line())
        write_json_atomic(extra.out / "run.json", about | {"seconds": time.time() - began})
    _show(tables(extra.out) + [health_table(f) for name, f in found.items() if name == "reward.json"])
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
    target = _new(extra.out / "evaluate" / "policy.json")
    encoder = Encoder.load(config.sft, max_length=config.max_length)
    prompts = prompts_that_fit(config.prompts, encoder, config)
    gold = load_scorer(config.gold) if config.gold else None
    folders = {"SFT": config.sft, **config.policies}
    answers = {
        name: answer(folder, config.sft, config.reward_model, prompts, encoder, gold, config)
        for name, folder in folders.items()
    }
    write_answers(target.parent / FOLDER, answers, prompts)
    hard_N = difficulty(config.sft, config.reward_model, prompts, encoder, config)
    _write(target, compare(answers, prompts, config, hard_N))
    _show(tables(extra.out))


def evaluate_judge(args: Args) -> None:
    """Win / tie / lose by judges. Given again after an error, it goes on from the verdicts that it has."""
    config, extra = parse(JudgedFilesConfig, args, verb="evaluate judge", about=VERBS["evaluate judge"], out=OUT)
    target = _new(extra.out / "evaluate" / "judge.json")
    _write(target, judge(config, config.read(), target.parent))
    _show(judge_tables(extra.out))
    print(f"\nreport: {build_report(extra.out)}")


def evaluate_features(args: Args) -> None:
    """Overlap of chosen and rejected features of several reward models."""
    config, extra = parse(FeatureConfig, args, verb="evaluate features", about=VERBS["evaluate features"], out=OUT)
    target = _new(extra.out / "examine" / "features.json")
    jobs = [(name, config) for name in config.models]
    workers = min(len(jobs), default_workers(config.device))
    found = run_jobs(examine_features, jobs, workers=workers, labels=list(config.models))
    _write(target, {"set": Path(config.data).name, "models": found})
    rows = [[m["name"], r["features"], r["measure"], r["value"], r["low"], r["high"]] for m in found for r in m["rows"]]
    columns = ["model", "features", "measure", "value", "low", "high"]
    _show([{"title": "Chosen and rejected features apart", "columns": columns, "rows": rows}])
    print(f"\nreport: {build_report(extra.out)}")


def study(
    config_type: type[Config], function: Callable[..., dict[str, Any]], verb: str, file: str = "study"
) -> Callable[[Args], None]:
    """The command of a study: `steelyard study KIND STUDY.yaml --out FOLDER`; `file` is what it reads."""

    class StudyOptions(Config):
        """Where to, and changes of single settings."""

        set: tuple[str, ...] = Field((), description="changes such as `reward.epochs=2` (values in YAML)")

    fields = "\n".join(f"- {name}: {field.description}" for name, field in config_type.model_fields.items())
    usage = f"{verb} {file.upper()}.yaml"
    about = f"{VERBS[verb]}. The file holds:\n\n{fields}"

    def command(args: Args) -> None:
        if not args or args[0].startswith("-"):
            if "-h" in args or "--help" in args:
                parse(StudyOptions, ["--help"], verb=usage, about=about, out=OUT, resume=RESUME)
            raise InputError(f"name the {file}: `steelyard {verb} {file}.yaml --out runs/name`")
        options, extra = parse(StudyOptions, args[1:], verb=usage, about=about, out=OUT, resume=RESUME)
        path = Path(args[0])
        config = checked(config_type, override(read_yaml(path), options.set), lambda f: f"{path.name}: {f}")
        function(config, extra.out, resume=extra.resume, command=command_line())
        page = build_report(extra.out)
        _show(json.loads((extra.out / "summary.json").read_text())["tables"])
        print(f"\nreport: {page}")

    return command


def rounds(config: RoundsConfig, out: Path, *, resume: bool, command: str) -> dict[str, Any]:
    """The rounds, and what the report says of the run."""
    began = time.time()
    record = run_rounds(config, out, resume=resume)
    if not (out / "run.json").exists():
        write_json_atomic(out / "run.json", describe_run(f"Rounds: {config.reward}", config.seed, began, command))
    write_json_atomic(out / "summary.json", {"tables": [rounds_table(record)]})
    return record


def study_data(args: Args) -> None:
    """The analyses of Secrets of RLHF II on one data set."""
    verb = "study data"
    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            _from_file(DataStudy, Path(), ["--help"], f"{verb} STUDY.yaml", VERBS[verb], None)
        raise InputError("name the study: `steelyard study data study.yaml --out runs/name`")
    config, extra = _from_file(DataStudy, Path(args[0]), args[1:], f"{verb} STUDY.yaml", VERBS[verb], None)
    found = run_data_study(config, extra.out, resume=extra.resume, command=command_line())
    page = build_report(extra.out)
    _show(json.loads((extra.out / "summary.json").read_text())["tables"])
    print("\n" + "\n".join(found.get("findings", [])))
    print(f"\nreport: {page}")


def _new(path: Path) -> Path:
    """A file that can be written. Raises InputError if it is there: results are never overwritten."""
    if path.exists():
        raise InputError(f"{path}: exists already; give another folder (--out)")
    if file := next((p for p in path.parents if p.is_file()), None):
        raise InputError(f"{file}: must be a folder, but it is a file; give another path (--out)")
    return path


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, content)


def report(args: Args) -> None:
    """The HTML page of a run folder."""

    class ReportOptions(Config):
        """Report options."""

        out: Path | None = Field(None, description="page to write; none given: report.html in the run folder")

    if not args or args[0].startswith("-"):
        parse(ReportOptions, args, verb="report RUN", about=VERBS["report"])
        raise InputError("name the run folder: `steelyard report runs/demo`")
    options, _ = parse(ReportOptions, args[1:], verb="report RUN", about=VERBS["report"])
    print(f"report: {build_report(Path(args[0]), options.out)}")


def _show(found: Sequence[dict[str, Any]]) -> None:
    """Print tables as the report has them."""
    console = Console()
    for t in found:
        table = Table(title=t["title"], title_justify="left", caption=t.get("note"), caption_justify="left")
        for i, column in enumerate(t["columns"]):
            table.add_column(str(column), justify="left" if i == 0 else "right")
        for row in t["rows"]:
            table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row))
        console.print()
        console.print(table)


COMMANDS: dict[str, Callable[[Args], None]] = {
    "demo": demo,
    "audit": audit,
    "simulate": simulate,
    "train sft": train(SFTConfig, train_sft, "train sft"),
    "train reward": train(RewardConfig, train_reward, "train reward"),
    "train ppo": train(PPOConfig, train_ppo, "train ppo"),
    "train dpo": train(DPOConfig, train_dpo, "train dpo"),
    "train metarm": train(MetaRMConfig, train_metarm, "train metarm"),
    "iterate": study(RoundsConfig, rounds, "iterate", "settings"),
    "strength": strength,
    "repair": repair_command,
    "sample": sample_command,
    "evaluate reward": evaluate_reward,
    "evaluate policy": evaluate_policy,
    "evaluate judge": evaluate_judge,
    "evaluate features": evaluate_features,
    "study contrastive": study(ContrastiveStudy, run_contrastive, "study contrastive"),
    "study data": study_data,
    "study metarm": study(MetaRMStudy, run_metarm, "study metarm"),
    "study rounds": study(RoundsStudy, run_rounds_study, "study rounds"),
    "study policy": study(PolicyStudy, run_policy_study, "study policy"),
    "study strength": study(StrengthStudy, run_strength_study, "study strength"),
    "report": report,
    "run": run,
}
