"""Opens reward models and examines them: preference files (accuracy, health) and benchmarks, into plain JSON values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator

from steelyard.config import Config, Device
from steelyard.data.benchmarks import Item, read_prior_set, read_rewardbench, read_rewardbench2, read_rm_bench
from steelyard.data.dialogues import prompt_text
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.errors import InputError
from steelyard.evaluate.benchmarks import PRIOR_SETS, rewardbench, rewardbench2, rm_bench, score_items
from steelyard.evaluate.health import checkup
from steelyard.evaluate.reward import examine
from steelyard.evaluate.units import units_of
from steelyard.models.load import read_config
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision
from steelyard.types import Preference

UNKNOWN_LENGTH = 512
Found = Mapping[str, Mapping[str, Any]]


class RewardEvaluationConfig(Config):
    """Examination of reward models."""

    model: tuple[str, ...] = Field(min_length=1, description="reward-model folders")
    data: tuple[str, ...] | None = Field(
        None, min_length=1, description="preference files, each examined by itself; none: benchmarks only"
    )
    max_length: int | None = Field(
        None, ge=8, description="tokens of prompt and one response together; none given: as each model was trained"
    )
    device: Device = "cpu"
    on_invalid: OnInvalid = Field("error", description="malformed rows of preference files: error or skip")
    strength: str | None = Field(
        None, description="folder of `steelyard strength` on these files; none: the strength columns of the files"
    )
    rewardbench: str | None = Field(None, description="file of RewardBench (split `filtered`)")
    rewardbench_prior: dict[str, str] = Field(
        {}, description="files of its prior sets by name: anthropic_helpful FILE anthropic_hhh FILE shp FILE ..."
    )
    rewardbench2: str | None = Field(None, description="file of RewardBench 2")
    rm_bench: tuple[str, ...] = Field((), description="file of RM-Bench, or one file for each domain")

    @field_validator("model", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _something_to_do(self) -> RewardEvaluationConfig:
        if self.rewardbench_prior and self.rewardbench is None:
            raise ValueError("rewardbench_prior: no effect without rewardbench; give RewardBench's own file with it")
        if self.data is None and not (self.rewardbench or self.rewardbench2 or self.rm_bench):
            raise ValueError("nothing to examine on: give data (preference files) or a benchmark's file")
        if self.data is None and self.strength is not None:
            raise ValueError("strength: no effect without data")
        return self


def examine_models(config: RewardEvaluationConfig) -> dict[str, dict[str, Any]]:
    """The files of examine/ by name: reward.json with data, benchmarks.json with benchmarks. Raises InputError.

    The files of the benchmarks are read and checked before the first model is opened. Prints what was found in each
    preference file, once.
    """
    data = config.data or ()
    names = [Path(path).name for path in data]
    sets = {name if names.count(name) == 1 else path: path for name, path in zip(names, data, strict=True)}
    weighed = read_weighed(config.strength) if config.strength else None
    benchmarks = read_benchmarks(
        first=config.rewardbench, prior=config.rewardbench_prior, second=config.rewardbench2, rm=config.rm_bench
    )
    examined: dict[str, Any] = {}
    scored: list[dict[str, Any]] = []
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            print(text, flush=True)
        said.add(text)

    for arm, folder in _model_names(config.model).items():
        length = training_length(folder, config.max_length)
        model, encoder = open_model(folder, max_length=length, device=config.device)
        if sets:
            examined[arm] = examine_sets(model, encoder, sets, weighed=weighed, on_invalid=config.on_invalid, say=say)
        scored += [{"arm": arm} | score(model, encoder, 4096) for score in benchmarks.values()]
    found = {"reward.json": reward_file(examined)} if sets else {}
    return found | ({"benchmarks.json": {"results": scored}} if scored else {})


def _model_names(folders: Sequence[str]) -> dict[str, str]:
    """Short names: the folder's; of several called `model`, what stands before it; the whole path where equal."""
    if len(set(folders)) < len(folders):
        raise InputError(f"--model: names a folder twice: {', '.join(folders)}; give each once")
    if len(folders) == 1:
        return {Path(folders[0]).name: folders[0]}
    short = [p.parent.name if p.name == "model" and p.parent.name else p.name for p in map(Path, folders)]
    return {name if short.count(name) == 1 else f: f for name, f in zip(short, folders, strict=True)}


@dataclass(frozen=True, slots=True)
class Weighed:
    """Strengths of a folder that `steelyard strength` wrote: mean margins by id, chosen and rejected; and by texts."""

    folder: str
    means: Mapping[tuple[str, str, str], float]
    by_text: Mapping[tuple[str, str, str], float]

    def of(self, pair: Preference) -> float:
        """The pair's mean margin; of a pair whose label was turned since, the opposite; nan if it was not weighed.

        Its id counts first, then its texts: an id that comes from a file's name is another in a copy of the file.
        """
        for means, key in ((self.means, pair.id), (self.by_text, prompt_text(pair.prompt))):
            for first, second, sign in ((pair.chosen, pair.rejected, 1), (pair.rejected, pair.chosen, -1)):
                if (key, first, second) in means:
                    return sign * means[key, first, second]
        return float("nan")


