"""Reads what a run left on disk into plain records. Knows file names and shapes, nothing of looks.

Files that carry results must be whole: a damaged one raises `InputError` naming it. Files that only tell how the
run was made (`run.json`, `recipe.yaml`, `config.json`, `timings.jsonl`, `samples.jsonl`) become a note on the page.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from steelyard.errors import InputError
from steelyard.report.data_study_records import DataStudyFile
from steelyard.report.policy_study_records import PolicyStudyFile
from steelyard.report.records import JudgeFile, PolicyFile, Record, RunFile, StrengthFile, SummaryFile
from steelyard.report.reward_records import BenchmarkFile, RewardFile
from steelyard.report.rounds_records import RoundsFile, RoundsStudyFile
from steelyard.report.strength_study_records import StrengthStudyFile
from steelyard.report.study_records import ContrastiveFile, FeatureFile, MetaRMFile

R = TypeVar("R", bound=Record)
Floats = NDArray[np.float64]

REQUIRED_COLUMNS = ("id", "prompt", "chosen", "rejected", "strength_mean", "strength_std")
_PRIMARY_FIRST = ("out-of-fold", "in-sample")


@dataclass(frozen=True)
class Stage:
    """One stage folder: `metrics` maps a name to (steps, values), ascending, the last line winning a repeated step."""

    name: str
    metrics: Mapping[str, tuple[Floats, Floats]]
    config: Any = None
    result: Mapping[str, Any] | None = None
    seconds: float | None = None
    samples: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class StrengthRun:
    """One scoring of a data set: its pairs (a pyarrow table, or None) and its figures (or None)."""

    scoring: str
    pairs: Any
    result: StrengthFile | None

    def column(self, name: str) -> Floats:
        """A numeric column as float64, (N,); missing values are nan."""
        return np.asarray(self.pairs.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)

    def has(self, name: str) -> bool:
        return self.pairs is not None and name in self.pairs.column_names


@dataclass(frozen=True)
class Run:
    """Everything a report shows. Empty where the run has no such file; `notes` are shown to the reader."""

    name: str
    info: RunFile | None = None
    recipe: str = ""
    summary: SummaryFile | None = None
    strengths: tuple[StrengthRun, ...] = ()
    sft: Mapping[str, Stage] = field(default_factory=dict)
    rm: Mapping[str, Stage] = field(default_factory=dict)
    ppo: Mapping[str, Stage] = field(default_factory=dict)
    dpo: Mapping[str, Stage] = field(default_factory=dict)
    reward: RewardFile | None = None
    benchmarks: BenchmarkFile | None = None
    policy: PolicyFile | None = None
    judged: JudgeFile | None = None
    features: FeatureFile | None = None
    contrastive: ContrastiveFile | None = None
    metarm: MetaRMFile | None = None
    data_study: DataStudyFile | None = None
    strength_study: StrengthStudyFile | None = None
    policy_study: PolicyStudyFile | None = None
    rounds: RoundsFile | None = None
    round_stages: Mapping[str, Stage] = field(default_factory=dict)
    rounds_study: RoundsStudyFile | None = None
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What the recipe or study says; nothing where it cannot be read."""
        with contextlib.suppress(yaml.YAMLError):
            if isinstance(settings := yaml.safe_load(self.recipe), dict):
                return settings
        return {}


