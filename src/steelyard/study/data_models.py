"""The reward models of a study of data: train, score the validation pairs, forget the weights; average weights.

A model's folder keeps its configuration, its metrics and `scores.npz` (ids, and r(chosen), r(rejected) of every
validation pair as it was labelled). Everything a study says is computed from these, without training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from steelyard.baselines import fingerprint
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_preferences
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.measure import StrengthConfig, held_out_plan, read_scores
from steelyard.models.reward import RewardModel
from steelyard.probe import Probes, bootstrap_rows, features
from steelyard.run_dir import write_json_atomic
from steelyard.train.pairwise import read_pairs
from steelyard.train.reward import RewardConfig, open_cache, train_reward

SCORES = "scores.npz"
Scores = tuple[list[str], Float[np.ndarray, "N 2"]]


@dataclass(frozen=True)
class Job:
    """One reward model: where it lives, its settings, which rows of its data it sees, and what it is examined on."""

    folder: Path
    config: RewardConfig
    rows: list[int] = field(repr=False)
    examined_on: str
    keep: bool = False

    @property
    def label(self) -> str:
        return " / ".join(self.folder.parts[-3:])

    @property
    def done(self) -> bool:
        """Whether its scores (and, if they are to be kept, its weights) are there."""
        return (self.folder / SCORES).exists() and (not self.keep or (self.folder / "model").exists())


def train_and_score(job: Job) -> None:
    """Train one reward model and score the validation pairs; goes on where an interrupted one stopped."""
    scored = job.folder / SCORES
    if scored.exists() and not job.done:
        # Its weights were not wanted when it was trained, and now are: the same bytes come out once more.
        shutil.rmtree(job.folder)
    if not scored.exists():
        began = time.perf_counter()
        result = train_reward(job.config, job.folder, resume=True, quiet=True, rows=job.rows)
        trained = time.perf_counter() - began
        found = score(job.folder / "model", job.config, job.examined_on)
        cost = {"training_seconds": trained, "seconds": time.perf_counter() - began, "steps": result["steps"]}
        # The scores last: a model that has them counts as done, and the tables read the cost of every done model.
        write_json_atomic(job.folder / "cost.json", cost)
        save_scores(scored, *found)
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    if not job.keep:
        shutil.rmtree(job.folder / "model", ignore_errors=True)


def score(model: str | Path | RewardModel, config: RewardConfig, path: str) -> Scores:
    """Ids and raw rewards of the usable pairs of a file, tokenised as in training."""
    folder = config.model if isinstance(model, RewardModel) else model
    encoder = Encoder.load(folder, max_length=config.max_length, on_overlong=config.on_overlong)
    if not isinstance(model, RewardModel):
        model = RewardModel.load(model, precision=config.precision, device=config.device)
    pairs, trees = read_pairs(path, encoder)
    scorer = open_cache(config, model, trees) or model
    return [p.id for p in pairs], scorer.score(trees, pad_id=encoder.pad_id, max_tokens=config.max_tokens)


def save_scores(path: Path, ids: Sequence[str], scores: Float[np.ndarray, "..."]) -> None:
    """ids (text) and scores, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez_compressed(temporary, ids=np.array(ids), scores=scores)
    temporary.replace(path)


def load_scores(path: Path) -> tuple[list[str], Float[np.ndarray, "..."]]:
    """What `save_scores` wrote."""
    with np.load(path) as stored:
        return stored["ids"].tolist(), stored["scores"]


def start_model(model: str, config: RewardConfig, folder: Path) -> str:
    """The untrained reward model that `train_reward` would begin with: what the members of an average share."""
    if not (folder / "config.json").exists():
        encoder = Encoder.load(model, max_length=config.max_length, on_overlong=config.on_overlong)
        fresh = RewardModel.from_language_model(model, pad_id=encoder.pad_id, seed=config.seed)
        draft = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        fresh.save(draft, encoder)
        draft.replace(folder)
    return str(folder)