def read_weighed(folder: str) -> Weighed:
    """The strengths in a folder of `steelyard strength` or `audit`. Raises InputError if there are none or several."""
    import pyarrow.parquet as pq

    root = Path(folder)
    places = [p for p in (root, *sorted((root / "strength").glob("*"))) if (p / "strength.parquet").exists()]
    if len(places) != 1:
        names = ", ".join(map(str, places)) or "none"
        raise InputError(f"{folder}: must hold one strength.parquet (name its folder), found {names}")
    columns = ["id", "prompt", "chosen", "rejected", "strength_mean"]
    try:
        rows = pq.read_table(places[0] / "strength.parquet", columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{places[0] / 'strength.parquet'}: cannot be read ({error}); weigh the pairs again") from None
    by_id, by_text = (
        {(r[key], r["chosen"], r["rejected"]): float(r["strength_mean"]) for r in rows} for key in ("id", "prompt")
    )
    return Weighed(folder, by_id, by_text)


def training_length(folder: str, asked: int | None) -> int:
    """The `max_length` to examine a model with: the one asked for, else that of its training, kept in its config.

    Says so where the two differ, and where a checkpoint of earlier versions or other tools keeps none (then 512).
    Raises InputError if the folder holds no model.
    """
    trained: int | None = getattr(read_config(folder), "steelyard_max_length", None)
    if asked is None and trained is None:
        print(f"{folder}: does not say with which max_length it was trained; {UNKNOWN_LENGTH} is taken", flush=True)
    elif asked is not None and trained is not None and asked != trained:
        print(
            f"{folder}: was trained with max_length = {trained} and is examined with {asked}: long pairs are cut or "
            "left out otherwise than in training; leave max_length out to examine it as it was trained",
            flush=True,
        )
    return asked or trained or UNKNOWN_LENGTH


def open_model(
    folder: str,
    *,
    max_length: int,
    on_overlong: OnOverlong = "truncate-prompt",
    precision: Precision = "float32",
    device: str = "cpu",
) -> tuple[RewardModel, Encoder]:
    """A reward model with its tokenizer. Raises InputError if the folder holds none."""
    encoder = Encoder.load(folder, max_length=max_length, on_overlong=on_overlong)
    return RewardModel.load(folder, precision=precision, device=device), encoder


def examine_sets(
    model: RewardModel,
    encoder: Encoder,
    validation: Mapping[str, str],
    *,
    max_tokens: int = 4096,
    weighed: Weighed | None = None,
    on_invalid: OnInvalid = "error",
    say: Callable[[str], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """One reward model on each preference file, every distinct pair scored once; `say` is told what the files hold.

    Raises InputError for a bad file.
    """
    read = {name: _read(path, encoder, weighed, on_invalid, say) for name, path in validation.items()}
    if weighed is not None and not any(np.isfinite(strength).any() for _, _, strength, _ in read.values()):
        raise InputError(f"{weighed.folder}: its strengths are of other pairs than those of {', '.join(validation)}")
    rewards = model.score_sets(
        {name: trees for name, (_, trees, _, _) in read.items()}, pad_id=encoder.pad_id, max_tokens=max_tokens
    )
    stored = getattr(model.hf.config, "steelyard_reward", None)
    found = {}
    for name, (pairs, trees, strength, left_out) in read.items():
        prompts, units = [str(p.prompt) for p in pairs], units_of(pairs)
        chosen, rejected = rewards[name][:, 0], rewards[name][:, 1]
        lengths = np.array([[len(response) for response in tree.responses] for tree in trees])
        health = checkup(
            chosen,
            rejected,
            prompts=prompts,
            units=units,
            chosen_length_N=lengths[:, 0],
            rejected_length_N=lengths[:, 1],
            strength_N=strength,
            normal=None if stored is None else model.normal,
        )
        found[name] = examine(chosen, rejected, prompts=prompts, units=units) | health
        found[name]["row"]["left_out"] = left_out
    return found


def _read(
    path: str,
    encoder: Encoder,
    weighed: Weighed | None,
    on_invalid: OnInvalid,
    say: Callable[[str], object] | None,
) -> tuple[list[Preference], list[Tree], Float[np.ndarray, "N"], str]:
    """Usable pairs, their trees, their strengths (the folder's, else the file's own; or nan), what was left out."""
    loaded = load_preferences(path, on_invalid=on_invalid)
    encoded = encoder.encode(loaded.preferences)
    left_out = loaded.left_out(encoded.text())
    if not encoded.trees:
        raise InputError(f"{path}: no usable pair is left to examine on ({left_out})")
    if say is not None:
        say(loaded.report.text())
        if encoded.text():
            say(f"{path}: {encoded.text()}")
    pairs = [loaded.preferences[i] for i in encoded.index]
    own = {id: strength.mean for id, strength in loaded.strengths.items()}
    means = [own.get(p.id, np.nan) if weighed is None else weighed.of(p) for p in pairs]
    return pairs, encoded.trees, np.array(means, dtype=np.float64), left_out


def reward_file(results: Mapping[str, Found]) -> dict[str, Any]:
    """The content of examine/reward.json from arm -> set -> `examine_sets`."""
    flat = [({"arm": arm, "set": name}, f) for arm, sets in results.items() for name, f in sets.items()]
    return {
        "rows": [at | f["row"] for at, f in flat],
        "reliability": [at | {"bins": f["bins"]} for at, f in flat],
        "by_strength": [at | {"groups": f["by_strength"]} for at, f in flat if "by_strength" in f],
        "temperature": [at | f["temperature"] for at, f in flat],
        "by_length": [at | f["by_length"] | {"longer_is_right": f["longer_is_right"]} for at, f in flat],
        "length": [at | f["length"] for at, f in flat],
        "scale": [at | f["scale"] for at, f in flat],
    }


# ---- benchmarks ----------------------------------------------------------------------------------------------------

Scorer = Callable[[RewardModel, Encoder, int], dict[str, Any]]


def read_benchmarks(
    *, first: str | None, prior: Mapping[str, str], second: str | None, rm: Sequence[str]
) -> dict[str, Scorer]:
    """What is to be scored, by name, its files read and checked. Raises InputError for files that do not fit."""
    if unknown := sorted(set(prior) - set(PRIOR_SETS)):
        raise InputError(f"rewardbench_prior: must name {', '.join(PRIOR_SETS)}; got {', '.join(unknown)}")
    found: dict[str, Scorer] = {}
    if first is not None:
        own, more = read_rewardbench(first), [i for name, path in prior.items() for i in read_prior_set(path, name)]
        found["RewardBench"] = lambda *how: _score_first(own, more, *how)
    if second is not None:
        rows = read_rewardbench2(second)
        found["RewardBench 2"] = lambda *how: _score(rewardbench2, rows, *how)
    if rm:
        styled = read_rm_bench(rm)
        found["RM-Bench"] = lambda *how: _score(rm_bench, styled, *how)
    return found


def _score(
    rule: Callable[..., dict[str, Any]], items: Sequence[Item], model: RewardModel, encoder: Encoder, max_tokens: int
) -> dict[str, Any]:
    rewards, notes = score_items(model, encoder, items, max_tokens=max_tokens)
    result = rule(items, rewards)
    return result | {"notes": result["notes"] + notes}


def _score_first(
    own: Sequence[Item], prior: Sequence[Item], model: RewardModel, encoder: Encoder, max_tokens: int
) -> dict[str, Any]:
    rewards, notes = score_items(model, encoder, own, max_tokens=max_tokens)
    more, said = score_items(model, encoder, prior, max_tokens=max_tokens)
    result = rewardbench(own, rewards, prior, more)
    return result | {"notes": result["notes"] + notes + [f"Prior sets: {note}" for note in said]}


# ---- tables for the terminal ---------------------------------------------------------------------------------------


def health_table(content: Mapping[str, Any]) -> dict[str, Any]:
    """The main figures of `reward_file`, for people."""
    rows = []
    for t, b, length, s in zip(*(content[k] for k in ("temperature", "by_length", "length", "scale")), strict=True):
        rows.append(
            [
                f"{t['arm']}, {t['set']}",
                "–" if t["temperature"] is None else f"{t['temperature']:.2f}",
                "–" if t["temperature"] is None else f"{t['nll'][0]:.3f} → {t['nll_scaled'][0]:.3f}",
                "–" if t["temperature"] is None else f"{t['ece']:.3f} → {t['ece_scaled']:.3f}",
                _estimate(b["longer_is_right"]),
                _estimate(length["prefers_longer"]),
                _estimate(length["spearman"]),
                f"{s['mean'][0]:.2f} ± {s['std'][0]:.2f}",
            ]
        )
    columns = ["model, set", "T", "NLL", "ECE", "longer is right", "prefers longer", "length ρ", "reward"]
    note = "NLL and ECE before and after a temperature fitted on the other half of the prompts (T: on all)."
    return {"title": "Reward models: health", "columns": columns, "rows": rows, "note": note}


def benchmark_tables(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table for each benchmark: a model a row."""
    tables = []
    for name in dict.fromkeys(r["benchmark"] for r in results):
        held = [r for r in results if r["benchmark"] == name]
        columns = ["model", "overall", *(p["name"] for p in held[0]["parts"])]
        rows = [[r["arm"], _part(r["overall"]), *(_part(p, short=True) for p in r["parts"])] for r in held]
        missing = list(dict.fromkeys(m for r in held for m in r["overall"]["missing"]))
        notes = list(dict.fromkeys(note for r in held for note in r["notes"]))
        said = [f"Missing: {', '.join(missing)}; averages that lack them are not given."] if missing else []
        tables.append({"title": name, "columns": columns, "rows": rows, "note": " ".join(said + notes)})
    return tables


def _part(score: Mapping[str, Any], *, short: bool = False) -> str:
    return "missing" if score["score"] is None else _estimate([score["score"][0], None] if short else score["score"])


def _estimate(value: Sequence[float | None]) -> str:
    if value[0] is None:
        return "–"
    return f"{value[0]:.3f}" if value[1] is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