def read_run(path: Path) -> Run:
    """Read a pipeline's folder, an audit's folder or a single stage's folder.

    Raises InputError if `path` is no folder, holds none of the files known, or holds a damaged file of results.
    """
    if not path.is_dir():
        raise InputError(f"{path}: a report needs the folder of a run, and this is not one. Check the path.")
    notes: list[str] = []
    single = _read_stage(path, path, notes) if (path / "metrics.jsonl").exists() else None
    kind = "" if single is None else _kind(single)
    run = Run(
        name=path.resolve().name,
        info=_optional_record(path / "run.json", RunFile, notes),
        recipe=_optional_text(path / "recipe.yaml", notes) or _optional_text(path / "study.yaml", notes),
        summary=_record(path / "summary.json", SummaryFile),
        sft=_stages(path, "sft", notes) or ({single.name: single} if single and kind == "sft" else {}),
        rm=_stages(path, "rm", notes) or ({single.name: single} if single and kind == "rm" else {}),
        ppo=_stages(path, "ppo", notes) or ({single.name: single} if single and kind == "ppo" else {}),
        dpo=_stages(path, "dpo", notes) or ({single.name: single} if single and kind == "dpo" else {}),
        reward=_record(path / "examine" / "reward.json", RewardFile),
        benchmarks=_record(path / "examine" / "benchmarks.json", BenchmarkFile),
        policy=_record(path / "evaluate" / "policy.json", PolicyFile),
        judged=_record(path / "evaluate" / "judge.json", JudgeFile),
        features=_record(path / "examine" / "features.json", FeatureFile),
        contrastive=_study(path, "contrastive", ContrastiveFile),
        metarm=_study(path, "metarm", MetaRMFile),
        data_study=_study(path, "data", DataStudyFile),
        strength_study=_study(path, "strength", StrengthStudyFile),
        policy_study=_study(path, "policy", PolicyStudyFile),
        rounds=_record(path / "rounds.json", RoundsFile),
        round_stages=_round_stages(path, notes),
        rounds_study=_study(path, "rounds", RoundsStudyFile),
    )
    run = replace(run, strengths=_read_strengths(path, notes, run.settings.get("repair_from")), notes=tuple(notes))
    found = (run.info, run.summary, run.strengths, run.sft, run.rm, run.ppo, run.reward, run.policy, run.features)
    studies = (
        run.contrastive,
        run.metarm,
        run.data_study,
        run.strength_study,
        run.policy_study,
        run.rounds,
        run.rounds_study,
    )
    if not any((*found, run.dpo, run.judged, run.benchmarks, *studies)):
        raise InputError(
            f"{path}: holds nothing a report can show. Expected run.json, summary.json, strength/, rm/, ppo/, "
            "dpo/, examine/reward.json, examine/benchmarks.json, evaluate/policy.json, evaluate/judge.json or, for a "
            "single stage, metrics.jsonl."
        )
    return run


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: must be a readable UTF-8 text file ({error}). Restore or delete it.") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: must be JSON, but {error.msg} at column {error.colno}. "
            "Write it again by re-running its stage, or delete it to leave its section out."
        ) from None
    except RecursionError:
        raise InputError(f"{path}: must be JSON of moderate depth, but is nested too deeply.") from None