def average_and_score(folders: Sequence[Path], config: RewardConfig, examined_on: str, out: Path) -> None:
    """WARM (arXiv 2401.12187): the mean of M models' weights, examined like the others."""
    if not (out / SCORES).exists():
        model = average([folder / "model" for folder in folders], config)
        save_scores(out / SCORES, *score(model, config, examined_on))


@torch.no_grad()
def average(folders: Sequence[Path], config: RewardConfig) -> RewardModel:
    """A reward model whose every weight is the mean over the folders' models (summed in float64)."""
    first = RewardModel.load(folders[0], precision=config.precision, device=config.device)
    total = {name: weight.double() for name, weight in first.state_dict().items()}
    for folder in folders[1:]:
        other = RewardModel.load(folder, precision=config.precision, device=config.device).state_dict()
        total = {name: weight + other[name] for name, weight in total.items()}
    kept = first.state_dict()
    first.load_state_dict({name: (weight / len(folders)).to(kept[name].dtype) for name, weight in total.items()})
    return first


def ensemble_scores(folder: Path, path: str) -> tuple[list[str], Float[np.ndarray, "M N 2"]]:
    """The strength's members on pairs that no member has seen: those of another file.

    Full members are read back from disk; linear members are fitted again, to the same rows with the same penalty, which
    takes one pass of the trunk over the new pairs and seconds beyond. Raises InputError if members cannot be had again.
    """
    config = StrengthConfig(**json.loads((folder / "config.json").read_text()))
    encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
    pairs, trees = read_pairs(path, encoder)
    if config.backend == "head":
        return [p.id for p in pairs], _head_scores(config, folder, encoder, trees)
    members = [folder / "members" / f"{m:02d}" / "model" for m in range(config.members)]
    scores = [
        RewardModel.load(member, precision=config.precision, device=config.device).score(
            trees, pad_id=encoder.pad_id, max_tokens=config.max_tokens
        )
        for member in members
    ]
    return [p.id for p in pairs], np.stack(scores)


def _head_scores(
    config: StrengthConfig, folder: Path, encoder: Encoder, trees: list[Tree]
) -> Float[np.ndarray, "M N 2"]:
    """The linear members of a strength, fitted again as `measure` did, and checked against what it stored."""
    preferences = load_preferences(config.data, on_invalid=config.on_invalid).preferences
    encoded = encoder.encode(preferences)
    keys = [prompt_key(preferences[i].prompt) for i in encoded.index]
    plan = held_out_plan(config, keys)
    probe = json.loads((folder / "probe.json").read_text())
    model = RewardModel.from_language_model(
        config.model, pad_id=encoder.pad_id, seed=config.seed, precision=config.precision, device=config.device
    )

    def read(some: list[Tree]) -> np.ndarray:
        # The name under which `measure` keeps them: features of the measured pairs are there already.
        key = hashlib.sha256(repr((fingerprint(config.model), probe["layers"], config.precision, some)).encode())
        path = folder.parent / f"features-{key.hexdigest()[:16]}.npy"
        sizes = {"pad_id": encoder.pad_id, "max_tokens": config.max_tokens}
        return features(model, some, probe["layers"], path, **sizes, quiet=True)

    pairs = [preferences[i] for i in encoded.index]
    probes, new = Probes(read(encoded.trees), pairs), np.asarray(read(trees))
    stored = read_scores(folder)[0]
    found = []
    for m in range(config.members):
        rows = bootstrap_rows(keys, config.seed + m) if plan is None else np.flatnonzero(~plan[m])
        weights = probes.fit(rows, probe["penalty"], config.seed + m)
        judged = np.flatnonzero(~np.isnan(stored[m, :, 0]))
        again = probes.scores(weights, judged)
        # Another number of threads may stop the fit a step apart; another data set or penalty gives other margins.
        before = stored[m, judged]
        if not np.allclose(again[:, 0] - again[:, 1], before[:, 0] - before[:, 1], rtol=0.01, atol=0.01):
            raise InputError(
                f"{folder}: its members could not be fitted again to the same scores (other data or another model "
                "behind the same names?); measure the strength anew"
            )
        found.append(new @ (weights / probes.scale))
    return np.stack(found)