def _record(path: Path, model: type[R]) -> R | None:
    if not path.exists():
        return None
    try:
        return model.model_validate(_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise InputError(
            f"{path}: field {where}: {first['msg']}, received {str(first['input'])[:80]!r}. "
            "Write it again by re-running its stage, or delete it to leave its section out."
        ) from None


def _study(path: Path, kind: str, model: type[R]) -> R | None:
    """study.json, if it is the study of this kind."""
    file = path / "study.json"
    content = _json(file) if file.exists() else None
    return _record(file, model) if isinstance(content, dict) and content.get("kind") == kind else None


def _optional_record(path: Path, model: type[R], notes: list[str]) -> R | None:
    try:
        return _record(path, model)
    except InputError as error:
        notes.append(f"Left out {error}")
        return None


def _optional_text(path: Path, notes: list[str]) -> str:
    try:
        return _text(path) if path.exists() else ""
    except InputError as error:
        notes.append(f"Left out {error}")
        return ""


def _json_lines(path: Path, *, may_be_cut: bool, notes: list[str]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file. A writer that was stopped may leave the last line cut: then a note, no error."""
    lines = _text(path).splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if may_be_cut and number == len(lines):
                notes.append(f"{path}:{number}: the last line is cut and was left out.")
                break
            raise InputError(f"{path}:{number}: each line must be one JSON object ({error}).") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: each line must be one JSON object, received {line[:60]!r}.")
        rows.append(row)
    return rows


def _optional_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return _json_lines(path, may_be_cut=True, notes=notes) if path.exists() else []
    except InputError as error:
        notes.append(f"Left out {error}")
        return []


def _columns(path: Path, rows: list[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    table: dict[str, dict[int, float]] = {}
    for number, row in enumerate(rows, start=1):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise InputError(f'{path}: object {number} must have an integer "step", received {step!r}.')
        for key, value in row.items():
            if key == "step" or value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{path}: step {step}: {key} must be a number, received {str(value)[:60]!r}.")
            table.setdefault(key, {})[step] = float(value)
    columns = {}
    for key, values in sorted(table.items()):
        steps = sorted(values)
        columns[key] = (np.array(steps, dtype=np.float64), np.array([values[s] for s in steps]))
    return columns


def _read_stage(folder: Path, root: Path, notes: list[str]) -> Stage:
    metrics_path = folder / "metrics.jsonl"
    label = folder.name if folder == root else folder.relative_to(root).as_posix()
    finished = (folder / "result.json").exists()
    if not finished:
        notes.append(f"{label} has no result.json: that stage has not finished. Shown as far as it went.")
    result = _json(folder / "result.json") if finished else None
    if result is not None and not isinstance(result, dict):
        raise InputError(f"{folder / 'result.json'}: must be one JSON object, received {str(result)[:60]!r}.")
    config = None
    if (folder / "config.json").exists():
        try:
            config = _json(folder / "config.json")
        except InputError as error:
            notes.append(f"Left out {error}")
    rows = _json_lines(metrics_path, may_be_cut=not finished, notes=notes)
    return Stage(
        name=folder.resolve().name,
        metrics=_columns(metrics_path, rows),
        config=config,
        result=result,
        seconds=_seconds(result, _optional_lines(folder / "timings.jsonl", notes)),
        samples=tuple(_optional_lines(folder / "samples.jsonl", notes)),
    )


def _seconds(result: Mapping[str, Any] | None, timings: list[dict[str, Any]]) -> float | None:
    """The stage's own total where it wrote one, else the sum over its steps."""
    total = (result or {}).get("seconds")
    if isinstance(total, int | float) and math.isfinite(total):
        return float(total)
    steps = [t["seconds"] for t in timings if isinstance(t.get("seconds"), int | float)]
    return float(sum(steps)) if steps else None


def _stages(path: Path, kind: str, notes: list[str]) -> dict[str, Stage]:
    folder = path / kind
    if (folder / "metrics.jsonl").exists():
        return {kind: _read_stage(folder, path, notes)}
    if not folder.is_dir():
        return {}
    stages = {}
    for child in sorted(p for p in folder.iterdir() if p.is_dir()):
        if (child / "metrics.jsonl").exists():
            stages[child.name] = _read_stage(child, path, notes)
        else:
            notes.append(f"{kind}/{child.name} has no metrics.jsonl and is left out.")
    return stages


def _round_stages(path: Path, notes: list[str]) -> dict[str, Stage]:
    """The PPO stage of each round that has begun."""
    folders = sorted(path.glob("round-[0-9][0-9]*/ppo"))
    begun = [f for f in folders if (f / "metrics.jsonl").exists()]
    return {f"round {int(f.parent.name.removeprefix('round-'))}": _read_stage(f, path, notes) for f in begun}


def _kind(stage: Stage) -> str:
    for kind in ("ppo", "dpo"):
        if any(key.startswith(f"{kind}/") for key in stage.metrics):
            return kind
    preference = ("train/accuracy", "train/margin", "train/reward_mean")
    return "rm" if any(key in stage.metrics for key in preference) else "sft"


def _read_strengths(path: Path, notes: list[str], repaired_from: Any) -> tuple[StrengthRun, ...]:
    """strength/<scoring>/, or strength.parquet right in strength/ or in the folder itself (an audit's output).

    The scoring by which a recipe or study repaired comes first.
    """
    for single in (path, path / "strength"):
        if (single / "strength.parquet").exists():
            return (_read_strength(single, path, notes),)
    folder = path / "strength"
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    first = (repaired_from, *_PRIMARY_FIRST)
    names.sort(key=lambda n: first.index(n) if n in first else len(first))
    present = [n for n in names if any((folder / n / f).exists() for f in ("strength.parquet", "result.json"))]
    return tuple(_read_strength(folder / n, path, notes) for n in present)


def _read_strength(folder: Path, root: Path, notes: list[str]) -> StrengthRun:
    result = _record(folder / "result.json", StrengthFile)
    pairs = _read_pairs(folder / "strength.parquet") if (folder / "strength.parquet").exists() else None
    label = folder.relative_to(root).as_posix()
    if result is None:
        notes.append(f"{label}: no result.json, so groups and detection are left out.")
    if pairs is None:
        notes.append(f"{label}: no strength.parquet, so histograms and examples are left out.")
    scoring = folder.name if folder.parent.name == "strength" else ""
    return StrengthRun(scoring or (result.scoring if result else "") or "strength", pairs, result)


def _read_pairs(path: Path) -> Any:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: must be a Parquet file ({error}). Write it again by re-running the audit.") from None
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: must have the columns {', '.join(missing)}; it has {', '.join(table.column_names)}.")
    for name in ("strength_mean", "strength_std", "votes", "voters", "p_flip", "truth"):
        if name in table.column_names:
            kind = table.schema.field(name).type
            if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
                raise InputError(f"{path}: column {name} must hold numbers, received {kind}.")
    return table
